"""Activations put in at single sites: against what the zoo's policies compute by hand, and by forward hooks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torchrl.modules import MultiAgentMLP, ProbabilisticActor

from tdhook_rl import targets
from tdhook_rl.errors import InputError, MissingKeyError, SiteError
from tdhook_rl.latent import SteeringVector
from tdhook_rl.sweeps import PatchTable, patch_sites
from tests.causal_networks import NETWORKS, PAIRS, edited, states_of, zoo_states
from tests.zoo import ZOO


# By hand, these say it otherwise: a critic that judges the action of an actor before it, noise that is added, no keys.
@pytest.mark.parametrize("way", ["denoising", "noising"])
@pytest.mark.parametrize("name", sorted(ZOO.keys() - {"actor_critic", "ou_noise", "plain"}))
def test_a_patch_of_every_policy_is_what_it_computes_by_hand(name: str, way: str) -> None:
    entry = ZOO[name]
    torch.manual_seed(3)
    policy = entry.build()
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    clean, corrupt = (zoo_states(entry, policy, seed) for seed in (1, 2))
    base, source = (corrupt, clean) if way == "denoising" else (clean, corrupt)
    with torch.no_grad():
        sides = [entry.rest(policy, entry.first(policy, rows), rows) for rows in (base, source)]
        expected = entry.rest(policy, entry.first(policy, source), base)
    keys = [key for key, value in expected.items() if value.is_floating_point()]
    weights = {key: torch.randn(expected[key][0].numel(), dtype=torch.float64) for key in keys}

    def total(outputs: Any) -> Tensor:
        return torch.stack(
            [outputs[key].reshape(PAIRS, -1).double().clamp(-99, 99) @ way for key, way in weights.items()]
        ).sum(0)

    state = torch.get_rng_state()
    cell = patch_sites(policy, clean, corrupt, entry.site, metric=total, way=way)[entry.site]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in policy.state_dict().items())
    by_hand = (total(expected) - total(sides[0])) / (total(sides[1]) - total(sides[0]))
    torch.testing.assert_close(cell.shares, by_hand, rtol=1e-3, atol=1e-3)
    # The default metric of a policy says something of it too, and is about its two decisions.
    own = patch_sites(policy, clean, corrupt, entry.site, way=way)[entry.site]
    assert own.left_out < PAIRS or "no difference" in own.words


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_of_an_activation_are_put_in_as_by_forward_hooks(name: str) -> None:
    network = NETWORKS[name]
    net = network.build()
    clean, corrupt = states_of(network, 6, seed=1), states_of(network, 6, seed=2)
    with torch.no_grad():
        ends = [network.metric(net(x)) for x in (corrupt, clean)]
    draws = torch.Generator().manual_seed(0)
    for site, axis in network.sites.items():
        there, here = edited(net, site, clean)[1], edited(net, site, corrupt)[1]
        size = here.shape[axis]
        vector = torch.randn(size, generator=draws, dtype=torch.float64)
        difference = (there - here).movedim(axis, -1).reshape(-1, size)
        two = torch.linalg.svd(difference, full_matrices=False).Vh[:2]
        for options, basis in (({"direction": vector}, (vector / vector.norm())[None]), ({"rank": 2}, two)):

            def put(value: Tensor, basis: Tensor = basis, there: Tensor = there, axis: int = axis) -> Tensor:
                delta = (there - value).movedim(axis, -1)
                return value + ((delta @ basis.T) @ basis).movedim(-1, axis)

            expected = (network.metric(edited(net, site, corrupt, put)[0]) - ends[0]) / (ends[1] - ends[0])
            given = [TensorDict({"input": x}, batch_size=6) for x in (clean, corrupt)]
            found = patch_sites(
                net, *given, site, metric=lambda out: network.metric(out["output"]), controls=3, chunk_size=4,
                units=axis, **options
            )[site]  # fmt: skip
            torch.testing.assert_close(found.shares, expected, rtol=1e-8, atol=1e-8)
            assert found.at_random.shape == (3, 6)
            assert found.random is not None


def actor(*layers: nn.Module, dist: Any = Categorical, keys: tuple[str, ...] = ("scores",)) -> ProbabilisticActor:
    net = TensorDictModule(nn.Sequential(*layers), in_keys=["observation"], out_keys=list(keys))
    in_keys = {"logits": keys[0]} if dist is Categorical else list(keys)
    return ProbabilisticActor(net, in_keys=in_keys, distribution_class=dist, return_log_prob=True)


def observed(*batch: int, seed: int = 0, features: int = 3) -> TensorDict:
    value = torch.randn(*batch, features, generator=torch.Generator().manual_seed(seed))
    return TensorDict({"observation": value}, batch_size=batch)


def test_the_metric_unless_given_is_the_difference_of_logits_of_the_two_greedy_actions() -> None:
    torch.manual_seed(0)
    policy = actor(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    clean, corrupt = observed(40, seed=1), observed(40, seed=2)
    net = policy.module[0].module
    direction = torch.randn(8)
    found = patch_sites(policy, clean, corrupt, direction=SteeringVector(vector=direction, path="module.0.module.1"))
    with torch.no_grad():
        sides = [net[:2](one["observation"]) for one in (clean, corrupt)]
        unit = direction / direction.norm()
        patched = net[2](sides[1] + ((sides[0] - sides[1]) @ unit)[:, None] * unit)
        logits = [net[2](one) for one in sides]
    actions = [one.argmax(-1, keepdim=True) for one in logits]

    def difference(one: Tensor) -> Tensor:
        return (one.gather(-1, actions[0]) - one.gather(-1, actions[1])).squeeze(-1)

    start, end, reached = map(difference, (logits[1], logits[0], patched))
    expected = torch.where(actions[0].ne(actions[1]).squeeze(-1), (reached - start) / (end - start), torch.nan)
    cell = found["module.0.module.1"]
    torch.testing.assert_close(cell.shares.float(), expected, equal_nan=True, rtol=1e-3, atol=1e-4)
    same = int((actions[0] == actions[1]).sum())
    assert cell.left_out == same > 0
    assert f"{same} with no difference" in cell.words
    kept = expected[expected.isfinite()].double()
    assert cell.median.estimate == pytest.approx(float(kept.quantile(0.5)), abs=1e-4)
    assert cell.mean.estimate == pytest.approx(float(kept.mean()), abs=1e-4)
    gap = (end - start)[expected.isfinite()].double()
    assert cell.pooled == pytest.approx(float((kept * gap.abs()).sum() / gap.abs().sum()), abs=1e-4)


def test_a_policy_that_samples_is_compared_by_its_distribution() -> None:
    """Nothing is drawn, whatever the policy would do; the log-ratio of the two means, for a Gaussian of one scale."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.full_like(x, 0.5)

    torch.manual_seed(0)
    policy = actor(nn.Linear(3, 2), Scaled(), dist=Normal, keys=("loc", "scale"))
    clean, corrupt = observed(12, seed=1), observed(12, seed=2)
    state = torch.get_rng_state()
    first, second = (patch_sites(policy, clean, corrupt, "module.0.module.0", direction=torch.tensor([1.0, 0.0]))
                     for _ in range(2))  # fmt: skip
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first[0].shares, second[0].shares)
    with torch.no_grad():
        here, there = (policy.module[0].module[0](one["observation"]) for one in (corrupt, clean))
    # The log-ratio is linear in the mean: the share of the squared distance that the first component has.
    expected = (there - here)[:, 0] ** 2 / (there - here).square().sum(-1)
    torch.testing.assert_close(first[0].shares.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_targets_and_keys_are_metrics_for_agents_too(shared: bool) -> None:
    torch.manual_seed(0)
    net = MultiAgentMLP(3, 2, 2, centralized=False, share_params=shared, depth=1, num_cells=6)
    module = TensorDictModule(net, in_keys=[("agents", "seen")], out_keys=[("agents", "scores")])
    policy = ProbabilisticActor(
        module, in_keys={"logits": ("agents", "scores")}, out_keys=[("agents", "action")],
        distribution_class=Categorical, return_log_prob=True, log_prob_key=("agents", "log_prob"),
    )  # fmt: skip
    draws = torch.Generator().manual_seed(1)
    clean, corrupt = (
        TensorDict({"agents": {"seen": torch.randn(9, 2, 3, generator=draws)}}, batch_size=9) for _ in range(2)
    )
    layers = [path for path, one in policy.named_modules() if isinstance(one, nn.Tanh)]
    for metric in (
        None, targets.taken_action_log_prob(), targets.logit(1, ("agents", "scores")), ("agents", "scores"),
        lambda out: out["agents", "scores"][..., 0],
    ):  # fmt: skip
        table = patch_sites(policy, clean, corrupt, layers, metric=metric)
        torch.testing.assert_close(table[0].pooled, 1.0)
    stored = clean.clone().set(("agents", "action"), torch.zeros(9, 2, dtype=torch.long))
    chosen = patch_sites(policy, stored, corrupt, layers, metric=targets.taken_action_log_prob(), rank=1)
    by_hand = patch_sites(
        policy, clean, corrupt, layers, rank=1,
        metric=lambda out: out["agents", "scores"].log_softmax(-1)[..., 0],
    )  # fmt: skip
    torch.testing.assert_close(chosen[0].shares, by_hand[0].shares, rtol=1e-4, atol=1e-4)


def linear_states(count: int) -> tuple[TensorDict, TensorDict]:
    return observed(count, seed=1), observed(count, seed=2)


def value_net() -> nn.Module:
    torch.manual_seed(0)
    return TensorDictModule(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), ["observation"], ["state_value"]
    )


def test_groups_are_what_intervals_rest_on() -> None:
    clean, corrupt = linear_states(30)
    groups = torch.arange(30) // 10
    options: dict[str, Any] = {"direction": torch.ones(4)}
    by_state = patch_sites(value_net(), clean, corrupt, "module.0", **options)[0]
    by_key = patch_sites(value_net(), clean.set("episode", groups), corrupt, "module.0", groups="episode", **options)[0]
    given = patch_sites(value_net(), clean, corrupt, "module.0", groups=groups, **options)[0]
    assert (by_state.mean.groups, by_key.mean.groups, given.mean.groups) == (30, 3, 3)
    assert str(by_key.mean) == str(given.mean)
    assert by_key.mean.estimate == pytest.approx(by_state.mean.estimate)
    whole = patch_sites(value_net(), clean.reshape(5, 6), corrupt.reshape(5, 6), "module.0", **options)[0]
    assert torch.equal(whole.shares, by_state.shares)


def test_checkpoints_are_compared_on_a_copy() -> None:
    clean, corrupt = linear_states(12)
    net, other = value_net(), value_net()
    nn.init.zeros_(other.module[0].weight)
    table = patch_sites(
        net, clean, corrupt, ["module.0", "module.1"], checkpoints={"now": net, "flat": other.state_dict()}
    )
    assert [cell.checkpoint for cell in table] == ["now", "now", "flat", "flat"]
    assert table["now", "module.1", "all"].mean.estimate == 1
    assert table["flat", "module.1", "all"].left_out == 12
    assert math.isnan(table["flat", "module.1", "all"].mean.estimate)
    assert torch.equal(net.module[0].weight, value_net().module[0].weight)


def test_a_table_is_read_as_text_as_numbers_and_in_a_notebook() -> None:
    table = patch_sites(value_net(), *linear_states(12), ["module.0", "module.1"], rank=1, controls=4)
    assert isinstance(table, PatchTable)
    text = str(table)
    assert text.startswith("denoising: runs on corrupt states")
    assert "module.1" in text
    assert "random directions" in text
    frame = table.frame()
    assert list(frame["site"]) == ["module.0", "module.1"]
    assert frame["p"].between(0.2, 1).all()  # of four random directions it is one of five at best
    assert "<table>" in table._repr_html_()
    assert '"site": "module.0"' in table.json()
    with pytest.raises(InputError, match=r"no patch 'module.2'.*module.1"):
        table["module.2"]


# ---------------------------------------------------------------------- nothing to recover, and bad input


def test_identical_states_have_nothing_to_recover_and_are_counted() -> None:
    clean, corrupt = linear_states(12)
    corrupt["observation"][:5] = clean["observation"][:5]
    cell = patch_sites(value_net(), clean, corrupt, "module.0", direction=torch.ones(4))[0]
    assert cell.left_out == 5
    assert cell.shares[:5].isnan().all()
    assert cell.mean.rows == 7
    for options in ({}, {"rank": 2}, {"direction": torch.ones(4)}):
        same = patch_sites(value_net(), clean, clean, "module.0", **options)[0]
        assert same.left_out == 12
        assert math.isnan(same.mean.estimate)
        assert "no state is left" in same.words


def test_states_with_nan_are_left_out_and_one_state_has_no_interval() -> None:
    clean, corrupt = linear_states(12)
    expected = patch_sites(value_net(), clean[1:], corrupt[1:], "module.0", rank=1)[0]
    clean["observation"][0, 1] = torch.nan
    cell = patch_sites(value_net(), clean, corrupt, "module.0", rank=1)[0]
    assert cell.left_out == 1
    torch.testing.assert_close(cell.shares[1:], expected.shares)
    for one in (linear_states(1), [side[0] for side in linear_states(1)]):
        alone = patch_sites(value_net(), *one, "module.0")[0]
        assert alone.mean.estimate == 1
        assert not alone.mean.known
        assert "one group only" in alone.words


def fewer(clean: TensorDict, corrupt: TensorDict) -> Any:
    return patch_sites(value_net(), clean, corrupt[:3], "module.0")


WRONG: dict[str, tuple[Callable[[TensorDict, TensorDict], Any], type[Exception], str]] = {
    "other batch": (fewer, InputError, r"pair up row by row.*\(6,\) and \(3,\)"),
    "other features": (
        lambda a, b: patch_sites(value_net(), a, TensorDict({"observation": torch.zeros(6, 2)}, 6), "module.0"),
        InputError, r"shapes \(6, 3\) and \(6, 2\)",
    ),
    "no key": (
        lambda a, b: patch_sites(value_net(), a, b.exclude("observation"), "module.0"), MissingKeyError, "policy reads",
    ),
    "no states": (lambda a, b: patch_sites(value_net(), a[:0], b[:0], "module.0"), InputError, "no states"),
    "all NaN": (lambda a, b: patch_sites(value_net(), a * torch.nan, b, "module.0"), InputError, "none of the 6 pairs"),
    "no site": (lambda a, b: patch_sites(value_net(), a, b, "module.7"), SiteError, "no submodule"),
    "nothing named": (lambda a, b: patch_sites(value_net(), a, b), InputError, "sites= names the modules"),
    "a longer direction": (
        lambda a, b: patch_sites(value_net(), a, b, "module.0", direction=torch.ones(5)), InputError,
        r"direction for 'module.0' has shape \(5,\)",
    ),
    "a zero direction": (
        lambda a, b: patch_sites(value_net(), a, b, "module.0", direction=torch.zeros(4)), InputError, "not zero",
    ),
    "a direction for another site": (
        lambda a, b: patch_sites(value_net(), a, b, "module.0", direction={"module.1": torch.ones(4)}), SiteError,
        "is for 'module.1', which is not patched",
    ),
    "two parts": (
        lambda a, b: patch_sites(value_net(), a, b, "module.0", direction=torch.ones(4), rank=1), InputError, "one of",
    ),
    "no rank": (lambda a, b: patch_sites(value_net(), a, b, "module.0", rank=0), InputError, "rank= is"),
    "no way": (lambda a, b: patch_sites(value_net(), a, b, "module.0", way="denoise"), Exception, "denoising"),
    "other groups": (
        lambda a, b: patch_sites(value_net(), a, b, "module.0", groups=torch.zeros(4)), InputError, "a group for each",
    ),
    "a metric of the batch": (
        lambda a, b: patch_sites(value_net(), a, b, "module.0", metric=lambda out: out["state_value"].mean()),
        InputError, "a number for each of 6 states",
    ),
    "no checkpoints": (
        lambda a, b: patch_sites(value_net(), a, b, "module.0", checkpoints={}), InputError, "there are none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_in_words(name: str) -> None:
    call, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        call(*linear_states(6))


class Sometimes(nn.Module):
    """Has a branch that no state takes, and a module that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last, self.never = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.first(x))
        if x.abs().max() > 1e9:
            hidden = self.never(hidden)
        return self.last(self.act(2 * hidden))


def test_a_site_that_does_not_run_is_refused_and_runs_are_told_apart() -> None:
    torch.manual_seed(0)
    net = Sometimes().double()
    clean, corrupt = (TensorDict({"input": one["observation"].double()}, 12) for one in linear_states(12))
    with pytest.raises(SiteError, match="'never' did not run"):
        patch_sites(net, clean, corrupt, "never")
    with pytest.raises(SiteError, match="which run is meant was not said"):
        patch_sites(net, clean, corrupt, "act")
    unit = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)

    def by_hand(first: bool, second: bool) -> Tensor:
        there, here = clean["input"], corrupt["input"]

        def run(x: Tensor, other: Tensor, first: bool, second: bool) -> Tensor:
            own, given = (torch.tanh(net.first(one)) for one in (x, other))
            own = own + (given - own) * unit * first
            last, given = torch.tanh(2 * own), torch.tanh(2 * given)
            return net.last(last + (given - last) * unit * second).squeeze(-1)

        start, end = run(here, here, False, False), run(there, there, False, False)
        return (run(here, there, first, second) - start) / (end - start)

    for site, runs in {"act@0": (1, 0), "act@1": (0, 1), "act@-1": (0, 1), "act@-2": (1, 0), "act@all": (1, 1)}.items():
        cell = patch_sites(net, clean, corrupt, site, direction=unit)[site]
        torch.testing.assert_close(cell.shares, by_hand(*map(bool, runs)).detach(), rtol=1e-9, atol=1e-9)


def test_the_policy_stays_as_it_was_also_in_training_mode() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    before = copy.deepcopy(net.state_dict())
    clean, corrupt = (TensorDict({"input": one["observation"]}, 12) for one in linear_states(12))
    table = patch_sites(net, clean, corrupt, ["1", "2"])
    assert net.training
    assert net[1].training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net[1]._forward_hooks
    assert [cell.mean.estimate for cell in table] == [1, 1]
    assert not any(value.requires_grad and value.grad is not None for value in net.parameters())

"""Units put in one at a time, and what one backward pass says they would do: against forward hooks in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import targets
from tdhook_rl.errors import InputError, SiteError, TargetError
from tdhook_rl.sweeps import attribution_patching, patch_paths, patch_sites, patch_units
from tests.causal_networks import NETWORKS, edited, states_of, zoo_states
from tests.zoo import ZOO

PAIRS = 5


def given(name: str) -> tuple[Any, nn.Module, list[Tensor], list[TensorDict]]:
    network = NETWORKS[name]
    states = [states_of(network, PAIRS, seed) for seed in (1, 2)]
    return network, network.build(), states, [TensorDict({"input": one}, PAIRS) for one in states]


def along(axis: int, value: Tensor, units: list[int]) -> Tensor:
    """Where the units are, in the shape of an activation."""
    mask = torch.zeros(value.shape[axis], dtype=torch.bool)
    mask[units] = True
    shape = [1] * value.ndim
    shape[axis] = len(mask)
    return mask.reshape(shape)


@pytest.mark.parametrize("way", ["denoising", "noising"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_unit_of_every_site_is_patched_as_by_a_hook_of_its_own(name: str, way: str) -> None:
    network, net, (clean, corrupt), data = given(name)
    base, source = (corrupt, clean) if way == "denoising" else (clean, corrupt)
    options: dict[str, Any] = {"metric": lambda out: network.metric(out["output"]), "way": way, "chunk_size": 13}
    table = patch_units(net, *data, list(network.sites), units=network.sites, **options)
    parts = {site: 2 for site in network.sites if table.components.parts[site] % 2 == 0}
    halves = patch_units(net, *data, list(network.sites), units=network.sites, parts=parts, **options)
    estimates = attribution_patching(net, *data, list(network.sites), units=network.sites, compare=3, **options)
    with torch.no_grad():
        start, end = network.metric(net(base)), network.metric(net(source))
    sign, size = torch.sign(end - start), (end - start).abs().sum()
    place = 0
    for site, axis in network.sites.items():
        there = edited(net, site, source)[1]
        for unit in range(there.shape[axis]):
            mask = along(axis, there, [unit])
            reached = network.metric(edited(net, site, base, lambda v, m=mask, t=there: torch.where(m, t, v))[0])
            torch.testing.assert_close(table.changes[place], reached - start, rtol=1e-9, atol=1e-12)
            share = float(((reached - start) * sign).sum() / size)
            assert table[site, unit].share == pytest.approx(share, rel=1e-6, abs=1e-12)
            place += 1
        if site in parts:
            mask = along(axis, there, list(range(there.shape[axis] // 2, there.shape[axis])))
            reached = network.metric(edited(net, site, base, lambda v, m=mask, t=there: torch.where(m, t, v))[0])
            share = float(((reached - start) * sign).sum() / size)
            assert halves[site, 1].share == pytest.approx(share, rel=1e-6, abs=1e-12)
        # By hand: the gradient at the site in the run that is patched, times the difference there.
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, output: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(output.detach().clone().requires_grad_())
            return seen[0].clone()  # what follows may work on it in place

        handle = net.get_submodule(site).register_forward_hook(keep)
        (slope,) = torch.autograd.grad(network.metric(net(base)).sum(), seen)
        handle.remove()
        others = [dim for dim in range(1, slope.ndim) if dim != axis % slope.ndim]
        product = slope * (there - seen[0].detach())
        expected = product.sum(others) if others else product
        first = [place for place, (name, _) in enumerate(estimates.components.names) if name == site]
        torch.testing.assert_close(estimates.estimates[first].T, expected, rtol=1e-9, atol=1e-12)
    assert table.agreement is None
    assert estimates.agreement.measured == 3
    assert int(estimates.changes.isfinite().all(-1).sum()) == 3


def test_estimates_are_exact_where_the_network_is_linear() -> None:
    """Convolutions, agents, residuals and runs that are repeated: what is put in at one place adds up."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mix, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(4, 4), nn.Linear(48, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.conv(x)
            return self.head((hidden + self.mix(hidden) - self.mix(hidden.flip(-1))).flatten(-3))

    torch.manual_seed(0)
    net = Linear().double()
    clean, corrupt = (TensorDict({"input": torch.randn(7, 2, 4, 4, dtype=torch.float64)}, 7) for _ in range(2))
    sites = ["conv", "mix@0", "mix@1", "mix@all"]
    table = attribution_patching(net, clean, corrupt, sites, metric="output", compare="all")
    torch.testing.assert_close(table.estimates, table.changes, rtol=1e-9, atol=1e-12)
    assert table.agreement.correlation == pytest.approx(1.0)
    assert table.agreement.error < 1e-6
    assert table.agreement.largest < 1e-6
    # The runs together do what they do by themselves, and the convolution does it all.
    torch.testing.assert_close(table.grid("mix@all"), table.grid("mix@0") + table.grid("mix@1"))
    assert float(table.grid("conv").sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["actor_value", "gru", "lstm", "agents_shared", "agents_separate", "agents_q"])
def test_estimates_are_exact_in_policies_that_are_linear_behind_the_site(name: str) -> None:
    """Recurrent steps and agents in a vmap: the units of all agents together; one by one they add up to the patch."""
    entry = ZOO[name]
    torch.manual_seed(3)
    policy = entry.build()
    clean, corrupt = (zoo_states(entry, policy, seed) for seed in (1, 2))
    logits = next(key for key in entry.rest(policy, entry.first(policy, clean), clean))
    metric = {"metric": lambda outputs: outputs[logits].flatten(1) @ torch.arange(outputs[logits][0].numel()).float()}
    table = attribution_patching(policy, clean, corrupt, entry.site, compare="all", **metric)
    torch.testing.assert_close(table.estimates, table.changes, rtol=1e-4, atol=1e-5)
    whole = patch_sites(policy, clean, corrupt, entry.site, **metric)[entry.site]
    torch.testing.assert_close(table.changes.sum(0), table.gap.source - table.gap.base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.pooled, float(table.grid(entry.site).sum()), rtol=1e-3, atol=1e-4)


def test_how_far_estimates_are_off_is_measured() -> None:
    network, net, _, data = given("mlp")
    metric = {"metric": lambda out: network.metric(out["output"])}
    table = attribution_patching(net, *data, ["0", "1"], compare="all", **metric)
    estimated, measured = (
        torch.tensor([getattr(cell, name).estimate for cell in table]) for name in ("estimated", "measured")
    )
    assert table.agreement.error == pytest.approx(float((estimated - measured).abs().mean() / measured.abs().mean()))
    assert table.agreement.correlation == pytest.approx(float(torch.corrcoef(torch.stack([estimated, measured]))[0, 1]))
    assert table.agreement.error > 0.01  # a network of tanh is not linear
    assert f"patching {len(table)} of {len(table)}" in str(table)
    assert [abs(cell.share) for cell in table] == sorted((abs(cell.share) for cell in table), reverse=True)
    none = attribution_patching(net, *data, ["0", "1"], compare=0, **metric)
    assert none.agreement is None
    assert none[0].measured is None
    assert list(none.frame()["estimated"]) == [cell.estimated.estimate for cell in none]
    largest = attribution_patching(net, *data, ["0", "1"], compare=2, **metric)
    assert largest[none[0].site, none[0].unit].measured is not None


def test_intervals_of_units_cover_and_narrow_with_more_groups() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    many = [TensorDict({"input": torch.randn(4000, 3, dtype=torch.float64)}, 4000) for _ in range(2)]
    truth = patch_units(net, *many, "1", metric="output").grid("1")
    hits, widths = 0, []
    for start in range(0, 4000, 100):
        some = [one[start : start + 100] for one in many]
        table = patch_units(net, *some, "1", metric="output")
        hits += sum(float(truth[cell.unit]) in cell.measured for cell in table)
        widths.append(table[0].measured.half_width)
    assert 0.85 < hits / 200 < 1
    grouped = patch_units(net, *[one[:100] for one in many], "1", metric="output", groups=torch.arange(100) // 20)
    assert grouped[0].measured.groups == 5
    assert widths[0] > patch_units(net, *many, "1", metric="output")[0].measured.half_width * 3


def value_net() -> TensorDictModule:
    torch.manual_seed(0)
    return TensorDictModule(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), ["observation"], ["state_value"]
    )


def pair(count: int = 6) -> list[TensorDict]:
    torch.manual_seed(5)
    return [TensorDict({"observation": torch.randn(count, 3)}, count) for _ in range(2)]


class Cut(nn.Module):
    """One branch is detached, one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.off, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.on(x) + self.off(x).detach().round())


def test_sites_that_no_gradient_reaches_are_said() -> None:
    torch.manual_seed(0)
    net = TensorDictModule(Cut(), ["observation"], ["state_value"])
    table = attribution_patching(net, *pair(), ["module.on", "module.off"], compare="all")
    assert "no gradient reaches 'module.off'" in str(table)
    assert float(patch_units(net, *pair(), "module.off").grid("module.off").abs().max()) > 0
    with pytest.raises(TargetError, match=r"no gradient reaches 'module.off'.*patch_units measures"):
        attribution_patching(net, *pair(), "module.off")


def test_nothing_of_the_policy_is_left_changed() -> None:
    net = value_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    data = pair()
    state = torch.get_rng_state()
    with torch.inference_mode():
        inside = attribution_patching(net, *data, "module.1")
    with torch.no_grad():
        outside = attribution_patching(net, *data, "module.1", metric=targets.state_value())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(inside.estimates, outside.estimates)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(one.grad is None for one in net.parameters())
    assert not any(one._forward_hooks for one in net.modules())


def test_wrong_units_are_refused_in_words() -> None:
    net = value_net()
    for options, error, words in (
        ({"parts": {"module.1": 3}}, InputError, "divides the 4 units of 'module.1' into 3"),
        ({"parts": {"module.0": 2}}, SiteError, "is for 'module.0', which is not looked at"),
        ({"compare": -1}, InputError, "compare= is"),
        ({"compare": "most"}, Exception, "all"),
        ({"units": 5}, InputError, "axis 5"),
        ({"way": "both"}, Exception, "denoising"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            attribution_patching(net, *pair(), "module.1", **options)
    with pytest.raises(InputError, match="has no units"):
        patch_units(
            nn.Sequential(nn.Linear(3, 4), nn.Flatten(0), nn.Unflatten(0, (-1, 4)), nn.Linear(4, 0)),
            *[TensorDict({"input": one["observation"]}, 6) for one in pair()],
            "3",
            metric=lambda out: out["input"][:, 0],
        )
    with pytest.raises(InputError, match="no component"):
        patch_units(net, *pair(), "module.1")["module.1", 9]


# ---------------------------------------------------------------------- paths


class Paths(nn.Module):
    """A sender, two ways from it, and one past it."""

    def __init__(self) -> None:
        super().__init__()
        self.sender, self.one, self.other, self.head = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        sent = self.sender(x).tanh()
        one = self.one(sent).tanh()
        other = self.other(sent + one).tanh()
        return (self.head(one + other + sent) + x).sin().sum(-1, keepdim=True)


def test_a_path_is_what_goes_through_the_receiver_alone() -> None:
    torch.manual_seed(0)
    net = Paths().double()
    clean, corrupt = (torch.randn(8, 3, dtype=torch.float64) for _ in range(2))
    data = [TensorDict({"input": one}, 8) for one in (clean, corrupt)]
    held = patch_paths(net, *data, "sender", ["one", "other"], held=[], metric="output")
    direct = patch_paths(net, *data, "sender", "other", held="one", metric="output")
    with torch.no_grad():
        sent, one = edited(net, "sender", corrupt)[1], edited(net, "one", clean)[1]
        start, end = (net(x).squeeze(-1) for x in (clean, corrupt))

        def through(receiver: str, value: Tensor) -> Tensor:
            return (edited(net, receiver, clean, lambda _: value)[0].squeeze(-1) - start) / (end - start)

        first = net.one(sent.tanh())
        both = net.other(sent.tanh() + first.tanh())
        torch.testing.assert_close(held["sender -> one"].shares, through("one", first))
        torch.testing.assert_close(held["sender -> other"].shares, through("other", both))
        alone = net.other(sent.tanh() + one.tanh())
        torch.testing.assert_close(direct["sender -> other"].shares, through("other", alone))
    back = patch_paths(net, *data, "other", "sender", metric="output", way="denoising")
    assert back[0].mean.estimate == 0
    assert "does not change with the sender" in back[0].words
    with pytest.raises(InputError, match="'one' is held, and it is a sender or receiver"):
        patch_paths(net, *data, "one", "other", held="one", metric="output")
    with pytest.raises(InputError, match="is sender and receiver"):
        patch_paths(net, *data, "one", "one", metric="output")

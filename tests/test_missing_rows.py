"""Modules that run in some calls, on some rows, or on one step at a time."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.modules import (
    MultiStepActorWrapper,
    RSSMPosterior,
    RSSMPosteriorV3,
    RSSMPrior,
    RSSMPriorV3,
    RSSMRollout,
    RSSMRolloutV3,
)

from tdhook_rl import ActivationCaching, Compose, LinearProbe, Saliency, SteeringVectors
from tdhook_rl.attribution import GuidedBackpropagation, IntegratedGradients
from tdhook_rl.errors import InputError, SiteError, TdhookError
from tdhook_rl.latent import ProbeGate


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found, rows = torch.zeros(*x.shape[:-1], 3), x[..., 0] > 0
        if rows.any():
            found[rows] = self.left(x[rows])
        if (~rows).any():
            found[~rows] = self.right(x[~rows])
        return found


@pytest.mark.parametrize("batch", [(8,), (3, 4)])
def test_rows_that_an_expert_has_not_seen_are_none(batch: tuple[int, ...]) -> None:
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Experts()), torch.randn(*batch, 4)
    path = "2.left"
    method = Compose(ActivationCaching(path, missing="nan"), Saliency(input_modules=[path], missing="nan"))
    with method.prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch))
        again = hooked.annotate(found.select("input", "output"))
    hidden = net[:2](x)
    rows = hidden[..., 0] > 0
    for one in (found, again):
        for root in ("cache", "attr"):
            assert torch.equal(one["computed", root], rows)
            assert torch.equal(one[root, path].isnan().any(-1), ~rows)
        torch.testing.assert_close(one["cache", path][rows], net[2].left(hidden[rows]))
        assert (one["attr", path][rows] == 1).all()


@pytest.mark.parametrize("baseline", [0.0, 1.0])
def test_a_path_between_rows_of_an_expert_is_refused_in_words(baseline: float) -> None:
    net, x = Experts(), torch.randn(8, 6)
    x[:, 0] = torch.tensor([-1.0, 1.0]).repeat(4)
    method = IntegratedGradients(input_modules=["left"], missing="nan", baseline=baseline)
    with (
        method.prepare(net) as hooked,
        pytest.raises((SiteError, InputError), match=r"'left'.*missing='nan'.*Saliency"),
    ):
        hooked.annotate(TensorDict({"input": x}, [8]))


class Alone(nn.Module):
    """One expert, for some rows or for some calls, before a ReLU."""

    def __init__(self, by_row: bool) -> None:
        super().__init__()
        self.by_row, self.left, self.last = by_row, nn.Linear(6, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        rows = x[..., 0] > 0
        found, rows = x[..., :3], rows if self.by_row else rows & False
        return self.last(found.masked_scatter(rows[..., None], self.left(x[rows])) if rows.any() else found)


OFFERED = {
    "caching": lambda **more: ActivationCaching("left", **more),
    "saliency": lambda **more: Saliency(input_modules=["left"], **more),
    "saliency in a step": lambda **more: Saliency(input_modules=["left"], when="step", **more),
    "of trajectories": lambda **more: Saliency(input_modules=["left"], horizon="trajectory", **more),
    "guided": lambda **more: GuidedBackpropagation(input_modules=["left"], **more),
    "path": lambda **more: IntegratedGradients(input_modules=["left"], baseline=1.0, **more),
}


@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "calls"])
@pytest.mark.parametrize("batch", [(8,), (3, 4)])
@pytest.mark.parametrize("name", OFFERED)
def test_where_rows_lack_a_value_the_remedy_is_named(name: str, batch: tuple[int, ...], by_row: bool) -> None:
    x = torch.randn(*batch, 6)
    x[..., 0] = torch.tensor([-1.0, 1.0]).repeat(math.prod(batch) // 2).reshape(batch)
    data = TensorDict({"input": x}, batch)
    with OFFERED[name]().prepare(Alone(by_row)) as hooked, pytest.raises(TdhookError) as error:
        hooked.annotate(data)
    assert "missing='nan'" in str(error.value)
    method = Saliency(input_modules=["left"], missing="nan") if name == "path" else OFFERED[name](missing="nan")
    with method.prepare(Alone(by_row)) as hooked:
        found = hooked.annotate(data)
        masks = [found["computed", key[0]] for key in hooked.result_keys if key[-1] == "left"]
    assert masks
    for mask in masks:
        assert torch.equal(mask, (x[..., 0] > 0) & by_row)


def test_where_rows_are_not_lacking_no_remedy_of_theirs_is_named() -> None:
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), nn.Linear(3, 4), nn.Unflatten(0, (-1, 2))
    )
    for method in (ActivationCaching("3"), Saliency(input_modules=["3"])):
        with method.prepare(net) as hooked, pytest.raises(InputError, match="a row for each row") as error:
            hooked.annotate(TensorDict({"input": torch.randn(5, 4)}, [5]))
        assert "missing=" not in str(error.value)


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.mean() > 0 else self.right(x)


def test_calls_without_a_module() -> None:
    method = Compose(ActivationCaching("left", missing="nan"), Saliency(input_modules=["left"], missing="nan"))
    with method.prepare(Either()) as hooked:
        for value in (-1.0, 1.0):
            found = hooked(TensorDict({"input": torch.full((2, 4), value)}, [2]))
            assert bool(found["computed", "cache"].all()) is (value > 0)
            assert bool(found["computed", "attr"].all()) is (value > 0)
            assert found["cache", "left"].shape == (2, 3)
    with ActivationCaching("left").prepare(Either()) as hooked, pytest.raises(SiteError, match="did not run"):
        hooked(TensorDict({"input": torch.full((2, 4), -1.0)}, [2]))
    with pytest.raises(InputError, match="missing="):
        ActivationCaching("left", missing="zero")  # type: ignore[arg-type]


def test_chunks_of_actions_as_they_are_played() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Unflatten(-1, (3, 2)))
    policy = MultiStepActorWrapper(TensorDictModule(net, ["seen"], ["action"]), n_steps=3)
    method = Compose(ActivationCaching("actor.module.1", missing="nan"), Saliency(when="step"))
    kept = TensorDict({}, [3])
    with method.prepare(policy) as hooked:
        for step in range(5):
            first = torch.tensor([[step == 0], [step == 0], [step in (0, 2)]])
            data = hooked(kept.clone().update({"seen": torch.randn(3, 5), "is_init": first}))
            rows = data["counter"].squeeze(-1) == 1
            for root in ("cache", "attr"):
                assert torch.equal(data["computed", root], rows)
            assert torch.equal(data["attr", "seen"].isnan().any(-1), ~rows)
            kept = data.select("counter", "action_orig")


class Rollout(TensorDictModuleBase):
    in_keys, out_keys = ["x"], ["y"]

    def __init__(self) -> None:
        super().__init__()
        self.cell = TensorDictModule(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), ["x"], ["y"])

    def forward(self, tensordict: TensorDict) -> TensorDict:
        steps = [self.cell(step) for step in tensordict.unbind(-1)]
        return tensordict.update(torch.stack(steps, -1))


@pytest.mark.parametrize("steps", [3, 5])  # as many as units
def test_a_rollout_shows_its_steps(steps: int) -> None:
    policy, path = Rollout(), "cell.module.0"
    data = TensorDict({"x": torch.randn(4, steps, 5)}, [4, steps])
    with ActivationCaching(path).prepare(policy) as hooked:
        found = hooked(data.clone())["cache", path]
    torch.testing.assert_close(found, policy.cell.module[0](data["x"]))
    with Saliency(input_modules=[path]).prepare(policy) as hooked, pytest.raises(InputError, match="one step"):
        hooked(data.clone())


# ---------------------------------------------------------------------- one step at a time

WIDTH, CHOICES = 4, 6


def walk_of_gaussians() -> RSSMRollout:
    prior = RSSMPrior(Unbounded((2,)), WIDTH, WIDTH, CHOICES, action_dim=2)
    posterior = RSSMPosterior(5, CHOICES, rnn_hidden_dim=WIDTH, obs_embed_dim=3)
    return _walk(RSSMRollout, prior, posterior, ["prior_mean", "prior_std"], ["posterior_mean", "posterior_std"])


def walk_of_choices(kind: str) -> RSSMRolloutV3:
    sizes = {"num_categoricals": 2, "num_classes": 3, "rnn_hidden_dim": WIDTH}
    prior = RSSMPriorV3(action_shape=(2,), action_dim=2, hidden_dim=6, recurrent_model=kind, num_blocks=2, **sizes)
    return _walk(
        RSSMRolloutV3, prior, RSSMPosteriorV3(6, obs_embed_dim=3, **sizes), ["prior_logits"], ["posterior_logits"]
    )


def _walk(kind: Any, prior: nn.Module, posterior: nn.Module, first: list[str], then: list[str]) -> Any:
    seen = [("next", "belief"), ("next", "encoded_latents")]
    parts = [("next", name) for name in (*first, "state", "belief")], [("next", name) for name in (*then, "state")]
    return kind(
        TensorDictModule(prior, ["state", "belief", "action"], parts[0]), TensorDictModule(posterior, seen, parts[1])
    )


WALKS: dict[str, Callable[[], nn.Module]] = {
    "gaussians": walk_of_gaussians,
    "choices": lambda: walk_of_choices("gru"),
    "choices by blocks": lambda: walk_of_choices("block_gru"),
}


def of_steps(steps: int) -> TensorDict:
    sizes = {"state": CHOICES, "belief": WIDTH, "action": 2, ("next", "encoded_latents"): 3, "strength": 1}
    data = {key: torch.randn(3, steps, size) for key, size in sizes.items()}
    return TensorDict({}, [3, steps]).update({**data, "strength": data["strength"].squeeze(-1)})


@pytest.mark.parametrize("steps", [1, 3, WIDTH])  # as many as features among them
@pytest.mark.parametrize("name", WALKS)
def test_world_models_that_walk_through_time_show_and_change_every_step(name: str, steps: int) -> None:
    policy, data, site = WALKS[name](), of_steps(steps), "rssm_prior.module.rnn"
    vector, runs = torch.randn(WIDTH), []

    def ran(alpha: Any) -> tuple[TensorDict, Tensor]:
        runs.clear()

        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            strength = alpha if isinstance(alpha, float) else alpha[:, len(runs), None]
            runs.append(output if isinstance(alpha, float) and not alpha else output + strength * vector)
            return runs[-1]

        handle = policy.get_submodule(site).register_forward_hook(hook)
        torch.manual_seed(0)
        found = policy(data.clone())
        handle.remove()
        return found, torch.stack(runs, 1)

    for alpha in (0.0, 1.5):
        expected, cached = ran(alpha)
        with Compose(SteeringVectors({site: vector}, alpha=alpha), ActivationCaching(site)).prepare(policy) as hooked:
            torch.manual_seed(0)
            found = hooked(data.clone())
        assert (found.select(*policy.out_keys) == expected.select(*policy.out_keys)).all()
        assert torch.equal(found["cache", site], cached)
    with ActivationCaching(site, missing="nan").prepare(policy) as hooked, pytest.raises(InputError, match="one step"):
        hooked(data.clone())
    with SteeringVectors({site: vector}, alpha="strength").prepare(policy) as hooked:
        if name != "gaussians" and steps > 1:  # tensors of one step do not say of which
            with pytest.raises(InputError, match="is handed tensors of one step at a time"):
                hooked(data.clone())
            return
        torch.manual_seed(0)
        found = hooked(data.clone())
    expected, _ = ran(data["strength"])
    assert (found.select(*policy.out_keys) == expected.select(*policy.out_keys)).all()


@pytest.mark.parametrize("steps", [3, WIDTH])  # as many as rows, and as features
@pytest.mark.parametrize("name", WALKS)
def test_gates_of_steps_say_where_they_were_open(name: str, steps: int) -> None:
    policy, data, site = WALKS[name](), of_steps(steps), "rssm_prior.module.rnn"
    probe = LinearProbe(weight=torch.randn(2, WIDTH), bias=torch.zeros(2), path=site)
    runs: list[Tensor] = []
    policy.get_submodule(site).register_forward_hook(lambda _, args, output: runs.append(output))
    gated = SteeringVectors({site: torch.zeros(WIDTH)}, alpha=1.0, when=ProbeGate(probe, above=0.5))
    with gated.prepare(policy) as hooked:
        torch.manual_seed(0)
        found = hooked(data.clone())
    runs.clear()
    torch.manual_seed(0)
    policy(data.clone())
    read = torch.stack(runs, 1) @ probe.weight.T
    assert torch.equal(found["steered", "steering"], read.softmax(-1)[..., 1] > 0.5)


class Loop(nn.Module):
    """A cell that is called with each step of a batch, as scripts write it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), WIDTH)
        found = []
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
            found.append(hidden)
        return torch.stack(found, 1)


@pytest.mark.parametrize("steps", [3, WIDTH])
def test_the_last_step_of_a_loop_is_not_taken_for_rows(steps: int) -> None:
    net, x = Loop(), torch.randn(5, steps, 2)
    with ActivationCaching("cell").prepare(net) as hooked, pytest.raises(InputError, match="'cell@all'"):
        hooked(TensorDict({"input": x}, [5, steps]))
    with ActivationCaching("cell@all").prepare(net) as hooked:
        assert torch.equal(hooked(TensorDict({"input": x}, [5]))["cache", "cell@all"], net(x))


# ---------------------------------------------------------------------- strengths of rows that a policy hands on


class TwoExperts(TensorDictModuleBase):
    """Two networks, each of which is called with the rows that are its own; as many of one as of the other."""

    in_keys, out_keys = ["seen"], ["action"]

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (TensorDictModule(nn.Linear(5, WIDTH), ["seen"], ["part"]) for _ in range(2))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        rows = tensordict["seen"][..., 1] > 0
        found = torch.zeros(*tensordict.shape, WIDTH)
        for mask, one in ((rows, self.left), (~rows, self.right)):
            found = found.masked_scatter(mask[..., None], one(tensordict[mask])["part"])
        return tensordict.set("action", found)


def chunks() -> tuple[nn.Module, list[str], TensorDict, str, str]:
    net = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 6), nn.Unflatten(-1, (3, 2)))
    policy = MultiStepActorWrapper(TensorDictModule(net, ["seen"], ["action"]), n_steps=3)
    data = TensorDict({"seen": torch.randn(6, 5), "is_init": torch.ones(6, 1, dtype=torch.bool)}, [6])
    data = policy(data).detach().exclude("action").set("seen", torch.randn(6, 5))
    return policy, ["actor.module.0"], data.set("is_init", torch.arange(6)[:, None] % 2 == 0), "seen", "action"


def experts() -> tuple[nn.Module, list[str], TensorDict, str, str]:
    seen = torch.randn(6, 5)
    seen[:, 1] = torch.tensor([1.0, -1.0]).repeat(3)
    return TwoExperts(), ["left.module", "right.module"], TensorDict({"seen": seen}, [6]), "seen", "action"


def walk() -> tuple[nn.Module, list[str], TensorDict, str, str]:
    return walk_of_gaussians(), ["rssm_prior.module.rnn"], of_steps(WIDTH), "belief", ("next", "belief")


@pytest.mark.parametrize("build", [chunks, experts, walk])
@pytest.mark.parametrize("what", ["alpha", "when"])
def test_functions_of_rows_are_asked_of_the_rows_that_are_handed_on(build: Callable[[], Any], what: str) -> None:
    policy, sites, data, key, out = build()
    vector = torch.randn(WIDTH)

    def strength(rows: TensorDictBase) -> Tensor:
        return rows[key][..., 0] if what == "alpha" else rows[key][..., 0] > 0

    options = {what: strength, "alpha": strength if what == "alpha" else 1.0}
    steering = SteeringVectors(dict.fromkeys(sites, vector), **options)
    explained = Saliency(inputs=[key], target=lambda run: run.outputs[out].flatten(data.ndim).sum(-1), when="step")
    with Compose(steering, explained).prepare(policy) as hooked:
        torch.manual_seed(0)
        found = hooked(data.clone())
    noted: list[Tensor] = []
    for site in sites:
        caller = policy.get_submodule(site.split(".")[0])
        caller.register_forward_pre_hook(lambda _, args: noted.append(strength(args[0]).detach().float()))
        policy.get_submodule(site).register_forward_hook(lambda _, args, value: value + noted[-1][..., None] * vector)
    leaf = data[key].clone().requires_grad_()
    torch.manual_seed(0)
    expected = policy(data.clone().set(key, leaf))
    assert torch.equal(found[out], expected[out])
    slope = torch.autograd.grad(expected[out].sum(), leaf)[0]
    rows = found["computed", "attr"]
    torch.testing.assert_close(found["attr", key][rows], slope[rows])
    acted = torch.stack(noted, 1) if build is walk else strength(data)
    assert torch.equal(found["steered", "steering"], acted.bool() & rows)

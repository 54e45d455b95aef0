"""A module that draws several times in one call, stored choices in other dtypes, and critics with values of other
names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, OneHotCategorical
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal, ProbabilisticActor, QValueModule, TanhDelta

from tdhook_rl import Saliency, targets
from tdhook_rl.errors import InputError
from tdhook_rl.sweeps import ablate_units, find_circuit, patch_sites, patch_units

DRAWN = {"categorical": (Categorical, ["logits"]), "normal": (IndependentNormal, ["loc", "scale"])}


def actor(kind: str) -> ProbabilisticActor:
    distribution, keys = DRAWN[kind]
    net = nn.Linear(4, 4) if kind == "categorical" else nn.Sequential(nn.Linear(4, 8), NormalParamExtractor())
    head = TensorDictModule(net, ["observation"], keys)
    return ProbabilisticActor(head, in_keys=keys, distribution_class=distribution)


class Loop(TensorDictModuleBase):
    """A container whose own forward calls its actor twice."""

    def __init__(self, actor: nn.Module, choose: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.actor, self.choose = actor, choose

    def forward(self, data: TensorDictBase) -> TensorDictBase:
        seen, actions = data.select("observation"), []
        for _ in range(2):
            seen = self.actor(seen)
            actions.append(seen["action"])
            seen["observation"] = seen["observation"] / 2
        return data.set("action", self.choose(actions))


CONTAINERS: dict[str, Callable[[Any], nn.Module]] = {
    "last": lambda one: Loop(one, lambda actions: actions[-1]),
    "chunk": lambda one: Loop(one, lambda actions: torch.stack(actions, -1)),
    "best": lambda one: Loop(one, lambda actions: torch.stack(actions).amax(0)),
    "sequence": lambda one: TensorDictSequential(one, one),
}


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("container", CONTAINERS)
def test_what_one_module_draws_several_times_is_not_taken_for_one_draw(
    container: str, kind: str, when: str, batch: tuple[int, ...]
) -> None:
    policy = CONTAINERS[container](actor(kind))
    data = TensorDict({"observation": torch.randn(*batch, 4)}, batch)
    with Saliency(when=when).prepare(policy) as hooked:
        with pytest.raises(InputError, match=r"one module draws 'action' .* several times in one call"):
            hooked.annotate(hooked(data))


def test_what_is_decided_several_times_without_drawing_is_explained() -> None:
    net = nn.Linear(4, 4)
    head = TensorDictModule(net, ["observation"], ["param"])
    one = ProbabilisticActor(head, in_keys=["param"], distribution_class=TanhDelta)
    data = TensorDict({"observation": torch.randn(4, 4)}, [4])
    with Saliency(when="step").prepare(CONTAINERS["last"](one)) as hooked:
        found = hooked(data)
    leaf = data["observation"].clone().requires_grad_()
    (right,) = torch.autograd.grad(net(leaf / 2).tanh().sum(), leaf)
    torch.testing.assert_close(found["attr", "observation"], right)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_a_one_hot_action_is_stored_in_any_dtype(dtype: torch.dtype) -> None:
    net = nn.Linear(4, 3)
    head = TensorDictModule(net, ["observation"], ["logits"])
    policy = ProbabilisticActor(head, in_keys=["logits"], distribution_class=OneHotCategorical)
    acted = policy(TensorDict({"observation": torch.randn(6, 4)}, [6]))
    acted["action"] = acted["action"].to(dtype)
    with Saliency().prepare(policy) as hooked:
        found = hooked.annotate(acted.detach())
    leaf = acted["observation"].clone().requires_grad_()
    log_prob = (net(leaf).log_softmax(-1) * acted["action"].float()).sum()
    torch.testing.assert_close(found["attr", "observation"], torch.autograd.grad(log_prob, leaf)[0])


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


@pytest.mark.parametrize(
    ("key", "counts"),
    [
        ("cost_value", True),
        ("state_value_2", True),
        (("cost", "value"), True),
        ("state_action_value_2", True),
        ("hidden", False),
        ("evaluation", False),
    ],
)
def test_all_values_of_a_critic_are_explained_whatever_they_are_called(key: Any, counts: bool) -> None:
    heads, x = Heads(), torch.randn(5, 4)
    with Saliency(when="step").prepare(TensorDictModule(heads, ["observation"], ["state_value", key])) as hooked:
        found = hooked(TensorDict({"observation": x}, [5]))["attr", "observation"]
    right = heads.one.weight + (heads.two.weight if counts else 0)
    torch.testing.assert_close(found, right.detach().expand(5, 4))


@pytest.mark.parametrize("key", ["logits", "loc", ("agents", "logits")])
def test_what_is_decided_by_is_named_where_only_the_value_is_explained(key: Any) -> None:
    critic = TensorDictModule(Heads(), ["observation"], ["state_value", key])
    data = TensorDict({"observation": torch.randn(5, 4)}, [5])
    with Saliency(when="step").prepare(critic) as hooked, pytest.warns(UserWarning, match="leaves out .*lo[cg]"):
        hooked(data)
    with Saliency(when="step", target=targets.state_value()).prepare(critic) as hooked:
        hooked(data)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("target", [targets.margin(key="action_value"), targets.chosen_q(), None])
def test_each_choice_of_a_multi_one_hot_q_network_has_its_margin(batch: tuple[int, ...], target: Any) -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(*batch, 4)
    choose = QValueModule(action_space="mult_one_hot", var_nums=[2, 3])
    policy = TensorDictSequential(TensorDictModule(net, ["observation"], ["action_value"]), choose)
    chosen = [nn.functional.one_hot(torch.randint(size, batch), size) for size in (2, 3)]  # explored, not the best
    data = TensorDict({"observation": x, "action": torch.cat(chosen, -1)}, batch)
    with Saliency(target=target).prepare(policy) as hooked:
        found = hooked.annotate(data, on_mismatch="ignore")["attr", "observation"]
    leaf, total = x.clone().requires_grad_(), torch.zeros(())
    for values, one in zip(net(leaf).split([2, 3], -1), chosen, strict=True):
        total = total + (values * one).sum()
        if target is not None and target.name == "margin":
            total = total - values.masked_fill(one.bool(), -torch.inf).amax(-1).sum()
    torch.testing.assert_close(found, torch.autograd.grad(total, leaf)[0])


# ---------------------------------------------------------------------- draws that states do not hold


class Mapped(nn.Module):
    def forward(self, choice: Tensor) -> Tensor:
        return choice.argmax(-1)


def latents_in_between() -> ProbabilisticTensorDictSequential:
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), NormalParamExtractor())
    return ProbabilisticTensorDictSequential(
        TensorDictModule(encoder, ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["latent"], distribution_class=Normal),
        TensorDictModule(nn.Linear(2, 3), ["latent"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=OneHotCategorical),
    )


def an_action_that_is_mapped() -> TensorDictSequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return TensorDictSequential(
        TensorDictModule(net, ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=OneHotCategorical),
        TensorDictModule(Mapped(), ["action"], ["action"]),
    )


@pytest.mark.parametrize("build", [latents_in_between, an_action_that_is_mapped])
def test_causal_tests_of_states_without_what_was_drawn(build: Callable[[], nn.Module]) -> None:
    policy, site = build(), "module.0.module.1"
    clean, corrupt = (TensorDict({"observation": torch.randn(6, 3)}, [6]) for _ in range(2))

    def metric(outputs: TensorDictBase) -> Tensor:
        return outputs["logits"] @ torch.tensor([1.0, -2.0, 0.5])

    def logits(states: TensorDictBase, hidden: Tensor | None = None) -> TensorDictBase:
        hook = None if hidden is None else (lambda *_: hidden)
        handle = policy.get_submodule(site).register_forward_hook(hook or (lambda *_: None))
        with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
            found = policy(states.clone())
        handle.remove()
        return found

    hidden = [policy.module[0].module[:2](one["observation"]).detach() for one in (clean, corrupt)]
    start, end = metric(logits(corrupt)), metric(logits(clean))
    units = patch_units(policy, clean, corrupt, site, metric=metric)
    for unit in range(4):
        put = torch.where(torch.arange(4) == unit, hidden[0], hidden[1])
        moved = (metric(logits(corrupt, put)) - start) * (end - start).sign()
        cell = next(one for one in units if one.unit == unit)
        assert cell.measured.estimate == pytest.approx(
            float(moved.sum() / (end - start).abs().sum()), rel=1e-3, abs=1e-3
        )
    assert patch_sites(policy, clean, corrupt, site, metric=metric)[site].mean.estimate == pytest.approx(1.0, abs=1e-4)
    whole = find_circuit(policy, clean, corrupt, site, metric=metric, keep=1.0, controls=1)
    assert whole.curve[-1].faithfulness.estimate == pytest.approx(1.0, abs=1e-4)
    assert len(ablate_units(policy, clean, site)) == 4


class Counted(Normal):
    made = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        type(self).made += 1
        super().__init__(*args, **kwargs)

    @property
    def deterministic_sample(self) -> Tensor:
        return self.mean


class Scales(ProbabilisticTensorDictModule):
    """Makes its distribution of something else than what it was given."""

    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        tensordict.set("loc", tensordict.get("loc") * 3)
        return super().forward(tensordict, *args, **kwargs)


class MakesItsOwn(ProbabilisticTensorDictModule):
    def get_dist(self, tensordict: TensorDictBase) -> Any:
        return Counted(tensordict.get("loc") * 2, tensordict.get("scale"))


@pytest.mark.parametrize("kind", [ProbabilisticTensorDictModule, Scales, MakesItsOwn])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("log_prob", [False, True])
def test_what_was_not_stored_is_decided_by_the_distribution_that_was_made(
    kind: type, shape: tuple[int, ...], log_prob: bool
) -> None:
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), NormalParamExtractor())
    head = kind(["loc", "scale"], ["action"], distribution_class=Counted, return_log_prob=log_prob)
    policy = ProbabilisticTensorDictSequential(TensorDictModule(encoder, ["observation"], ["loc", "scale"]), head)
    states = TensorDict({"observation": torch.randn(*shape, 3)}, shape)
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        expected = policy(states.clone())
    # A target that reads what was decided: nothing of the distribution, which would make another.
    target = targets.Target("decided", lambda run: run.outputs["action"].sum(-1))
    with Saliency(target=target, when="batch").prepare(policy) as hooked:
        Counted.made = 0
        found = hooked.annotate(states)
        assert (Counted.made == 1) is (kind is ProbabilisticTensorDictModule)
        assert "action" not in found
        x = states["observation"].clone().requires_grad_()
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            policy(TensorDict({"observation": x}, shape))["action"].sum().backward()
        torch.testing.assert_close(found["attr", "observation"], x.grad)
        before = Counted.made
        again = hooked(states.clone())  # acting makes its own
        assert Counted.made > before
        assert again["action"].shape == expected["action"].shape

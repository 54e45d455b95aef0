"""Sequences with `partial_tolerant` do without some of their inputs, hooked as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor, QValueModule

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import Occlusion
from tdhook_rl.errors import MissingKeyError
from tdhook_rl.method import Method
from tdhook_rl.rollout import NetworkDiagnostics
from tdhook_rl.sweeps import attribution_patching, patch_sites, patch_units

F64 = torch.float64


def mlp(features: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 7), nn.Tanh(), nn.Linear(7, out)).to(F64)


def tolerant() -> TensorDictSequential:
    first = TensorDictModule(mlp(4, 5), ["a"], ["hidden"])
    other = TensorDictModule(mlp(3, 5), [("more", "b")], ["unused"])
    return TensorDictSequential(
        first, other, TensorDictModule(mlp(5, 3), ["hidden"], ["logits"]), partial_tolerant=True
    )


def tolerant_inside() -> TensorDictSequential:
    scale = TensorDictModule(nn.Tanh(), ["a"], ["a"])
    return TensorDictSequential(scale, tolerant())


def tolerant_actor() -> ProbabilisticActor:
    return ProbabilisticActor(tolerant(), in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


def tolerant_q() -> TensorDictSequential:
    """A Q-network with a head that says something more where more is there."""
    return TensorDictSequential(tolerant(), QValueModule("categorical", action_value_key="logits"))


POLICIES: dict[str, Callable[[], TensorDictSequential]] = {
    "tolerant": tolerant, "inside": tolerant_inside, "actor": tolerant_actor, "q": tolerant_q,
}  # fmt: skip


def first_logit(policy: TensorDictSequential, a: Tensor) -> Tensor:
    return policy(TensorDict({"a": a}, a.shape[:-1]))["logits"][..., 0]


def by_gradient(policy: TensorDictSequential, a: Tensor) -> Tensor:
    leaf = a.clone().requires_grad_()
    return torch.autograd.grad(first_logit(policy, leaf).sum(), leaf)[0]


def by_loop(policy: TensorDictSequential, a: Tensor) -> Tensor:
    there = first_logit(policy, a)
    return torch.stack([there - first_logit(policy, a * (torch.arange(4) != i)) for i in range(4)], -1)


def method_of(kind: str, when: str, **options: object) -> Method:
    target = targets.logit(0)
    if kind == "occlusion":
        return Occlusion(target=target, baseline=0.0, when=when, **options)
    if kind == "steered":
        site = "0.module.0"
        return Compose(
            ActivationCaching(site),
            SteeringVectors({site: torch.zeros(7)}),
            Saliency(target=target, when=when, **options),
        )
    return Saliency(target=target, when=when, **options)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["saliency", "occlusion", "steered"])
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_absent_is_done_without(
    policy: str, kind: str, when: str, batch: tuple[int, ...], inference: bool
) -> None:
    if policy != "tolerant" and kind == "steered":
        pytest.skip("its paths are others")
    torch.manual_seed(0)
    plain = POLICIES[policy]()
    key = "a"
    if policy == "inside":  # it writes over what it reads
        when = "step"
    data = TensorDict({"a": torch.randn(*batch, 4, dtype=F64)}, batch)
    right = (by_loop if kind == "occlusion" else by_gradient)(plain, data["a"])
    with method_of(kind, when, inputs=[key]).prepare(plain) as hooked, torch.inference_mode(inference):
        found = hooked.annotate(hooked(data.clone())) if when == "batch" else hooked(data.clone())
    torch.testing.assert_close(found["attr", key], right.detach())
    assert bool(found["computed", "attr"].all())


@pytest.mark.filterwarnings("ignore:no gradient of")
@pytest.mark.parametrize("method", [Saliency, IntegratedGradients, Occlusion])
def test_what_is_to_be_explained_is_there_or_named(method: type) -> None:
    data = TensorDict({"a": torch.randn(5, 4, dtype=F64)}, [5])
    one = method(target=targets.logit(0), when="step", **({} if method is Saliency else {"baseline": 0.0}))
    with one.prepare(tolerant()) as hooked:
        with pytest.raises(MissingKeyError, match=r"can do without \('more', 'b'\).* inputs=\['a'\]"):
            hooked(data.clone())
        data["more", "b"] = torch.randn(5, 3, dtype=F64)
        assert hooked(data)["attr", "a"].shape == (5, 4)


def test_what_every_way_needs_is_asked_for() -> None:
    policy = TensorDictSequential(TensorDictModule(mlp(2, 3), ["c"], ["unused"]), tolerant())
    with Saliency(target=targets.logit(0), when="step", inputs=["a"]).prepare(policy) as hooked:
        with pytest.raises((MissingKeyError, KeyError), match="'c'"):
            hooked(TensorDict({"a": torch.randn(5, 4, dtype=F64)}, [5]))


@pytest.mark.parametrize("policy", ["actor", "q"])
@pytest.mark.parametrize("compared", [patch_sites, patch_units, attribution_patching])
def test_states_may_lack_what_is_absent(policy: str, compared: Callable) -> None:
    torch.manual_seed(0)
    plain, more = POLICIES[policy](), torch.randn(9, 3, dtype=F64)
    lacking = [TensorDict({"a": 9 * torch.randn(9, 4, dtype=F64)}, [9]) for _ in range(2)]
    whole = [one.clone().set(("more", "b"), more) for one in lacking]
    site, metric = plain.get_submodule("0" if policy == "q" else "module.0"), lambda out: out["logits"][..., 0]
    name = next(path for path, one in plain.named_modules() if one is site.module[0].module[1])
    found, expected = (compared(plain, *states, name, metric=metric) for states in (lacking, whole))
    assert str(found) == str(expected)
    with pytest.raises(MissingKeyError, match=r"\('more', 'b'\), which the data lacks"):
        compared(plain, lacking[0], whole[1], name, metric=metric)


def test_diagnostics_are_of_states_that_lack_it() -> None:
    plain = tolerant_actor()
    [site] = [path for path, one in plain.named_modules() if one is plain.module[0].module[0].module[1]]
    states = TensorDict({"a": torch.randn(30, 4, dtype=F64)}, [30])
    whole = states.clone().set(("more", "b"), torch.randn(30, 3, dtype=F64))
    found, expected = (NetworkDiagnostics(plain, sites=[site]).update(one) for one in (states, whole))
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert found

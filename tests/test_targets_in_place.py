"""Functions of the user's that write in place to what they are given: nobody else sees it, or it is refused."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Compose, IntegratedGradients, Saliency, targets
from tdhook_rl.attribution import LRP, GuidedBackpropagation, Occlusion, PerturbationSaliency
from tdhook_rl.errors import InputError
from tdhook_rl.sweeps import attribution_patching
from tests.chains import Unknown


def masked(run: Any) -> Tensor:
    y = run.outputs["logits"]
    y[..., 0] = -50.0
    return y.log_softmax(-1)[..., 1]


def plain(run: Any) -> Tensor:
    return run.outputs["logits"].softmax(-1)[..., 0]


def pure(run: Any) -> Tensor:
    y = run.outputs["logits"]
    return torch.cat([torch.full_like(y[..., :1], -50.0), y[..., 1:]], -1).log_softmax(-1)[..., 1]


ROWS = 3
METHODS: dict[str, Callable[..., Any]] = {
    "Saliency": Saliency,
    "a path": functools.partial(IntegratedGradients, n_steps=4, baseline=0.1, compute_convergence_delta=True),
    "GuidedBackpropagation": GuidedBackpropagation,
    "LRP": LRP,
    "Occlusion": functools.partial(Occlusion, baseline=0.1),
    "PerturbationSaliency": functools.partial(PerturbationSaliency, stride=2),
}
ORDERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "first": {"masked": masked, "plain": plain},
    "last": {"plain": plain, "masked": masked},
    "before ours": {"masked": masked, "ours": targets.logit(0), "plain": plain},
}


def acting(kind: str, acts: bool) -> tuple[Any, TensorDict]:
    torch.manual_seed(0)
    layers = [nn.Flatten(-3), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)]
    net = nn.Sequential(*layers).double()
    module = TensorDictModule(net if kind == "chain" else Unknown(net), ["observation"], ["logits"])
    policy: Any = ProbabilisticActor(module, ["logits"], distribution_class=Categorical) if acts else module
    x = torch.rand(ROWS, 1, 4, 4, dtype=torch.double)
    with torch.no_grad():
        return policy, policy(TensorDict({"observation": x}, batch_size=ROWS))


def explained(method: Any, policy: Any, data: TensorDict, when: str, mode: Any) -> TensorDict:
    torch.manual_seed(1)
    with warnings.catch_warnings(), method.prepare(policy) as hooked:
        warnings.simplefilter("error")
        with mode():
            return hooked.annotate(data) if when == "batch" else hooked(data.clone())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("acts", [False, True])
@pytest.mark.parametrize("kind", ["chain", "no chain"])
@pytest.mark.parametrize("name", METHODS)
def test_other_targets_and_the_policy_do_not_see_it(name: str, kind: str, acts: bool, when: str, mode: Any) -> None:
    policy, data = acting(kind, acts)
    alone = explained(METHODS[name](target={"plain": plain, "masked": pure}, when=when), policy, data, when, mode)
    for order in ORDERS.values():
        found = explained(METHODS[name](target=order, when=when), policy, data, when, mode)
        assert torch.equal(found["logits"], alone["logits"])
        for target in ("plain", "masked"):
            if (name, target) != ("LRP", "masked"):  # which counts what is put in the place of an output as well
                torch.testing.assert_close(
                    found["attr", target, "observation"], alone["attr", target, "observation"], msg=f"{target}"
                )


@pytest.mark.parametrize("when", ["step", "batch"])
def test_other_methods_do_not_see_it(when: str) -> None:
    policy, data = acting("chain", True)
    expected = explained(Saliency(target=plain, when=when), policy, data, when, torch.enable_grad)
    both = Compose(Saliency(target=masked, when=when, attribution_key="masked"), Saliency(target=plain, when=when))
    found = explained(both, policy, data, when, torch.enable_grad)
    assert torch.equal(found["attr", "observation"], expected["attr", "observation"])
    assert torch.equal(found["logits"], expected["logits"])


def test_a_metric_of_causal_tests_does_not_see_it() -> None:
    policy, data = acting("no chain", False)
    clean, corrupt = data.select("observation"), data.select("observation").apply(lambda x: x.flip(0))
    site = "module.net.1"
    found = [
        attribution_patching(policy, clean, corrupt, sites=[site], metric=targets.Target("it", metric))
        for metric in (masked, pure)
    ]
    torch.testing.assert_close(*(one.estimates for one in found))


def writing_to_stored(run: Any) -> Tensor:
    run.stored["observation"].zero_()
    return run.outputs["logits"][..., 0]


def writing_beside(outputs: TensorDict, additional: TensorDict) -> TensorDict:
    additional["observation"].zero_()
    return TensorDict({"score": outputs["logits"][..., 0]}, batch_size=outputs.batch_size)


def writing_to_inputs(inputs: TensorDict, _: TensorDict) -> TensorDict:
    inputs["observation"].mul_(2.0)
    return inputs


@pytest.mark.parametrize("kind", ["chain", "no chain"])
@pytest.mark.parametrize(
    "options",
    [
        {"target": targets.Target("it", writing_to_stored)},
        {"init_attr_targets": writing_beside, "additional_init_keys": ["observation"]},
        {"init_attr_inputs": writing_to_inputs},
    ],
    ids=["a target", "init_attr_targets", "init_attr_inputs"],
)
def test_what_would_be_lost_to_the_caller_is_refused(options: dict[str, Any], kind: str) -> None:
    policy, data = acting(kind, False)
    with Saliency(when="batch", **options).prepare(policy) as hooked:
        with pytest.raises(InputError, match=r"has written to 'observation' in place.*let it work on a copy"):
            hooked.annotate(data)

"""Forward hooks on the policy itself are a part of what it computes: every pass of ours runs them, once."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import Actor

from tdhook_rl import ActivationCaching, ActivationPatching, Compose, IntegratedGradients, Saliency
from tdhook_rl.attribution import Occlusion

BOUND = 0.2


def scale_before(module: nn.Module, args: tuple) -> tuple:
    return (args[0].copy().set("observation", args[0]["observation"] * 3),)


def scale_before_named(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return scale_before(module, args), kwargs


def cube_after(module: nn.Module, args: tuple, output: TensorDictBase) -> TensorDictBase:
    return output.set("action", output["action"] ** 3)


def cube_after_named(module: nn.Module, args: tuple, kwargs: dict, output: TensorDictBase) -> TensorDictBase:
    return output.copy().set("action", output["action"] ** 3)


def copy_after(module: nn.Module, args: tuple, output: TensorDictBase) -> TensorDictBase:
    return output.copy()


class Count:
    """A hook with a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: tuple, output: TensorDictBase) -> TensorDictBase:
        self.calls += 1
        return output.set("action", output["action"] * self.calls)


HOOKS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]]] = {
    "before": (lambda p: p.register_forward_pre_hook(scale_before), lambda net, x: net(3 * x)),
    "before, by name": (
        lambda p: p.register_forward_pre_hook(scale_before_named, with_kwargs=True), lambda net, x: net(3 * x)
    ),
    "after": (lambda p: p.register_forward_hook(cube_after), lambda net, x: net(x) ** 3),
    "after, by name": (
        lambda p: p.register_forward_hook(cube_after_named, with_kwargs=True), lambda net, x: net(x) ** 3
    ),
    "after, in any case": (lambda p: p.register_forward_hook(cube_after, always_call=True), lambda net, x: net(x) ** 3),
    "another TensorDict": (lambda p: p.register_forward_hook(copy_after), lambda net, x: net(x)),
    "with a state": (lambda p: p.register_forward_hook(Count()), lambda net, x: net(x)),
    "two": (
        lambda p: (p.register_forward_hook(cube_after), p.register_forward_pre_hook(scale_before)),
        lambda net, x: net(3 * x) ** 3,
    ),
    "safe": (lambda p: None, lambda net, x: net(x).clamp(-BOUND, BOUND)),
}  # fmt: skip
every_hook = pytest.mark.parametrize("name", HOOKS)


def make(name: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    if name == "safe":
        bounds = Bounded(-BOUND, BOUND, (2,), dtype=torch.float64)
        policy: Any = Actor(net, in_keys=["observation"], spec=bounds, safe=True)
    else:
        policy = TensorDictModule(net, in_keys=["observation"], out_keys=["action"])
    register, by_hand = HOOKS[name]
    register(policy)
    return policy, lambda x: by_hand(net, x)


def batch() -> TensorDict:
    return TensorDict({"observation": torch.randn(5, 4, dtype=torch.float64)}, batch_size=5)


@every_hook
def test_what_is_explained_is_what_the_policy_puts_out(name: str) -> None:
    policy, by_hand = make(name)
    data = batch()
    x = data["observation"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(by_hand(x).sum(), x)
    x = data["observation"]
    drops = torch.stack([(by_hand(x) - by_hand(x * (torch.arange(4) != i))).sum(-1) for i in range(4)], -1)
    with Compose(Saliency(when="step"), Occlusion(attribution_key="drop", when="step")).prepare(policy) as hooked:
        for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
            copied = pickle.loads(pickle.dumps(hooked))  # with a state the second call does something else
            with context:
                found = copied(data.clone())
            torch.testing.assert_close(found["action"], by_hand(x))
            torch.testing.assert_close(found["attr", "observation"], gradient)
            torch.testing.assert_close(found["drop", "observation"], drops)


@every_hook
def test_annotated_rows_are_those_of_the_step(name: str) -> None:
    policy, by_hand = make(name)
    data = batch()
    stored = data.clone().set("action", by_hand(data["observation"]).detach())
    with IntegratedGradients(n_steps=64, baseline=0.0, method="riemann_middle").prepare(policy) as hooked:
        annotated = hooked.annotate(stored)  # a warning if the stored action were another
    x, path = data["observation"], torch.zeros_like(data["observation"])
    for step in range(64):
        point = (x * (step + 0.5) / 64).requires_grad_()
        path += torch.autograd.grad(by_hand(point).sum(), point)[0] * x / 64
    torch.testing.assert_close(annotated["attr", "observation"], path)


@every_hook
def test_a_patched_run_goes_through_the_hooks(name: str) -> None:
    policy, _ = make(name)
    data = batch()
    data["patched", "observation"] = torch.randn(5, 4, dtype=torch.float64)
    with ActivationPatching("module.2" if name != "safe" else "module").prepare(policy) as hooked:
        found = hooked(data)
    torch.testing.assert_close(found["patched", "action"], found["action"])


def test_a_state_goes_on_as_often_as_the_policy_is_called() -> None:
    """The hooked policy has a copy of the hook, which counts the calls and none of our passes."""
    policy, by_hand = make("with a state")
    data = batch()
    with Compose(Saliency(when="step"), ActivationCaching("module.0")).prepare(policy) as hooked:
        outputs = [hooked(data.clone()) for _ in range(3)]
    x = data["observation"].clone().requires_grad_()
    for calls, found in enumerate(outputs, start=1):
        torch.testing.assert_close(found["action"], by_hand(x) * calls)
        torch.testing.assert_close(found["attr", "observation"], torch.autograd.grad(by_hand(x).sum() * calls, x)[0])


def test_an_error_reaches_the_hooks_that_are_called_in_any_case() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    seen: list[Any] = []
    policy.register_forward_hook(lambda module, args, output: seen.append(output), always_call=True)
    policy.register_forward_hook(lambda module, args, output: seen.append("not called"))
    with Saliency(when="step").prepare(policy) as hooked, pytest.raises(Exception, match="shape"):
        hooked(TensorDict({"observation": torch.randn(5, 3)}, batch_size=5))
    assert seen == [None]


def test_the_policy_keeps_its_hooks() -> None:
    policy, by_hand = make("two")
    data = batch()
    with Saliency().prepare(policy):
        torch.testing.assert_close(policy(data.clone())["action"], by_hand(data["observation"]))
    torch.testing.assert_close(policy(data.clone())["action"], by_hand(data["observation"]))


def test_a_compiled_policy_runs_them() -> None:
    policy, by_hand = make("safe")
    data = batch()
    x = data["observation"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(by_hand(x).sum(), x)
    with Saliency(when="step").prepare(policy) as hooked:
        found = torch.compile(hooked, backend="eager")(data)
    torch.testing.assert_close(found["action"], by_hand(data["observation"]))
    torch.testing.assert_close(found["attr", "observation"], gradient)

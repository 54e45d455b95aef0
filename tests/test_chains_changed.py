"""Chains that somebody listens to, has changed or rebuilt: everything runs as it always does."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tdhook_rl import Saliency, targets
from tdhook_rl.calls.chains import Record
from tdhook_rl.calls.passes import Slope
from tdhook_rl.targets import LinearTarget, Target
from tests.chains import MODES, SQUARES, by_autograd, chain, data, logit


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _own_forward(net: nn.Sequential) -> None:
    net[0].forward = lambda x, layer=net[0]: nn.Linear.forward(layer, x) * 2


def _inplace(net: nn.Sequential) -> None:
    net[1].inplace = True


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a hook": lambda net: net[0].register_forward_hook(lambda m, a, y: 2 * y),
    "a hook on the chain": lambda net: net.register_forward_hook(lambda m, a, y: 2 * y),
    "an in-place hook": lambda net: net.register_forward_hook(lambda m, a, y: y.mul_(2)),
    "a pre-hook": lambda net: net[2].register_forward_pre_hook(lambda m, a: (2 * a[0],)),
    "a backward hook": lambda net: net[2].register_full_backward_hook(lambda m, g, _: (2 * g[0],)),
    "a backward hook on the chain": lambda net: net.register_full_backward_hook(lambda m, g, _: (2 * g[0],)),
    "a parametrization": lambda net: parametrizations.weight_norm(net[0]),
    "a forward of its own": _own_forward,
    "in place": _inplace,
}


#: What is refused once there is a hooked policy: other tensors, and functions that run the user's own modules.
REFUSED_AFTER = ("a parametrization", "a forward of its own")


@pytest.mark.filterwarnings("ignore:a forward hook was added")  # to the user's policy, and here to the hooked one too
@pytest.mark.parametrize(
    ("change", "when"),
    [(c, w) for c in CHANGES for w in ("before", "after") if w == "before" or c not in REFUSED_AFTER],
)
def test_layers_that_somebody_has_changed(change: str, when: str) -> None:
    net, one = chain(nn.ReLU), data(5)
    if when == "before":
        CHANGES[change](net)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        if when == "after":
            CHANGES[change](net)
            CHANGES[change](hooked.hooked_root)
        expected = by_autograd(net, one["input"], logit)
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode:
                found = hooked(one.clone())
            assert torch.equal(found["output"], net(one["input"]))
            torch.testing.assert_close(found["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


def test_subclasses_run_as_they_do(records: list[Record]) -> None:
    net, one = nn.Sequential(Doubling(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked(one.clone())
    assert not records
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


def test_global_hooks_are_heard(records: list[Record]) -> None:
    heard: list[nn.Module] = []
    with Saliency().prepare(chain()) as hooked:
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: heard.append(m))
        try:
            hooked(data(5))
        finally:
            handle.remove()
    assert sum(isinstance(module, nn.Linear) for module in heard) >= 3
    assert not records


def test_autocast_runs_as_without_us(records: list[Record]) -> None:
    net, one = chain().float(), data(5).float()
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked, torch.autocast("cpu", torch.bfloat16):
        found = hooked(one.clone())
        assert torch.equal(found["output"], net(one["input"]))
        torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))
    assert not records


def test_the_copy_keeps_its_classes_and_can_be_sliced_and_copied() -> None:
    net, x = chain(), data(3)["input"]
    with Saliency().prepare(net) as hooked:
        assert repr(hooked.hooked_root) == repr(net)
        assert type(hooked.hooked_root) is nn.Sequential
        assert torch.equal(hooked.hooked_root[:2](x), net[:2](x))
        assert "forward" not in vars(net)
        for copied in (copy.deepcopy(hooked), pickle.loads(pickle.dumps(hooked))):
            assert torch.equal(copied(data(3).set("input", x))["output"], net(x))


class Learning:
    """A logit at whose first look the weights change, as a learner in another thread may change them."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.changed = net, False

    def __call__(self, run: object) -> Tensor:
        return run.outputs["output"][..., 1]

    def slope(self, run: object) -> Slope:
        if not self.changed:
            self.changed = True
            with torch.no_grad():
                self.net[0].weight.mul_(2)
        ones = nn.functional.one_hot(torch.ones(run.outputs.batch_size).long(), 3)
        return Slope("output", ones.to(run.outputs["output"]))


@pytest.mark.parametrize("how", ["annotate", "no_grad", "grad"])
def test_a_weight_that_a_learner_changes_meanwhile(how: str) -> None:
    net, one = chain(), data(5)
    with Saliency(target=LinearTarget("learning", Learning(net), reads_inputs=False)).prepare(net) as hooked:
        if how == "annotate":
            found = hooked.annotate(one)  # the pass is made again, with the new weights
        else:
            with torch.set_grad_enabled(how == "grad"):
                found = hooked(one.clone())
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


def _replaced_hooks(net: nn.Sequential) -> None:
    net[2]._forward_pre_hooks = OrderedDict()
    net[2].register_forward_pre_hook(lambda m, a: (2 * a[0],))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


REBUILT: dict[str, Callable[[nn.Sequential], object]] = {
    "appended": lambda net: net.append(nn.Linear(3, 3).double()),
    "replaced": lambda net: net.__setitem__(1, nn.Sigmoid()),
    "replaced by an unknown one": lambda net: net.__setitem__(1, nn.LayerNorm(16).double()),
    "removed": lambda net: net.__delitem__(3),
    "another class": lambda net: setattr(net[2], "__class__", Doubled),
    "another hook dictionary": _replaced_hooks,
}


@pytest.mark.parametrize("change", REBUILT)
def test_chains_that_are_rebuilt_while_hooked(change: str) -> None:
    net, one = chain(), data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        hooked(one.clone())
        REBUILT[change](hooked.hooked_root)
        plain = copy.deepcopy(hooked.hooked_root)
        found = hooked(one.clone())
        assert torch.equal(found["output"], plain(one["input"]))
        torch.testing.assert_close(found["attr", "input"], by_autograd(plain, one["input"], logit))


class Twice(Tensor):
    """A weight that linear layers read doubled, as quantised ones are read through a scale."""

    @classmethod
    def __torch_function__(
        cls, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.as_subclass(Tensor) * 2, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_of_other_types() -> None:
    net, one = chain(), data(5)
    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Twice))
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked(one.clone())
    assert torch.equal(found["output"].as_subclass(Tensor), net(one["input"]).as_subclass(Tensor))
    torch.testing.assert_close(
        found["attr", "input"].as_subclass(Tensor), by_autograd(net, one["input"], logit).as_subclass(Tensor)
    )


class Tripling(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(3 * x)


def _called_twice_as_much() -> TensorDictModule:
    policy = TensorDictModule(chain(), ["input"], ["output"])
    policy._call_module = lambda tensors, **_: 2 * policy.module(*tensors)
    return policy


def test_other_ways_to_be_called() -> None:
    one = data(5)
    for policy in (TensorDictModule(Tripling(*chain()), ["input"], ["output"]), _called_twice_as_much()):
        expected = policy(one.clone())["output"]
        with Saliency(target=targets.logit(1, "output")).prepare(policy) as hooked:
            found = hooked(one.clone())
        assert torch.equal(found["output"], expected)

        def plain(x: Tensor, policy: TensorDictModule = policy) -> Tensor:
            return policy(TensorDict({"input": x}, batch_size=5))["output"]

        torch.testing.assert_close(found["attr", "input"], by_autograd(plain, one["input"], logit))


@MODES
def test_noise_before_the_chain_is_drawn_once(mode: type) -> None:
    net, one = chain(), data(5)
    net.register_forward_pre_hook(lambda m, a: (a[0] + torch.randn_like(a[0]),))
    with Saliency(target=SQUARES).prepare(net) as hooked, mode():
        torch.manual_seed(3)
        found = hooked(one.clone())
        after = torch.randn(3)
    torch.manual_seed(3)
    x = one["input"] + torch.randn_like(one["input"])
    assert torch.equal(torch.randn(3), after)
    clean = nn.Sequential(*net)
    torch.testing.assert_close(found["output"], clean(x))
    torch.testing.assert_close(found["attr", "input"], by_autograd(clean, x, lambda y: y.square().sum(-1)))


def test_a_hook_on_the_gradient_of_the_chain() -> None:
    def doubles(module: nn.Module, args: tuple, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda gradient: 2 * gradient)

    net, one = chain(), data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        hooked.hooked_root.register_forward_hook(doubles)
        expected = 2 * by_autograd(net, one["input"], logit)
        torch.testing.assert_close(hooked(one.clone())["attr", "input"], expected)
        torch.testing.assert_close(hooked.annotate(one)["attr", "input"], expected)


def test_a_class_that_somebody_has_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    net, one = chain(), data(5)
    usual = nn.Linear.forward
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * usual(self, x))
        found = hooked(one.clone())
        assert torch.equal(found["output"], net(one["input"]))
        torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(self._modules.values()))


def test_sequences_that_run_in_another_order() -> None:
    net, one = Backwards(nn.Linear(16, 3), nn.Tanh(), nn.Linear(6, 16)).double(), data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked(one.clone())
    assert torch.equal(found["output"], net(one["input"]))
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


class Named(nn.Sequential):
    _steps = slope = 4


class Sloped:
    slope = _steps = 2.0

    def __call__(self, run: object) -> Tensor:
        return run.outputs["output"][..., 1]


def test_names_that_users_give_their_own_things() -> None:
    net, one = Named(*chain()), data(5)
    with Saliency(target=Target("sloped", Sloped())).prepare(net) as hooked:
        found = hooked(one)
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))

"""Functions that a policy keeps and that name its modules run the hooked ones; those that are compiled are refused."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, errors, targets
from tdhook_rl.policies.rebinding import deep_copy
from tdhook_rl.weights import Pruning
from tests.policies import ACTIONS, FEATURES, HIDDEN

X = torch.randn(5, FEATURES)


class Net(nn.Module):
    """Computes by ``self.kept``, which it keeps, and counts how often it did."""

    kept: Any

    def __init__(self, keep: Callable[[Net], None]) -> None:
        super().__init__()
        self.first, self.last, self.ran = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, ACTIONS), 0
        keep(self)

    def inner(self, x: Tensor) -> Tensor:
        self.ran += 1
        return self.last(self.first(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x)


class Helper:
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


def a_lambda(net: Net) -> None:
    net.kept = lambda x: net.inner(x)


def of_a_method(net: Net) -> None:
    inner = net.inner
    net.kept = lambda x: inner(x)


def of_another(net: Net) -> None:
    before = lambda x: net.first(x).tanh()  # noqa: E731

    def after(x: Tensor) -> Tensor:
        net.ran += 1
        return net.last(before(x))

    net.kept = after


def of_itself(net: Net) -> None:
    def again(x: Tensor, times: int = 1) -> Tensor:
        return again(x, times - 1) if times else net.inner(x)

    net.kept = again


def of_each_other(net: Net) -> None:
    def one(x: Tensor, times: int = 3) -> Tensor:
        return other(x, times) if times else net.inner(x)

    def other(x: Tensor, times: int) -> Tensor:
        return one(x, times - 1)

    net.kept = one


def by_a_default(net: Net) -> None:
    net.kept = lambda x, net=net: net.inner(x)


def by_a_keyword(net: Net) -> None:
    def run(x: Tensor, *, layers: Any = (net,)) -> Tensor:
        return layers[0].inner(x)

    net.kept = run


def in_a_partial(net: Net) -> None:
    net.kept = functools.partial(lambda y, x: net.inner(x) + y, 0.0)


def in_an_object(net: Net) -> None:
    net.kept = Helper(lambda x: net.inner(x))


def in_a_dictionary(net: Net) -> None:
    net.steps = {"all": [lambda x: net.inner(x)]}
    net.kept = lambda x: net.steps["all"][0](x)


def decorated(net: Net) -> None:
    @functools.wraps(net.inner)
    def run(*args: Tensor) -> Tensor:
        return net.inner(*args)

    net.kept = run


def a_patched_forward(net: Net) -> None:
    net.kept = net.inner
    old = net.forward

    def forward(self: Net, x: Tensor) -> Tensor:
        return old(x)

    net.forward = types.MethodType(forward, net)  # type: ignore[method-assign]


def a_bound_method(net: Net) -> None:
    net.kept = net.inner


KEPT = [
    a_lambda, of_a_method, of_another, of_itself, of_each_other, by_a_default, by_a_keyword, in_a_partial, in_an_object,
    in_a_dictionary, decorated, a_patched_forward, a_bound_method,
]  # fmt: skip


def policy_of(net: nn.Module) -> TensorDictModule:
    return TensorDictModule(net, ["observation"], ["logits"])


def data() -> TensorDict:
    return TensorDict({"observation": X}, [len(X)])


@pytest.mark.parametrize("keep", KEPT, ids=lambda keep: keep.__name__)
def test_kept_functions_run_the_hooked_modules(keep: Callable[[Net], None]) -> None:
    net = Net(keep)
    hidden = net.first(X)
    steered = net.last((hidden + 1).tanh())
    methods = ActivationCaching("module.first"), Saliency(target=targets.logit(0), input_modules=["module.first"])
    with Compose(*methods, SteeringVectors({"module.first": torch.ones(HIDDEN)}, alpha=1.0)).prepare(
        policy_of(net)
    ) as hooked:
        out = hooked(data())
        torch.testing.assert_close(out["logits"], steered)
        torch.testing.assert_close(out["cache", "module.first"], hidden)
        found = hooked.annotate(out)["attr", "module.first"]
        torch.testing.assert_close(found, net.last.weight[0] * (1 - (hidden + 1).tanh() ** 2))
        assert net.ran == 0  # what passes count is theirs
    net(X)
    assert net.ran == 1


@pytest.mark.parametrize("keep", KEPT, ids=lambda keep: keep.__name__)
def test_weights_that_are_edited_are_those_that_run(keep: Callable[[Net], None]) -> None:
    net = Net(keep)
    before = net(X)
    with Pruning(importance_callback=lambda parameter, **_: parameter.abs(), amount_to_prune=1.0).prepare(
        policy_of(net)
    ) as hooked:
        assert not torch.allclose(hooked(data())["logits"], before)
    assert torch.equal(net(X), before)
    other = deep_copy(net)
    nn.init.zeros_(other.last.weight), nn.init.zeros_(other.last.bias)
    assert not other(X).any()
    assert torch.equal(net(X), before)


@pytest.mark.parametrize("keep", [a_lambda, of_a_method, by_a_default, in_a_partial, decorated, a_bound_method])
def test_a_function_that_is_set_while_hooked_is_told(keep: Callable[[Net], None]) -> None:
    net = Net(a_lambda)
    with SteeringVectors({"module.first": torch.ones(HIDDEN)}).prepare(policy_of(net)) as hooked:
        hooked(data())
        net.kept = lambda x: torch.zeros(len(x), ACTIONS)  # which runs no module
        assert not hooked(data())["logits"].any()
        keep(net)
        with pytest.raises(
            errors.TieError, match=r"'module\.kept' of the user's policy was set to a function that runs"
        ):
            hooked(data())


# ------------------------------------------------------------------ compiled


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="eager")


def an_attribute(net: Net) -> None:
    net.kept = compiled(net.inner)


def in_its_own_place(net: Net) -> None:
    net.inner = compiled(net.inner)  # type: ignore[method-assign]
    net.kept = net.inner


def the_forward(net: Net) -> None:
    net.kept = net.inner
    net.forward = compiled(net.forward)  # type: ignore[method-assign]


def of_a_layer_of_torch(net: Net) -> None:
    first = compiled(net.first.forward)
    net.kept = lambda x: net.last(first(x).tanh())


def compiled_lambda(net: Net) -> None:
    net.kept = {"run": compiled(lambda x: net.inner(x))}["run"]


def called_by_another(net: Net) -> None:
    fast = compiled(net.inner)
    net.kept = lambda x: fast(x)


@pytest.mark.parametrize(
    "keep", [an_attribute, in_its_own_place, the_forward, compiled_lambda, called_by_another, of_a_layer_of_torch]
)
@pytest.mark.parametrize("method", [Saliency(), ActivationCaching("module.first")], ids=["explained", "cached"])
def test_a_method_compiled_as_an_attribute_is_refused(keep: Callable[[Net], None], method: Any) -> None:
    with pytest.raises(errors.PreparationError, match=r"'module\.\w+' .*compiled by torch.compile before it was prep"):
        method.prepare(policy_of(Net(keep))).__enter__()


def test_compiled_functions_that_run_no_module_are_no_matter() -> None:
    def keep(net: Net) -> None:
        act = compiled(torch.tanh)
        net.kept = lambda x: net.last(act(net.first(x)))

    net = Net(keep)
    with SteeringVectors({"module.first": torch.ones(HIDDEN)}, alpha=1.0).prepare(policy_of(net)) as hooked:
        for _ in range(2):
            torch.testing.assert_close(hooked(data())["logits"], net.last((net.first(X) + 1).tanh()))
            net(X)


class Decorated(Net):
    @torch.compile(backend="eager")
    def inner(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


@torch.compile(backend="eager")
def applied(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).tanh()


class Applied(Net):
    def inner(self, x: Tensor) -> Tensor:
        return self.last(applied(self.first, x))


@pytest.mark.parametrize("kind", [Decorated, Applied])
def test_what_a_decorated_method_was_compiled_to_before_is_told(kind: type[Net]) -> None:
    """Its graphs are those of the class: one of a call of the user's own policy has no hooks."""
    torch.compiler.reset()
    net = kind(a_bound_method)
    steering = SteeringVectors({"module.first": torch.ones(HIDDEN)}, alpha=1.0)
    words = r"put on .*compile the hooked policy"
    with steering.prepare(policy_of(net)) as hooked:
        for _ in range(2):
            torch.testing.assert_close(hooked(data())["logits"], net.last((net.first(X) + 1).tanh()))
        torch.testing.assert_close(net(X), net.last(net.first(X).tanh()))
        with pytest.raises(errors.SiteError, match=words):  # by now the graph of the user's call comes first
            hooked(data())
    torch.compiler.reset()
    net(X)
    for method in (steering, ActivationCaching("module.first")):
        with method.prepare(policy_of(net)) as hooked, pytest.raises(errors.SiteError, match=words):
            hooked(data())
    with Saliency(input_modules=["module.first"]).prepare(policy_of(net)) as hooked:
        with pytest.raises(errors.SiteError, match=words):
            hooked.annotate(data())
    torch.compiler.reset()

"""What a policy keeps of its last forward, and modules with habits of their own, are no reason not to prepare them."""

from __future__ import annotations

import collections
import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torchrl.modules import TanhNormal

from tdhook_rl import ActivationCaching, Saliency, targets
from tdhook_rl.errors import PreparationError


@dataclass
class Record:
    logits: Tensor
    more: Any = None


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


KEEPERS = {
    "distribution": lambda y: Categorical(logits=y),
    "nested distribution": lambda y: Independent(Normal(y, y.exp()), 1),
    "distribution of torchrl": lambda y: TanhNormal(y, y.exp()),
    "list": lambda y: [y, [y * 2]],
    "tuple": lambda y: (y, (y,)),
    "dictionary": lambda y: {"a": {"b": y}},
    "deque": lambda y: collections.deque([y], maxlen=3),
    "dataclass": lambda y: Record(y, Record(y * 2)),
    "object": lambda y: SimpleNamespace(inner=SimpleNamespace(y=y)),
    "slots": Slots,
    "tensordict": lambda y: TensorDict({"y": y, "inner": {"z": y * 2}}, [5]),
    "locked tensordict": lambda y: TensorDict({"y": y}, [5]).lock_(),
    "tensordict in a list": lambda y: [TensorDict({"y": y}, [5])],
    "method": lambda y: Record(y).__eq__,
}


class Keeps(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.linear, self.last, self.how = nn.Linear(3, 2), None, how

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x)
        self.last = self.how(logits)
        return logits


@pytest.mark.parametrize("name", KEEPERS)
def test_a_policy_that_keeps_something_of_its_last_forward(name: str) -> None:
    policy, x = Keeps(KEEPERS[name]), torch.randn(5, 3)
    policy(x)
    kept = policy.last
    with Saliency(target=targets.logit(0), when="step").prepare(
        policy, in_keys=["observation"], out_keys=["logits"]
    ) as hooked:
        found = hooked(TensorDict({"observation": x}, [5]))
    torch.testing.assert_close(found["attr", "observation"], policy.linear.weight[0].expand(5, 3))
    assert policy.last is kept


@pytest.mark.parametrize(
    ("hide", "path"),
    [
        (lambda lock: SimpleNamespace(inner={"lock": lock}), "1.helper.inner['lock']"),
        (lambda lock: [0, (lock,)], "1.helper[1][0]"),
        (lambda lock: lock, "1.helper"),
    ],
)
def test_what_does_not_copy_is_named(hide: Any, path: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[1].helper = hide(threading.Lock())
    with pytest.raises(PreparationError) as error:
        Saliency().prepare(net).__enter__()
    assert repr(path) in str(error.value)


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Any:
        yield from super().named_parameters(prefix, recurse)

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Any:
        yield from super().named_buffers(prefix, recurse)


class Groups(Old):
    """Its methods are for the optimiser that it is trained by."""

    def parameters(self) -> Any:  # type: ignore[override]
        return [{"params": [self.linear.weight]}]

    def named_parameters(self) -> Any:  # type: ignore[override]
        return {"weight": self.linear.weight}.items()


@pytest.mark.parametrize("kind", [Old, Groups])
@pytest.mark.parametrize("inside", [False, True])
def test_old_signatures(inside: bool, kind: type[Old]) -> None:
    net = nn.Sequential(kind()) if inside else kind()
    weight = (net[0] if inside else net).linear.weight
    with Saliency(target=targets.logit(1)).prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
        found = hooked(TensorDict({"observation": torch.randn(4, 3)}, [4]))["attr", "observation"]
    torch.testing.assert_close(found, weight[1].expand(4, 3))


class OldModules(Old):
    def named_modules(self, memo: Any = None, prefix: str = "") -> Any:
        yield from nn.Module.named_modules(self, memo, prefix)


class OnlyItself(Old):
    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        yield prefix, self


class FewModules(Old):
    def modules(self) -> Any:
        return iter([self.linear])


class AsAList(Old):
    def modules(self, deep: bool = True) -> Any:
        return list(super().modules())


HIDING = {OldModules: "does not take what torch gives it", OnlyItself: "leaves out 'linear'", FewModules: "leaves out"}


@pytest.mark.parametrize("kind", [*HIDING, AsAList])
@pytest.mark.parametrize("inside", [False, True])
def test_modules_that_are_not_listed_are_told(inside: bool, kind: type[Old]) -> None:
    net = nn.Sequential(nn.Tanh(), kind()) if inside else kind()
    context = ActivationCaching("1.linear" if inside else "linear").prepare(net)
    if kind is AsAList:
        with context as hooked:
            hooked(TensorDict({"input": torch.randn(4, 3)}, [4]))
        return
    with pytest.raises(PreparationError, match=rf"{kind.__name__}\) has a named_modules\(\) .*{HIDING[kind]}") as error:
        context.__enter__()
    assert str(error.value).startswith("submodule '1'" if inside else "the policy")


@pytest.mark.parametrize("kept", [lambda y: y, lambda y: [(y, {"y": y})], lambda y: Categorical(logits=y)])
def test_a_hooked_policy_that_keeps_a_graph_is_copied(kept: Callable) -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = nn.Linear(4, 3), None

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            self.last = kept(y)
            return y * 1.0

    method = Saliency(target=targets.logit(0), when="step")
    with method.prepare(Keeps(), in_keys=["x"], out_keys=["logits"]) as hooked:
        data = TensorDict({"x": torch.randn(5, 4)}, [5])
        expected = hooked(data.clone())
        found = copy.deepcopy(hooked)(data.clone())
        torch.testing.assert_close(found["attr", "x"], expected["attr", "x"])

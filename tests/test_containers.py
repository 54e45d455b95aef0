"""Modules that put out several tensors, in whatever holds them: the first is kept, changed and explained."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict, tensorclass
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.latent import ActivationPatching

X = torch.randn(3, 4)


class Pair(NamedTuple):
    hidden: Tensor
    extra: Tensor


Older = collections.namedtuple("Older", "hidden extra")


@dataclasses.dataclass
class Record:
    hidden: Tensor
    extra: Tensor
    name: str = "a name"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    hidden: Tensor
    extra: Tensor


@dataclasses.dataclass
class Derived:
    """Makes a field of the others, which a copy keeps as it was."""

    hidden: Tensor
    extra: Tensor
    made: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.made = 1


@tensorclass
class Rows:
    hidden: Tensor
    extra: Tensor


class Output(collections.OrderedDict):
    """As the outputs of transformers' models."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Plain:
    def __init__(self, hidden: Tensor, extra: Tensor) -> None:
        self.hidden, self.extra = hidden, extra


HOLDERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda *two: two,
    "list": lambda *two: list(two),
    "named": Pair,
    "namedtuple": Older,
    "mapping": lambda hidden, extra: {"hidden": hidden, "extra": extra},
    "output": lambda hidden, extra: Output(hidden=hidden, extra=extra),
    "dataclass": Record,
    "frozen": Frozen,
    "derived": Derived,
    "tensorclass": lambda hidden, extra: Rows(hidden=hidden, extra=extra, batch_size=[len(hidden)]),
    "tensordict": lambda hidden, extra: TensorDict({"hidden": hidden, "extra": extra}, [len(hidden)]),
    "in a tuple": lambda hidden, extra: (Record(hidden, extra), extra),
    "in a dataclass": lambda hidden, extra: Record({"hidden": hidden}, extra),  # type: ignore[arg-type]
}


def entry(value: Any, name: str) -> Tensor:
    if isinstance(value, (dict, TensorDict)):
        return value[name]
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return entry(value[0], name) if isinstance(value[0], Record) else value[name == "extra"]
    found = getattr(value, name)
    return found[name] if isinstance(found, dict) else found


class Encoder(nn.Module):
    def __init__(self, hold: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.hold = nn.Linear(4, 4), hold

    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        return self.hold(h, h.cumsum(-1))


class Net(nn.Module):
    def __init__(self, hold: Callable[[Tensor, Tensor], Any], read: str = "hidden") -> None:
        super().__init__()
        self.encoder, self.head, self.read = Encoder(hold), nn.Linear(4, 2), read

    def forward(self, x: Tensor) -> Tensor:
        return self.head(entry(self.encoder(x), self.read))


def policy_of(net: Net) -> TensorDictModule:
    return TensorDictModule(net, ["x"], ["y"])


SITE = "module.encoder"
STEERING = {
    "vector": SteeringVectors({SITE: torch.ones(4)}),
    "function": SteeringVectors(modules_to_steer=[SITE], steer_fn=lambda module_key, output: output + 1),
}


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("steering", STEERING)
def test_the_first_is_kept_changed_and_explained(steering: str, name: str) -> None:
    net = Net(HOLDERS[name])
    hidden = net.encoder.layer(X)
    explained = Saliency(target=lambda run: run.outputs["y"].sum(-1), input_modules=[SITE])
    with Compose(ActivationCaching(SITE), STEERING[steering], explained).prepare(policy_of(net)) as hooked:
        found = hooked.annotate(hooked(TensorDict({"x": X}, [3])))
    torch.testing.assert_close(found["cache", SITE], hidden)
    torch.testing.assert_close(found["y"], net.head(hidden + 1))
    torch.testing.assert_close(found["attr", SITE], net.head.weight.sum(0).expand(3, 4))
    with ActivationPatching([SITE]).prepare(policy_of(net)) as hooked:
        found = hooked(TensorDict({"x": X, ("patched", "x"): X + 1}, [3]))
    torch.testing.assert_close(found["patched", "y"], net.head(hidden))


@pytest.mark.parametrize("name", HOLDERS)
def test_an_intervention_where_others_are_read_is_refused(name: str) -> None:
    if name == "tensordict":
        pytest.skip("its entries have keys, and which is meant is the order of these")
    with STEERING["vector"].prepare(policy_of(Net(HOLDERS[name], "extra"))) as hooked:
        with pytest.raises(SiteError, match="returns several tensors, of which it changes the first"):
            hooked(TensorDict({"x": X}, [3]))


@pytest.mark.parametrize("method", [ActivationCaching(SITE), *STEERING.values(), ActivationPatching([SITE])])
def test_what_holds_no_tensor_that_is_found_says_what_may(method: Any) -> None:
    with method.prepare(policy_of(Net(Plain))) as hooked:
        with pytest.raises(
            InputError, match=rf"output of '{SITE}' \(Encoder\) is a Plain, .*dataclasses or TensorDicts"
        ):
            hooked(TensorDict({"x": X, ("patched", "x"): X}, [3]))

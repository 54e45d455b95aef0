"""What the user changes on his policy while it is hooked: attributes are followed, other modules are refused."""

from __future__ import annotations

import array
import collections
import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tdhook_rl import ActivationCaching, Saliency, targets
from tdhook_rl.errors import TieError

X = torch.randn(5, 4)


class Options:
    """Settings with defaults in the class, of which an object has none of its own at first."""

    gain, deep = 1.0, None


class Slots:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 1.0


class Policy(nn.Module):
    """Reads settings of several kinds, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 3)
        self.inner = nn.Sequential(nn.LeakyReLU(0.1))
        self.temperature = 1.0
        self.scales = {"adapter": 1.0}
        self.merged: list[str] = []
        self.config = SimpleNamespace(gain=1.0, deep=SimpleNamespace(offset=0.0))
        self.options, self.slots = Options(), Slots()
        self.table, self.gains = np.ones(3), {"row": np.ones((1, 3), np.float32)}
        self.recent: collections.deque[float] = collections.deque([1.0], maxlen=2)
        self.numbers = array.array("d", [1.0])
        self.stats, self.pair = {"scale": torch.ones(3), "all": [torch.ones(3)]}, (torch.ones(3),)
        self.held, self.record = SimpleNamespace(scale=torch.ones(3)), TensorDict({"scale": torch.ones(3)})
        self.offset = torch.zeros(3)
        self.act: Any = torch.tanh
        self.calls = 0
        self.seen: list[int] = []
        self.last_output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        h = self.act(self.drop(self.inner(self.first(x)))) * self.scales["adapter"] * self.config.gain
        h = h * self.options.gain * self.slots.gain * sum(self.recent) * self.numbers[0]
        y = self.last(h) / self.temperature + self.offset + self.config.deep.offset + len(self.merged) + self.calls
        y = y * torch.from_numpy(self.table).float() * torch.as_tensor(self.gains["row"])
        y = y * self.stats["scale"] * self.stats["all"][0] * self.pair[0] * self.held.scale * self.record["scale"]
        self.last_output = y
        return y


def anneal(policy: Policy) -> None:
    policy.temperature = 0.5


def slope(policy: Policy) -> None:
    policy.inner[0].negative_slope = 0.7


def drop_all(policy: Policy) -> None:
    policy.drop.p = 1.0


def rescale(policy: Policy) -> None:
    policy.scales["adapter"] = 2.0


def merge(policy: Policy) -> None:
    policy.merged.append("adapter")


def gain(policy: Policy) -> None:
    policy.config.gain = 3.0


def deep(policy: Policy) -> None:
    policy.config.deep.offset = 3.0


def first_of_its_own(policy: Policy) -> None:
    policy.options.gain = 3.0


def in_a_slot(policy: Policy) -> None:
    policy.slots.gain = 3.0


def in_an_array(policy: Policy) -> None:
    policy.table[1:] = 3.0


def in_an_array_in_a_dictionary(policy: Policy) -> None:
    policy.gains["row"] *= 2.0


def another_array(policy: Policy) -> None:
    policy.table = np.arange(3.0)


def in_a_deque(policy: Policy) -> None:
    policy.recent.append(2.0)


def in_plain_numbers(policy: Policy) -> None:
    policy.numbers[0] = 3.0


def other_tensor(policy: Policy) -> None:
    policy.offset = torch.ones(3)


def same_tensor(policy: Policy) -> None:
    policy.offset += 1


def tensor_in_a_dictionary(policy: Policy) -> None:
    policy.stats["scale"] *= 2


def tensor_in_a_list(policy: Policy) -> None:
    policy.stats["all"][0][1:] = 3.0


def tensor_in_a_tuple(policy: Policy) -> None:
    policy.pair[0].mul_(2.0)


def tensor_in_an_object(policy: Policy) -> None:
    policy.held.scale.data.mul_(2.0)


def tensor_in_a_tensordict(policy: Policy) -> None:
    policy.record["scale"].mul_(2.0)


def function(policy: Policy) -> None:
    policy.act = torch.sigmoid


CHANGES = (
    anneal, slope, drop_all, rescale, merge, gain, deep, first_of_its_own, in_a_slot, in_an_array,
    in_an_array_in_a_dictionary, another_array, in_a_deque, in_plain_numbers, other_tensor, same_tensor,
    tensor_in_a_dictionary, tensor_in_a_list, tensor_in_a_tuple, tensor_in_an_object, tensor_in_a_tensordict, function,
)  # fmt: skip


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_attributes_are_followed(change: Callable[[Policy], None], calls: int) -> None:
    policy = Policy()
    twin = copy.deepcopy(policy)
    method = Saliency(target=targets.logit(0), when="step")
    with method.prepare(policy, in_keys=["observation"], out_keys=["logits"]) as hooked:
        for _ in range(calls):
            torch.testing.assert_close(hooked(TensorDict({"observation": X}, [5]))["logits"], twin(X))
        for _ in range(2):
            for one in (policy, twin):
                change(one)
            found = hooked(TensorDict({"observation": X}, [5]))
            leaf = X.clone().requires_grad_()
            plain = twin(leaf)
            torch.testing.assert_close(found["logits"], plain)
            if plain[:, 0].sum().requires_grad:
                (right,) = torch.autograd.grad(plain[:, 0].sum(), leaf, allow_unused=True)
                torch.testing.assert_close(found["attr", "observation"], right)


@pytest.mark.parametrize("first", [True, False])
def test_what_a_forward_writes_and_the_mode_are_not_followed(first: bool) -> None:
    policy = Policy()
    twin = copy.deepcopy(policy)
    with ActivationCaching("first").prepare(policy, in_keys=["observation"], out_keys=["logits"]) as hooked:
        if first:
            torch.testing.assert_close(hooked(TensorDict({"observation": X}, [5]))["logits"], twin(X))
        for _ in range(3):
            policy(X)  # a loss of the user's
        policy.drop.eval()
        with pytest.warns(UserWarning, match="'drop' of the user's policy is in eval mode"):
            torch.testing.assert_close(hooked(TensorDict({"observation": X}, [5]))["logits"], twin(X))
        assert hooked.hooked_root.drop.training
        assert not policy.drop.training
    assert policy.calls == 3


def replace(net: nn.Sequential) -> None:
    net[1][0] = nn.Linear(8, 8)


def add(net: nn.Sequential) -> None:
    net.append(nn.Tanh())


def remove(net: nn.Sequential) -> None:
    del net[2]


def parametrise(net: nn.Sequential) -> None:
    parametrizations.weight_norm(net[0])


def mask(net: nn.Sequential) -> None:
    prune.random_unstructured(net[0], "weight", 0.5)


REPLACED = [(replace, "1.0"), (add, "3"), (remove, "2"), (parametrise, "0"), (mask, "0")]


@pytest.mark.parametrize(("change", "path"), REPLACED)
def test_another_structure_is_refused_by_name(change: Callable[[nn.Sequential], None], path: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 3))
    with Saliency(target=targets.logit(0), when="batch").prepare(
        net, in_keys=["observation"], out_keys=["logits"]
    ) as hooked:
        data = hooked(TensorDict({"observation": X}, [5]))
        change(net)
        with pytest.raises(TieError, match=f"{path}"):
            hooked(data.clone())
        with pytest.raises(TieError, match=f"{path}"):
            hooked.annotate(data)


EMPTY: dict[str, Callable[[], nn.Module]] = {
    "sequence": nn.Sequential, "list": nn.ModuleList, "dictionary": nn.ModuleDict, "bare module": nn.Module
}  # fmt: skip


class Extended(nn.Module):
    """Runs what it finds in a module that holds nothing at first."""

    def __init__(self, extra: nn.Module) -> None:
        super().__init__()
        self.layer, self.extra = nn.Linear(4, 3), extra

    def forward(self, x: Tensor) -> Tensor:
        for one in self.extra.children():
            x = one(x)
        return self.layer(x)


@pytest.mark.parametrize("name", EMPTY)
def test_a_first_module_in_what_holds_none_is_refused_by_name(name: str) -> None:
    net = Extended(EMPTY[name]())
    with ActivationCaching("layer").prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
        hooked(TensorDict({"observation": X}, [5]))
        net.extra.add_module("new", nn.Linear(4, 4))
        with pytest.raises(TieError, match=r"extra\.new"):
            hooked(TensorDict({"observation": X}, [5]))


class Still(nn.Module):
    """Without an attribute of its own, in whose forward the mode counts."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


MODES: dict[str, Callable[[nn.Sequential], Any]] = {
    "a layer": lambda net: net[1].eval(),
    "a class of one's own": lambda net: net[2].eval(),
    "all that is wrapped": lambda net: net.eval(),
}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_that_was_changed_inside_is_told_once(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.9), Still(), nn.Linear(8, 3))
    policy = TensorDictModule(net, ["observation"], ["logits"])
    with ActivationCaching("module.0").prepare(policy) as hooked:
        hooked(TensorDict({"observation": X}, [5]))
        MODES[name](net)
        with pytest.warns(UserWarning, match="'module[.0-9]*' of the user's policy is in eval mode and the hooked one"):
            hooked(TensorDict({"observation": X}, [5]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hooked(TensorDict({"observation": X}, [5]))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("path", ["", "0", "1"])
def test_hooks_that_were_put_in_or_taken_out_are_told_once(path: str, kind: str) -> None:
    for before in (False, True):  # the user hooks the policy while it is hooked, or takes a hook from it
        net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
        handle = getattr(net.get_submodule(path), kind)(lambda *_: None) if before else None
        with ActivationCaching("0").prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
            hooked(TensorDict({"observation": X}, [5]))
            handle.remove() if handle else getattr(net.get_submodule(path), kind)(lambda *_: None)
            said = f"hook was {'removed' if before else 'added'} at '{path}' of the user's policy"
            with pytest.warns(UserWarning, match=said):
                hooked(TensorDict({"observation": X}, [5]))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                hooked(TensorDict({"observation": X}, [5]))

"""Copies of modules, and lists of them, made in less time: equal to those of ``copy`` and torch."""

from __future__ import annotations

import collections
import copy
import gc
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tdhook_rl import ActivationCaching
from tdhook_rl.policies.module_copies import deep_copy_of, is_plain
from tdhook_rl.policies.tying import tied_clone
from tdhook_rl.sites.listed import modules, named_modules
from tests.zoo import ZOO

#: What the constructors of torch's layers take, by the names of their arguments.
GIVEN = {
    "in_features": 4, "out_features": 4, "in1_features": 4, "in2_features": 4, "in_channels": 4, "out_channels": 4,
    "kernel_size": 2, "num_features": 4, "num_channels": 4, "num_groups": 2, "normalized_shape": 4, "d_model": 4,
    "nhead": 2, "embed_dim": 4, "num_heads": 2, "input_size": 4, "hidden_size": 4, "num_embeddings": 4, "groups": 2,
    "embedding_dim": 4, "output_size": 2, "padding": 1, "size": 2, "upscale_factor": 2, "downscale_factor": 2,
    "threshold": 0.1, "value": 0.0, "dim": 1, "unflattened_size": (2, 2), "scale_factor": 2, "n_classes": 4,
    "cutoffs": [2], "min_val": -1.0, "max_val": 1.0, "num_layers": 1, "head_bias": True, "dim_feedforward": 8,
}  # fmt: skip

LARGE = 1_000_000


def layers() -> dict[str, nn.Module]:
    """Every layer of torch that can be made of these."""
    found: dict[str, nn.Module] = {}
    for name, kind in vars(nn).items():
        if not isinstance(kind, type) or not issubclass(kind, nn.Module) or kind is nn.Module:
            continue
        if "Lazy" in name or name in ("Container", "NLLLoss2d"):  # without shapes; deprecated
            continue
        code = kind.__init__.__code__
        names = code.co_varnames[1 : code.co_argcount]
        needed = names[: len(names) - len(kind.__init__.__defaults__ or ())]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made = kind(**{one: GIVEN[one] for one in needed})
            except (KeyError, TypeError, ValueError):
                continue
            if sum(one.numel() for one in made.parameters()) < LARGE:
                found[name] = made
    return found


LAYERS = layers()


class Own(nn.Linear):
    """A class of the user's, in whose objects others are."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.inner, self.beside = nn.Tanh(), [nn.Linear(4, 4)]


class Agent(nn.Module):
    """As users write them: layers of torch in a class of their own, one of which knows the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.ModuleDict({"actor": nn.Linear(4, 2)})
        self.norm, self.again, self.calls = nn.BatchNorm1d(4), self.trunk[0], [self.trunk]
        self.trunk[1].__dict__["whole"] = self


class InItsOwnWay(nn.Tanh):
    def __deepcopy__(self, memo: dict[int, Any]) -> InItsOwnWay:
        made = InItsOwnWay()
        made.copied = True
        return made


def frozen() -> nn.Module:
    return nn.Linear(4, 4).requires_grad_(False)


def with_hooks() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    net[0].register_forward_hook(print)
    net.register_forward_pre_hook(print, with_kwargs=True)
    return net


def twice() -> nn.Module:
    one = nn.Linear(4, 4)
    return nn.Sequential(one, nn.Sequential(nn.Tanh(), one))


def with_things() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    net[0].seen, net[0].scale, net[0].table = [1, [2]], torch.ones(4), {"a": torch.zeros(2)}
    net[1].act, net.first, net.order = torch.tanh, net[0], collections.OrderedDict(b=1, a=2)
    net.empty = net[1].empty = {}
    net[1].pair = (net[0], 1)
    return net


def weights_elsewhere() -> nn.Module:
    net = nn.Linear(4, 4)
    net.also = net.weight
    net.register_buffer("mean", torch.zeros(4), persistent=False)
    return net


def compiled() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].compile(backend="eager")
    return net


def of_functions() -> nn.Module:
    return TensorDictModule(lambda x: x + 1, in_keys=["observation"], out_keys=["y"])


def of_params() -> nn.Module:
    return nn.ModuleList([nn.Tanh(), TensorDictParams(TensorDict({"w": torch.ones(3)}))])


MADE: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda one=one: copy.deepcopy(one)) for name, one in LAYERS.items()},
    **{
        one.__name__: one for one in (frozen, with_hooks, twice, with_things, weights_elsewhere, compiled, of_functions)
    },
    "of_params": of_params,
    "own": Own,
    "an agent": Agent,
    "an agent in a chain": lambda: nn.Sequential(nn.Linear(4, 4), Agent()),
    "own in a chain": lambda: nn.Sequential(Own(), nn.ReLU()),
    "in its own way": lambda: nn.Sequential(InItsOwnWay(), nn.Linear(4, 4)),
    "parametrized": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4))),
    "double": lambda: nn.Linear(4, 4).double(),
    **{f"zoo: {name}": entry.build for name, entry in ZOO.items()},
}


def described(value: Any, seen: dict[int, int]) -> Any:
    """All that an object holds, in words; what stands in two places is one."""
    if isinstance(value, (bool, int, float, str, bytes, type(None), type, torch.dtype, torch.device)):
        return repr(value)
    if id(value) in seen:
        return f"as {seen[id(value)]}"
    seen[id(value)] = len(seen)
    kind = type(value).__qualname__
    if isinstance(value, Tensor):
        return kind, str(value.dtype), value.requires_grad, value.shape, None if value.is_meta else value.sum().item()
    if isinstance(value, dict):
        return kind, [(described(key, seen), described(one, seen)) for key, one in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return kind, [described(one, seen) for one in value]
    if isinstance(value, nn.Module) or hasattr(value, "__dict__"):
        held = vars(value) if not callable(value) or isinstance(value, nn.Module) else {}
        return kind, [(name, described(one, seen)) for name, one in held.items()]
    return kind


def held(module: nn.Module) -> set[int]:
    """What a deep copy makes anew: modules and the mutable things that they hold."""
    found: set[int] = set()
    for child in module.modules():
        found |= {id(child), id(vars(child))} | {
            id(one) for one in vars(child).values() if isinstance(one, (dict, list, set, Tensor, types.FunctionType))
        }
    return found


@pytest.mark.parametrize("name", MADE)
def test_copies_and_lists_are_those_of_copy_and_torch(name: str) -> None:
    module = MADE[name]()
    stores = [store for child in module.modules() for store in (child._parameters, child._buffers)]
    for memo in ({}, {id(one): one for store in stores for one in store.values()}):
        expected, made = copy.deepcopy(module, dict(memo)), deep_copy_of(module, dict(memo))
        assert described(made, {}) == described(expected, {})
        assert held(module) & held(made) == held(module) & held(expected)
    assert named_modules(module) == list(module.named_modules())
    assert modules(module) == list(module.modules())


def test_plain_layers_hold_nothing_else() -> None:
    plain = {name for name, layer in LAYERS.items() if is_plain(layer)}
    assert {"Linear", "Conv2d", "Tanh", "ReLU", "LayerNorm", "Embedding", "Flatten", "Dropout"} <= plain
    assert plain.isdisjoint({"BatchNorm1d", "GRU", "MultiheadAttention"})
    for name in plain:
        layer = LAYERS[name]
        assert [*layer.children(), *layer.buffers()] == []
        assert all(one.requires_grad for one in layer.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.requires_grad_(False), lambda one: one.register_buffer("mean", torch.zeros(2)),
        lambda one: one.register_forward_hook(print), lambda one: one.add_module("inner", nn.Tanh()),
        lambda one: setattr(one, "scale", torch.ones(2)), lambda one: setattr(one, "act", torch.tanh),
        lambda one: setattr(one, "seen", [1]), lambda one: setattr(one, "pair", (torch.ones(2), 1)),
        lambda one: setattr(one, "__class__", Own), lambda one: setattr(one, "rows", {"mean": torch.ones(2)}),
    ],
)  # fmt: skip
def test_what_holds_more_is_not_plain(change: Callable[[nn.Module], Any]) -> None:
    layer = nn.Linear(4, 4)
    assert is_plain(layer)
    change(layer)
    assert not is_plain(layer)


class Lists(nn.Module):
    """Lists what it holds beside its modules too, and itself last."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.others = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), [nn.Linear(4, 4)]

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        memo = set() if memo is None else memo
        dot = f"{prefix}." if prefix else ""
        yield from self.net.named_modules(memo, f"{dot}net", remove_duplicate)
        yield from ((f"{dot}others.{index}", one) for index, one in enumerate(self.others) if one not in memo)
        yield prefix, self


@pytest.mark.parametrize("build", [Lists, lambda: nn.Sequential(nn.Tanh(), Lists(), nn.ModuleDict({"a": Lists()}))])
def test_lists_of_classes_that_list_by_themselves(build: Callable[[], nn.Module]) -> None:
    module = build()
    assert named_modules(module) == list(module.named_modules())
    assert modules(module) == list(module.modules())


def test_views_of_trained_weights_are_tied() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.view, self.rows = self.first.weight.detach()[0], {"last": self.last.weight.detach()}

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.view + self.rows["last"].sum())

    net = Views()
    own = tied_clone(net)
    assert own.view is net.view
    assert own.rows["last"] is net.rows["last"]
    x = torch.randn(3, 4)
    with ActivationCaching("first").prepare(net) as hooked:
        with torch.no_grad():
            net.first.weight.mul_(2)
            net.last.weight.add_(1)
        assert torch.equal(hooked(TensorDict({"input": x}, 3))["output"], net(x))


def test_classes_are_not_kept() -> None:
    def local() -> weakref.ref[type]:
        class Local(nn.Linear):
            pass

        Local.__module__ = nn.Linear.__module__  # as the classes of hooked modules have it
        deep_copy_of(nn.Sequential(Local(2, 2)), {})
        assert not is_plain(Local(2, 2))
        return weakref.ref(Local)

    gone = local()
    gc.collect()
    assert gone() is None

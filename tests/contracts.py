"""What ``tdhook_rl.internals`` expects of others: for each of its names, a use of it against what is built on it.

``CONTRACTS`` maps ``(file, name)`` to a function that raises where the installed version does something else.
"""

from __future__ import annotations

import abc
import copy
import tempfile
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictParams,
    TensorDictSequential,
    dispatch,
    set_skip_existing,
)
from torch import nn

from tdhook_rl.internals import python_names, tensordict_names
from tdhook_rl.internals.attributes import OVERRIDDEN

Contract = Callable[[], None]
CONTRACTS: dict[tuple[str, str], Contract] = {}


def contract(file: str, *names: str) -> Callable[[Contract], Contract]:
    def add(function: Contract) -> Contract:
        CONTRACTS.update({(file, name): function for name in names})
        return function

    return add


# ---------------------------------------------------------------------- attributes


@contract("attributes", "_parameters", "_buffers", "_modules")
def stores_of_a_module() -> None:
    module = nn.BatchNorm1d(2, affine=False)
    module.child = nn.Linear(2, 2, bias=False)
    assert module._parameters == {"weight": None, "bias": None}
    assert list(module._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert module._modules == {"child": module.child}
    new = nn.Parameter(torch.zeros(2, 2))
    module.child._parameters["weight"] = new
    module._buffers["running_mean"] = mean = torch.ones(2)
    module._modules["child"] = child = nn.Sequential(module.child)
    assert module.child is child
    assert child[0].weight is new
    assert module.running_mean is mean


@contract("attributes", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
def hooks_of_a_module() -> None:
    module = nn.Linear(2, 2)
    hook = print
    handle = module.register_forward_hook(hook)
    module.register_forward_pre_hook(hook)
    module.register_full_backward_hook(hook)
    module.register_full_backward_pre_hook(hook)
    for store in (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    ):  # fmt: skip
        assert list(store.values()) == [hook]
    handle.remove()
    assert not module._forward_hooks


@contract("attributes", "_version", "_base")
def versions_and_views() -> None:
    tensor = torch.zeros(3)
    before = tensor._version
    tensor[1:].add_(1)
    assert tensor._version == before + 1
    assert tensor[1:]._base is tensor
    assert tensor._base is None


@contract("attributes", "_getframe", "_exit", "_fields", "_replace")
def documented_by_python() -> None:
    import os
    import sys

    assert sys._getframe(0).f_code.co_name == "documented_by_python"
    assert callable(os._exit)
    pair = namedtuple("Pair", "a b")(1, 2)
    assert pair._fields == ("a", "b")
    assert pair._replace(b=3) == (1, 3)


@contract("attributes", *OVERRIDDEN)
def methods_that_others_call() -> None:
    from torchrl.envs import EnvBase

    from tdhook_rl.envs import CueCorners

    called: list[str] = []

    class Env(CueCorners):
        def _reset(self, *args: Any, **kwargs: Any) -> Any:
            called.append("_reset")
            return super()._reset(*args, **kwargs)

        def _step(self, data: Any) -> Any:
            called.append("_step")
            return super()._step(data)

        def _set_seed(self, seed: int | None) -> None:
            called.append("_set_seed")
            super()._set_seed(seed)

    class Module(TensorDictModule):
        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            called.append("_apply")
            return super()._apply(*args, **kwargs)

        def _write_to_tensordict(self, *args: Any, **kwargs: Any) -> Any:
            called.append("_write_to_tensordict")
            return super()._write_to_tensordict(*args, **kwargs)

    env = Env()
    env.set_seed(0)
    env.step(env.rand_action(env.reset()))
    Module(nn.Linear(2, 2), ["a"], ["b"]).double()(TensorDict({"a": torch.zeros(2, dtype=torch.double)}))
    assert set(called) == {*OVERRIDDEN} - {"_supports_set_state"}
    assert EnvBase._supports_set_state is False


# ---------------------------------------------------------------------- Python


@contract("python_names", "codes", "parser")
def parts_of_an_expression() -> None:
    codes, parser = python_names.codes, python_names.parser
    [(operator, (low, high, body))] = parser.parse("(?:a|bc)+")
    assert operator is codes.MAX_REPEAT
    assert (low, high > 1000, isinstance(body, parser.SubPattern)) == (1, True, True)
    assert body[0][0] is codes.BRANCH
    lazy, possessive, reference = (parser.parse(one)[-1][0] for one in ("a+?", "a++", "(a)\\1"))
    assert (lazy, possessive, reference) == (codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT, codes.GROUPREF)
    assert parser.parse("(a)(?(1)b|c)")[-1][0] is codes.GROUPREF_EXISTS


@contract("python_names", "ABC_STATE")
def what_an_abstract_class_holds() -> None:
    added = vars(abc.ABCMeta("Abstract", (), {})).keys() - vars(type("Plain", (), {})).keys()
    assert {name for name in added if not name.startswith(python_names.ABC_STATE)} <= {"__abstractmethods__"}


class Copied:
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return python_names.copied_as_pickled(self, memo)


@contract("python_names", "copied_as_pickled")
def copies() -> None:
    one = Copied()
    one.items, one.self = [1], one
    other = copy.deepcopy(one)
    assert other is not one
    assert (other.items, other.self) == ([1], other)
    assert other.items is not one.items


@contract("python_names", "is_owned")
def owners_of_a_lock() -> None:
    lock, seen = threading.RLock(), []
    with lock:
        thread = threading.Thread(target=lambda: seen.append(python_names.is_owned(lock)))
        thread.start()
        thread.join()
        seen.append(python_names.is_owned(lock))
    assert [*seen, python_names.is_owned(lock)] == [False, True, False]


class Declared(Protocol):
    x: int


@contract("python_names", "is_protocol")
def protocols() -> None:
    assert python_names.is_protocol(Declared)
    assert not any(map(python_names.is_protocol, (int, type("Kept", (Declared,), {}), list[int])))


# ---------------------------------------------------------------------- tensordict


@contract("tensordict_names", "new_unsafe", "set_str", "has_names", "store_of")
def unchecked_entries() -> None:
    names, value = tensordict_names, torch.zeros(2)
    data = names.new_unsafe({"a": value}, batch_size=torch.Size([2]), names=None)
    assert type(data) is TensorDict
    assert (data["a"] is value, data.batch_size, data.device, names.has_names(data)) == (True, (2,), None, False)
    names.set_str(data, "b", value, inplace=False, validated=True)
    assert names.store_of(data) == {"a": value, "b": value}
    names.store_of(data)["a"] = other = torch.ones(2)
    assert data["a"] is other
    assert names.has_names(names.new_unsafe({}, batch_size=torch.Size([2]), names=["time"]))


@contract("tensordict_names", "WRITE", "CALL_METHODS", "written_by", "has_options", "selects")
def calls_of_a_module() -> None:
    names = tensordict_names
    called: list[str] = []

    def noting(name: str) -> Any:
        method = getattr(TensorDictModule, name)
        return lambda self, *args, **kwargs: (called.append(name), method(self, *args, **kwargs))[1]

    noted = type("Noted", (TensorDictModule,), {name: noting(name) for name in names.CALL_METHODS})
    noted(nn.Linear(2, 2), ["a"], ["b"])(TensorDict({"a": torch.zeros(2)}))
    assert set(called) == set(names.CALL_METHODS)
    assert names.written_by(noted) is getattr(noted, names.WRITE)
    assert names.written_by(nn.Linear) is None
    plain = TensorDictModule(nn.Linear(2, 2), ["a"], ["b"])
    by_name = TensorDictModule(lambda x: x, {"a": "x"}, ["b"])
    padded = TensorDictModule(nn.Linear(2, 2), ["a"], ["b"], get_kwargs={"as_padded_tensor": True})
    assert [names.has_options(one) for one in (plain, by_name, padded)] == [False, True, True]
    chosen = TensorDictSequential(plain, TensorDictModule(nn.Linear(2, 2), ["b"], ["c"]), selected_out_keys=["c"])
    assert [names.selects(one) for one in (TensorDictSequential(plain), chosen)] == [False, True]


@contract("tensordict_names", "DISPATCH", "SKIP")
def code_of_decorators() -> None:
    class Doubles(TensorDictModuleBase):
        in_keys = out_keys = ("x",)

        @dispatch(auto_batch_size=False)
        def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
            return tensordict.set("x", 2 * tensordict["x"])

    assert Doubles.forward.__code__ is tensordict_names.DISPATCH
    assert Doubles.forward.__wrapped__.__code__ not in (tensordict_names.DISPATCH, tensordict_names.SKIP)
    for kind in (TensorDictModule, TensorDictSequential, ProbabilisticTensorDictModule):
        dispatching, skipping = kind.forward, kind.forward.__wrapped__
        assert dispatching.__code__ is tensordict_names.DISPATCH, kind
        assert skipping.__code__ is tensordict_names.SKIP, kind
        assert not hasattr(skipping.__wrapped__, "__wrapped__"), kind
    module = TensorDictModule(nn.Identity(), in_keys=["x"], out_keys=["y"])
    skipping = TensorDictModule.forward.__wrapped__
    with set_skip_existing(True):
        found = skipping(module, TensorDict({"x": torch.zeros(2), "y": torch.ones(2)}, 2))
        assert bool(found["y"].all())  # it was skipped, and that is what this decorator is for
        found = skipping.__wrapped__(module, TensorDict({"x": torch.zeros(2), "y": torch.ones(2)}, 2))
    assert not bool(found["y"].any())


@contract("tensordict_names", "file_stem")
def files_of_entries() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for key in ("plain", "a b", "module.0", "half/half", "%"):
            TensorDict({key: torch.ones(2)}).memmap(Path(folder))
            assert (Path(folder) / f"{tensordict_names.file_stem(key)}.memmap").is_file(), key


@contract("tensordict_names", "params_with")
def parameters_in_a_tensordict() -> None:
    params = TensorDictParams(TensorDict.from_module(nn.Linear(2, 2)))
    new = torch.zeros(2, requires_grad=True) * 1
    for locked in (False, True):
        if locked:
            params.lock_()
        made = tensordict_names.params_with(params, {id(params["bias"]): new})
        assert made["bias"] is new
        assert made["weight"] is params["weight"]
        assert isinstance(params["bias"], nn.Parameter)
        assert (made.is_locked, made.training) == (locked, True)
        assert [name for name, _ in made.named_parameters()] == ["weight"]

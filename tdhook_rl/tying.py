"""The tied clone: fresh module objects that hold the very same tensors.

Hooks, switches and training flags then belong to the clone alone, while an optimiser step on the user's
policy is seen by the clone at once and weight sync finds the structure it knows.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from typing import Any, TypeVar

import torch
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

from tdhook_rl.errors import PreparationError, TieError

__all__ = ["Tie", "tied_clone"]

M = TypeVar("M", bound=nn.Module)


def tied_clone(module: M) -> M:
    """A structural deep copy of a module that shares its parameters, buffers and generators.

    Raises:
        PreparationError: for compiled, lazy or scripted modules, and for modules that do not deep-copy.
        TieError: if a parameter or buffer of the copy is not the same object as the original's.
    """
    _refuse_uncopyable(module)
    memo: dict[int, Any] = {}
    kept = []  # deepcopy returns memo[id(x)], so whatever is listed here is shared instead of copied
    for child in module.modules():
        if isinstance(child, TensorDictParams):
            kept.append(child)
        kept.extend(child.parameters(recurse=False))
        kept.extend(child.buffers(recurse=False))
        # Plain tensor attributes and generators are state of the policy as well.
        kept.extend(value for value in vars(child).values() if isinstance(value, (Tensor, torch.Generator)))
    memo.update((id(item), item) for item in kept)
    try:
        clone = copy.deepcopy(module, memo)
    except Exception as error:
        raise PreparationError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}). A hooked policy is a copy "
            "of the modules over the same tensors; remove what does not deep-copy (locks, open files, "
            "non-leaf tensors), or build and prepare the policy inside `policy_factory`"
        ) from error
    untied = [name for name, tensor in _tensors(module).items() if _tensors(clone).get(name) is not tensor]
    if untied:
        raise TieError(
            f"the copy of {type(module).__name__} does not share {untied[0]!r} (and {len(untied) - 1} more) with the "
            "original: a module with its own __deepcopy__ duplicates its tensors"
        )
    return clone


class Tie:
    """Watches that the user's policy still holds the tensors that its clone holds.

    ``load_state_dict(assign=True)`` and ``.to(dtype)`` put new tensors into the original, after which the
    clone would go on with the old ones in silence.
    """

    def __init__(self, original: nn.Module) -> None:
        self._original = weakref.ref(original)
        self._entries = [
            (store, name, tensor, f"{prefix}.{name}" if prefix else name)
            for prefix, child in original.named_modules()
            for store in (child._parameters, child._buffers)
            for name, tensor in store.items()
            if tensor is not None
        ]
        self._warned = False

    def check(self, clone: nn.Module) -> None:
        """Raise :class:`TieError` if the original was given other tensors; warn if train/eval differ."""
        # While a loss runs, another thread may see the original with target weights swapped in.
        if threading.current_thread() is not threading.main_thread():
            return
        for store, name, tensor, path in self._entries:
            if store.get(name) is not tensor:
                raise TieError(
                    f"the user's policy holds another tensor at {path!r} than when it was prepared "
                    "(load_state_dict(assign=True) and .to(...) replace tensors): prepare it again"
                )
        original = self._original()
        if original is not None and original.training is not clone.training and not self._warned:
            self._warned = True
            warnings.warn(
                f"the user's policy is in {'train' if original.training else 'eval'} mode and the hooked one in "
                f"{'train' if clone.training else 'eval'} mode: train() and eval() act only where called",
                stacklevel=4,
            )

    def original(self) -> nn.Module | None:
        return self._original()


def _refuse_uncopyable(module: nn.Module) -> None:
    from torch._dynamo import OptimizedModule

    for path, child in module.named_modules():
        where = f"submodule {path!r} of the policy" if path else "the policy"
        if isinstance(child, OptimizedModule) or child._compiled_call_impl is not None:
            raise PreparationError(
                f"{where} was compiled before it was prepared, so hooks would never fire: prepare the plain module "
                "(`compiled._orig_mod`) and compile the hooked one, or pass `compile_policy` to the collector"
            )
        if isinstance(child, torch.jit.ScriptModule):
            raise PreparationError(f"{where} is a ScriptModule, which cannot be hooked: prepare the plain nn.Module")
        lazy = [
            name
            for name, tensor in [*child._parameters.items(), *child._buffers.items()]
            if torch.nn.parameter.is_lazy(tensor)
        ]
        if lazy:
            raise PreparationError(
                f"{where} ({type(child).__name__}) is lazy and {lazy[0]!r} has no shape yet: "
                "call the policy once on a batch, then prepare it"
            )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor
        for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in named
    }

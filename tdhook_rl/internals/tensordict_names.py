"""What is used of the insides of tensordict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams
from tensordict.utils import _encode_key_for_filesystem
from torch import Tensor

#: A TensorDict of entries, batch size and names that are known to fit: in each call, the checks and conversions of the
#: public constructor would cost as much as a layer.
new_unsafe = TensorDict._new_unsafe

#: ``(data, key, value, inplace=False, validated=True)``: an entry at the top that is known to fit, set without the
#: checks and conversions of ``set``.
set_str = TensorDict._set_str

#: Whether the dimensions of a TensorDict are named; ``names`` makes a list of ``None`` to say that they are not.
has_names = TensorDict._has_names

#: The method of a ``TensorDictModule`` by which its outputs become entries.
WRITE = "_write_to_tensordict"

#: What a call of a ``TensorDictModule`` passes: where all are its own, it does what tensordict says and nothing else.
CALL_METHODS = ("forward", "_call_module", WRITE, "__call__")

#: The code of ``dispatch``, which all forwards share that are decorated by it: nothing else tells which are.
DISPATCH = TensorDictModule.forward.__code__

#: The code of the decorator below it, which skips existing entries.
SKIP = TensorDictModule.forward.__wrapped__.__code__  # type: ignore[attr-defined]


def file_stem(key: str) -> str:
    """The name without its ending of the file that ``memmap`` writes of an entry: nothing public says where a key lies
    whose letters no file system takes."""
    return _encode_key_for_filesystem(key)


def written_by(kind: type) -> Any:
    """The method of a class of modules by which outputs become entries; ``None`` for other modules."""
    return getattr(kind, WRITE, None)


def has_options(module: TensorDictModule) -> bool:
    """Whether a ``TensorDictModule`` calls its module by keywords, or reads entries with options: both are private."""
    return module._kwargs is not None or bool(module._get_kwargs)


def selects(sequence: TensorDictModule) -> bool:
    """Whether a sequence of modules was made to leave some of its outputs out (``selected_out_keys``)."""
    return bool(getattr(sequence, "_select_before_return", False))


def store_of(data: TensorDict) -> dict[str, Any]:
    """The dictionary in which a TensorDict keeps its entries: to notice and undo that one is put in another's place,
    and to read one at the top without the detour of ``get`` through nested keys."""
    return data._tensordict  # type: ignore[attr-defined]


def params_with(params: TensorDictParams, new: Mapping[int, Tensor]) -> TensorDictParams:
    """A ``TensorDictParams`` with other tensors, by the ``id`` of the old, that need be no parameters.

    Its public ``set`` would make parameters of them, and replace them in the TensorDict that the original reads.
    """
    copied = TensorDictParams(params)
    copied.no_convert, copied._lock_content = params.no_convert, params._lock_content
    copied.training = params.training
    data = copied._param_td.unlock_()
    for key, tensor in list(data.items(True, True)):
        if id(tensor) in new:
            data.set(key, new[id(tensor)])
    if params._param_td.is_locked:
        data.lock_()
    copied._reset_params()
    if params.is_locked:
        copied.lock_()
    return copied

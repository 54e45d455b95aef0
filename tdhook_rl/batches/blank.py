"""A batch that is not annotated, with the keys that an annotated one has: NaN, and masks that say so.

Buffers keep the keys of their first batch. What a later batch leaves out stays there as it was: results of the row that
lay there before, or memory that nobody has written, with a mask that may be true.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.batches.annotation import annotate
from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import InputError
from tdhook_rl.replaying.batching import shallow_copy
from tdhook_rl.sites.missing import missing_value

Key = tuple[str, ...]
#: Of each result its shape without the batch, and its dtype.
Forms = Mapping[Key, tuple[torch.Size, torch.dtype]]


def forms_of(policy: Any, data: TensorDictBase) -> Forms:
    """The forms of the results that ``annotate`` would write into a batch; one of its rows is computed to see them.

    Raises:
        InputError: if the batch has no rows.
    """
    if not data.batch_size.numel():
        raise InputError(f"there is nothing to annotate: the batch has no rows, its shape is {tuple(data.batch_size)}")
    rows = data.reshape(-1) if data.ndim != 1 else data
    real = real_rows(rows)
    first = 0 if real is None or not bool(real.any()) else int(real.nonzero()[0])
    # The row is not one of those that a schedule counts.
    counted = [one for one in policy._hooked.bound if one.plan is not None]
    before = [(dict(one._counts), one._silent) for one in counted]
    try:
        return known_forms(policy, annotate(policy, rows[first : first + 1], None, "ignore"))
    finally:
        for one, (counts, silent) in zip(counted, before, strict=True):
            one._counts, one._silent = counts, silent


def known_forms(policy: Any, annotated: TensorDictBase) -> Forms:
    """The forms of the results in a batch that was annotated."""
    values = {key: annotated.get(key, None) for key in policy.result_keys}
    dims = annotated.ndim
    return {key: (v.shape[dims:], v.dtype) for key, v in values.items() if isinstance(v, Tensor)}


def without_results(policy: Any, data: TensorDictBase, forms: Forms) -> TensorDict:
    """What a batch lacks of the results, in the forms of :func:`forms_of`, not computed; results that it has stay."""
    result = shallow_copy(data)
    lacking = {key: form for key, form in forms.items() if data.get(key, None) is None}
    roots = {key[0] for key in lacking if key[0] != "computed"}
    device = next((value.device for value in data.values(True, True) if isinstance(value, Tensor)), None)
    filled: dict[Key, Tensor] = {}
    for key, (shape, dtype) in forms.items():
        of_root = key[0] == "computed" and key[1].removesuffix(".stamp") in roots
        if key in lacking or of_root:
            value = 0 if is_stamp(key) else missing_value(dtype)
            filled[key] = torch.full((*data.batch_size, *shape), value, dtype=dtype, device=device)
    nodes: dict[str, TensorDictBase] = {}
    for key, value in filled.items():
        if len(key) == 1:  # a number for each row, such as the convergence delta
            result.set(key[0], value)
            continue
        if key[0] not in nodes:
            node = data.get(key[0], None)
            nodes[key[0]] = TensorDict({}, batch_size=data.batch_size) if node is None else shallow_copy(node)
        nodes[key[0]].set(key[1:], value)
    for root, node in nodes.items():
        result.set(root, node)
    return result

"""The results of a call are written: with a mask of the rows that are real, and a stamp of whose they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.provenance import Key
from tdhook_rl.calls.writing import set_entries

__all__ = ["publish_step"]


def publish_step(
    policy: HookedPolicy, source: TensorDictBase, output: TensorDictBase, results: Mapping[Key, Tensor]
) -> None:
    """Write the results of one call, which rows of them are real, and whose they are.

    Args:
        policy: the hooked policy.
        source: what it was called with.
        output: what it gave, in which the results are written.
        results: by key; the masks of schedules among them.
    """
    if not results:
        return
    own = policy._hooked.provenance
    trace = None
    # In a compiled graph, and inside vmap, rows are nobody's: what is read of them later is computed again.
    traced = torch.compiler.is_compiling() or policy._hooked.runtime.level >= 0
    if not traced:
        trace = own.trace(source) if own.note_weights(policy) else None
    by_root: dict[str, list[Tensor]] = {}
    for key, value in results.items():
        if key[0] != "computed":
            by_root.setdefault(key[0], []).append(value)
    marks: dict[Key, Tensor] = {}
    for root, values in by_root.items():
        mask_key, stamped = own.marks[root]
        marks[mask_key] = mask = own.mask(root, values, source, results.get(mask_key), traced)
        if stamped is not None:
            marks[stamped] = mask.to(torch.float32) * 0 if trace is None else own.stamp(root, trace, output)
    set_entries(output, {**results, **marks})

"""Every row of a replay buffer annotated; the results are kept beside it and an interrupted analysis goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from tdhook_rl.annotation import OnMismatch
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.replay.reading import Reader
from tdhook_rl.replay.results import Results

__all__ = ["analyze"]

#: Entries that are computed again before an analysis goes on, and how far they may differ.
CHECKED = 32
RELATIVE, OF_LARGEST = 1e-3, 1e-4

Progress = Callable[[int, int], None]


def analyze(
    hooked: Any,
    buffer: ReplayBuffer,
    folder: str | Path,
    *,
    batch_size: int = 1024,
    on_mismatch: OnMismatch = "warn",
    progress: Progress | None = None,
) -> TensorDict:
    """Annotate every row of a buffer and keep the results in memory-mapped files beside it.

    Called again with the folder of an analysis that was interrupted, by Ctrl-C or by a machine, it goes on from the
    entry after the last that was written; of one that is finished, it returns the results. In both cases some of the
    stored entries are computed again first, so that results of other weights, methods or data are never mixed.

    Args:
        hooked: a hooked policy; its configured methods are computed.
        buffer: any TorchRL buffer of TensorDicts; it is only read, in storage order, as its ``sample`` gives rows.
        folder: where the results go: a new or empty folder, or that of an analysis to go on with.
        batch_size: rows read at once.
        on_mismatch: as of ``annotate``: what to do where the stored outputs are not what the policy computes now.
        progress: called with the entries that are done, and all, before the first batch and after each.

    Returns:
        a memory-mapped TensorDict of the result keys, entry ``i`` for storage entry ``i``; read it again with
        :func:`load_results`.

    Raises:
        ArtifactError: if the folder holds something else, cannot be written, or was written by another analysis.
        InputError: if the buffer is empty, an ensemble, does not hold TensorDicts, or is written to meanwhile.

    Example:
        >>> import tempfile
        >>> from torchrl.data import LazyTensorStorage
        >>> from tdhook_rl import Saliency
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import make_actor
        >>> actor, buffer = make_actor(), ReplayBuffer(storage=LazyTensorStorage(100))
        >>> data = CueCorners(batch_size=[5]).rollout(20, actor, break_when_any_done=False)
        >>> _ = buffer.extend(data.reshape(-1).detach())
        >>> with tempfile.TemporaryDirectory() as folder, Saliency().prepare(actor) as policy:
        ...     analyze(policy, buffer, folder)["attr", "observation"].shape
        torch.Size([100, 90])
    """
    folder = Path(folder)
    reader = Reader(buffer, whole=_explains_trajectories(hooked))
    size = reader.size
    written = _writes(buffer)
    results = Results.find(folder)
    if results is not None:
        _require_same(results, hooked, reader)
    done = 0 if results is None else results.page.done
    if progress is not None:
        progress(done, size)
    lacking = 0
    for first, last in reader.chunks(batch_size, start=done):
        index = torch.arange(first, last)
        found = _results_of(hooked, reader.read(index), on_mismatch)
        if bool((incomplete := reader.incomplete(index)).any()):
            found = without(found, incomplete)
            lacking += int(incomplete.sum())
        if _writes(buffer) != written:
            raise InputError(
                f"the buffer was written to while it was analysed (at entry {first} of {size}), so results would not "
                "belong to its rows: analyse a buffer that rests, or a copy of it"
            )
        if results is None:
            results = Results.create(folder, found, size, _facts(hooked))
        results.write(first, found)
        if progress is not None:
            progress(first + len(found), size)
    if lacking:
        warnings.warn(
            f"{lacking} of {size} rows have no results (NaN, and a false mask): {reader.looking} reads rows before "
            "them that were written over, so what the policy saw there is no longer known",
            stacklevel=2,
        )
    assert results is not None  # there is at least one entry
    return results.data


def _explains_trajectories(hooked: Any) -> bool:
    """Whether chunks have to end where trajectories do.

    Raises:
        InputError: if a method needs all rows at once.
    """
    for one in hooked._hooked_bound:
        if getattr(one, "whole_batch", False):
            name = type(one).__name__.removeprefix("_Bound")
            raise InputError(
                f"the results of {name} ({', '.join(map(repr, one.result_keys))}) are of all rows of a batch together, "
                "and a buffer is read in chunks: call annotate with the rows that are meant"
            )
    return any(getattr(one, "horizon", "step") == "trajectory" for one in hooked._hooked_bound)


def _writes(buffer: ReplayBuffer) -> int | None:
    # Offline datasets have a writer that counts nothing, since it writes nothing.
    return getattr(buffer, "write_count", None)


def _results_of(hooked: Any, batch: TensorDictBase, on_mismatch: OnMismatch) -> TensorDictBase:
    """What annotate gives; some methods show only what happens while the policy acts.

    Raises:
        InputError: if that is all that is configured.
    """
    found = hooked.annotate(batch, on_mismatch=on_mismatch).select(*hooked.result_keys, strict=False)
    if found.is_empty():
        raise InputError(
            f"the hooked policy computes nothing offline (its results are {hooked.result_keys}): prepare it with a "
            "method that observes, such as ActivationCaching or Saliency"
        )
    return found


def _facts(hooked: Any) -> dict[str, Any]:
    return {
        "policy": type(hooked)._base.__name__,
        "parameters": sum(parameter.numel() for parameter in hooked.parameters()),
    }


def without(found: TensorDictBase, rows: Tensor) -> TensorDictBase:
    """Results of which some rows are not known: NaN where that can be written, and false masks."""
    found = found.clone()
    for key, value in found.items(True, True):
        masked = isinstance(key, tuple) and key[0] == "computed"
        value[rows] = float("nan") if value.is_floating_point() else False if masked else 0
    return found


def _require_same(results: Results, hooked: Any, reader: Reader) -> None:
    """Raise :class:`ArtifactError` if this policy, these methods and this buffer did not give what is stored."""
    folder, page, size = results.folder, results.page, reader.size
    if page.entries != size:
        raise ArtifactError(
            f"the analysis in {folder} is of a buffer of {page.entries} entries, and this one has {size}: name a new "
            "folder"
        )
    index = torch.linspace(0, page.done - 1, min(CHECKED, page.done)).round().long().unique()
    found = _results_of(hooked, reader.read(index), "ignore")
    known = {tuple(entry["key"]) for entry in page.keys}
    asked = {key if isinstance(key, tuple) else (key,) for key in found.keys(True, True)}
    if known != asked:
        raise ArtifactError(
            f"the analysis in {folder} holds {_listed(known - asked)}, and this one computes {_listed(asked - known)}: "
            "name a new folder"
        )
    for key in sorted(known):
        if key[0] == "computed":
            continue
        rows = _both(found, results.data[index], key)
        if not _near(found.get(key)[rows], results.data.get(key)[index][rows]):
            raise ArtifactError(
                f"{key!r} in {folder} is not what this policy computes now: its weights, its methods or the buffer "
                "have changed since; name a new folder"
            )


def _both(found: TensorDictBase, stored: TensorDictBase, key: tuple[str, ...]) -> Tensor:
    """The rows that both have: a schedule may choose others each time."""
    masks = [one.get(("computed", key[0]), None) for one in (found, stored)]
    rows = torch.ones(found.batch_size, dtype=torch.bool)
    for mask in masks:
        rows = rows if mask is None else rows & mask.cpu()
    return rows


def _near(found: Tensor, stored: Tensor) -> bool:
    found, stored = found.cpu(), stored.cpu()
    if found.shape != stored.shape or found.dtype != stored.dtype:
        return False
    if not found.is_floating_point():
        return torch.equal(found, stored)
    largest = float(stored.abs().nan_to_num(0.0, 0.0, 0.0).max()) if stored.numel() else 0.0
    return torch.allclose(found, stored, rtol=RELATIVE, atol=OF_LARGEST * largest, equal_nan=True)


def _listed(keys: set[tuple[str, ...]]) -> str:
    return ", ".join(map(repr, sorted(keys))) or "nothing else"

"""Every row of a replay buffer annotated; the results are kept beside it and an interrupted analysis goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.checked import checked, require_counts
from tdhook_rl.arguments.progress import Progress, shown
from tdhook_rl.batches.annotating_mixin import annotate_part
from tdhook_rl.batches.annotation import OnMismatch
from tdhook_rl.calls.preconditions import require_hooked
from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.errors import ArtifactError, InputError, warn
from tdhook_rl.files.durable import FolderLock
from tdhook_rl.files.functions import untold_in
from tdhook_rl.reading.reader import Reader
from tdhook_rl.reading.sources import Rows
from tdhook_rl.reading.transforms import near
from tdhook_rl.replay.manifest import facts_of
from tdhook_rl.replay.ray_engine import ray_results
from tdhook_rl.replay.results import INDEX, Results, ranges
from tdhook_rl.replay.selection import Chosen, Selection, Where

#: Entries that are computed again before an analysis goes on, and how far they may differ.
CHECKED = 32
OF_LARGEST = 1e-4
_LAID_OUT = "the rows of a buffer are computed some at a time"


@checked
def analyze(
    hooked: Any,
    buffer: Rows,
    folder: str | Path,
    *,
    batch_size: int | None = None,
    rows: Chosen | None = None,
    where: Where | None = None,
    fraction: float | None = None,
    seed: int = 0,
    time_budget: float | None = None,
    on_mismatch: OnMismatch = "warn",
    progress: Progress | bool | None = None,
    engine: Literal["local", "ray"] = "local",
    workers: int = 2,
) -> TensorDict:
    """Annotate the rows of a buffer, all of them or some, and keep the results in memory-mapped files beside it.

    Called again with the folder of an analysis that was interrupted, by Ctrl-C or by a machine, it goes on from the
    entry after the last that is on the disk; of one that is finished, it returns the results. In both cases everything
    that is there is held against its checksums, and what never reached the disk is computed again; and some of the
    stored entries are computed again first, so that results of other weights, methods or data are never mixed.

    The files take all their room before work begins. What a kill or a loss of power can take is what was computed in
    the last ten seconds; Ctrl-C and errors take nothing. One analysis at a time works in a folder.

    Args:
        hooked: a hooked policy; its configured methods are computed.
        buffer: what holds the rows; it is only read, in storage order: a TorchRL buffer (offline datasets such as
            ``MinariExperienceReplay`` too), as its ``sample`` gives rows; a folder that ``buffer.dumps`` or ``memmap``
            of a TensorDict wrote, mapped without unpickling, rows as they are stored; Parquet, a file, a folder of
            files or a data set as LeRobot has them, a key for each column of numbers (``next.done`` is
            ``("next", "done")``, ``episode_index`` tells trajectories); a TensorDict; or TensorDicts one after the
            other, each a trajectory or a batch: a list, or a function that gives a new iterator over the same ones at
            each call (which is gone through once more to count).
        folder: where the results go: a new or empty folder, or that of an analysis to go on with.
        batch_size: rows read at once, which changes nothing in the results but last digits (see :func:`in_order`): as
            many as take 16 MB, from 1024 to 8192, unless given; with ``horizon="trajectory"``, as many whole
            trajectories as have so many rows, and at least one.
        rows: analyse these entries only: a slice, a mask, or their numbers. Results are of them alone, in storage
            order, and have a key ``"index"`` that says which entry each is of.
        where: of ``rows`` those only for which this is true: a function of a batch that gives a truth value for each
            of its entries. It reads everything once more, before.
        fraction: of what is left such a share, drawn by ``seed``.
        seed: of ``fraction``.
        time_budget: seconds, after which it stops with the chunk that it is at, with a warning; the same call goes on.
        on_mismatch: as of ``annotate``: what to do where the stored outputs are not what the policy computes now.
        progress: called with the entries that are done, and all, before the first batch and after each; ``True`` for a
            bar with the time that is left, ``False`` for none; a bar on a terminal unless given.
        engine: ``"ray"``: a pool of Ray actors computes the chunks, each with the policy and a reader of its own; the
            results are those of one machine to the bit, and so is the folder. Each has one torch thread; where sums
            depend on how many there are, so has one machine after ``torch.set_num_threads(1)``. A path, or what
            pickles, may be read so.
        workers: how many actors.

    Returns:
        a memory-mapped TensorDict of the result keys, entry ``i`` for storage entry ``i`` (for the entries that
        ``"index"`` names, where some were chosen; those that are done, where time was over); read it again with
        :func:`load_results`.

    Raises:
        ArtifactError: if the folder holds something else, cannot be written, has no room, was written by another
            analysis, or another is under way in it.
        MissingKeyError: if the rows lack what the policy reads.
        InputError: if there are no rows or no TensorDicts; for an ensemble, a collector or an iterator; if a buffer is
            written to meanwhile, or an iterable gives other rows; if a transform of a buffer, or a method, gives a row
            other values when other rows are read with it, and if the policy reads entries together, as a sequence.

    Example:
        >>> import tempfile
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
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
    require_hooked(hooked, "analyze")
    if time_budget is not None and time_budget < 0:
        raise InputError(f"time_budget= is a number of seconds, got {time_budget}")
    folder = Path(folder)
    reader = Reader(buffer, whole=_explains_trajectories(hooked))
    batch_size = reader.batch_size() if batch_size is None else batch_size
    start = time.monotonic()
    with FolderLock(folder, "analysis"), shown(progress, f"analysing {reader.size:,} entries") as show:
        results = Results.find(folder)
        work = _Work(hooked, reader, Selection.of(reader, rows, where, fraction, seed, batch_size), on_mismatch)
        if results is not None:
            work.go_on(results)
        done, size = 0 if results is None else results.done, work.selection.size
        show(done, size)
        try:
            parts = (
                work.results(batch_size, done) if engine == "local" else work.on_ray(batch_size, done, buffer, workers)
            )
            for first, last, found in parts:
                if results is None:
                    results = Results.create(folder, found, size, facts_of(hooked), work.selection.facts)
                results.write(first, found)
                results.sync_now_and_then()
                show(last, size)
                if time_budget is not None and time.monotonic() - start >= time_budget and last < size:
                    break
        finally:  # also of an analysis that is interrupted
            if results is not None:
                results.sync()
        work.report()
    assert results is not None  # there is at least one entry
    if results.done < size:
        warn(
            f"the {time_budget:g} seconds of time_budget= are over: {results.done} of {size} entries are done; the "
            "same call goes on from there"
        )
    return results.data if results.done == size else results.data[: results.done]


class _Work:
    """Computes the results of entries, and goes on with what is there."""

    def __init__(self, hooked: Any, reader: Reader, selection: Selection, on_mismatch: OnMismatch) -> None:
        self.hooked = hooked
        self.selection = selection
        self.reader = reader
        self.on_mismatch = on_mismatch
        self.written = reader.source.writes()
        self.lacking = 0

    def compute(self, first: int, last: int) -> TensorDictBase:
        """The results of consecutive entries among those that are analysed.

        Raises:
            InputError: if the buffer has been written to since the analysis began.
        """
        found, incomplete = self._computed(torch.arange(first, last), self.on_mismatch)
        self.lacking += int(incomplete.sum())
        if self.reader.source.writes() != self.written:
            raise InputError(
                f"the buffer was written to while it was analysed (at entry {first} of {self.selection.size}), so "
                "results would not belong to its rows: analyse a buffer that rests, or a copy of it"
            )
        return found

    def results(self, batch_size: int, done: int) -> Iterator[tuple[int, int, TensorDictBase]]:
        """The results of each chunk from an entry on."""
        for first, last in self.selection.chunks(batch_size, start=done):
            yield first, last, self.compute(first, last)

    def on_ray(
        self, batch_size: int, done: int, buffer: Rows, workers: int
    ) -> Iterator[tuple[int, int, TensorDictBase]]:
        """The same from actors.

        Raises:
            InputError: for a number of workers that is none, or rows that do not pickle.
        """
        require_counts(workers=workers)
        chunks = list(self.selection.chunks(batch_size, start=done))
        if not chunks:
            return
        make = partial(
            _computing, self.hooked, buffer, self.reader.whole, self.selection.chosen, self.selection.facts,
            self.on_mismatch,
        )  # fmt: skip
        for first, last, found, lacking in ray_results(make, chunks, workers=workers):
            self.lacking += lacking
            yield first, last, found

    def go_on(self, results: Results) -> None:
        """Make sure that what is there is this analysis and whole; what has not arrived is computed again.

        Raises:
            ArtifactError: if another policy, other methods or another buffer gave what is stored.
        """
        manifest = results.manifest
        if not manifest.has_checksums and manifest.done < manifest.entries:
            raise ArtifactError(
                f"the analysis in {results.folder} was begun by an earlier version ({manifest.format}), without the "
                "checksums by which rows are found that never reached the disk: name a new folder"
            )
        lost = results.damaged() if manifest.has_checksums else []
        self._require_same(results, lost)
        if not lost:
            return
        warn(
            f"{ranges(lost)} of {manifest.done} that were done in {results.folder} are not what was written (they "
            "never reached the disk, or were changed): they are computed again"
        )
        for start, stop in lost:
            for first, last in self.selection.covering(start, stop):
                kept = slice(max(start, first) - first, min(stop, last) - first)
                results.write(max(start, first), self.compute(first, last)[kept])
        results.sync()

    def report(self) -> None:
        """Say which rows could not be computed."""
        if self.lacking:
            warn(
                f"{self.lacking} of {self.selection.size} rows have no results (NaN, and a false mask): "
                f"{self.reader.looking} reads rows before them that are not there (written over, or never stored), so "
                "what the policy saw is not known"
            )

    def _computed(self, places: Tensor, on_mismatch: OnMismatch) -> tuple[TensorDictBase, Tensor]:
        index, wanted = self.selection.read_for(places)
        state = self.hooked._hooked
        if self.reader.whole and not state.traits.recurrent and state.chain is None:
            # It does not know where a trajectory ends.
            parts = [_results_of(self.hooked, self.reader.read(one), on_mismatch) for one in self.reader.apart(index)]
            found = torch.cat(parts)
        else:
            batch = self.reader.turned(self.reader.read(index))
            found = self.reader.turned(_results_of(self.hooked, batch, on_mismatch), back=True)
        if len(wanted) < len(index):
            index, found = index[wanted], found[wanted]
        incomplete = self.reader.incomplete(index)
        found = _without(found, incomplete) if bool(incomplete.any()) else found
        if self.selection.facts is not None:
            found = found.copy().set(INDEX, _beside(index, found.batch_size))
        return found, incomplete

    def _require_same(self, results: Results, lost: list[tuple[int, int]]) -> None:
        """Raise :class:`ArtifactError` if this policy, these methods and this buffer did not give what is stored."""
        folder, manifest, size = results.folder, results.manifest, self.selection.size
        before, now = manifest.selection, self.selection.facts
        if (before is None) != (now is None) or (before and now and before["digest"] != now["digest"]):
            raise ArtifactError(
                f"the analysis in {folder} is of {_chosen(before, manifest.entries)}, and this one of "
                f"{_chosen(now, size)}: name a new folder"
            )
        if manifest.entries != size:
            raise ArtifactError(
                f"the analysis in {folder} is of a buffer of {manifest.entries} entries, and this one has {size}: name "
                "a new folder"
            )
        index = self._checked_rows(manifest.done)
        found = self._computed(index, "ignore")[0]
        known = {tuple(entry["key"]) for entry in manifest.keys}
        asked = {key if isinstance(key, tuple) else (key,) for key in found.keys(True, True)}
        if known != asked:
            raise ArtifactError(
                f"the analysis in {folder} holds {_listed(known - asked)}, and this one computes "
                f"{_listed(asked - known)}: name a new folder"
            )
        arrived = index < manifest.done
        for start, stop in lost:
            arrived &= (index < start) | (index >= stop)
        for key in sorted(known):
            if key[0] == "computed":
                continue
            stored = results.data[index[arrived]]
            rows = _both(found[arrived], stored, key)
            if not near(found.get(key)[arrived][rows], stored.get(key)[rows], OF_LARGEST):
                raise ArtifactError(
                    f"{key!r} in {folder} is not what this policy computes now: its weights, its methods or the "
                    "buffer have changed since; name a new folder"
                )
        facts = facts_of(self.hooked)
        for said in untold_in(facts["methods"]):
            warn(f"{folder} holds an analysis that goes on as the same: {said}")
        for name, what in (("methods", "methods or options"), ("weights", "weights, buffers or controls")):
            then = manifest.facts.get(name)
            if manifest.has_checksums and None not in (then, facts[name]) and then != facts[name]:
                raise ArtifactError(
                    f"the analysis in {folder} was computed with other {what} than this policy has now, though its "
                    "results are near: name a new folder"
                )

    def _checked_rows(self, done: int) -> Tensor:
        """Some entries that are computed again to be compared: whole trajectories where these are explained."""
        if self.reader.whole:
            first, last = next(self.selection.chunks(1))
            return torch.arange(first, last)
        return torch.linspace(0, done - 1, min(CHECKED, done)).round().long().unique()


def _computing(
    hooked: Any, buffer: Rows, whole: bool, chosen: Tensor | None, facts: dict[str, Any] | None, on_mismatch: OnMismatch
) -> Callable[[int, int], tuple[TensorDictBase, int]]:
    """What computes chunks in another process."""
    reader = Reader(buffer, whole=whole)
    work = _Work(hooked, reader, Selection(reader, chosen, facts), on_mismatch)

    def compute(first: int, last: int) -> tuple[TensorDictBase, int]:
        before = work.lacking
        found = work.compute(first, last)
        return found, work.lacking - before

    return compute


def _explains_trajectories(hooked: Any) -> bool:
    """Whether chunks have to end where trajectories do.

    Raises:
        InputError: if a method needs all rows at once.
    """
    for one in hooked._hooked.bound:
        if one.whole_batch:
            raise InputError(
                f"the results of {one.method_name} ({', '.join(map(repr, one.result_keys))}) are of all rows of a "
                "batch together, and a buffer is read in chunks: call annotate with the rows that are meant"
            )
    return any(one.horizon == "trajectory" for one in hooked._hooked.bound)


def _results_of(hooked: Any, batch: TensorDictBase, on_mismatch: OnMismatch) -> TensorDictBase:
    """What annotate gives; some methods show only what happens while the policy acts.

    Raises:
        InputError: if that is all that is configured.
    """
    # What the buffer holds may be anybody's; and the files themselves say whose what is in them is.
    stamps = [key for key in hooked.result_keys if is_stamp(key)]
    found = annotate_part(hooked, batch.exclude(*stamps), _LAID_OUT, on_mismatch=on_mismatch)
    found = found.select(*hooked.result_keys, strict=False).exclude(*stamps)
    if found.is_empty():
        raise InputError(
            f"the hooked policy computes nothing offline (its results are {hooked.result_keys}): prepare it with a "
            "method that observes, such as ActivationCaching or Saliency"
        )
    return found


def _without(found: TensorDictBase, rows: Tensor) -> TensorDictBase:
    """Results of which some rows are not known: NaN where that can be written, and false masks."""
    found = found.clone()
    for value in found.values(True, True):
        value[rows] = float("nan") if value.is_floating_point() else 0
    return found


def _beside(index: Tensor, batch_size: torch.Size) -> Tensor:
    """The number of its entry, for each row."""
    return index.reshape(-1, *[1] * (len(batch_size) - 1)).expand(batch_size).contiguous()


def _chosen(selection: dict[str, Any] | None, entries: int) -> str:
    if selection is None:
        return f"all of {entries} entries"
    asked = ", ".join(f"{name}={value}" for name, value in selection.items() if name not in ("of", "digest"))
    return f"{entries} of {selection['of']} entries ({asked:.200})"


def _both(found: TensorDictBase, stored: TensorDictBase, key: tuple[str, ...]) -> Tensor:
    """The rows that both have: a schedule may choose others each time."""
    masks = [one.get(("computed", key[0]), None) for one in (found, stored)]
    rows = torch.ones(found.batch_size, dtype=torch.bool)
    for mask in masks:
        rows = rows if mask is None else rows & mask.cpu()
    return rows


def _listed(keys: set[tuple[str, ...]]) -> str:
    return ", ".join(map(repr, sorted(keys))) or "nothing else"

"""Every row of a replay buffer annotated; the results are kept beside it and an interrupted analysis goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from tensordict import TensorDict

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.progress import Progress, shown
from tdhook_rl.batches.annotation import OnMismatch
from tdhook_rl.calls.preconditions import require_hooked
from tdhook_rl.errors import InputError, warn
from tdhook_rl.files.durable import FolderLock
from tdhook_rl.reading.reader import Reader
from tdhook_rl.reading.sources import Rows
from tdhook_rl.replay.manifest import facts_of
from tdhook_rl.replay.read_rows import together
from tdhook_rl.replay.results import Results
from tdhook_rl.replay.selection import Chosen, Selection, Where
from tdhook_rl.replay.work import Work, explains_trajectories


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
    that is there is held against its checksums, and what never reached the disk is computed again. Some of the stored
    entries are computed again first, and the rows of all of them are read again (what the policy reads and has put
    out), so that results of other weights, methods or data are never mixed.

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
            other values when other rows are read with it, and if the policy reads entries together, as a sequence, or
            looks across the rows of a batch (five rows are computed alone) where not all are computed at once.

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
    reader = Reader(buffer, whole=explains_trajectories(hooked))
    batch_size = reader.batch_size() if batch_size is None else batch_size
    start = time.monotonic()
    with FolderLock(folder, "analysis"), shown(progress, f"analysing {reader.size:,} entries") as show:
        results = Results.find(folder)
        work = Work(hooked, reader, Selection.of(reader, rows, where, fraction, seed, batch_size), on_mismatch)
        if results is not None:
            work.go_on(results, batch_size)
        done, size = 0 if results is None else results.done, work.selection.size
        show(done, size)
        try:
            parts = (
                work.results(batch_size, done) if engine == "local" else work.on_ray(batch_size, done, buffer, workers)
            )
            for first, last, found, read in parts:
                if results is None:
                    results = Results.create(folder, found, size, facts_of(hooked), work.selection.facts)
                results.write(first, found, together(results.read, read))
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

"""What an analysis does: computes the results of entries, and goes on with what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.checked import require_counts
from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.arguments.near import near
from tdhook_rl.batches.annotating_mixin import annotate_part
from tdhook_rl.batches.annotation import OnMismatch
from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.errors import ArtifactError, InputError, warn
from tdhook_rl.files.functions import untold_in
from tdhook_rl.reading.reader import Reader
from tdhook_rl.reading.sources import Rows
from tdhook_rl.replay.manifest import facts_of
from tdhook_rl.replay.ray_engine import Told, ray_results
from tdhook_rl.replay.read_rows import Sums, differing, keys_read, sums_of, together
from tdhook_rl.replay.results import INDEX, Results, ranges
from tdhook_rl.replay.row_functions import require_alone
from tdhook_rl.replay.selection import Selection

#: Entries that are computed again before an analysis goes on, and how far they may differ.
CHECKED = 32
OF_LARGEST = 1e-4
#: What may not be another, and how it is called.
_FACTS = {
    "methods": "methods or options",
    "weights": "weights, buffers or controls",
    "settings": "modules, or options of these,",
}
_LAID_OUT = "the rows of a buffer are computed some at a time"


class Work:
    """Computes the results of entries, and goes on with what is there."""

    def __init__(self, hooked: Any, reader: Reader, selection: Selection, on_mismatch: OnMismatch) -> None:
        self.hooked = hooked
        self.selection = selection
        self.reader = reader
        self.on_mismatch = on_mismatch
        self.written = reader.source.writes()
        self.lacking = 0
        self.keys = keys_read(hooked, reader.source.transforms)
        self.tried = False

    def compute(self, first: int, last: int) -> tuple[TensorDictBase, Sums]:
        """The results of consecutive entries among those that are analysed, and sums of these rows.

        Raises:
            InputError: if the buffer has been written to since the analysis began.
        """
        found, incomplete, read = self._computed(torch.arange(first, last), self.on_mismatch)
        self._require_alone(first, last, found)
        self.lacking += int(incomplete.sum())
        if self.reader.source.writes() != self.written:
            raise InputError(
                f"the buffer was written to while it was analysed (at entry {first} of {self.selection.size}), so "
                "results would not belong to its rows: analyse a buffer that rests, or a copy of it"
            )
        return found, read

    def results(self, batch_size: int, done: int) -> Iterator[tuple[int, int, TensorDictBase, Sums]]:
        """The results of each chunk from an entry on."""
        for first, last in self.selection.chunks(batch_size, start=done):
            yield first, last, *self.compute(first, last)

    def on_ray(
        self, batch_size: int, done: int, buffer: Rows, workers: int
    ) -> Iterator[tuple[int, int, TensorDictBase, Sums]]:
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
        for first, last, found, told in ray_results(make, chunks, workers=workers):
            self.lacking += told["lacking"]
            yield first, last, found, told["read"]

    def go_on(self, results: Results, batch_size: int) -> None:
        """Make sure that what is there is this analysis and whole; what has not arrived is computed again.

        Args:
            results: what is there.
            batch_size: rows that are read at once.

        Raises:
            ArtifactError: if another policy, other methods, another buffer or other rows gave what is stored.
        """
        manifest = results.manifest
        if not manifest.has_checksums and manifest.done < manifest.entries:
            raise ArtifactError(
                f"the analysis in {results.folder} was begun by an earlier version ({manifest.format}), without the "
                "checksums by which rows are found that never reached the disk: name a new folder"
            )
        lost = results.damaged() if manifest.has_checksums else []
        self._require_same(results, lost)
        self._require_same_rows(results, batch_size)
        if not lost:
            return
        warn(
            f"{ranges(lost)} of {manifest.done} that were done in {results.folder} are not what was written (they "
            "never reached the disk, or were changed): they are computed again"
        )
        for start, stop in lost:
            for first, last in self.selection.covering(start, stop):
                kept = slice(max(start, first) - first, min(stop, last) - first)
                results.write(max(start, first), self.compute(first, last)[0][kept])
        results.sync()

    def report(self) -> None:
        """Say which rows could not be computed."""
        if self.lacking:
            warn(
                f"{self.lacking} of {self.selection.size} rows have no results (NaN, and a false mask): "
                f"{self.reader.looking} reads rows before them that are not there (written over, or never stored), so "
                "what the policy saw is not known"
            )

    def _computed(self, places: Tensor, on_mismatch: OnMismatch) -> tuple[TensorDictBase, Tensor, Sums]:
        index, wanted = self.selection.read_for(places)
        state = self.hooked._hooked
        if self.reader.whole and not state.traits.recurrent and state.chain is None:
            # It does not know where a trajectory ends.
            parts = [self.reader.read(one) for one in self.reader.apart(index)]
            found = torch.cat([_results_of(self.hooked, one, on_mismatch) for one in parts])
            rows: TensorDictBase = torch.cat([one.select(*self.keys, strict=False) for one in parts])  # type: ignore[assignment]
        else:
            rows = self.reader.read(index)
            found = _results_of(self.hooked, self.reader.turned(rows), on_mismatch)
            found = self.reader.turned(found, back=True)
        rows = rows.select(*self.keys, strict=False)
        if len(wanted) < len(index):
            index, found, rows = index[wanted], found[wanted], rows[wanted]
        read = self._sums(places, index, rows)
        incomplete = self.reader.incomplete(index)
        found = _without(found, incomplete) if bool(incomplete.any()) else found
        if self.selection.facts is not None:
            found = found.copy().set(INDEX, _beside(index, found.batch_size))
        return found, incomplete, read

    def _require_alone(self, first: int, last: int, found: TensorDictBase) -> None:
        """Raise :class:`InputError` if a policy's rows, of which not all are computed at once, depend on each other."""
        if self.tried or self.reader.whole or last - first == self.selection.size:
            return
        self.tried = True
        known = {key: one for key, one in found.items(True, True) if key_parts(key)[0] not in (INDEX, "computed")}

        def alone(place: int) -> dict[Any, Tensor]:
            one = self._computed(torch.tensor([first + place]), "ignore")[0]
            both = {key: bool(_both(one, found[place : place + 1], key_parts(key)).all()) for key in known}
            return {key: one.get(key) if both[key] else value[place : place + 1] for key, value in known.items()}

        require_alone(alone, known, last - first, what="the policy, or a method,", total=self.selection.size)

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
        for said in (*untold_in(facts["methods"]), *untold_in(facts["settings"])):
            warn(f"{folder} holds an analysis that goes on as the same: {said}")
        for name, what in _FACTS.items():
            then, now = manifest.facts.get(name), facts[name]
            if manifest.has_checksums and None not in (then, now) and then != now:
                raise ArtifactError(
                    f"the analysis in {folder} was computed with other {what} than this policy has now"
                    f"{_named(then, now)}, though its results are near: name a new folder"
                )

    def _require_same_rows(self, results: Results, batch_size: int) -> None:
        """Raise :class:`ArtifactError` if the entries that are done hold something else than what was read of them."""
        read: Sums = {}
        for first, last in self.selection.chunks(batch_size):
            if first >= results.done:
                break
            places = torch.arange(first, min(last, results.done))
            read = together(read, self._sums(places, self.selection.entries(places)))
        if odd := differing(results.read, read):
            raise ArtifactError(
                f"{odd[0]!r} of the rows is not what it was when the analysis in {results.folder} read them (some of "
                f"the {results.done} entries that are done have been written over since): name a new folder"
            )
        results.known(read)

    def _sums(self, places: Tensor, index: Tensor, rows: TensorDictBase | None = None) -> Sums:
        """Of entries in these places, as they are stored: a transform may give them other last digits each time."""
        if rows is None or self.reader.source.transforms:
            rows = self.reader.source.raw(index)
        return sums_of(places, rows, self.keys)

    def _checked_rows(self, done: int) -> Tensor:
        """Some entries that are computed again to be compared: whole trajectories where these are explained."""
        if self.reader.whole:
            first, last = next(self.selection.chunks(1))
            return torch.arange(first, last)
        return torch.linspace(0, done - 1, min(CHECKED, done)).round().long().unique()


def _computing(
    hooked: Any, buffer: Rows, whole: bool, chosen: Tensor | None, facts: dict[str, Any] | None, on_mismatch: OnMismatch
) -> Callable[[int, int], tuple[TensorDictBase, Told]]:
    """What computes chunks in another process."""
    reader = Reader(buffer, whole=whole)
    work = Work(hooked, reader, Selection(reader, chosen, facts), on_mismatch)

    def compute(first: int, last: int) -> tuple[TensorDictBase, Told]:
        before = work.lacking
        found, read = work.compute(first, last)
        return found, {"lacking": work.lacking - before, "read": dict(read)}

    return compute


def explains_trajectories(hooked: Any) -> bool:
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


def _named(then: Any, now: Any) -> str:
    """Where two mappings differ, in words."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return ""
    first = next(name for name in {**then, **now} if then.get(name) != now.get(name))
    return f" ({first or 'the policy'!r} was {then.get(first)!s:.80}, and is {now.get(first)!s:.80})"


def _listed(keys: set[tuple[str, ...]]) -> str:
    return ", ".join(map(repr, sorted(keys))) or "nothing else"

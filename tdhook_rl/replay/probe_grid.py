"""Probes of every site and concept on stored data, for as many checkpoints as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import checked, require_counts
from tdhook_rl.arguments.of_rows import require_of_each
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import InputError
from tdhook_rl.files.checkpoints import load_into
from tdhook_rl.hooking.hooked import HookedMixin
from tdhook_rl.policies.rebinding import deep_copy
from tdhook_rl.probes.board import CLASSES, Board, Observed, Source
from tdhook_rl.probes.probe_table import ProbeCell, ProbeTable
from tdhook_rl.probes.quantities import (
    Future,
    Return,
    Trajectory,
    course_of,
    label_columns,
    read_label,
    read_of_row,
    require_concepts,
)
from tdhook_rl.probes.site_features import Layout, SiteFeatures
from tdhook_rl.probes.splits import GroupSplit
from tdhook_rl.reading.going_on import GoingOn
from tdhook_rl.reading.reader import Reader
from tdhook_rl.reading.sources import Rows, is_ragged
from tdhook_rl.replay.row_functions import require_alone
from tdhook_rl.statistics import benjamini_hochberg

Progress = Callable[[str, int, int], None]
_LAID_OUT = "probes read the rows of a buffer some at a time"


@checked
def probe_grid(
    policy: nn.Module,
    data: Rows,
    *,
    sites: Sequence[str] | str,
    concepts: Mapping[str, Any],
    checkpoints: Mapping[str, Any] | None = None,
    untrained: Any = None,
    split: GroupSplit | None = None,
    control: Any = None,
    penalty: float | None = None,
    layout: Layout | Mapping[str, Layout] = "flat",
    units: int | Mapping[str, int] | None = None,
    input_key: NestedKey | list[NestedKey] | None = None,
    batch_size: int = 4096,
    min_rows: float = 10,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> ProbeTable:
    """What can be read of each site: all probes of a site from one set of sums, controls beside every cell.

    The data are read once for the labels and the split. Then, for each checkpoint, the network runs once over the rows
    that train and once over those that are held out. Memory holds a chunk of activations, the labels, and sums.

    Args:
        policy: the policy or network; a hooked one may be given.
        data: a TensorDict of any batch shape, or what :func:`tdhook_rl.replay.analyze` reads: a replay buffer, a
            folder, a list of TensorDicts.
        sites, concepts, untrained, split, control, penalty, layout, units, input_key, min_rows, confidence, seed: as of
            :class:`tdhook_rl.rollout.ProbeSuite`.
        checkpoints: by name the weights to look at, in this order: state dicts, modules, or files of weights; the
            policy as it is unless given. The policy itself is not touched.
        batch_size: rows that are read at once, which changes nothing but the last digits: a function under
            ``concepts``, or a network, that says of a row something else when other rows are read with it is refused.
        progress: called with what is being done, and how many of how many rows are through.

    Returns:
        a cell for each checkpoint, site and concept, with p-values that are adjusted over all of them.

    Raises:
        InputError: without data, sites or concepts; if all rows train, or all are held out.
        MissingKeyError: if the data lack a concept, a group or an input.

    Example:
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import FC2, make_actor
        >>> data = CueCorners(batch_size=[100]).rollout(20, break_when_any_done=False)
        >>> table = probe_grid(make_actor(), data, sites=FC2, concepts={"xor": ("concept", "xor")},
        ...                    split=GroupSplit(("concept", "cell")))
        >>> table[FC2, "xor"].score
        'accuracy'
    """
    require_concepts(concepts)
    if isinstance(policy, HookedMixin):
        with policy.disable_context() as original:
            policy = original
    own = policy if checkpoints is None else deep_copy(policy)
    features = SiteFeatures(own, sites, untrained=untrained, layout=layout, units=units, input_key=input_key, seed=seed)  # type: ignore[arg-type]
    split = split or GroupSplit()
    source = _Source(data, batch_size)
    tell = progress or (lambda *_: None)
    facts = _Facts.of(source, concepts, split, None if control is None else GroupSplit(control), tell)
    if not bool(facts.train.any()) or not bool(facts.held.any()):
        raise InputError(
            f"of {len(facts.train)} rows {int(facts.train.sum())} train and {int(facts.held.sum())} are held out: a "
            f"split by {split.groupings} needs more groups, or another share held_out={split.held_out}"
        )
    cells: list[ProbeCell] = []
    untried = len(source) if source.several else 0
    for name, checkpoint in (checkpoints or {"": None}).items():
        if checkpoint is not None:
            load_into(own, checkpoint, name)
        board = Board(
            groupings=len(split.groupings), shuffled=True, penalty=penalty, confidence=confidence,
            min_rows=max(min_rows, 1e-3),
        )  # fmt: skip
        for group, names in facts.groups.items():
            board.declare(group, {one: facts.labels[one][facts.known[names[0]]] for one in names})
        for part, rows in (("fitting", facts.train), ("scoring", facts.held)):
            done, total = 0, int(rows.sum())
            for index, batch in source.batches(rows):
                for group, labels, chosen, seen in facts.parts(index, batch, features, untried):
                    if part == "fitting":
                        board.add(group, labels, seen(chosen), score=False)
                    else:
                        board.judge(group, labels, seen(chosen))
                done, untried = done + len(index), 0
                tell(f"{part} {name}".rstrip(), done, total)
            board.fit()
        inputs = {site: features.inputs.get(site) for site in features.sites}
        cells += [replace(cell, checkpoint=name) for cell in board.table(inputs, facts.left_out)]
    adjusted = benjamini_hochberg([cell.p for cell in cells])
    return ProbeTable([replace(cell, adjusted=float(one)) for cell, one in zip(cells, adjusted, strict=True)])


class _Source:
    """Rows of a buffer or of a TensorDict by their number."""

    def __init__(self, data: Rows, batch_size: int) -> None:
        require_counts(batch_size=batch_size)
        if isinstance(data, TensorDictBase) and not data.batch_size.numel():
            raise InputError(f"there is no row to read: the batch has shape {tuple(data.batch_size)}")
        rows = data if isinstance(data, TensorDictBase) and not is_ragged(data) else None
        self._reader = Reader(data) if rows is None else None
        self._flat = None if rows is None else rows.reshape(-1)
        self._per = 1 if self._reader is None else self._reader.rows
        self._entries = len(self._flat) if self._flat is not None else self._reader.size  # type: ignore[union-attr]
        self._step = max(1, batch_size // self._per)

    def __len__(self) -> int:
        return self._entries * self._per

    @property
    def several(self) -> bool:
        """Whether not all rows are read at once."""
        return self._entries > self._step

    def in_time(self) -> Tensor:
        """The numbers of all rows, each trajectory's in the order of time."""
        return torch.arange(len(self)) if self._reader is None else self._reader.in_time("a Future or a Return")

    def batches(self, rows: Tensor) -> Iterator[tuple[Tensor, TensorDictBase]]:
        """The wanted rows, in order.

        Args:
            rows: ``(rows,)``, which are wanted.

        Yields:
            the numbers of rows, and these rows.
        """
        wanted = rows.reshape(self._entries, self._per)
        for entries in wanted.any(1).nonzero().squeeze(-1).split(self._step):
            inside = wanted[entries].reshape(-1)
            batch = self._flat[entries] if self._reader is None else self._reader.read(entries).reshape(-1)  # type: ignore[index]
            numbers = (entries[:, None] * self._per + torch.arange(self._per)).reshape(-1)
            yield numbers[inside], batch if bool(inside.all()) else batch[inside]


@dataclass
class _Facts:
    """What is known of every row without running a network.

    Attributes:
        codes: for each grouping ``(rows,)``.
        train, held, control: as of :class:`Observed`.
        labels: by concept ``(rows, places, columns)``.
        known: by concept ``(rows,)``, which rows have a label.
        groups: by the name of a group its concepts.
        left_out: by concept how many rows have none.
    """

    codes: list[Tensor]
    train: Tensor
    held: Tensor
    control: Tensor
    labels: dict[str, Tensor]
    known: dict[str, Tensor]
    groups: dict[str, list[str]]
    left_out: dict[str, int]

    @classmethod
    def of(
        cls, source: _Source, concepts: Mapping[str, Any], split: GroupSplit, control: GroupSplit | None, tell: Progress
    ) -> _Facts:
        asked = {name: one for name, one in concepts.items() if isinstance(one, Future | Return)}
        parts: dict[Any, list[Tensor]] = {}
        going_on = GoingOn(len(source))
        for index, batch in source.batches(torch.ones(len(source), dtype=torch.bool)):
            row: dict[Any, Tensor] = {("code", place): code for place, code in enumerate(split.groups(batch))}
            row["control"] = row["code", len(row) - 1] if control is None else control.groups(batch)[0]
            real = real_rows(batch)
            row["real"] = torch.ones(len(batch), dtype=torch.bool) if real is None else real
            for name, one in concepts.items():
                what = read_of_row(one, batch)
                label = read_label(what, batch)
                if callable(what) and source.several:
                    require_of_each(
                        partial(read_label, what), batch, label, what=f"the concept {name!r}", rows=len(source)
                    )
                row["label", name] = label_columns(label, batch)
            if asked:
                row |= course_of(batch)
                going_on.add(index, batch)
            for key, value in row.items():
                parts.setdefault(key, []).append(value.detach().cpu().clone())
            tell("reading labels", int(index[-1]) + 1, len(source))
        found = {key: torch.cat(value) for key, value in parts.items()}
        codes = [found["code", place] for place in range(len(split.groupings))]
        train, held = (one & found["real"] for one in split.masks(codes))
        labels = {name: found["label", name] for name in concepts}
        known = dict.fromkeys(concepts, found["real"])
        later = _later(found, asked, source.in_time(), going_on) if asked else {}
        for name, (label, mask) in later.items():
            labels[name], known[name] = label, mask
        groups: dict[str, list[str]] = {}
        for name in concepts:
            own = name in asked or labels[name].is_floating_point()
            groups.setdefault(name if own else CLASSES, []).append(name)
        left_out = {name: int((found["real"] & ~known[name]).sum()) for name in concepts}
        return cls(codes, train, held, found["control"], labels, known, groups, left_out)

    def parts(
        self, index: Tensor, batch: TensorDictBase, features: SiteFeatures, untried: int
    ) -> Iterator[tuple[str, dict[str, Tensor], Tensor, Callable[[Tensor], Observed]]]:
        """For each group of concepts the labels of the rows that have one, these rows, and what observes them.

        Args:
            index: the numbers of some rows.
            batch: these rows.
            features: reads their features.
            untried: how many rows there are, where it is to be tried whether they depend on each other; 0 where not.
        """
        read = features.of(batch, torch.arange(len(index)), laid_out=_LAID_OUT)
        if untried:
            _require_alone(features, batch, read, untried)

        def seen(rows: Tensor) -> Observed:
            where = index[rows]
            every = len(rows) == len(index)
            return Observed(
                {source: value if every else value[rows] for source, value in read.items()},
                [code[where] for code in self.codes], self.train[where], self.held[where], self.control[where],
            )  # fmt: skip

        for group, names in self.groups.items():
            rows = self.known[names[0]][index].nonzero().squeeze(-1)
            yield group, {name: self.labels[name][index[rows]] for name in names}, rows, seen


def _require_alone(features: SiteFeatures, batch: TensorDictBase, read: Mapping[Source, Tensor], total: int) -> None:
    """Raise :class:`InputError` if what a network makes of a row depends on the rows that are read with it."""
    known = {f"{source.network} {source.site}": source for source in read if source.network != "input"}

    def alone(place: int) -> dict[str, Tensor]:
        found = features.of(batch[place : place + 1], torch.arange(1), laid_out=_LAID_OUT)
        return {name: found[source] for name, source in known.items()}

    together = {name: read[source] for name, source in known.items()}
    require_alone(alone, together, len(batch), what="a network", total=total)


def _later(
    found: Mapping[Any, Tensor], asked: Mapping[str, Future | Return], in_time: Tensor, going_on: GoingOn
) -> dict[str, tuple[Tensor, Tensor]]:
    """What was asked of the future of each row, and of which rows it is known."""
    real = in_time[found["real"][in_time]]
    order = real[found["trajectory"][real].argsort(stable=True)]
    count = found.get("step")
    number, done = found["trajectory"][order], found["done"][order]
    stops = done.clone()
    stops[:-1] |= number[1:] != number[:-1]
    broken, _ = going_on.breaks(order, stops)  # several runs may number theirs alike
    path = Trajectory.of(number, None if count is None else count[order], done, broken)
    results = {}
    for name, one in asked.items():
        value = found["label", name][order]
        if isinstance(one, Return):
            label, known = path.returns(value, one.gamma), path.ended
        else:
            place, known = path.ahead(one.steps)
            label = value[place]
        spread = torch.zeros(len(found["real"]), *label.shape[1:], dtype=label.dtype)
        mask = torch.zeros(len(found["real"]), dtype=torch.bool)
        spread[order], mask[order] = label, known
        results[name] = spread, mask
    return results

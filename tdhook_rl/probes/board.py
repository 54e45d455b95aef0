"""Probes of many concepts at many sites, with the controls that belong to each."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.rows import Parts, Rows, usable_rows
from tdhook_rl.latent.probing.scored import Scored, ScoredClasses, ScoredValues
from tdhook_rl.probes.probe_table import ProbeCell, ProbeTable
from tdhook_rl.statistics import Interval

#: The group of all concepts that are classes, as no concept is called: one that is a group of its own is by its name.
CLASSES = ""
#: Labels that are kept for shuffled ones to be drawn from.
_DRAWN_FROM = 1024


class Source(NamedTuple):
    """Whose features: ``"trained"``, ``"untrained"`` or ``"input"``; and the site, or which rows of an input."""

    network: str
    site: Any


@dataclass(frozen=True)
class Observed:
    """Rows as they were collected.

    Attributes:
        features: for each source ``(rows, places, features)``: a row may have several places, squares of a map or
            agents, each with features of its own.
        codes: for each grouping ``(rows,)``, the number of the group.
        train, held: ``(rows,)``.
        control: ``(rows,)``, the number by which shuffled labels are dealt out.
    """

    features: Mapping[Source, Tensor]
    codes: Sequence[Tensor]
    train: Tensor
    held: Tensor
    control: Tensor
    _parts: dict[int, Parts] = field(default_factory=dict, compare=False)

    def parts(self, places: int) -> Parts:
        """Which rows train and which are held out, of activations with so many places."""
        if places not in self._parts:
            each = [*self.codes, self.train, self.held]
            *codes, train, held = each if places == 1 else (one.repeat_interleave(places) for one in each)
            self._parts[places] = Parts(codes, train, held)
        return self._parts[places]


@dataclass
class _Column:
    """A concept, or one of the labels or numbers of a concept that has several."""

    name: str
    concept: str
    seen: Tensor  # labels of the first rows, of which shuffled ones are drawn


@dataclass
class _Stack:
    """Sources of one network with as many features, which learn together."""

    sources: list[Source]
    scored: Any = None  # a Scored; what it is of is known with the first labels


@dataclass
class _Group:
    """Concepts whose labels are known for the same rows, so that they share the moments of the features."""

    numbers: bool
    columns: list[_Column] = field(default_factory=list)
    stacks: list[_Stack] = field(default_factory=list)
    dropped: dict[Source, int] = field(default_factory=dict)  # rows that were not finite
    declared: bool = False  # what shuffled labels are drawn from is known, and stays

    def find(self, source: Source) -> tuple[Any, int] | None:
        """What learns from a source, and which of its sources that is."""
        for stack in self.stacks:
            if source in stack.sources:
                return stack.scored, stack.sources.index(source)
        return None

    def stack(self, features: Mapping[Source, Tensor]) -> list[_Stack]:
        """All stacks, new ones for sources that were not seen before."""
        known = {source for stack in self.stacks for source in stack.sources}
        new: dict[Any, list[Source]] = {}
        for source, value in features.items():
            if source not in known:
                new.setdefault((source.network, value.shape[1:], value.dtype), []).append(source)
        self.stacks += map(_Stack, new.values())
        return self.stacks

    def look_at(self, labels: Mapping[str, Tensor]) -> None:
        """Keep labels to draw from until there are enough; a first batch may have one row, or none."""
        values = [column for value in labels.values() for column in value.flatten(0, 1).unbind(1)]
        for column, value in zip(self.columns, values, strict=True):
            if len(column.seen) < _DRAWN_FROM:
                known = value[torch.isfinite(value)]
                spread = torch.linspace(0, max(len(known) - 1, 0), min(len(known), 4 * _DRAWN_FROM)).round().long()
                column.seen = torch.cat([column.seen, known[spread]])


#: A step count would become a class for each step, which stops a training run: 2,000 take minutes and gigabytes.
MOST_CLASSES = 512


class Board:
    """Fits and scores probes of concepts from observed rows.

    Args:
        groupings: how many ways there are to group the rows.
        shuffled: whether labels that were dealt out by chance are fitted as well.
        penalty, confidence, min_rows: as of :class:`Scored`.
    """

    def __init__(
        self, *, groupings: int, shuffled: bool, penalty: float | None, confidence: float, min_rows: float
    ) -> None:
        self._options: dict[str, Any] = {"penalty": penalty, "confidence": confidence, "min_rows": min_rows}
        self._groupings, self._shuffled = groupings, shuffled
        self._groups: dict[str, _Group] = {}

    # ------------------------------------------------------------------ rows

    def add(self, group: str, labels: Mapping[str, Tensor], rows: Observed, *, score: bool = True) -> None:
        """Learn from the training rows, and score the held-out ones by the probes that result.

        Args:
            group: the name of the concepts that come together.
            labels: for each concept ``(rows, places or 1, columns)``; integers and booleans are classes, several
                columns of them yes-or-no labels; floats are numbers.
            rows: the rows.
            score: whether the probes are solved for anew, and the held-out rows scored.
        """
        for prepared, scored in self._prepared(group, labels, rows, count=True):
            scored.learn(prepared)
            if score:
                scored.fit()
                scored.judge(prepared)

    def declare(self, group: str, labels: Mapping[str, Tensor]) -> None:
        """Say what a group of concepts is, and from what shuffled labels are drawn; otherwise its first rows do.

        Args:
            group: its name.
            labels: as of :meth:`add`.
        """
        self._begun(group, labels).look_at(labels)
        self._groups[group].declared = True

    def judge(self, group: str, labels: Mapping[str, Tensor], rows: Observed) -> None:
        """Score the held-out rows by the probes as they are."""
        for prepared, scored in self._prepared(group, labels, rows, count=False):
            scored.judge(prepared)

    def fit(self) -> None:
        """Solve for all probes."""
        for group in self._groups.values():
            for stack in group.stacks:
                stack.scored.fit()

    def decay(self, factor: float) -> None:
        """Let rows of before count for less."""
        if factor < 1:
            for group in self._groups.values():
                for stack in group.stacks:
                    stack.scored.decay(factor)

    def __add__(self, other: Board) -> Board:
        """What two workers or shards have seen, together."""
        merged = copy.copy(self)
        merged._groups = copy.deepcopy(self._groups)
        for name, theirs in other._groups.items():
            own = merged._groups.get(name)
            if own is None:
                merged._groups[name] = copy.deepcopy(theirs)
                continue
            if [one.name for one in own.columns] != [one.name for one in theirs.columns]:
                raise InputError(
                    f"only probes of the same labels add up: {name or 'classes'!r} has "
                    f"{[one.name for one in own.columns]} and {[one.name for one in theirs.columns]}"
                )
            for source, count in theirs.dropped.items():
                own.dropped[source] = own.dropped.get(source, 0) + count
            known = {tuple(stack.sources): stack for stack in own.stacks}
            for stack in theirs.stacks:
                same = known.get(tuple(stack.sources))
                if same is None:
                    own.stacks.append(copy.deepcopy(stack))
                else:
                    same.scored = _together(same.scored, stack.scored)
        return merged

    def _prepared(
        self, name: str, labels: Mapping[str, Tensor], rows: Observed, count: bool
    ) -> Iterator[tuple[Rows, Any]]:
        """For each source its rows, and what learns from them."""
        group = self._groups.get(name)
        if group is None:
            group = self._begun(name, labels)
        wanted = torch.cat([
            (value.double() if group.numbers else value.long()).expand(-1, max(v.shape[1] for v in labels.values()), -1)
            for value in labels.values()
        ], 2)  # fmt: skip
        self._check(group, labels, wanted)
        if count and not group.declared:
            group.look_at(labels)
        dealt: Tensor | None = None
        for stack in group.stack(rows.features):
            features = [rows.features[source] for source in stack.sources]
            places = features[0].shape[1]
            self._check_stack(stack, features, labels, wanted.shape[1])
            own = wanted.expand(-1, places, -1).flatten(0, 1)
            if self._shuffled and stack.sources[0].network == "trained":
                if dealt is None:
                    dealt = _dealt(group, rows.control, wanted.dtype)
                own = torch.cat([own, dealt[:, None].expand(-1, places, -1).flatten(0, 1)], 1)
            flat = [one.flatten(0, 1) for one in features]
            usable = usable_rows(flat, own)
            if count and usable is not None:
                for source, bad in zip(stack.sources, (~usable).sum(1).tolist(), strict=True):
                    group.dropped[source] = group.dropped.get(source, 0) + bad
            yield Rows(flat, own, rows.parts(places), usable), self._scored(group, stack, flat[0].shape[1], own)

    def _begun(self, name: str, labels: Mapping[str, Tensor]) -> _Group:
        """A new group.

        Raises:
            InputError: if a column of it is called as one of another concept.
        """
        found = _group(labels)
        known = {column.name: column.concept for one in self._groups.values() for column in one.columns}
        for column in found.columns:
            if (other := known.setdefault(column.name, column.concept)) != column.concept:
                raise InputError(
                    f"the concepts {other!r} and {column.concept!r} both have something called {column.name!r} (of "
                    "several labels or numbers each is numbered so): give one of the two another name"
                )
        self._groups[name] = found
        return found

    def _scored(self, group: _Group, stack: _Stack, width: int, labels: Tensor) -> Any:
        one = stack.scored
        if one is not None:
            if isinstance(one, ScoredClasses) and len(labels):
                for place, most in enumerate((labels.amax(0) + 1).tolist()):
                    if most > one.bank.classes[place]:
                        one.widen(place, most)
            return one
        shape = {"sources": len(stack.sources), "features": width, "groupings": self._groupings}
        if group.numbers:
            stack.scored = ScoredValues(numbers=labels.shape[1], **shape, **self._options)
        else:
            most = [max(int(one) + 1, 2) for one in labels.amax(0)] if len(labels) else [2] * labels.shape[1]
            areas = len(group.columns) if stack.sources[0].network == "trained" else 0
            stack.scored = ScoredClasses(classes=most, areas=areas, **shape, **self._options)
        return stack.scored

    def _check_stack(self, stack: _Stack, features: list[Tensor], labels: Mapping[str, Tensor], places: int) -> None:
        """Raise unless the activations have the shape that they had before, and the labels' places."""
        for source, value in zip(stack.sources, features, strict=True):
            own, width = value.shape[1:]
            if places not in (1, own):
                raise InputError(
                    f"the labels of {', '.join(labels)} have {places} places a row and the activation of "
                    f"{source.site!r} has {own}: squares or agents have a label each, or one for all"
                )
            if own != features[0].shape[1]:
                raise InputError(
                    f"the activations of {stack.sources[0].site!r} and {source.site!r} had as many places before, and "
                    f"have {features[0].shape[1]} and {own} in this batch"
                )
            if stack.scored is not None and stack.scored.bank.width != width:
                raise InputError(
                    f"a row of {source.site!r} had {stack.scored.bank.width} features before, and has {width} in this "
                    "batch"
                )

    def _check(self, group: _Group, labels: Mapping[str, Tensor], wanted: Tensor) -> None:
        if wanted.shape[2] != len(group.columns):
            raise InputError(
                f"the concepts {', '.join(labels)} had {len(group.columns)} labels or numbers a row before, and have "
                f"{wanted.shape[2]} in this batch"
            )
        if not group.numbers and wanted.numel() and int(wanted.min()) < 0:
            column = int((wanted.amin((0, 1)) < 0).nonzero()[0])
            raise InputError(f"the classes of {group.columns[column].name!r} are numbers from 0, got {wanted.min()}")
        if not group.numbers and wanted.numel() and int(wanted.max()) >= MOST_CLASSES:
            column = int((wanted.amax((0, 1)) >= MOST_CLASSES).nonzero()[0])
            raise InputError(
                f"the labels of {group.columns[column].name!r} are integers up to {int(wanted[..., column].max())}, "
                f"each a class of its own, and there is room for {MOST_CLASSES}: give a quantity as floats (.float()), "
                "which is scored by the variance explained, and number kinds from 0 (torch.unique(..., "
                "return_inverse=True))"
            )

    # ------------------------------------------------------------------ what was found

    def probe(self, concept: str, source: Source, path: str) -> LinearProbe | None:
        """The probe of a concept at a source."""
        for group in self._groups.values():
            for place, column in enumerate(group.columns):
                known = group.find(source) if column.name == concept else None
                if known is not None:
                    scored, number = known
                    found = scored.found(number, place)
                    facts: dict[str, Any] = {name: one.estimate for name, one in found.items() if one.known}
                    return scored.probe(number, place, path, facts | {"groups": next(iter(found.values())).groups})
        return None

    def table(self, sites: Mapping[Any, Any], left_out: Mapping[str, int]) -> ProbeTable:
        """All cells.

        Args:
            sites: for each site which rows of the input it is compared with.
            left_out: by concept how many rows were.
        """
        return ProbeTable([
            self._cell(group, place, site, inputs, left_out)
            for site, inputs in sites.items() for group in self._groups.values() for place in range(len(group.columns))
            if group.find(Source("trained", site)) is not None
        ])  # fmt: skip

    def _cell(self, group: _Group, place: int, site: Any, inputs: Any, left_out: Mapping[str, int]) -> ProbeCell:
        column, trained = group.columns[place], Source("trained", site)
        own, at = group.find(trained)  # type: ignore[misc]
        others = [group.find(Source("untrained", site)), group.find(Source("input", inputs))]
        untrained, given = (None if one is None else one[0].score(one[1], place) for one in others)
        found = own.found(at, place)
        score = next(iter(found))
        dealt = place + len(group.columns) if self._shuffled else None
        return ProbeCell(
            site=str(site), concept=column.name, score=score, trained=found[score], untrained=untrained, input=given,
            shuffled=None if dealt is None else own.score(at, dealt),
            gain=None if others[0] is None else own.difference(at, place, others[0][0], (others[0][1], place)),
            selectivity=None if dealt is None else own.difference(at, place, own, (at, dealt)),
            auc=found.get("auc"), chance=own.chance(at, place), majority=own.majority(at, place),
            classes=own.classes(at, place),
            penalty=math.nan if own.probes is None else float(own.probes.penalty[at, place]),
            left_out=left_out.get(column.concept, 0) + group.dropped.get(trained, 0), words=own.words(at, place),
        )  # fmt: skip

    def scores(self) -> dict[tuple[str, str], Interval]:
        """The main score of each concept at each site of the trained network."""
        return {
            (str(source.site), column.name): stack.scored.score(at, place)
            for group in self._groups.values() for stack in group.stacks
            for at, source in enumerate(stack.sources) if source.network == "trained"
            for place, column in enumerate(group.columns)
        }  # fmt: skip


def _group(labels: Mapping[str, Tensor]) -> _Group:
    numbers = {value.is_floating_point() for value in labels.values()}
    if len(numbers) != 1:
        raise InputError("classes and numbers are fitted apart")
    found = _Group(numbers.pop())
    for concept, value in labels.items():
        width = value.shape[2]
        for place in range(width):
            name = concept if width == 1 else f"{concept}.{place}"
            found.columns.append(_Column(name, concept, value.new_empty(0)))
    return found


def _dealt(group: _Group, control: Tensor, dtype: torch.dtype) -> Tensor:
    """Labels that depend on the number of the group alone, as often each as in the rows seen: ``(rows, columns)``."""
    drawn = [column.seen if len(column.seen) else column.seen.new_zeros(1) for column in group.columns]
    lengths = torch.tensor(list(map(len, drawn)))
    code = (
        control[:, None] ^ torch.tensor([zlib.crc32(one.name.encode()) for one in group.columns])
    ) * 0x2545F4914F6CDD1D
    code = (code ^ (code >> 29)) * 0x27D4EB2F165667C5
    return torch.cat(drawn)[((code ^ (code >> 32)) & 0x7FFFFFFF) % lengths + lengths.cumsum(0) - lengths].to(dtype)


def _together(first: Scored, second: Scored) -> Scored:
    if isinstance(first, ScoredClasses) and isinstance(second, ScoredClasses):
        both: list[ScoredClasses] = [copy.deepcopy(first), copy.deepcopy(second)]
        first, second = both
        for place, counts in enumerate(zip(first.bank.classes, second.bank.classes, strict=True)):
            for one, count in zip(both, counts, strict=True):
                if count < max(counts):
                    one.widen(place, max(counts))
    return first + second

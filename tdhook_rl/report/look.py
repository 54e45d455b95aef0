"""What one batch shows: numbers under names, and pictures, histograms and tables where it is their turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.batches.annotation import OnMismatch
from tdhook_rl.batches.found import is_of_another
from tdhook_rl.calls.bound import observers
from tdhook_rl.errors import TdhookError, warn
from tdhook_rl.report.episodes import Episode, Followed, episode_table, episodes, odd_rewards
from tdhook_rl.report.media import DataTable
from tdhook_rl.report.probes import WatchedProbe, WatchedSuite, table_of_probes
from tdhook_rl.report.readings import Features, Readings
from tdhook_rl.report.shown import Shown
from tdhook_rl.rollout.diagnostics import NetworkDiagnostics

__all__ = ["Look", "Tries", "Turns"]

T = TypeVar("T")


class Tries:
    """Calls what may fail: a mistake that shows at once is raised, and what fails later is said once.

    Args:
        note: is told what has failed.

    Attributes:
        strict: whether errors of ours are raised; until the first batch was logged.
    """

    def __init__(self, note: Callable[[str], None] = lambda _: None) -> None:
        self.strict = True
        self.note = note
        self._said: set[str] = set()

    def __call__(self, what: str, function: Callable[[], T]) -> T | None:
        """What a function returns, ``None`` where it fails."""
        try:
            return function()
        except Exception as error:
            if isinstance(error, TdhookError) and self.strict:
                raise
            if what not in self._said:
                self._said.add(what)
                said = f"Monitor could not log {what} ({type(error).__name__}: {error})"
                self.note(said)
                warn(f"{said}; training goes on")
            return None


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Every how many batches that are looked at each of these comes; 0 for never."""

    media: int = 5
    table: int = 20
    animation: int = 100


@dataclass(kw_only=True)
class Look:
    """Looks at batches.

    Args:
        policy: the hooked policy.
        features: names and groups of features.
        turns: how often what is no number comes.
        images: of each attribution, each time.
        frames_key: frames to show attributions over.
        render: draws the states of rows.
        probes: by name.
        suite: of sites by concepts.
        diagnostics: of the network.
        tries: what calls the parts that may fail.

    Attributes:
        seen: how many batches were looked at.
    """

    policy: Any
    features: Features
    turns: Turns
    images: int
    frames_key: NestedKey | None = None
    render: Callable[[TensorDictBase], Tensor] | None = None
    probes: Mapping[str, WatchedProbe] = field(default_factory=dict)
    suite: WatchedSuite | None = None
    diagnostics: NetworkDiagnostics | None = None
    tries: Tries = field(default_factory=Tries)
    seen: int = 0
    _tabled: int | None = field(default=None, init=False)
    _others: bool | None = field(default=None, init=False)  # whether results that a batch brings are another policy's
    _followed: Followed = field(default_factory=Followed, init=False)

    def __call__(
        self, batch: TensorDictBase, step: int, on_mismatch: OnMismatch
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The numbers of a batch, and the rest.

        Args:
            batch: as collected, with results or without.
            step: environment frames so far.
            on_mismatch: as of ``annotate``.
        """
        data = self._annotated(batch, on_mismatch)
        readings = Readings(self.policy, data, self.features)
        known = self.tries("episodes", lambda: episodes(data, self._followed.before(batch))) or []
        odd = self.tries("rewards", lambda: odd_rewards(data)) or {}
        numbers = {**readings.numbers(), **_returns(known), **odd}
        for name, probe in self.probes.items():
            scores = self.tries(f"the probe {name!r}", lambda probe=probe: probe.update(data)) or {}
            numbers |= {f"probe.{name}.{score}": value for score, value in scores.items()}
        if self.suite is not None:
            self.show(data)
            if self._is_turn(self.turns.media) or self._is_turn(self.turns.table):
                found = self.tries("the suite of probes", self.suite.numbers) or {}
                numbers |= {f"probe.{name}": value for name, value in found.items()}
        if self.diagnostics is not None:
            found = self.tries("diagnostics", lambda: self.diagnostics.update(data)) or {}
            numbers |= {name.replace("/", "."): value for name, value in found.items()}
        return numbers, self._media(readings, known, step)

    def _media(self, readings: Readings, known: list[Episode], step: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        shown = Shown(readings, step, self.frames_key, self.render)
        if self._is_turn(self.turns.media):
            found |= self.tries("histograms", readings.histograms) or {}
            found |= self.tries("images", lambda: shown.images(self.images)) or {}
        if self._is_turn(self.turns.table):
            table = self.tries("episodes", lambda: episode_table(known, readings.by_row(), step))
            found |= {} if table is None else {"episodes": table}
            found |= self.probe_table(step)
        if self._is_turn(self.turns.animation):
            found |= self.tries("an episode", lambda: shown.animation(known)) or {}
        return found

    def follow(self, data: TensorDictBase) -> None:
        """Take notice of the episodes that the next batch may go on with; of every batch, in order."""
        self.tries("episodes", lambda: self._followed.follow(data))

    def lose(self) -> None:
        """Take notice that rows were missed before the next batch."""
        self._followed.lose()

    def show(self, data: TensorDictBase) -> None:
        """Let the suite of probes learn from a batch: it takes every one, in order."""
        suite = self.suite
        if suite is not None:
            self.tries("the suite of probes", lambda: suite.suite.update(data))

    def probe_table(self, step: int) -> dict[str, DataTable]:
        """The table of all probes as they are, unless it was made at this step already, or there are none."""
        if self._tabled == step:
            return {}
        records = [probe.record(name) for name, probe in self.probes.items() if probe.probe.scores]
        records += [] if self.suite is None else self.suite.records()
        table = self.tries("the table of probes", lambda: table_of_probes(records, step))
        self._tabled = step
        return {} if table is None else {"probes": table}

    def _is_turn(self, every: int) -> bool:
        return bool(every) and self.seen % every == 0

    def _annotated(self, batch: TensorDictBase, on_mismatch: OnMismatch) -> TensorDictBase:
        """The batch with results; as it is where it has them, of this policy."""
        later = [key for one in observers(self.policy._hooked.bound) if not one.only_in_forward
                 for key in one.result_keys]  # fmt: skip
        if all(batch.get(key, None) is not None for key in later):
            if self._others is None:  # asked once: later, weights are others than those that acted
                self._others = is_of_another(self.policy, batch)
            if not self._others:
                return batch
        return self.policy.annotate(batch, on_mismatch=on_mismatch)


def _returns(found_in: list[Episode]) -> dict[str, float]:
    ended = [one for one in found_in if one.ended]
    found = {"episodes.ended": float(len(ended))}
    for name, values in (("return", [one.total for one in ended]), ("steps", [one.steps for one in ended])):
        known = [value for value in values if value == value]
        if known:
            found[f"episodes.{name}"] = sum(known) / len(known)
    return found

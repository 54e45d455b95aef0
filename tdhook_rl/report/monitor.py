"""What the methods of a hooked policy find, in the logs of a run, while the agent trains."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from tensordict import NestedKey, TensorDictBase

from tdhook_rl.arguments.checked import Checked, checked
from tdhook_rl.batches.annotation import OnMismatch
from tdhook_rl.calls.bound import observers
from tdhook_rl.calls.preconditions import require_data, require_hooked
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import ArtifactError, InputError, TdhookError, warn
from tdhook_rl.report.episodes import Episode, episode_table, episodes
from tdhook_rl.report.facts import facts_of
from tdhook_rl.report.media import Artifact
from tdhook_rl.report.probes import WatchedProbe
from tdhook_rl.report.readings import Features, Readings
from tdhook_rl.report.sinks.names import PREFIX
from tdhook_rl.report.sinks.together import sinks_of
from tdhook_rl.rollout.diagnostics import NetworkDiagnostics
from tdhook_rl.rollout.newest_rows import NewestRows
from tdhook_rl.rollout.online_probe import OnlineProbe
from tdhook_rl.rollout.summary import AnnotatedMetrics

if TYPE_CHECKING:
    from torchrl.trainers import Trainer

__all__ = ["Budgets", "Monitor"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Budgets(metaclass=Checked):
    """How much is logged. What goes beyond is said once; numbers are in the local files nevertheless.

    Args:
        keys: names that loggers other than the local files are given.
        features: inputs with more features than this, and without names, are not listed one by one.
        images: of each attribution, each time.
        bytes: of pictures, tables and artifacts in the folder.
    """

    keys: int = 500
    features: int = 64
    images: int = 4
    bytes: float = 1e9

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise InputError(f"a budget is not negative, got {name}={value}")


class Monitor:
    """Logs what a hooked policy writes: two lines in a training loop, whatever the logger.

    Of each batch that is due: for each feature the mean absolute attribution, attribution mass by group, statistics of
    activations, probes beside their controls, the health of the network, what controls were set to, the shares of rows
    computed and not finite, returns. Every so often histograms, attributions over frames (or as bars), an episode, and
    a table of the worst and best episodes. All of it lies on an axis of its own, ``interp/step``, in frames.

    Nothing of it reaches training: no generator moves, the batch stays as it is, and what fails after the first batch
    is said once while training goes on. A mistake that shows at once is raised.

    Args:
        policy: the hooked policy. Batches that lack results are annotated.
        logger: a TorchRL ``Logger``, a W&B run, a TensorBoard ``SummaryWriter``, the path of a folder, or a list of
            these, which stay open; or what ``open_wandb`` gives, which is closed at the end. Everything is written to a
            folder first: that which is named, or one beside what the logger writes.
        every: every how many batches.
        media_every: every how many of these come with pictures and histograms; 0 for never, as in the next two.
        table_every: every how many of these come with the worst and best episodes.
        animation_every: every how many of these come with an episode as an animation.
        feature_names: names of the features of an input, or of each by key.
        groups: groups of features by name, each a list of indices or a mask; or such groups for each input by key.
        frames_key: frames to show attributions over, such as ``"pixels"``; the input itself where it is a picture.
        probes: probes by name; they learn from the batches that are due.
        untrained: a hooked policy of the network before training, as a control of the probes.
        diagnostics: of the network.
        seed, experiment, config: facts about the run, kept with its methods, targets, sites and versions.
        folder: where local files go; beside what the logger writes, unless given.
        prefix: the first level of all names.
        resume: go on in a folder that holds a log; :meth:`load_state_dict` sets the axis.
        buffer: read by ``step(None)``, where a collector hands out nothing and fills a replay buffer.
        rows: how many elements of the buffer are looked at once.
        budgets: how much is logged.
        on_mismatch: as of ``annotate``.

    Attributes:
        frames: environment frames so far, padding left out.
        folder: where the local files are.

    Raises:
        PreparationError: for a policy that is not hooked.
        InputError: for arguments that mean nothing.
        ArtifactError: if the folder holds a log already, or cannot be written.

    Example:
        >>> import tempfile
        >>> from tdhook_rl import Saliency
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import make_actor
        >>> with Saliency().prepare(make_actor()) as policy, Monitor(policy, tempfile.mkdtemp()) as monitor:
        ...     found = monitor.step(CueCorners(batch_size=[4]).rollout(5, policy, break_when_any_done=False))
        >>> monitor.frames, sorted(found)[:2]
        (20, ['attr.observation', 'computed.attr'])
    """

    @checked
    def __init__(
        self,
        policy: Any,
        logger: Any = None,
        *,
        every: int = 1,
        media_every: int = 5,
        table_every: int = 20,
        animation_every: int = 100,
        feature_names: Any = None,
        groups: Mapping[Any, Any] | None = None,
        frames_key: NestedKey | None = None,
        probes: Mapping[str, OnlineProbe] | None = None,
        untrained: Any = None,
        diagnostics: NetworkDiagnostics | None = None,
        seed: int | None = None,
        experiment: str | None = None,
        config: Mapping[str, Any] | None = None,
        folder: str | Path | None = None,
        prefix: str = PREFIX,
        resume: bool = False,
        buffer: Any = None,
        rows: int = 512,
        budgets: Budgets | None = None,
        on_mismatch: OnMismatch = "warn",
    ) -> None:
        require_hooked(policy, "Monitor")
        for name, value, least in (
            ("every", every, 1), ("media_every", media_every, 0), ("table_every", table_every, 0),
            ("animation_every", animation_every, 0), ("rows", rows, 1),
        ):  # fmt: skip
            if isinstance(value, bool) or value < least:
                raise InputError(f"{name}= is a whole number from {least} on, got {value!r}")
        if not prefix or "/" in prefix:
            raise InputError(f"prefix= is one word without a slash, as names have two levels; got {prefix!r}")
        if untrained is not None:
            require_hooked(untrained, "Monitor(untrained=...)")
        self.policy, self.buffer = policy, buffer
        self.every = every
        self.media_every, self.table_every, self.animation_every = media_every, table_every, animation_every
        self.budgets = budgets or Budgets()
        self.frames = 0
        self._features = Features(feature_names, groups, self.budgets.features)
        self._frames_key = frames_key
        inputs = policy.policy_in_keys
        self._probes = {
            name: WatchedProbe(probe, inputs[0] if inputs else None, untrained)
            for name, probe in (probes or {}).items()
        }
        self._diagnostics = diagnostics
        self._on_mismatch: OnMismatch = on_mismatch
        self._newest = NewestRows(rows)
        self._steps = self._seen = 0
        self._last: dict[str, float] = {}
        self._said: set[str] = set()
        self._closed = False
        self._sinks = sinks_of(
            logger, folder, prefix=prefix, resume=resume, most_keys=self.budgets.keys, most_bytes=self.budgets.bytes
        )
        self.folder: Path = self._sinks.local[0].path
        self._sinks.describe(facts_of(policy, seed=seed, experiment=experiment, config=config or {}))

    # ------------------------------------------------------------------ in a loop

    @checked
    def step(self, batch: TensorDictBase | None = None) -> dict[str, float] | None:
        """Take notice of a batch, and log what it shows if it is due.

        Args:
            batch: as collected; ``None`` for the newest rows of :attr:`buffer`.

        Returns:
            the numbers that were logged, or ``None``.

        Raises:
            InputError: for ``None`` without a buffer; and at the first batch whatever is wrong with the arguments.
        """
        if self._closed:
            raise InputError("this monitor is closed: make another, with resume=True to go on in its folder")
        due = self._steps % self.every == 0
        self._steps += 1
        data = self._from_buffer(due) if batch is None else batch
        if batch is not None:
            require_data(batch, "Monitor.step")
            real = real_rows(batch)
            self.frames += batch.batch_size.numel() if real is None else int(real.sum())
        if not due or data is None or not data.batch_size.numel():
            return None
        found = self._try("a batch", lambda: self._look(data))
        self._seen += 1
        return found

    def close(self) -> None:
        """Write the last values and the probes, and hand on what waits; the loggers stay open. May be called again."""
        if self._closed:
            return
        self._closed = True
        for name, probe in self._probes.items():
            if probe.probe.probe is not None:
                self._try("a probe's file", lambda name=name, probe=probe: self._save_probe(name, probe.probe))
        self._sinks.summarise({**self._last, "frames": float(self.frames)})
        self._sinks.close()

    def save(self, name: str, thing: Any, facts: Mapping[str, Any] | None = None) -> Path:
        """Keep a probe, a vector, or a file, locally first and then as an artifact of the loggers.

        Args:
            name: what it is called.
            thing: something with ``save(path)``, or the path of a file.
            facts: JSON-able facts about it.

        Returns:
            where it is.
        """
        with tempfile.TemporaryDirectory() as place:
            if isinstance(thing, str | Path):
                kind, files = "file", [Path(thing)]
            else:
                safe = "".join(one if one.isalnum() or one in "-_." else "_" for one in name)
                kind, saved = type(thing).__name__, Path(thing.save(Path(place) / safe))
                files = [one for one in (saved, saved.with_suffix(".json")) if one.is_file()]
            artifact = Artifact(files, kind, facts or {})
            self._sinks.log({name: artifact}, self.frames)  # copies them before it returns
        if artifact.path is None:
            raise ArtifactError(f"{name!r} could not be kept in {self.folder}: the disk, or the budget, has no room")
        return artifact.path

    @checked
    def log(self, values: Mapping[str, Any]) -> None:
        """Log more on the same axis, at the frame that was reached: numbers, images, tables such as a dose-response.

        Args:
            values: numbers, and what :mod:`tdhook_rl.report` has beside them, by name.

        Raises:
            InputError: for what is neither.
        """
        self._sinks.log(values, self.frames)

    def stats(self) -> dict[str, float]:
        """The last numbers, as TorchRL's ``LoggerMonitor`` asks for them; ``frames`` can be its step."""
        return {**self._last, "frames": float(self.frames)}

    @property
    def metrics_fn(self) -> AnnotatedMetrics:
        """What TorchRL's ``Evaluator`` takes as ``metrics_fn=``: the numbers of its trajectories."""
        return AnnotatedMetrics(self.policy, self._on_mismatch)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ in a trainer

    def register(self, trainer: Trainer, name: str = "monitor") -> None:
        """Look at the batches of a TorchRL ``Trainer``; those that go straight to its buffer are read from there."""
        self.buffer = getattr(trainer, "replay_buffer", None) if self.buffer is None else self.buffer
        trainer.register_op("pre_steps_log", self._of_trainer)
        trainer.register_module(name, self)

    def _of_trainer(self, batch: TensorDictBase | None) -> None:
        self.step(batch)  # nothing is returned, which the trainer would log as well

    def state_dict(self) -> dict[str, Any]:
        """Where the axis and the schedule are."""
        return {"frames": self.frames, "steps": self._steps, "seen": self._seen, "written": self._newest.written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the same frame."""
        self.frames, self._steps = state_dict["frames"], state_dict["steps"]
        self._seen, self._newest.written = state_dict["seen"], state_dict["written"]

    # ------------------------------------------------------------------ inner

    def _look(self, batch: TensorDictBase) -> dict[str, float]:
        data = self._annotated(batch)
        readings = Readings(self.policy, data, self._features)
        known = self._try("episodes", lambda: episodes(data)) or []
        numbers = {**readings.numbers(), **_returns(known)}
        for name, probe in self._probes.items():
            scores = self._try(f"the probe {name!r}", lambda probe=probe: probe.update(data)) or {}
            numbers |= {f"probe.{name}.{score}": value for score, value in scores.items()}
        if self._diagnostics is not None:
            found = self._try("diagnostics", lambda: self._diagnostics.update(data)) or {}
            numbers |= {name.replace("/", "."): value for name, value in found.items()}
        self._last = numbers
        self._sinks.log({**numbers, **self._media(readings, known)}, self.frames)
        return numbers

    def _media(self, readings: Readings, known: list[Episode]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._is_turn(self.media_every):
            found |= self._try("histograms", readings.histograms) or {}
            count = self.budgets.images
            found |= self._try("images", lambda: readings.images(count, self.frames, self._frames_key)) or {}
        if self._is_turn(self.table_every):
            table = self._try("episodes", lambda: episode_table(known, readings.by_row(), self.frames))
            found |= {} if table is None else {"episodes": table}
        if self._is_turn(self.animation_every):
            found |= self._try("an episode", lambda: readings.animation(known, self.frames, self._frames_key)) or {}
        return found

    def _is_turn(self, every: int) -> bool:
        return bool(every) and self._seen % every == 0

    def _annotated(self, batch: TensorDictBase) -> TensorDictBase:
        """The batch with results; as it is where it has them."""
        later = [key for one in observers(self.policy._hooked.bound) if not one.only_in_forward
                 for key in one.result_keys]  # fmt: skip
        if all(batch.get(key, None) is not None for key in later):
            return batch
        return self.policy.annotate(batch, on_mismatch=self._on_mismatch)

    def _from_buffer(self, due: bool) -> TensorDictBase | None:
        if self.buffer is None:
            raise InputError(
                "step(None) looks at the newest rows of a replay buffer, and this monitor knows none: set "
                "monitor.buffer = ..., or Monitor(buffer=...)"
            )
        if not due:
            return None
        count = self._newest.count(self.buffer)
        data = self._newest.take(self.buffer)
        if data is not None:  # an element may be a trajectory, or a step of several environments
            self.frames += count * data.batch_size[1:].numel()
        return data

    def _save_probe(self, name: str, probe: OnlineProbe) -> None:
        facts = {score: value.estimate for score, value in probe.scores.items()}
        self.save(f"probe.{name}", probe.probe, {**facts, "frames": self.frames})

    def _try(self, what: str, function: Callable[[], T]) -> T | None:
        """What a function returns; after the first batch a failure is said once, and training goes on."""
        try:
            return function()
        except Exception as error:
            if isinstance(error, TdhookError) and not self._seen and not self._closed:
                raise
            if what not in self._said:
                self._said.add(what)
                warn(f"Monitor could not log {what} ({type(error).__name__}: {error}); training goes on")
            return None


def _returns(known: list[Episode]) -> dict[str, float]:
    ended = [one for one in known if one.ended]
    found = {"episodes.ended": float(len(ended))}
    if ended:
        found["episodes.return"] = sum(one.total for one in ended) / len(ended)
        found["episodes.steps"] = sum(len(one.places) for one in ended) / len(ended)
    return found

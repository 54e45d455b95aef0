"""What the methods of a hooked policy find, in the logs of a run, while the agent trains."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tensordict import NestedKey, TensorDictBase
from torchrl.trainers import TrainerHookBase

from tdhook_rl.arguments.checked import checked
from tdhook_rl.batches.annotation import OnMismatch
from tdhook_rl.calls.preconditions import require_data, require_hooked
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import ArtifactError, InputError, PreparationError
from tdhook_rl.internals.torchrl_names import modules_of
from tdhook_rl.probes.site_features import observed_by
from tdhook_rl.report.budgets import Budgets, require_options
from tdhook_rl.report.facts import facts_of
from tdhook_rl.report.known_env import known_of
from tdhook_rl.report.look import Look, Tries, Turns
from tdhook_rl.report.media import Artifact
from tdhook_rl.report.probes import WatchedProbe, WatchedSuite
from tdhook_rl.report.readings import Features
from tdhook_rl.report.results import files_of, loggable_by_name
from tdhook_rl.report.sinks.names import PREFIX
from tdhook_rl.report.sinks.together import Sinks, sinks_of
from tdhook_rl.rollout.diagnostics import NetworkDiagnostics
from tdhook_rl.rollout.newest_rows import NewestRows
from tdhook_rl.rollout.online_probe import OnlineProbe
from tdhook_rl.rollout.probe_suite import ProbeSuite
from tdhook_rl.rollout.summary import AnnotatedMetrics
from tdhook_rl.rollout.trainer_hook import AnnotateHook
from tdhook_rl.rollout.trainer_policy import policy_of_trainer

if TYPE_CHECKING:
    from torchrl.trainers import Trainer

__all__ = ["Monitor"]


class Monitor(TrainerHookBase):
    """Logs what a hooked policy writes: two lines in a training loop, whatever the logger.

    Of each batch that is due: for each feature the mean absolute attribution, attribution mass by group, statistics of
    activations, probes beside their controls, the health of the network, what controls were set to, the shares of rows
    computed and not finite, returns. Every so often histograms, attributions over frames (or as bars), an episode, and
    a table of the worst and best episodes. All of it lies on an axis of its own, ``interp/step``, in frames.

    Nothing of it reaches training: no generator moves, the batch stays as it is, and what fails after the first batch
    is said once while training goes on. A mistake that shows at once is raised.

    Args:
        policy: the hooked policy; a trainer's at :meth:`register`, unless one is given. Batches that lack results are
            annotated.
        logger: a TorchRL ``Logger``, a W&B run, a TensorBoard ``SummaryWriter``, the path of a folder, or a list of
            these, which stay open; or what ``open_wandb`` gives, which is closed at the end. Everything is written to a
            folder first: that which is named, or one beside what the logger writes. Without any of these a trainer's
            own logger, or a new folder in ``runs``.
        every: every how many batches.
        media_every: every how many of these come with pictures and histograms; 0 for never, as in the next two.
        table_every: every how many of these come with the worst and best episodes, and a table of all probes.
        animation_every: every how many of these come with an episode as an animation.
        env: an environment or a collector, which may know names of features and draw states; a trainer's at
            :meth:`register`.
        feature_names: names of the features of an input, or of each by key; what the environment says unless given.
        groups: groups of features by name, each a list of indices or a mask; or such groups for each input by key.
        frames_key: frames to show attributions over, such as ``"pixels"``; the input itself where it is a picture.
        probes: probes by name, which learn from the batches that are due; or a ``ProbeSuite``, which is shown all that
            are handed over.
        untrained: a hooked policy of the network before training, as a control of the probes.
        diagnostics: of the network.
        seed, experiment, config: facts about the run, kept with its methods, targets, sites and versions.
        folder: where local files go; beside what the logger writes, unless given.
        prefix: the first level of all names.
        resume: go on in a folder that holds a log; :meth:`load_state_dict` sets the axis.
        buffer: read by ``step(None)``, where a collector hands out nothing and fills a replay buffer.
        rows: how many elements of the buffer are looked at once.
        budgets: how much is logged.
        on_mismatch: as of ``annotate``; unless given, ``"warn"`` for batches, and ``"ignore"`` for rows of a buffer,
            which older weights have collected.

    Attributes:
        frames: environment frames so far, padding left out; in a trainer times its ``frame_skip``, as it counts them.

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
        policy: Any = None,
        logger: Any = None,
        *,
        every: int = 1,
        media_every: int = 5,
        table_every: int = 20,
        animation_every: int = 100,
        env: Any = None,
        feature_names: Any = None,
        groups: Mapping[Any, Any] | None = None,
        frames_key: NestedKey | None = None,
        probes: Mapping[str, OnlineProbe] | ProbeSuite | None = None,
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
        on_mismatch: OnMismatch | None = None,
    ) -> None:
        for one, name in ((policy, "Monitor"), (untrained, "Monitor(untrained=...)")):
            if one is not None:
                require_hooked(one, name)
        require_options(
            prefix, every=(every, 1), rows=(rows, 1), media_every=(media_every, 0), table_every=(table_every, 0),
            animation_every=(animation_every, 0),
        )  # fmt: skip
        self.policy, self.buffer = None, buffer
        self.every = every
        self.budgets = budgets or Budgets()
        self.frames = 0
        self._newest = NewestRows(rows)
        self._mismatch: tuple[OnMismatch, OnMismatch] = (on_mismatch or "warn", on_mismatch or "ignore")
        self._steps, self._skip = 0, 1
        self._last: dict[str, float] = {"frames": 0.0}
        self._closed, self._ended = False, -1
        self._trainer: Trainer | None = None
        self._tries = Tries(self._note)
        suite = WatchedSuite(probes) if isinstance(probes, ProbeSuite) else None
        self._probes, self._untrained = {} if suite is not None else dict(probes or {}), untrained
        self._look = Look(
            policy=None,
            features=Features(feature_names, groups, self.budgets.features),
            turns=Turns(media=media_every, table=table_every, animation=animation_every),
            images=self.budgets.images,
            frames_key=frames_key,
            suite=suite,
            diagnostics=diagnostics,
            tries=self._tries,
        )
        self._facts: dict[str, Any] = {"seed": seed, "experiment": experiment, "config": config or {}}
        self._options: dict[str, Any] = {"prefix": prefix, "resume": resume}
        self._opened: Sinks | None = None
        self._learn_of(env)
        if policy is not None:
            self._watch(policy)
        if logger is not None or folder is not None:
            self._open(logger, folder)

    # ------------------------------------------------------------------ in a loop
    @checked
    def step(self, batch: TensorDictBase | None = None) -> dict[str, float] | None:
        """Take notice of a batch, and log what it shows if it is due.

        Args:
            batch: as collected (of several collectors, which number episodes alike, with ``StepCounter`` and
                ``RewardSum``, or returns are left out); ``None`` for the newest rows of :attr:`buffer`.

        Returns:
            the numbers that were logged, or ``None``.

        Raises:
            InputError: for ``None`` without a buffer; and at the first batch whatever is wrong with the arguments.
        """
        if self._closed:
            raise InputError("this monitor is closed: make another, with resume=True to go on in its folder")
        if self.policy is None:
            raise PreparationError(
                "this monitor has no policy yet: give it the hooked one, Monitor(policy, ...), or register it at a "
                "trainer whose collector has one"
            )
        due = self._steps % self.every == 0
        self._steps += 1
        data = self._from_buffer(due) if batch is None else batch
        if batch is not None:
            require_data(batch, "Monitor.step")
            real = real_rows(batch)
            self.frames += self._skip * (batch.batch_size.numel() if real is None else int(real.sum()))
        if data is None or not data.batch_size.numel():
            return None
        found = None
        if due:
            found = self._tries("a batch", lambda: self._logged(data, self._mismatch[batch is None]))
            self._look.seen += 1
            self._tries.strict = False
        else:
            self._look.show(data)
        self._look.follow(data)
        return found

    def close(self) -> None:
        """Write the last values and the probes, and hand on what waits; the loggers stay open. May be called again."""
        if self._closed:
            return
        if self._opened is not None:
            self._end()
            self._opened.close()
        self._closed = True

    def save(self, name: str, thing: Any, facts: Mapping[str, Any] | None = None) -> Path:
        """Keep a probe, a vector, statistics or a file, locally first and then as an artifact of the loggers.

        Args:
            name: what it is called.
            thing: something with ``save(path)``; the path of a file; or what holds tensors: a mapping, a TensorDict, a
                module, the statistics of a probe.
            facts: JSON-able facts about it.

        Returns:
            where it is.

        Raises:
            InputError: for anything else.
            ArtifactError: if there is no room for it.
        """
        with tempfile.TemporaryDirectory() as place:
            kind, files = files_of(name, thing, Path(place), facts or {})
            artifact = Artifact(files, kind, facts or {})
            self._sinks.log({name: artifact}, self.frames)  # copies them before it returns
        if artifact.path is None:
            raise ArtifactError(f"{name!r} could not be kept in {self.folder}: the disk, or the budget, has no room")
        return artifact.path

    @checked
    def log(self, values: Mapping[str, Any]) -> None:
        """Log more on the same axis, at the frame that was reached.

        Args:
            values: by name numbers, what :mod:`tdhook_rl.report` has beside them (images, tables, ...), and results: an
                interval, a dose-response, a table of probes, rows as mappings or dataclasses, a DataFrame, a figure.

        Raises:
            InputError: for what is none of these, and once it is closed.

        Example:
            >>> import tempfile
            >>> monitor = Monitor(folder=tempfile.mkdtemp())
            >>> monitor.log({"loss": 0.5, "dose": [{"alpha": 0.0, "rate": 0.1}, {"alpha": 1.0, "rate": 0.9}]})
            >>> print((monitor.folder / "media" / "dose" / "000000000.csv").read_text(), end="")
            alpha,rate
            0.0,0.1
            1.0,0.9
            >>> monitor.close()
        """
        self._sinks.log(loggable_by_name(values), self.frames)

    def stats(self) -> dict[str, float]:
        """The last numbers, and ``frames`` where they were logged; TorchRL's ``LoggerMonitor`` asks for them."""
        return {**self._last}

    @property
    def folder(self) -> Path:
        """Where the local files are."""
        return self._sinks.local[0].path

    @property
    def metrics_fn(self) -> AnnotatedMetrics:
        """What TorchRL's ``Evaluator`` takes as ``metrics_fn=``: the numbers of its trajectories."""
        return AnnotatedMetrics(self.policy, self._mismatch[0])

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._opened is not None and not self._closed:
            # What ends well enough to be closed has a summary, as if all had been done.
            self._opened.note(f"stopped by {kind.__name__} at frame {self.frames:,}: what follows was never measured")
        self.close()

    # ------------------------------------------------------------------ in a trainer

    def register(self, trainer: Trainer, name: str = "monitor") -> None:
        """Look at the batches of a TorchRL ``Trainer``; those that go straight to its buffer are read from there.

        Raises:
            PreparationError: for a monitor made without a policy, if the trainer has no hooked one; it says what it
                has.
        """
        if self.policy is None:
            self._watch(policy_of_trainer(trainer, "Monitor"))
        if self._opened is None:
            self._open(getattr(trainer, "logger", None))
        if not self._look.features.known:
            self._learn_of(getattr(trainer, "collector", None))
        self.buffer = getattr(trainer, "replay_buffer", None) if self.buffer is None else self.buffer
        self._trainer, self._skip = trainer, getattr(trainer, "frame_skip", 1)
        trainer.register_op("pre_steps_log", self._of_trainer)
        trainer.register_op("shutdown", self._end)
        trainer.register_module(name, self)

    def _of_trainer(self, batch: TensorDictBase | None) -> None:
        hooks = [one for one in modules_of(self._trainer).values() if isinstance(one, AnnotateHook)]
        for hook in hooks if batch is not None else ():
            if hook.policy is self.policy and hook.keep is not None and hook.last is not None:
                batch = hook.last  # with what the hook does not let on
        self.step(batch)  # nothing is returned, which the trainer would log as well

    def state_dict(self) -> dict[str, Any]:
        """Where the axis and the schedule are."""
        seen, written = self._look.seen, self._newest.written
        return {"frames": self.frames, "steps": self._steps, "seen": seen, "written": written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the same frame."""
        self.frames, self._steps = state_dict["frames"], state_dict["steps"]
        self._look.seen, self._newest.written = state_dict["seen"], state_dict["written"]
        self._tries.strict = not self._look.seen

    # ------------------------------------------------------------------ inner

    def _watch(self, policy: Any) -> None:
        """Begin to look at what a policy writes."""
        self._look.features.require_inputs(policy)
        self.policy = self._look.policy = policy
        if self._opened is not None:
            self._opened.describe(facts_of(policy, **self._facts))
        of = {"inputs": observed_by(policy), "untrained": self._untrained}
        self._look.probes = {name: WatchedProbe(one, **of) for name, one in self._probes.items()}

    def _note(self, text: str) -> None:
        if self._opened is not None:
            self._opened.note(f"{text}, from frame {self.frames:,} on")

    def _learn_of(self, env: Any) -> None:
        self._look.features.known, self._look.render = (known := known_of(env)).names, known.render

    def _open(self, logger: Any, folder: str | Path | None = None) -> Sinks:
        most = {"most_keys": self.budgets.keys, "most_bytes": self.budgets.bytes}
        found = sinks_of(logger, folder, **self._options, **most)
        if self.policy is not None:
            found.describe(facts_of(self.policy, **self._facts))
        self._opened = found
        return found

    @property
    def _sinks(self) -> Sinks:
        return self._opened or self._open(None)

    def _logged(self, batch: TensorDictBase, on_mismatch: OnMismatch) -> dict[str, float]:
        numbers, shown = self._look(batch, self.frames, on_mismatch)
        self._sinks.log({**numbers, **shown}, self.frames)
        self._last = {**numbers, "frames": float(self.frames)}  # at once: another thread may read it
        return numbers

    def _from_buffer(self, due: bool) -> TensorDictBase | None:
        if self.buffer is None:
            raise InputError(
                "step(None) looks at the newest rows of a replay buffer, and this monitor knows none: set "
                "monitor.buffer = ..., or Monitor(buffer=...)"
            )
        if not due:
            return None
        data = self._newest.take(self.buffer)
        self.frames += self._skip * self._newest.new * self._newest.each  # an element: a step of several environments
        if self._newest.missed:
            self._look.lose()
        return data

    def _end(self) -> None:
        """Write the last values and the probes, unless that was done at this frame."""
        self._tries.strict = False
        if self._ended == self.frames:
            return
        self._ended = self.frames
        found = [one for name, probe in self._look.probes.items() for one in probe.fitted(name).items()]
        suite = self._look.suite
        if suite is not None:
            self._tries("the suite of probes", suite.numbers)
            found += (self._tries("the suite of probes", suite.fitted) or {}).items()
        table = self._look.probe_table(self.frames)
        if table:
            self._sinks.log(table, self.frames)
        for name, (probe, scores) in found:
            facts = {**scores, "frames": self.frames}
            self._tries("a probe's file", lambda n=name, p=probe, f=facts: self.save(f"probe.{n}", p, f))
        self._sinks.summarise({**self._last, "frames": float(self.frames)})

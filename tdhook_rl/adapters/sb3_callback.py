"""Explanations in the logs of Stable-Baselines3, while it trains."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.logger import Image as Picture

from tdhook_rl.adapters.sb3 import from_sb3
from tdhook_rl.adapters.sb3_data import sb3_data
from tdhook_rl.adapters.sb3_networks import Piece
from tdhook_rl.adapters.sb3_reading import Keys
from tdhook_rl.arguments.checked import Checked
from tdhook_rl.errors import InputError
from tdhook_rl.method import Method
from tdhook_rl.report import Monitor
from tdhook_rl.report.media import Image, Media
from tdhook_rl.report.sinks.base import LoggerSink

__all__ = ["ExplainCallback"]


class ExplainCallback(BaseCallback, metaclass=Checked):
    """Explains what Stable-Baselines3 has collected, before it learns from it, and logs what is found.

    A :class:`~tdhook_rl.report.Monitor` of the stored steps: the last rollout of PPO and A2C, the newest rows of the
    replay buffer of DQN, SAC and TD3, explained at the stored actions by the network of now. Numbers go to the agent's
    own logger, as ``interp/...`` (TensorBoard, CSV, JSON), and everything to a folder and to further loggers. Training
    with it is training without it, bit for bit.

    Given to ``learn`` again it goes on in its log, also where training was interrupted, or goes on with a loaded agent
    (``reset_num_timesteps=False``). Another agent gets a log of its own.

    Args:
        method: a method, or a ``Compose`` of several, as for :func:`~tdhook_rl.adapters.from_sb3` of the agent.
        every: after how many steps of the environment, at the end of the rollout in which they are over.
        rows: at most so many stored steps of each environment, the newest.
        part: as of :func:`~tdhook_rl.adapters.from_sb3`; ``"actor_value"`` for targets on values.
        in_keys: likewise.
        logger: further loggers, as of :class:`~tdhook_rl.report.Monitor`.
        folder: where local files go; unless given, ``interp`` in the folder of the agent's logger, if it has one.
        monitor: further arguments of :class:`~tdhook_rl.report.Monitor`.
        verbose: as of ``BaseCallback``.

    Attributes:
        policy: the hooked policy, while training.
        last: the last numbers.

    Raises:
        InputError: when training starts, below a callback that tells it of no rollouts (``EveryNTimesteps``).
        ArtifactError: if the folder holds a log already, of another agent.

    Example:
        >>> import tempfile
        >>> from stable_baselines3 import PPO
        >>> from tdhook_rl import Saliency
        >>> agent = PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu")
        >>> explain = ExplainCallback(Saliency(), every=64, folder=tempfile.mkdtemp())
        >>> agent = agent.learn(128, callback=explain)
        >>> sorted(explain.last)[:2]
        ['attr.observation', 'attr.observation.0']
    """

    def __init__(
        self,
        method: Method,
        *,
        every: int = 10_000,
        rows: int = 512,
        part: Piece = "actor",
        in_keys: Keys | None = None,
        logger: Any = None,
        folder: str | Path | None = None,
        monitor: dict[str, Any] | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if every < 1 or rows < 1:
            raise InputError(f"every= and rows= are at least 1, got {every} and {rows}")
        self.method, self.every, self.rows = method, every, rows
        self.part, self.in_keys = part, in_keys
        self.further = [] if logger is None else list(logger) if isinstance(logger, list | tuple) else [logger]
        self.folder, self.options = folder, dict(monitor or {})
        self._named = folder
        self.policy: Any = None
        self.last: dict[str, float] = {}
        self._monitor: Monitor | None = None
        self._kept: dict[str, Any] | None = None
        self._next = 0
        self._agent: Any = None  # of the last training, weakly

    def _require_told(self) -> None:
        """Raise where another callback calls this one, at its events and at no others."""
        if isinstance(self.parent, EventCallback):
            raise InputError(
                f"ExplainCallback explains at the end of rollouts; {type(self.parent).__name__} tells those below it "
                "of none: give it to learn beside it, as in learn(steps, callback=[explain, other]); every= says how "
                "often it explains"
            )

    def _on_training_start(self) -> None:
        self._require_told()
        self._on_training_end()  # of a training that was interrupted
        model = self.model
        if self._agent is not None and self._agent() is not model and not self.num_timesteps:
            self._kept, self.folder, self.last = None, self._named, {}
        self._agent = weakref.ref(model)
        off_policy = hasattr(model, "replay_buffer")
        # A rollout buffer has observations as the network saw them, a replay buffer as the environment gave them.
        normalize = (model.get_vec_normalize_env() if off_policy else None) or False
        policy = from_sb3(model, self.part, normalize=normalize, in_keys=self.in_keys)
        self.policy = self.method.prepare(policy, return_context=False)
        folder = self.folder
        if folder is None and (beside := model.logger.get_dir()) is not None:
            folder = Path(beside) / "interp"
        options = {"on_mismatch": "ignore" if off_policy else "warn", **self.options}
        self._monitor = Monitor(
            self.policy,
            [Recorder(model.logger), *self.further],
            folder=folder,
            resume=self._kept is not None,
            **options,
        )
        if self._kept is not None:  # training goes on
            self._monitor.load_state_dict(self._kept)
        self.folder = self._monitor.folder
        self._next = self.num_timesteps + self.every

    def _on_step(self) -> bool:
        self._require_told()  # some that are below another one are called here alone
        return True

    def _on_rollout_end(self) -> None:
        if self._monitor is None or self.num_timesteps < self._next:
            return
        self._next = self.num_timesteps + self.every
        self._monitor.frames = self.num_timesteps
        data = sb3_data(self.model, newest=self.rows, in_keys=self.in_keys)
        self._monitor.frames -= data.numel()  # which it counts
        self.last = self._monitor.step(data) or self.last

    def _on_training_end(self) -> None:
        if self._monitor is not None:
            self._kept = self._monitor.state_dict()
            self._monitor.close()
            self._monitor = None


class Recorder(LoggerSink):
    """The logger of an agent, which writes what it was told when the agent does: numbers, and pictures.

    Names are longer than its printed table takes, so they are left out of it; what else there is stays in the folder.
    """

    shows = (Image,)
    keeps_files = False

    def _can(self, name: str, value: Media) -> bool:
        return isinstance(value, self.shows)

    def _send(self, values: Mapping[str, float], media: Mapping[str, Any], step: int) -> None:
        printed = ("stdout", "log")
        for name, value in values.items():
            self.logger.record(name, value, exclude=printed)
        for name, one in media.items():
            self.logger.record(name, Picture(one.pixels, "HWC"), exclude=(*printed, "json", "csv"))

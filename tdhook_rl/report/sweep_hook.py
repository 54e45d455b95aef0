"""A sweep every so many batches of training, on the axis of a monitor."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchrl.trainers.trainers import TrainerHookBase

from tdhook_rl.arguments.checked import checked, require_counts
from tdhook_rl.errors import InputError
from tdhook_rl.report.look import Tries
from tdhook_rl.report.monitor import Monitor
from tdhook_rl.report.steering import strongest
from tdhook_rl.sweeps import SweepResult

if TYPE_CHECKING:
    from torchrl.trainers import Trainer


class SweepHook(TrainerHookBase):
    """Plays a sweep every so many batches and logs it: what steering does while the agent learns.

    Of each vector at its strongest, for each outcome: the effect with its limits, and the range of those of random
    directions; and the table of all strengths. Generators of torch, NumPy and Python are as they were after a sweep, so
    that training stays as it is to the bit, if the sweep is given an environment of its own too. What fails after the
    first sweep is said once while training goes on; a mistake that shows at once is raised.

    Args:
        monitor: what logs it.
        sweep: plays it, with the policy as it is then: a call of :func:`tdhook_rl.sweeps.steering_sweep`.
        every: every how many batches, the first included.
        share: of the time so far, at most so much goes into sweeps: one that is due is left out where they took more.
        name: of the numbers, ``"<name>.<vector>.<outcome>.effect"``, and of the table.

    Attributes:
        last: the result that was logged last.

    Raises:
        InputError: for a share that is none; if ``sweep`` at first gives no :class:`~tdhook_rl.sweeps.SweepResult`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import FC2, make_actor
        >>> from tdhook_rl.sweeps import SteeringVector, steering_sweep
        >>> actor, vector = make_actor(), SteeringVector(vector=torch.ones(64), path=FC2)
        >>> monitor = Monitor(folder=tempfile.mkdtemp())
        >>> play = lambda: steering_sweep(actor, CueCorners(), vector, alphas=[1.0], controls=2, episodes=8)
        >>> steering = SweepHook(monitor, play, every=10)
        >>> sorted(steering.step())[:2]  # in a loop, after monitor.step(data)
        ['steering.module-0-module-3.length.effect', 'steering.module-0-module-3.length.effect_high']
        >>> monitor.close()
    """

    @checked
    def __init__(
        self,
        monitor: Monitor,
        sweep: Callable[[], Any],
        *,
        every: int = 20,
        share: float | None = None,
        name: str = "steering",
    ) -> None:
        require_counts(every=every)
        if share is not None and not 0 < share <= 1:
            raise InputError(f"share= is a share of the time, above 0 and up to 1; got {share!r}")
        self.monitor, self.every, self.name = monitor, every, name
        self.last: SweepResult | None = None
        self._sweep = sweep
        self._batches = 0
        self._share, self._spent, self._start = share, 0.0, time.monotonic()
        self._tries = Tries()

    def step(self, batch: Any = None) -> dict[str, float] | None:
        """Count a batch, and play the sweep if it is due; returns the numbers that were logged, or ``None``."""
        due = self._batches % self.every == 0
        self._batches += 1
        if not due or (self._share is not None and self._spent > self._share * (time.monotonic() - self._start)):
            return None
        found = self._tries(f"the sweep {self.name!r}", self._logged)
        self._tries.strict = False
        return found

    def _logged(self) -> dict[str, float]:
        start = time.monotonic()
        try:
            with _generators_kept():
                result = self._sweep()
        finally:
            self._spent += time.monotonic() - start
        if not isinstance(result, SweepResult):
            raise InputError(f"sweep= gives a {type(result).__name__}; it returns what steering_sweep returns")
        self.last = result
        numbers = self._numbers(result)
        self.monitor.log({self.name: result, **numbers})
        return numbers

    def _numbers(self, result: SweepResult) -> dict[str, float]:
        found: dict[str, float] = {}
        for vector in result.vectors:
            for outcome in result.outcomes:
                row = result.row(outcome, vector, strongest(result, vector))
                first = ".".join((self.name, *(one.replace(".", "-") for one in (vector, outcome))))
                found |= {f"{first}.effect": row.effect.estimate, f"{first}.mean": row.mean.estimate}
                if row.effect.known:
                    found |= {f"{first}.effect_low": row.effect.low, f"{first}.effect_high": row.effect.high}
                if len(row.random):
                    found |= {f"{first}.random_low": float(row.random.min())}
                    found |= {f"{first}.random_high": float(row.random.max())}
        return found

    def register(self, trainer: Trainer, name: str = "sweep") -> None:
        """Count the batches of a TorchRL ``Trainer``; register it after its monitor."""
        trainer.register_op("pre_steps_log", self._of_trainer)
        trainer.register_module(name, self)

    def _of_trainer(self, batch: Any) -> None:
        self.step(batch)  # nothing is returned, which the trainer would log as well

    def state_dict(self) -> dict[str, int]:
        """Where the schedule is."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on with the schedule."""
        self._batches = state_dict["batches"]


@contextmanager
def _generators_kept() -> Iterator[None]:
    """What is drawn inside is not drawn for training."""
    plain, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)

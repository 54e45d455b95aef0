"""Sweeps while an agent trains: logged on the monitor's axis, and training stays as it is to the bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrl.collectors import Collector

from tdhook_rl import Saliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.report import FileSink, Monitor, SweepHook
from tdhook_rl.sweeps import SteeringVector, steering_sweep
from tests.test_monitor_results import rows_in


def train(folder: Path | None, batches: int = 5) -> tuple[list[torch.Tensor], list[dict[str, float] | None]]:
    """A loop that learns from what it collects, with sweeps if there is a folder for them."""
    torch.manual_seed(0)
    actor = make_actor()
    adam = torch.optim.Adam(actor.parameters(), lr=1e-2)
    collector = Collector(
        CueCorners(batch_size=[4], max_steps=6), actor, frames_per_batch=32, total_frames=32 * batches,
        auto_register_policy_transforms=False,
    )  # fmt: skip
    vector = SteeringVector(vector=torch.linspace(-2, 2, 64), path=FC2)
    play = partial(
        steering_sweep, actor, CueCorners(max_steps=6), vector, alphas=[0.5, 1.0], controls=2, episodes=8, max_steps=6,
        progress=False,
    )  # fmt: skip
    found = []
    policy = Saliency().prepare(actor, return_context=False)
    monitor = None if folder is None else Monitor(policy, folder)
    steering = None if monitor is None else SweepHook(monitor, play, every=2)
    for data in collector:
        if monitor is not None and steering is not None:
            monitor.step(data)
            found.append(steering.step(data))
        adam.zero_grad()
        (-actor.get_dist(data).log_prob(data["action"]) * data["next", "reward"].squeeze(-1)).mean().backward()
        adam.step()
    if monitor is not None:
        monitor.close()
    collector.shutdown()
    return [one.detach().clone() for one in actor.parameters()], found


@pytest.mark.filterwarnings("ignore:.*did not end")
def test_sweeps_are_logged_and_training_stays_as_it_is(tmp_path: Path) -> None:
    plain, _ = train(None)
    weights, found = train(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(plain, weights, strict=True))
    assert [one is not None for one in found] == [True, False, True, False, True]
    logged = FileSink.read(tmp_path / "log.csv")
    name = "steering.module-0-module-3.return.effect"
    assert logged[name] == [(frames, one[name]) for frames, one in zip((32, 96, 160), found[::2], strict=True) if one]
    assert any(f"{name}_low" in one and f"{name}_high" in one for one in found[::2] if one)
    table = rows_in(tmp_path / "media" / "steering" / "000000096.csv")
    assert len(table) == 4
    assert found[2] is not None
    row = next(one for one in table if one["outcome"] == "return" and float(one["alpha"]) == 1)
    assert float(row["effect"]) == pytest.approx(found[2][name])


def test_the_schedule_goes_on_and_wrong_sweeps_are_refused(tmp_path: Path) -> None:
    with Monitor(folder=tmp_path) as monitor:
        hook = SweepHook(monitor, lambda: 3, every=4)
        with pytest.raises(InputError, match="gives a int"):
            hook.step()
        other = SweepHook(monitor, lambda: 3, every=4)
        other.load_state_dict(hook.state_dict())
        assert other.step() is None
        with pytest.raises(InputError):
            SweepHook(monitor, lambda: 3, every=0)


def played() -> Any:
    actor, vector = make_actor(), SteeringVector(vector=torch.linspace(-2, 2, 64), path=FC2)
    return steering_sweep(
        actor, CueCorners(max_steps=4), vector, alphas=[1.0], controls=2, episodes=4, max_steps=4, progress=False
    )


def drawn() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.filterwarnings("ignore:.*did not end")
def test_whatever_a_sweep_draws_is_not_drawn_for_training_and_a_later_failure_is_said_once(tmp_path: Path) -> None:
    def careless() -> Any:
        drawn()
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        return played()

    def seeded(hook: SweepHook | None) -> list[tuple[float, ...]]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        found = []
        for _ in range(3):
            if hook is not None:
                hook.step()
            found.append(drawn())
        return found

    sweeps: list[Callable[[], Any]] = [careless]
    with Monitor(folder=tmp_path) as monitor:
        hook = SweepHook(monitor, lambda: sweeps[0](), every=2)
        assert seeded(hook) == seeded(None)
        assert hook.last is not None
        sweeps[0] = lambda: 1 / 0
        with pytest.warns(UserWarning, match="ZeroDivisionError.*training goes on") as caught:
            assert [hook.step() for _ in range(6)] == [None] * 6
        assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:.*did not end")
def test_no_more_time_is_spent_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, clock = played(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow() -> Any:
        clock[0] += 10.0
        return result

    with Monitor(folder=tmp_path) as monitor:
        hook = SweepHook(monitor, slow, every=1, share=0.25)
        when = []
        for _ in range(100):
            clock[0] += 1.0
            if hook.step() is not None:
                when.append(clock[0])
        assert when == [11.0, 50.0, 90.0, 130.0]  # 10 s of each 40
        with pytest.raises(InputError, match="share="):
            SweepHook(monitor, slow, share=0.0)

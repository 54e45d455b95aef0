"""CueCorners: specs, determinism, labels against a slow reference, pairing, resets."""

from __future__ import annotations

import pytest
import torch
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from tdhook_rl.envs import CueCorners
from tests.oracles import xor_of


@pytest.mark.parametrize("batch_size", [(), (5,), (2, 3)])
def test_specs(batch_size: tuple[int, ...]) -> None:
    check_env_specs(CueCorners(batch_size=batch_size), seed=0)


def test_the_same_seed_gives_the_same_episodes() -> None:
    first, second = (CueCorners(batch_size=[8], seed=4) for _ in range(2))
    other = CueCorners(batch_size=[8], seed=5)
    assert torch.equal(first.reset()["observation"], second.reset()["observation"])
    assert not torch.equal(first.reset()["observation"], other.reset()["observation"])


def reference(cell: int, bits: list[int], action: int) -> tuple[int, float, bool]:
    """One step, written out for one agent."""
    row, column = divmod(cell, 5)
    if action == 0 and row > 0:
        row -= 1
    elif action == 1 and row < 4:
        row += 1
    elif action == 2 and column > 0:
        column -= 1
    elif action == 3 and column < 4:
        column += 1
    cell = row * 5 + column
    pays_a = xor_of(bits, 0, 1) == 1
    reward = -0.02
    if cell == 0:
        reward += 1 if pays_a else -1
    elif cell == 24:
        reward += -1 if pays_a else 1
    return cell, reward, cell in (0, 24)


def test_steps_and_labels_equal_a_slow_reference() -> None:
    data = CueCorners(batch_size=[64], max_steps=9, seed=0).rollout(60, break_when_any_done=False).reshape(-1)
    for row in range(0, len(data), 3):
        now, then = data[row], data[row]["next"]
        bits, cell = now["concept", "bits"].tolist(), int(now["concept", "cell"])
        expected, reward, terminated = reference(cell, bits, int(now["action"]))
        assert int(then["concept", "cell"]) == expected
        assert float(then["reward"]) == pytest.approx(reward)
        assert bool(then["terminated"]) == terminated
        assert bool(then["truncated"]) == (int(now["elapsed"]) == 8 and not terminated)
        assert int(now["concept", "xor"]) == xor_of(bits, 0, 1)
        assert int(now["concept", "unneeded_xor"]) == xor_of(bits, 2, 3)
        assert int(now["concept", "paying_corner"]) == 1 - xor_of(bits, 0, 1)
        planes = now["observation"].reshape(3, 6, 5)
        assert planes[0, 1:].flatten().nonzero().flatten().tolist() == [cell]
        assert planes[1, 1:].flatten().nonzero().flatten().tolist() == [0, 24]
        assert planes[2, 0, :4].tolist() == [float(bit) for bit in bits]
        assert now["observation"][CueCorners.light_features()].tolist() == [float(bit) for bit in bits]
        assert then["concept", "bits"].tolist() == bits  # also in the last step of an episode


@pytest.mark.parametrize("wrapped", [False, True])
def test_finished_rows_start_again_and_the_others_go_on(wrapped: bool) -> None:
    env = CueCorners(batch_size=[32], max_steps=6, seed=3)
    data = (TransformedEnv(env, StepCounter()) if wrapped else env).rollout(80, break_when_any_done=False)
    done = data["next", "done"][:, :-1, 0]
    assert 200 < int(done.sum()) < 2000
    assert bool((data["elapsed"][:, 1:][done] == 0).all())
    for key in ("observation", "elapsed", ("concept", "bits"), ("concept", "cell")):
        assert torch.equal(data["next"][key][:, :-1][~done], data[key][:, 1:][~done])
    assert len(data["concept", "bits"][:, 1:][done].unique(dim=0)) == 16
    assert not bool(torch.isin(data["concept", "cell"], torch.tensor([0, 24])).any())


def test_all_states_and_pairs() -> None:
    env = CueCorners()
    states = env.all_states()
    assert states.batch_size == (368,)
    assert len(states["observation"].unique(dim=0)) == 368
    for bit in range(4):
        off, on = env.paired_states(bit)
        assert off.batch_size == on.batch_size == (184,)
        changed = (off["observation"] != on["observation"]).sum(0).nonzero().flatten()
        assert changed.tolist() == [int(CueCorners.light_features()[bit])]
        assert bool((off["concept", "xor"] != on["concept", "xor"]).all()) == (bit < 2)
        assert bool((off["concept", "unneeded_xor"] != on["concept", "unneeded_xor"]).all()) == (bit >= 2)


def test_a_rollout_starts_from_given_states() -> None:
    env = CueCorners()
    start = env.state(cell=torch.tensor([3, 20]), bits=torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1]]))
    data = env.rollout(4, auto_reset=False, tensordict=start, break_when_any_done=False)
    assert data["concept", "cell"][:, 0].tolist() == [3, 20]
    assert data["concept", "bits"][1, 0].tolist() == [1, 1, 0, 1]


def test_wrong_states_and_sizes_are_refused() -> None:
    env = CueCorners()
    bits = torch.zeros(1, 4)
    for cell, lights, message in (
        (25, bits, "cells go from 0 to 24"),
        (24, bits, "goals"),
        (3, bits + 2, "0 or 1"),
        (3, torch.zeros(1, 3), "bits has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            env.state(cell=torch.tensor([cell]), bits=lights)
    with pytest.raises(ValueError, match="at least one copy"):
        CueCorners(batch_size=[0])
    with pytest.raises(ValueError, match="max_steps"):
        CueCorners(max_steps=0)
    with pytest.raises(ValueError, match="lights 0 to 3"):
        env.paired_states(4)

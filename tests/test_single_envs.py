"""What each environment promises of its own: closed forms, regions, mazes, pictures, and steps written out slowly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tdhook_rl.envs import Cheese, KeyDoor, KnownValue, TMaze
from tests.test_envs import ENVS


def test_known_value_is_the_expected_discounted_reward() -> None:
    env = KnownValue(gamma=0.9, seed=0, max_steps=1000)
    starts = env.sample_states(3, seed=1)
    copies = 2000
    states = starts[:, None].expand(3, copies).clone()
    total, discount = torch.zeros(3, copies), 1.0
    for _ in range(70):
        best = (states["features"][..., 9] > 0).long()
        step = env.step(states.set("action", best))["next"]
        total += discount * step["reward"].squeeze(-1)
        discount *= 0.9
        states = step.exclude("reward")
    error = (total.mean(1) - env.value(starts)).abs()
    assert bool((error < 5 * total.std(1) / copies**0.5).all())
    # Moving two features that the value counts and one that it does not.
    moved = env.edit(starts, features=starts["features"] + torch.eye(16)[[2, 5, 11]])
    torch.testing.assert_close(env.value(moved) - env.value(starts), torch.tensor([0.5 / 0.28, 1.0, 0.0]))


def test_known_value_attributions_are_complete_and_equal_a_numerical_path_integral() -> None:
    env = KnownValue()
    states, baseline = env.sample_states(50), torch.linspace(-1, 1, 16)
    found = env.attribution(states, baseline=baseline)
    at_baseline = env.value(env.state(features=baseline))
    torch.testing.assert_close(found.sum(-1), env.value(states) - at_baseline, rtol=1e-4, atol=1e-4)
    features, total = states["features"].double(), torch.zeros(50, 16, dtype=torch.double)
    steps = 4000
    for share in (torch.arange(steps) + 0.5) / steps:
        point = baseline.double() + share * (features - baseline.double())
        total += env.gradient(states.clone().set("features", point)) * (features - baseline) / steps
    torch.testing.assert_close(found.double(), total, rtol=1e-3, atol=3e-3)
    drawn = states["features"].clone().requires_grad_()
    value = env._value({"features": drawn}, env.gamma).sum()
    torch.testing.assert_close(torch.autograd.grad(value, drawn)[0], env.gradient(states))


def test_known_value_drifts_as_declared() -> None:
    data = KnownValue(batch_size=[4000], seed=0, max_steps=50).rollout(12, break_when_any_done=False)
    x = data["features"].double()
    assert float((x.var((0, 1)) - 1).abs().max()) < 0.1
    correlation = (x[:, 1:] * x[:, :-1]).mean((0, 1))
    expected = torch.zeros(16, dtype=torch.double)
    expected[[2, 11]] = 0.8
    torch.testing.assert_close(correlation, expected, rtol=0, atol=0.05)


def test_the_cue_is_seen_once_and_decides() -> None:
    data = TMaze(batch_size=[200], seed=0).rollout(27, break_when_any_done=False)
    shown = data["observation"][..., :4].any(-1)
    assert torch.equal(shown, data["elapsed"] == 0)
    last = data["elapsed"] == 8
    assert torch.equal(data["next", "terminated"].squeeze(-1), last)
    right = data["action"] == data["concept", "cue"]
    expected = torch.where(last, torch.where(right, 1.0, -1.0), 0.0)
    assert torch.equal(data["next", "reward"].squeeze(-1), expected)
    assert torch.equal(data["observation"][..., 6] == 1, last)


def test_cheese_lies_in_its_region_and_can_be_hidden() -> None:
    corner = torch.tensor([4, 5, 6, 11, 12, 13, 18, 19, 20])
    for region, inside in (("top_right", 1.0), ("outside", 0.0), ("anywhere", 9 / 49)):
        cells = Cheese(region=region, seed=0).sample_states(4000)["concept", "cheese_cell"]
        assert float(torch.isin(cells, corner).float().mean()) == pytest.approx(inside, abs=0.03)
    hidden = Cheese(visible=False, start=42, batch_size=[64], seed=0).reset()
    assert not bool(hidden["observation"][:, 1].any())
    assert bool((hidden["concept", "cell"] == 42).all())
    env = Cheese(batch_size=[64], seed=0)
    with_cheese, without = env.paired("visible", states=env.reset())
    assert bool((with_cheese["observation"][:, 1].sum((-1, -2)) == 1).all())
    assert not bool(without["observation"][:, 1].any())
    assert torch.equal(with_cheese["observation"][:, [0, 2]], without["observation"][:, [0, 2]])


def test_mazes_are_trees_and_stay_the_same() -> None:
    env, other = Cheese(mazes=20, seed=0), Cheese(mazes=20, seed=1)
    assert torch.equal(env._walls, other._walls)
    assert not torch.equal(env._walls, Cheese(mazes=20, maze_seed=1)._walls)
    assert len(env._walls.unique(dim=0)) > 15
    assert bool(((~env._walls).sum(1) == 31).all())  # 16 rooms and 15 doors between them
    free = ~env._walls
    reachable = env._distances < 49
    assert torch.equal(reachable, free[:, :, None] & free[:, None, :])


def test_key_door_pictures_show_the_tiles() -> None:
    env = KeyDoor()
    states = env.state(
        cell=[0, 15, 15],
        key_cell=[7, 7, 7],
        door_row=[2, 2, 2],
        goal_cell=[29, 29, 29],
        has_key=[0, 1, 1],
        door_open=[0, 1, 1],
        floor=[0, 0, 1],
    )
    middle = states["observation"][:, :, 2::6, 2::6].permute(0, 2, 3, 1)  # the core of each tile
    edge = states["observation"][:, :, ::6, ::6].permute(0, 2, 3, 1)
    assert middle[0, 1, 1].tolist() == [240, 228, 66]  # the key
    assert middle[1, 1, 1].tolist() == [225, 225, 215]  # taken
    assert middle[0, 4, 5].tolist() == [0, 158, 115]  # the goal
    assert middle[1, 2, 3].tolist() == [240, 228, 66]  # the agent, with the key, in the open door
    assert bool((middle[0, :, 3] == torch.tensor([70, 75, 85])).all())  # the wall, and the keyhole in it
    assert edge[0, 2, 3].tolist() == [230, 159, 0]
    assert edge[2, 0, 0].tolist() == [190, 205, 225]
    assert not torch.equal(states["observation"][1], states["observation"][2])


def test_relevant_pixels_are_the_tiles_of_things() -> None:
    env = KeyDoor()
    states = env.sample_states(200)
    mask = env.relevance("value", states)
    assert mask.shape == states["observation"].shape
    holds = states["concept", "has_key"] == 1
    assert torch.equal(mask.sum((1, 2, 3)), torch.where(holds, 3, 4) * 3 * 36)
    moved, changed = env.paired("floor", states=states)
    same = (moved["observation"] == changed["observation"]).all(1, keepdim=True)
    assert torch.equal(env.value(moved), env.value(changed))
    middle = torch.isin(torch.arange(36) % 6, torch.tensor([2, 3]))
    core = mask & middle & middle[:, None]
    assert bool(same.expand_as(mask)[core].all())  # the floor shows only around the things


def slow_step(kind: str, at: dict[str, Any], action: int, walls: list[bool]) -> tuple[dict[str, Any], float, bool]:
    """One step of one agent, written out for each environment with a grid."""
    side = {"cue_grid": 4, "cheese": 7, "key_door": 6}[kind]
    at = dict(at)
    row, column = divmod(at["cell"], side)
    y, x = {0: (row - 1, column), 1: (row + 1, column), 2: (row, column - 1), 3: (row, column + 1)}[action]
    inside = 0 <= y < side and 0 <= x < side
    there = y * side + x
    if kind == "cue_grid":
        at["cell"] = there if inside else at["cell"]
        good = at["goal_a"] if sum(at["bits"][:2]) == 1 else at["goal_b"]
        ended = at["cell"] in (at["goal_a"], at["goal_b"])
        return at, -0.02 + (0 if not ended else 1 if at["cell"] == good else -1), ended
    if kind == "cheese":
        at["cell"] = there if inside and not walls[there] else at["cell"]
        return at, -0.02 + (at["cell"] == at["cheese_cell"]), at["cell"] == at["cheese_cell"]
    if inside and x == 3:
        if y == at["door_row"] and at["door_open"]:
            at["cell"] = there
        elif y == at["door_row"] and at["has_key"]:
            at["door_open"] = 1
    elif inside:
        at["cell"] = there
    if at["cell"] == at["key_cell"]:
        at["has_key"] = 1
    return at, -0.02 + (at["cell"] == at["goal_cell"]), at["cell"] == at["goal_cell"]


@pytest.mark.parametrize("name", ["cue_grid", "cheese", "cheese_maze", "key_door"])
def test_steps_equal_a_slow_reference(name: str) -> None:
    env = ENVS[name](batch_size=[64], seed=0, max_steps=25)
    kind = name.removesuffix("_maze")
    data = env.rollout(75, break_when_any_done=False)
    if kind == "key_door":  # random behaviour seldom gets beyond the door
        start = env.sample_states(64)
        data = torch.cat([data, env.rollout(75, auto_reset=False, tensordict=start, break_when_any_done=False)])
    ended = 0
    for row in data.reshape(-1)[torch.randperm(data.numel())[:700]].unbind(0):
        at = {name: row[key].tolist() for name, key in env.variables.items()}
        walls = env._walls[at["maze"]].tolist() if kind == "cheese" else []
        after, reward, terminated = slow_step(kind, at, int(row["action"]), walls)
        after["elapsed"] += 1
        assert {name: row["next"][key].tolist() for name, key in env.variables.items()} == after
        assert float(row["next", "reward"]) == pytest.approx(reward)
        assert bool(row["next", "terminated"]) == terminated
        assert bool(row["next", "truncated"]) == (after["elapsed"] == 25 and not terminated)
        ended += terminated
    assert ended or kind == "key_door"

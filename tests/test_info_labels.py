"""Labels from Gymnasium infos: specs, workers, strings, fields that come and go; MiniGrid and Atari."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torchrl.collectors import Collector
from torchrl.data import Unbounded
from torchrl.envs import GymEnv, GymWrapper, ParallelEnv, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from tdhook_rl.envs import (
    Concept,
    CueCorners,
    InfoField,
    InfoLabels,
    add_computed_labels,
    add_info_labels,
    check_concept_env,
)
from tdhook_rl.envs.atari_labels import ATARI_RAM, atari_concepts, make_atari
from tdhook_rl.envs.minigrid_labels import make_minigrid, register_mission_space
from tdhook_rl.errors import InputError, MissingKeyError

EVENT = Concept(role="needed", meaning="", classes=10)


class Infos(gymnasium.Env):
    """Counts to five; the info holds one field of each kind."""

    def __init__(self, **kept: Any) -> None:
        self.observation_space = spaces.Box(0, 10, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.count = 0

    def seen(self) -> tuple[np.ndarray, dict[str, Any]]:
        info = {
            "count": self.count,
            "half": self.count / 2,
            "odd": self.count % 2 == 1,
            "pair": np.array([self.count, -self.count]),
            "mood": "good" if self.count < 3 else "bad",
            "inner": {"square": self.count**2, "deep": {"cube": np.int32(self.count**3)}},
            "thing": object(),
            "growing": np.zeros(self.count),
        }
        return np.array([self.count], np.float32), info | ({"event": 7} if self.count == 2 else {})

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.count = 0
        return self.seen()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.count += 1
        observation, info = self.seen()
        return observation, 0.0, self.count == 5, False, info


def make(fields: Any, **options: Any) -> GymWrapper:
    return add_info_labels(GymWrapper(Infos()), fields, **options)


DECLARED = {
    "event": InfoField(spec=EVENT, fill=0),
    "mood": InfoField(words=("good", "bad")),
    "cubed": InfoField(spec=Unbounded((), dtype=torch.long), source=("inner", "deep", "cube")),
    "pair": InfoField(spec=Unbounded((2,), dtype=torch.float32)),
}


def test_inferred_fields() -> None:
    env = make(["count", "half", "odd", "pair", "square", "cube"])
    check_env_specs(env)
    data = env.rollout(12, break_when_any_done=False)
    count = data["observation"].squeeze(-1).long()
    assert count.tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]
    for name, value in (("count", count), ("square", count**2), ("cube", (count**3).int()), ("half", count / 2)):
        assert torch.equal(data["concept", name], value.to(data["concept", name].dtype)), name
    assert data["concept", "half"].dtype == torch.float64
    assert data["concept", "cube"].dtype == torch.int32
    assert torch.equal(data["concept", "odd"], count % 2)
    assert torch.equal(data["concept", "pair"], torch.stack([count, -count], -1))
    assert torch.equal(data["next", "concept", "count"], data["next", "observation"].squeeze(-1).long())


def test_declared_fields() -> None:
    env = make(DECLARED, root="labels")
    check_env_specs(env)
    data = env.rollout(5)
    assert data["labels", "event"].tolist() == [0, 0, 7, 0, 0]
    assert data["labels", "mood"].tolist() == [0, 0, 0, 1, 1]
    assert data["next", "labels", "cubed"].tolist() == [1, 8, 27, 64, 125]
    assert data["labels", "pair"].dtype == torch.float32


@pytest.mark.parametrize("batched", [SerialEnv, ParallelEnv])
def test_in_workers_and_collectors(batched: type) -> None:
    env = batched(2, [partial(make, DECLARED), partial(make, DECLARED)])
    try:
        check_env_specs(env)
        collector = Collector(env, None, frames_per_batch=24, total_frames=24, auto_register_policy_transforms=False)
        data = next(iter(collector))
        assert data["concept", "event"].tolist() == [[0, 0, 7, 0, 0] * 2 + [0, 0]] * 2
        collector.shutdown()
    finally:
        if not env.is_closed:
            env.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["cuont"], "no field 'cuont'; nearest: 'count'"),
        (["mood"], r"'mood' is the string 'good'; leave it out, or declare \{'mood': InfoField\(words=\(...\)\)\}"),
        (["event"], r"'event' appeared in . of .. infos; leave it out, or declare"),
        (["thing"], "'thing' is a object, which cannot be a label"),
        (["growing"], "'growing' changes its shape"),
        (None, "cannot be a label|is the string|changes its shape|appeared in"),
        ({}, "at least one"),
    ],
)
def test_what_cannot_be_a_label_is_refused(fields: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(fields)


@pytest.mark.parametrize(
    ("field", "kind", "message"),
    [
        (InfoField(spec=EVENT), MissingKeyError, "'label' is absent .*nearest: .*fill=value"),
        (InfoField(spec=EVENT, source="event"), MissingKeyError, "'label' is absent"),
        (InfoField(words=("good", "fine"), source="mood"), InputError, "'label' is 'bad'; nearest: 'good', 'fine'"),
        (InfoField(spec=EVENT, source="half"), InputError, "float64, its spec torch.int64: declare a float spec"),
        (InfoField(spec=EVENT, source="pair"), InputError, r"shape \(2,\), its spec \(\)"),
        (InfoField(spec=EVENT, source="thing"), InputError, "cannot be a label"),
    ],
)
def test_declarations_that_do_not_fit_raise_at_the_step(field: InfoField, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        make({"label": field}).rollout(5)


def test_declarations_are_checked() -> None:
    with pytest.raises(InputError, match="spec or, for strings, words"):
        InfoField()
    with pytest.raises(InputError, match="at least one"):
        InfoLabels({})
    with pytest.raises(InputError, match="GymEnv or GymWrapper, got TransformedEnv"):
        add_info_labels(TransformedEnv(GymWrapper(Infos()), StepCounter()))
    pair = GymEnv("CartPole-v1", num_envs=2)
    try:
        with pytest.raises(InputError, match=r"batch size .2,.: label single copies"):
            add_info_labels(pair)
    finally:
        pair.close()
    with pytest.raises(InputError, match=r"info of .* is empty"):
        add_info_labels(GymEnv("CartPole-v1"))
    with pytest.raises(InputError, match=r"computed for \['a'\] and declared for \['b'\]"):
        add_computed_labels(Infos(), {"a": lambda env: 0}, {"b": EVENT})


def test_our_own_faces_through_gymnasium_have_the_labels_of_the_batched_environment() -> None:
    env = add_info_labels(GymEnv("tdhook_rl/CueCorners-v0"), dict(CueCorners.concepts))
    check_env_specs(env)
    data = env.rollout(40, break_when_any_done=False)
    own = CueCorners()
    same = own.state(cell=data["concept", "cell"], bits=data["concept", "bits"], elapsed=torch.zeros(40))
    assert torch.equal(same["observation"], data["observation"])
    for name in CueCorners.concepts:
        assert torch.equal(same["concept", name], data["concept", name])
        assert data["concept", name].dtype == same["concept", name].dtype


# ---------------------------------------------------------------------- MiniGrid


@pytest.fixture
def minigrid(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    return pytest.importorskip("minigrid", reason="the extra `minigrid` is not installed")


def test_minigrid_in_torchrl(minigrid: Any) -> None:
    env = make_minigrid("MiniGrid-DoorKey-5x5-v0")
    assert check_concept_env(env).failed == ()
    serial = SerialEnv(2, make_minigrid)
    check_env_specs(serial)
    data = serial.rollout(30, break_when_any_done=False)
    assert data["mission"][0][0].startswith("use the key")
    # A carried thing is drawn in the agent's cell of its own view: 5 is a key.
    assert torch.equal(data["concept", "has_key"], (data["image"][..., 3, 6, 0] == 5).long())
    assert "concept" not in make_minigrid(labels=False).reset()


def test_minigrid_door_key_step_by_step(minigrid: Any) -> None:
    from minigrid.core.actions import Actions
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Door, Goal, Key

    env = make_minigrid("MiniGrid-DoorKey-5x5-v0")
    data = env.reset()
    grid = env._env.unwrapped
    grid.grid = Grid(5, 5)  # the agent, above it the way to the key; the door to the right of the middle
    grid.grid.wall_rect(0, 0, 5, 5)
    grid.grid.vert_wall(2, 0, 5)
    grid.put_obj(Door("yellow", is_locked=True), 2, 2)
    grid.put_obj(Key("yellow"), 1, 3)
    grid.put_obj(Goal(), 3, 3)
    grid.agent_pos, grid.agent_dir = (1, 1), 1
    walk = [
        # action, has_key, door_open, distance, column, row, direction
        (Actions.forward, 0, 0, 3, 1, 2, 1),
        (Actions.pickup, 1, 0, 3, 1, 2, 1),
        (Actions.left, 1, 0, 3, 1, 2, 0),
        (Actions.toggle, 1, 1, 3, 1, 2, 0),
        (Actions.forward, 1, 1, 2, 2, 2, 0),
        (Actions.forward, 1, 1, 1, 3, 2, 0),
        (Actions.right, 1, 1, 1, 3, 2, 1),
        (Actions.forward, 1, 1, 0, 3, 3, 1),
    ]
    for action, *expected in walk:
        data["action"] = torch.nn.functional.one_hot(torch.tensor(int(action)), 7)
        data = env.step(data)["next"]
        names = ("has_key", "door_open", "distance", "column", "row", "direction")
        assert [float(data["concept", name]) for name in names] == expected
    assert bool(data["terminated"])


def test_a_minigrid_without_goal_has_no_distance(minigrid: Any) -> None:
    data = make_minigrid("MiniGrid-GoToDoor-5x5-v0").rollout(3)
    assert bool((data["concept", "distance"] == -1).all())


# ---------------------------------------------------------------------- Atari


def corner(frame: np.ndarray, colour: tuple[int, int, int], top: int, bottom: int, size: int) -> tuple[int, int] | None:
    """The first row and column of a sprite of at most a size, or ``None``."""
    rows, columns = np.nonzero((frame[top:bottom] == np.array(colour)).all(-1))
    return (int(rows.min()) + top, int(columns.min())) if 0 < len(rows) <= size else None


def found(data: Any, colour: tuple[int, int, int], top: int, bottom: int, size: int) -> tuple[list[int], np.ndarray]:
    places = [corner(frame.numpy(), colour, top, bottom, size) for frame in data["pixels"]]
    steps = [step for step, place in enumerate(places) if place is not None]
    return steps, np.array([places[step] for step in steps])


def test_atari_pong_labels_are_where_the_sprites_are() -> None:
    pytest.importorskip("ale_py", reason="the extra `atari` is not installed")
    env = make_atari("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    env.set_seed(0)
    data = env.rollout(400, break_when_any_done=False)
    labels = {name: value.numpy() for name, value in data["concept"].items()}
    ball, place = found(data, (236, 236, 236), 34, 194, 8)
    moving = [step for step in ball if labels["ball_x"][step] and step > 1]
    place = place[[ball.index(step) for step in moving]]
    assert len(moving) > 100
    assert np.mean(labels["ball_x"][moving] == place[:, 1] + 49) > 0.97
    assert np.mean(abs(labels["ball_y"][moving] - place[:, 0] - 14) <= 1) > 0.97
    enemy, place = found(data, (213, 130, 74), 34, 194, 200)
    assert np.mean(labels["enemy_y"][enemy] == place[:, 0] + 15) > 0.85
    player, place = found(data, (92, 186, 92), 34, 194, 200)
    whole = place[:, 0] > 34  # not behind the upper border
    player, place = np.array(player)[whole], place[whole]
    assert np.mean(abs(labels["player_y"][player] - place[:, 0] - 13) <= 1) > 0.85
    lost = (data["next", "reward"].squeeze(-1).numpy() < 0).cumsum()
    assert lost[-1] >= 1
    assert np.array_equal(data["next", "concept", "enemy_score"].numpy(), lost)


def test_atari_breakout_labels_are_where_the_sprites_are() -> None:
    pytest.importorskip("ale_py", reason="the extra `atari` is not installed")
    env = make_atari("ALE/Breakout-v5", frameskip=2, repeat_action_probability=0.0)
    env.set_seed(0)
    data = env.rollout(200, break_when_any_done=False)
    ball, place = found(data, (200, 72, 72), 93, 189, 8)
    assert len(ball) > 30
    assert np.mean(abs(data["concept", "ball_x"].numpy()[ball] - place[:, 1] - 49) <= 1) > 0.95
    assert np.mean(abs(data["concept", "ball_y"].numpy()[ball] - place[:, 0] + 9) <= 1) > 0.95
    assert set(ATARI_RAM["Breakout"]) == set(data["concept"].keys())


def test_missing_packages_and_tables_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no table of memory addresses for 'Pnog'; nearest: 'Pong'"):
        atari_concepts("Pnog")
    absent: list[tuple[str, Callable[[], Any]]] = [("minigrid", make_minigrid), ("atari", make_atari)]
    for extra, build in absent:
        for module in ("minigrid", "minigrid.core.mission", "ale_py"):
            monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ImportError, match=rf"pip install 'tdhook_rl\[{extra}\]'"):
            build()


def test_a_script_in_the_place_of_minigrid_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    script = types.ModuleType("minigrid")
    script.__file__ = "/home/somebody/minigrid.py"
    for name in [one for one in sys.modules if one.startswith("minigrid.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "minigrid", script)
    with pytest.raises(ImportError, match=r"somebody/minigrid\.py is imported as minigrid.*rename it"):
        register_mission_space()

"""Every environment: specs, labels, pairs, relevance, closed-form values, states, frames, and bad input."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor
from torchrl.envs import SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.transforms import ObservationNorm
from torchrl.envs.utils import check_env_specs

from tdhook_rl.envs import Cheese, ConceptEnv, CueCorners, CueGrid, KeyDoor, KnownValue, TMaze, check_concept_env
from tdhook_rl.errors import ConceptError, InputError

ENVS: dict[str, Callable[..., ConceptEnv]] = {
    "known_value": KnownValue,
    "cue_corners": CueCorners,
    "cue_grid": CueGrid,
    "t_maze": TMaze,
    "cheese": Cheese,
    "cheese_maze": lambda **options: Cheese(mazes=6, region="anywhere", start=42, **options),
    "key_door": KeyDoor,
}
every_env = pytest.mark.parametrize("make", ENVS.values(), ids=ENVS)


@every_env
@pytest.mark.parametrize("batch_size", [(), (2, 3)])
def test_the_check_passes(make: Callable[..., ConceptEnv], batch_size: tuple[int, ...]) -> None:
    report = check_concept_env(make(batch_size=batch_size, max_steps=9) if make is not TMaze else make(batch_size=[3]))
    assert [outcome for _, outcome, _ in report.rows] == ["passed"] * 6


@every_env
def test_the_closed_form_value_solves_the_bellman_equation(make: Callable[..., ConceptEnv]) -> None:
    env = make(seed=0)
    states = env.sample_states(2000)
    for gamma in (0.5, 0.9) if make is KnownValue else (0.5, 0.95, 1.0):
        values = env.action_values(states, gamma=gamma)
        torch.testing.assert_close(values.amax(-1), env.value(states, gamma=gamma))
        for action in range(env.n_actions):
            advantage = env.advantage(states, torch.full((2000,), action), gamma=gamma)
            torch.testing.assert_close(advantage, values[:, action] - values.amax(-1), rtol=1e-4, atol=1e-5)


@every_env
def test_optimal_play_earns_the_value(make: Callable[..., ConceptEnv]) -> None:
    if make is KnownValue:
        pytest.skip("its returns are random; the expectation is tested on its own")
    env, gamma = make(seed=0), 0.9
    states = env.sample_states(300)
    expected, earned = env.value(states, gamma=gamma), torch.zeros(300)
    running, discount = torch.ones(300, dtype=torch.bool), 1.0
    for _ in range(env.max_steps):
        step = env.step(states.set("action", env.action_values(states, gamma=gamma).argmax(-1)))["next"]
        earned += discount * running * step["reward"].squeeze(-1)
        running &= ~step["terminated"].squeeze(-1)
        discount *= gamma
        states = step.exclude("reward")
    assert not bool(running.any())
    torch.testing.assert_close(earned, expected)


@pytest.mark.parametrize("name", ["cue_corners", "cue_grid", "cheese", "cheese_maze"])
def test_states_that_agree_in_relevant_features_agree_in_value_and_best_actions(name: str) -> None:
    env = ENVS[name](batch_size=[200], seed=0)
    data = env.rollout(60, break_when_any_done=False).reshape(-1)
    values = env.action_values(data)
    best = values >= values.amax(-1, keepdim=True) - 1e-5
    for of, known in (("value", env.value(data)[:, None]), ("policy", best.float())):
        mask = env.relevance(of).flatten()
        assert mask.shape == data["observation"].flatten(1).shape[1:]
        seen = data["observation"].flatten(1)[:, mask].numpy()
        _, first, group = np.unique(seen, axis=0, return_index=True, return_inverse=True)
        assert len(first) < len(data) / 2
        torch.testing.assert_close(known, known[first][group])
        if name.startswith("cue"):
            assert bool((data["observation"][:, mask].std(0) > 0).all())
            assert not bool(mask[env.light_features()[2:]].any())


@pytest.mark.parametrize("mazes", [0, 1, 5])
def test_what_is_the_same_in_all_states_of_cheese_is_not_relevant(mazes: int) -> None:
    """Walls that stand in every maze or in none, and an agent or cheese in them; all else is."""
    env = Cheese(mazes=mazes)
    free = [(~walls).nonzero().flatten().tolist() for walls in env._walls]
    places = [(maze, *pair) for maze, cells in enumerate(free) for pair in permutations(cells, 2)]
    maze, cell, cheese = torch.tensor(places).unbind(1)
    coin = torch.zeros_like(cell)
    states = env.state(maze=maze, cell=cell, cheese_cell=cheese, visible=coin + 1, episode_coin=coin)
    varies = (states["observation"] != states["observation"][0]).any(0)
    for of in env.relevance_of:
        assert torch.equal(env.relevance(of), varies)


def test_only_relevant_features_of_known_value_matter() -> None:
    env = KnownValue()
    states = env.sample_states(500)
    for of, known in (("value", env.value), ("policy", lambda data: env.action_values(data).argmax(-1))):
        mask = env.relevance(of)
        redrawn = torch.where(mask, states["features"], torch.randn(500, 16))
        assert torch.equal(known(states), known(env.edit(states, features=redrawn)))
        for feature in mask.nonzero().flatten():
            opposite = states["features"].clone()
            opposite[:, feature] = 1 - opposite[:, feature]
            assert not torch.equal(known(states), known(env.edit(states, features=opposite)))


@every_env
def test_roles_are_what_the_task_needs(make: Callable[..., ConceptEnv]) -> None:
    """Changing what is not needed changes no action value; changing what is needed does."""
    env = make()
    for name, concept in env.concepts.items():
        if not concept.moves or name == "visible":  # the cheese pays whether it is seen or not
            continue
        for index, role in enumerate(concept.roles):
            before, after = env.paired(name, index=None if concept.size is None else index)
            same = torch.isclose(env.action_values(before), env.action_values(after), atol=1e-5).all(-1)
            assert bool(same.all()) == (role != "needed"), (name, index)


@every_env
def test_a_reset_begins_where_it_is_told(make: Callable[..., ConceptEnv]) -> None:
    env = make(batch_size=[5], seed=0)
    states = env.sample_states(5, seed=7)
    found = env.reset(states.clone(), set_state=True)
    for key in states.keys(True, True):
        assert torch.equal(found[key], states[key]), key
    data = env.rollout(3, auto_reset=False, tensordict=states.clone(), break_when_any_done=False)
    assert torch.equal(data["observation"][:, 0], states["observation"])
    mask = torch.tensor([True, False, True, False, False])[:, None]
    other = env.sample_states(5, seed=8).set("_reset", mask)
    partly = env.reset(other, set_state=True)
    assert torch.equal(partly["observation"], other["observation"])


@every_env
def test_states_are_set_inside_other_environments(make: Callable[..., ConceptEnv]) -> None:
    states = make().sample_states(3, seed=7)
    for env in (TransformedEnv(make(batch_size=[3]), StepCounter()), SerialEnv(3, partial(make))):
        assert torch.equal(env.reset(states.clone(), set_state=True)["observation"], states["observation"])


@every_env
def test_copies_go_on_alike(make: Callable[..., ConceptEnv]) -> None:
    env = make(batch_size=[3], seed=5, device="cpu")
    env.reset()
    other, sent = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    expected = env.reset()
    assert expected.device == torch.device("cpu")
    for twin in (other, sent):
        assert torch.equal(twin.reset()["observation"], expected["observation"])


@every_env
def test_sampling_and_asking_leave_the_generator_alone(make: Callable[..., ConceptEnv]) -> None:
    first, second = make(batch_size=[4], seed=3), make(batch_size=[4], seed=3)
    states = first.sample_states(10)
    first.action_values(states)
    first.render(states[:2])
    assert torch.equal(first.reset()["observation"], second.reset()["observation"])


@every_env
def test_frames_show_the_time_only_where_it_is_said(make: Callable[..., ConceptEnv]) -> None:
    env = make(batch_size=[8], seed=0)
    states = env.rollout(3, break_when_any_done=False).reshape(-1)
    later = states.clone().set("elapsed", states["elapsed"] + 1)
    assert bool((env.render(states) != env.render(later)).any()) == env.drawn_with_time


@every_env
def test_names_of_actions_features_and_planes_fit(make: Callable[..., ConceptEnv]) -> None:
    env = make(seed=0)
    observation = env.observation_spec["observation"].shape
    assert len(env.action_names) in (0, env.n_actions)
    assert len(env.feature_names or ()) in (0, observation.numel())
    if env.grid is not None:
        assert len(env.planes) * env.grid[0] * env.grid[1] == observation.numel()
        frames = env.render(env.sample_states(1))
        assert frames.shape[1] * env.grid[1] == frames.shape[2] * env.grid[0]  # squares are square


@every_env
def test_frames_show_the_state(make: Callable[..., ConceptEnv]) -> None:
    env = make(seed=0)
    frames = env.render(env.sample_states(6).reshape(2, 3))
    assert frames.dtype == torch.uint8
    assert frames.ndim == 5
    assert frames.shape[-1] == 3
    assert min(frames.shape[2:4]) >= 100
    assert len(frames.reshape(6, -1).unique(dim=0)) > 1
    with pytest.raises(InputError, match="render\\(states\\)"):
        env.render()


@every_env
def test_a_transform_of_the_observation_does_not_change_the_dynamics(make: Callable[..., ConceptEnv]) -> None:
    plain = make(batch_size=[4], seed=0)
    if make is KeyDoor:
        pytest.skip("ObservationNorm is for floats")
    norm = ObservationNorm(loc=3.0, scale=2.0, in_keys=["observation"])
    wrapped = TransformedEnv(make(batch_size=[4], seed=0), norm)
    rollouts = []
    for env in (plain, wrapped):
        torch.manual_seed(0)
        rollouts.append(env.rollout(20, break_when_any_done=False))
    assert torch.equal(rollouts[0]["next", "reward"], rollouts[1]["next", "reward"])
    torch.testing.assert_close(rollouts[0]["observation"] * 2 + 3, rollouts[1]["observation"])


def test_several_copies_in_one_serial_environment() -> None:
    env = SerialEnv(2, [partial(Cheese, mazes=2, seed=seed) for seed in (0, 1)])
    check_env_specs(env)
    data = env.rollout(10, break_when_any_done=False)
    assert data["concept", "cheese_cell"].shape == (2, 10)
    env.close()


@every_env
def test_the_gymnasium_face_plays_the_same_game(make: Callable[..., ConceptEnv]) -> None:
    env = make(seed=0)
    face = gymnasium.make(env.gymnasium_id, **({"mazes": 6} if make is ENVS["cheese_maze"] else {}))
    state = env.sample_states(1, seed=5)[0]
    at = {name: state[key].numpy() for name, key in env.variables.items()}
    observation, info = face.reset(seed=0, options={"state": at})
    assert np.array_equal(observation, state["observation"].numpy())
    assert set(info["concept"]) == set(env.concepts)
    action = 1
    observation, reward, terminated, truncated, info = face.step(action)
    expected = env.step(state.set("action", torch.tensor(action)))["next"]
    assert reward == pytest.approx(float(expected["reward"]))
    assert (terminated, truncated) == (bool(expected["terminated"]), bool(expected["truncated"]))
    if make not in (KnownValue, TMaze):  # their next features are drawn
        assert np.array_equal(observation, expected["observation"].numpy())
        for name, label in info["concept"].items():
            assert np.array_equal(label, expected["concept", name].numpy()), name
    with pytest.warns(UserWarning, match="without a render_mode"):
        assert face.unwrapped.render() is None


def test_the_gymnasium_face_refuses() -> None:
    with pytest.raises(InputError, match="one copy"):
        gymnasium.make("tdhook_rl/Cheese-v0", batch_size=[2])
    face = gymnasium.make("tdhook_rl/Cheese-v0", region="outside").unwrapped
    with pytest.raises(gymnasium.error.ResetNeeded):
        face.step(0)
    with pytest.raises(InputError, match="option 'state', got place"):
        face.reset(options={"place": 3})
    with pytest.raises(InputError, match="no batch dimension"):
        face.reset(options={"state": {"cell": [3], "cheese_cell": [4]}})
    face.reset()
    with pytest.raises(InputError, match="from 0 to 3, got 4"):
        face.step(4)
    with pytest.raises(InputError, match="render_mode"):
        type(face)(Cheese, render_mode="human")


@every_env
def test_bad_input_is_refused(make: Callable[..., ConceptEnv]) -> None:
    env = make()
    states = env.sample_states(4)
    refused: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (InputError, "at least one copy", lambda: make(batch_size=[0])),
        (InputError, "sequence of integers", lambda: make(batch_size=8)),
        (InputError, "a seed is an integer, got 1.5", lambda: make(seed=1.5)),
        (InputError, "a seed is an integer, got 'a'", lambda: env.set_seed("a")),
        (ConceptError, "has no concept 'episode_con'; nearest", lambda: env.paired("episode_con")),
        (InputError, "relevance for", lambda: env.relevance("reward")),
        (InputError, "at least one state", lambda: env.sample_states(0)),
        (InputError, "no state variable 'elapse'; nearest: 'elapsed'", lambda: env.edit(states, elapse=1)),
        (InputError, "counts steps from 0", lambda: env.edit(states, elapsed=torch.full((4,), -1))),
        (InputError, "shape", lambda: env.edit(states, elapsed=torch.zeros(3, dtype=torch.long))),
        (InputError, "with fractions", lambda: env.edit(states, elapsed=torch.full((4,), 0.5))),
    ]
    if make is CueCorners:
        refused.pop(4)
    for kind, message, call in refused:
        with pytest.raises(kind, match=message):
            call()


def test_the_field_s_own_mistakes_are_refused() -> None:
    corners, grid, maze, cheese, door, known = (
        CueCorners(),
        CueGrid(),
        TMaze(),
        Cheese(mazes=2),
        KeyDoor(),
        KnownValue(),
    )
    bits = [0, 0, 1, 1]
    place = {"key_cell": 12, "door_row": 2, "goal_cell": 17}
    refused: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ConceptError, "no concept 'xorr'; nearest: 'xor'", lambda: corners.paired("xorr")),
        (ConceptError, "'cell' cannot be changed alone; concepts that can: bits", lambda: corners.paired("cell")),
        (ConceptError, "elements 0 to 3, got index 4", lambda: corners.paired("bits", index=4)),
        (ConceptError, "elements 0 to 3, got index None", lambda: corners.paired("bits")),
        (ConceptError, "no index, got index 0", lambda: corners.paired("xor", index=0)),
        (InputError, "also needs bits", lambda: corners.state(cell=3)),
        (InputError, "cells go from 0 to 15, got 16", lambda: grid.state(cell=16, goal_a=1, goal_b=2, bits=bits)),
        (InputError, "different cells", lambda: grid.state(cell=0, goal_a=1, goal_b=1, bits=bits)),
        (InputError, "on a goal", lambda: grid.state(cell=2, goal_a=1, goal_b=2, bits=bits)),
        (InputError, "chooses at step 8, got elapsed 9", lambda: maze.state(cue=0, elapsed=9)),
        (InputError, "distractor_steps", lambda: TMaze(distractor_steps=0)),
        (InputError, "'policy'|for policy", lambda: maze.relevance("value")),
        (InputError, "no region 'top'; nearest: 'top_right'", lambda: Cheese(region="top")),
        (InputError, "number of mazes", lambda: Cheese(mazes=-1)),
        (InputError, "starts in a cell, 0 to 48, got 49", lambda: Cheese(start=49)),
        (InputError, "cell 8 is a wall", lambda: Cheese(start=8, mazes=2)),
        (InputError, "mazes go from 0 to 1, got 2", lambda: cheese.state(cell=0, cheese_cell=2, maze=2)),
        (InputError, "in a wall", lambda: cheese.state(cell=0, cheese_cell=8)),
        (InputError, "on the cheese", lambda: cheese.state(cell=2, cheese_cell=2)),
        (InputError, "past a closed door", lambda: door.state(cell=16, **place)),
        (InputError, "in the wall", lambda: door.state(cell=9, has_key=1, door_open=1, **place)),
        (InputError, "opened with the key", lambda: door.state(cell=0, door_open=1, **place)),
        (InputError, "has not taken it", lambda: door.state(cell=12, **place)),
        (InputError, "on the goal", lambda: door.state(cell=17, has_key=1, door_open=1, **place)),
        (InputError, "left of column 3", lambda: door.state(cell=0, **place | {"key_cell": 16})),
        (InputError, "right of column 3", lambda: door.state(cell=0, **place | {"goal_cell": 1})),
        (InputError, "depends on the state", lambda: door.relevance("value")),
        (InputError, "gamma", lambda: KnownValue(gamma=1.0)),
        (InputError, "numbers from", lambda: known.state(features=torch.full((16,), torch.nan))),
    ]
    for kind, message, call in refused:
        with pytest.raises(kind, match=message):
            call()


@every_env
def test_finished_rows_start_again_and_the_others_go_on(make: Callable[..., ConceptEnv]) -> None:
    env = make(batch_size=[4, 3], seed=0) if make is TMaze else make(batch_size=[4, 3], seed=0, max_steps=7)
    data = env.rollout(40, break_when_any_done=False)
    done = data["next", "done"][..., :-1, 0]
    assert bool(done.any())
    assert not bool(done.all())
    for key in ("observation", *env.variables.values(), *(("concept", name) for name in env.concepts)):
        before, after = data["next"][key][..., :-1, *_rest(data, key)], data[key][..., 1:, *_rest(data, key)]
        assert torch.equal(before[~done], after[~done]), key
    assert bool((data["elapsed"][..., 1:][done] == 0).all())
    fresh = data[..., 1:][done]
    env._checked({name: fresh[key] for name, key in env.variables.items()})  # start states, in which one can act


def _rest(data: Any, key: Any) -> tuple[slice, ...]:
    value: Tensor = data[key]
    return (slice(None),) * (value.ndim - 3)

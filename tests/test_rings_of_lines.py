"""Storages of several dimensions go round in time: rows are read in the order in which they were written."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer
from torchrl.envs.transforms import CatFrames

from tdhook_rl import Saliency, targets
from tdhook_rl.errors import InputError
from tdhook_rl.replay import analyze, episodes, frame, in_order, probe_grid, returns
from tdhook_rl.rollout import Future, GroupSplit, Return
from tdhook_rl.rollout.newest_rows import NewestRows
from tests.test_going_on import STATES, episodes_in, numbered, walks, whole
from tests.test_going_on import STEPS as LINE
from tests.test_recurrent import recurrent_pair
from tests.walks import Walks

ENVS, STEPS, PARTS = 4, 9, 3
#: Steps that a line keeps: all with room left, all, and those of a ring that went round once or more.
KEPT = (40, PARTS * STEPS, 20, 13, 9, 5)


def lines(data: TensorDict, kept: int, how: str, folder: Path) -> tuple[Any, torch.Tensor]:
    """A buffer of lines, given one batch after the other, and at which place in it each step that is left lies."""
    kind = LazyMemmapStorage if how == "mapped" else LazyTensorStorage
    buffer = ReplayBuffer(storage=kind(ENVS * kept, ndim=2))
    for part in data.split(STEPS if kept >= STEPS else kept, 1):
        buffer.extend(part)
    left = torch.arange(max(0, data.shape[1] - kept), data.shape[1])
    if how == "saved":
        buffer.dumps(folder)
    return (folder if how == "saved" else buffer), left % kept


def by_a_loop(data: TensorDict, kept: int, counted: bool) -> list[tuple[int, float, int, bool, bool]]:
    """Environment, return, length, and whether it begins and ends there, of each episode in the last steps."""
    found, steps = [], data.shape[1]
    for env, line in enumerate(data):
        open_one: list[float] = []
        first = max(0, steps - kept)
        begun = int(line["step_count"][first]) == 0 if counted else first == 0
        for step in range(first, steps):
            open_one.append(float(line["next", "reward"][step]))
            done = bool(line["next", "done"][step])
            if done or step == steps - 1:
                found.append((env, sum(open_one), len(open_one), begun, done))
                open_one, begun = [], True
    return found


@pytest.mark.parametrize("told", ["nothing", "numbers", "steps"])
@pytest.mark.parametrize("how", ["live", "mapped", "saved"])
@pytest.mark.parametrize("kept", KEPT)
def test_episodes_are_those_of_a_loop_over_environments(kept: int, how: str, told: str, tmp_path: Path) -> None:
    data = Walks(ENVS, length=7).batch(PARTS * STEPS, counted=True)
    hidden = {"nothing": ("collector", "step_count"), "numbers": ("step_count",), "steps": ()}[told]
    given = data.exclude(*hidden)
    source, where = lines(given, kept, how, tmp_path / "buffer")
    expected = by_a_loop(data, kept, told == "steps")
    found = returns(source)
    width = len(where)
    seen = [(int(one.rows[0]) // width, one.total, len(one.rows), one.begun, one.ended) for one in found.episodes]
    assert [one[:1] + one[2:] for one in seen] == [one[:1] + one[2:] for one in expected]
    assert [one[1] for one in seen] == pytest.approx([one[1] for one in expected])
    # Each row is that which lies at its place.
    rewards = data["next", "reward"][:, -width:, 0].double()
    stored = torch.zeros_like(rewards)
    stored[:, where] = rewards
    assert [float(stored.reshape(-1)[one.rows].sum()) for one in found.episodes] == pytest.approx(
        [one[1] for one in expected]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="none of .* episodes is whole")
        best = episodes(source, order="best", k=1)[0]
    assert best.data["next", "reward"][:, 0].double().tolist() == stored.reshape(-1)[best.rows].tolist()


@pytest.mark.parametrize("how", ["live", "saved"])
@pytest.mark.parametrize("kept", KEPT)
def test_whole_trajectories_are_explained_as_they_were_written(kept: int, how: str, tmp_path: Path) -> None:
    actor, _ = recurrent_pair("gru")
    walks = Walks(ENVS, length=7).batch(PARTS * STEPS, counted=True)
    shape = (ENVS, PARTS * STEPS)
    data = TensorDict(
        {
            "observation": torch.randn(*shape, 4).double(),
            "recurrent_state": torch.randn(*shape, 1, 8).double(),
            "is_init": walks["step_count"] == 0,
            "action": torch.randint(0, 3, shape),
            "next": {"reward": walks["next", "reward"], "done": walks["next", "done"]},
        },
        shape,
    )
    source, where = lines(data, kept, how, tmp_path / "buffer")
    method = Saliency(target=targets.chosen_logit(), inputs=["observation"], horizon="trajectory")
    with method.prepare(actor) as policy:
        expected = policy.annotate(data[:, -len(where) :].contiguous())["attr", "observation"]
        found = analyze(policy, source, tmp_path / "found", progress=False)
    torch.testing.assert_close(found["attr", "observation"][:, where], expected)
    table = frame(found, source)
    assert (table["frame_index"].diff()[table["episode_index"].diff() == 0] == 1).all()
    rows = table["buffer_index"].tolist()
    assert table["attr.observation.0"].tolist() == found["attr", "observation"].reshape(-1, 4)[rows, 0].tolist()


@pytest.mark.parametrize("kept", KEPT)
def test_frames_reach_back_in_time(kept: int, tmp_path: Path) -> None:
    data = Walks(ENVS, length=7).batch(PARTS * STEPS)
    frames = CatFrames(N=2, dim=-1, in_keys=["observation"], out_keys=["frames"], padding="same")
    source, where = lines(data, kept, "live", tmp_path)
    source.append_transform(frames)
    found = torch.cat([batch["frames"] for _, batch in in_order(source, 1)])
    seen, done = data["observation"][:, -len(where) :], data["next", "done"][:, -len(where) :]
    before = torch.where(done[:, :-1], seen[:, 1:], seen[:, :-1])
    torch.testing.assert_close(found[:, where][:, 1:], torch.cat([before, seen[:, 1:]], -1))


@pytest.mark.parametrize("kind", ["lines", "rows", "trajectories"])
@pytest.mark.parametrize("kept", KEPT)
def test_futures_are_those_that_followed(kind: str, kept: int, tmp_path: Path) -> None:
    data = Walks(40, length=7).batch(PARTS * STEPS)
    if kind == "lines":
        source = ReplayBuffer(storage=LazyTensorStorage(40 * kept, ndim=2))
        left = data[:, -kept:]
    else:
        kept -= kept % STEPS if kind == "trajectories" else 0
        kept = max(kept, STEPS)
        source = ReplayBuffer(storage=LazyTensorStorage(40 * kept // (STEPS if kind == "trajectories" else 1)))
        left = torch.cat([part.reshape(-1) for part in data.split(STEPS, 1)])[-40 * kept :]
    for part in data.split(STEPS if kept >= STEPS else kept, 1):
        source.extend(part.reshape(-1) if kind == "rows" else part)
    concepts = {"soon": Future("value", 2), "return": Return(gamma=0.9)}
    options: dict[str, Any] = {"sites": "module.0", "concepts": concepts, "untrained": False}
    policy = TensorDictModule(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), ["observation"], ["hidden"])
    found, expected = (probe_grid(policy, one, **options) for one in (source, left))
    for one, other in zip(found.records(), expected.records(), strict=True):
        assert one["left_out"] == other["left_out"]
        assert one["rows"] == other["rows"]
        assert one["trained"] == pytest.approx(other["trained"], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("kept", [1, 2, 3, 5])
@pytest.mark.parametrize("room", [5, 7, 12])
def test_entries_of_a_ring_go_on_from_those_written_before(room: int, kept: int) -> None:
    """Of trajectories that are stored one an entry, and cut off, the parts that went on do not begin."""
    data = Walks(ENVS, length=11).batch(kept * STEPS)
    buffer = ReplayBuffer(storage=LazyTensorStorage(room))
    for part in data.split(STEPS, 1):
        buffer.extend(part)
    entries = torch.arange(kept * ENVS)[-room:]  # in the order of writing
    begun = {}
    for entry in entries.tolist():
        part, env = divmod(entry, ENVS)
        goes_on = part > 0 and not bool(data["next", "done"][env, part * STEPS - 1])
        if part == 0 or entry - ENVS in entries:  # what was before it is known
            begun[entry % room] = not goes_on
    found = {int(one.rows[0]) // STEPS: one.begun for one in returns(buffer).episodes if int(one.rows[0]) % STEPS == 0}
    assert {entry: found[entry] for entry in begun} == begun


@pytest.mark.parametrize("kept", [40, 9, 20])
def test_the_newest_rows_have_time_last(kept: int) -> None:
    data = Walks(ENVS, length=7).batch(PARTS * STEPS)
    buffer, newest = ReplayBuffer(storage=LazyTensorStorage(ENVS * kept, ndim=2)), NewestRows(most=6)
    for part in data.split(STEPS, 1):
        buffer.extend(part)
        found = newest.take(buffer)
        assert found is not None
        assert (found == part[:, -6:]).all()
        assert newest.each == ENVS


#: What rows say of their episodes beside their states and ends.
TOLD = ("nothing", "is_init", "step_count", "numbers")


def hidden(data: TensorDict, told: str) -> TensorDict:
    return (numbered(data.clone()) if told == "numbers" else data).exclude(*({"is_init", "step_count"} - {told}))


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("how", ["lines", "entries", "list"])
@pytest.mark.parametrize("several", [False, True], ids=["one run", "runs"])
@pytest.mark.parametrize("kind", STATES)
def test_runs_that_follow_each_other_are_cut_where_they_meet(kind: str, several: bool, how: str, told: str) -> None:
    """A run that is taken up again begins anew, in the middle of a line and without an end before it."""
    data = walks(kind, 3 * LINE)
    parts = [walks(kind, seed=seed) for seed in (1, 2, 3)] if several else list(data.split(LINE, 1))
    given = [hidden(part, told) for part in parts] if several else list(hidden(data, told).split(LINE, 1))
    source: Any = given
    if how != "list":
        source = ReplayBuffer(storage=LazyTensorStorage(1000, ndim=2 if how == "lines" else 1))
        for part in given:
            source.extend(part)
    joins = how == "lines" or (how == "list" and told == "numbers")
    expected = episodes_in([data] if joins and not several else parts)
    assert whole(returns(source)) == pytest.approx(expected)


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("how", ["TensorDict", "buffer", "step by step"])
@pytest.mark.parametrize("kind", STATES)
def test_where_time_comes_first_it_is_said(kind: str, how: str, told: str) -> None:
    data = hidden(walks(kind, 3 * LINE), told).transpose(0, 1).contiguous()
    source: Any = data
    if how != "TensorDict":
        source = ReplayBuffer(storage=LazyTensorStorage(1000))
        source.extend(data) if how == "buffer" else [source.add(row) for row in data]
    for ask in (returns, lambda one: frame(data.select(), one)):
        with pytest.raises(InputError, match=r"time is the last dimension of a batch; give it as data\.transpose"):
            ask(source)
    assert whole(returns(data.transpose(0, 1))) == pytest.approx(whole(returns(data.transpose(0, 1).reshape(-1))))


@pytest.mark.parametrize("kind", ["lines", "rows"])
@pytest.mark.parametrize("state", STATES)
def test_futures_end_where_a_run_was_taken_up_again(state: str, kind: str) -> None:
    """Runs that number their episodes alike, as each collector does from 0 on."""
    runs = [numbered(walks(state, seed=seed)).exclude("is_init", "step_count") for seed in (1, 2, 3)]
    source = ReplayBuffer(storage=LazyTensorStorage(1000, ndim=2 if kind == "lines" else 1))
    for number, run in enumerate(runs):
        run["reward"], run["alone"] = run["next", "reward"], run["collector", "traj_ids"] + 1000 * number
        run["features"] = torch.randn(*run.shape, 3, generator=torch.Generator().manual_seed(number))
        source.extend(run if kind == "lines" else run.reshape(-1))
    policy = TensorDictModule(nn.Linear(3, 4), ["features"], ["hidden"])
    options: dict[str, Any] = {"sites": "module", "untrained": False, "split": GroupSplit("alone", held_out=0.4)}
    concepts = {"soon": Future("reward", 1), "return": Return()}
    [soon, whole_one] = probe_grid(policy, source, concepts=concepts, **options)
    apart = [run.clone().set(("collector", "traj_ids"), run["alone"]) for run in runs]
    expected = probe_grid(policy, torch.cat(apart), concepts=concepts, **options)
    assert [soon.left_out, whole_one.left_out] == [one.left_out for one in expected]
    assert soon.trained.estimate == pytest.approx(expected["module", "soon"].trained.estimate, abs=1e-5)


@pytest.mark.parametrize("size", [640, 100_000])
def test_the_newest_rows_are_whole_while_a_thread_writes_others(size: int) -> None:
    """A buffer counts rows before it has them: what it has counted is waited for."""
    buffer, newest = ReplayBuffer(storage=LazyTensorStorage(size)), NewestRows(most=512)

    def write() -> None:
        for start in range(0, 16 * 500, 16):
            rows = {"number": torch.arange(start, start + 16), "frame": torch.zeros(16, 500)}
            buffer.extend(TensorDict(rows, [16]))

    thread = threading.Thread(target=write)
    thread.start()
    seen, missed, going_on = [], 0, True
    while going_on:
        going_on = thread.is_alive()
        found = newest.take(buffer)
        missed += newest.missed
        seen += [] if found is None else [found["number"]]
    thread.join()
    numbers = torch.cat(seen)
    assert len(numbers) + missed == 16 * 500
    assert all(torch.equal(one, torch.arange(len(one)) + one[0]) for one in seen)
    assert torch.equal(numbers, numbers.unique())

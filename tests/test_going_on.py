"""Episodes that were cut off, row after row: nothing is joined that belongs to different ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs.transforms import CatFrames

from tdhook_rl.latent import ActivationCaching
from tdhook_rl.replay import analyze, returns

ENVS, STEPS = 5, 9

#: From random numbers a state of each kind, under its key.
STATES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "vectors": ("observation", lambda noise: noise[..., :3].float()),
    "nested, with NaN": (("agent", "state"), lambda noise: noise[..., :3].where(noise[..., :3] < 1, torch.nan)),
    "pictures": ("pixels", lambda noise: (noise * 40).to(torch.uint8).unflatten(-1, (1, 2, 5))),
    "numbers": ("observation", lambda noise: (noise[..., 0] * 1e6).long()),
    "half precision": ("observation", lambda noise: noise[..., :3].bfloat16()),
}


def walks(kind: str, steps: int = STEPS, seed: int = 0) -> TensorDict:
    """``(ENVS, steps)`` of episodes of one to six steps, each of which begins and goes on as nothing else does."""
    draws = torch.Generator().manual_seed(seed)
    key, state = STATES[kind]
    noise = torch.randn(ENVS, steps + 1, 10, generator=draws, dtype=torch.float64)
    begins = torch.randn(ENVS, steps, 10, generator=draws, dtype=torch.float64)
    count, length = torch.zeros(ENVS, dtype=torch.long), torch.randint(1, 7, (ENVS, steps), generator=draws)
    data = TensorDict({}, batch_size=[ENVS, steps])
    done, fresh, counts = (torch.zeros(ENVS, steps, 1, dtype=dtype) for dtype in (torch.bool, torch.bool, torch.long))
    then = noise[:, :-1].clone()
    for time in range(steps):
        fresh[:, time, 0], counts[:, time, 0] = count == 0, count
        then[:, time] = torch.where(fresh[:, time], begins[:, time], then[:, time])
        count = count + 1
        done[:, time, 0] = count >= length[:, time]
        count = torch.where(done[:, time, 0], 0, count)
    data[key], data["next", key] = state(then), state(noise[:, 1:])
    data["next", "reward"] = torch.randn(ENVS, steps, 1, generator=draws, dtype=torch.float64)
    data["next", "done"], data["is_init"], data["step_count"] = done, fresh, counts
    return data


def episodes_in(parts: list[TensorDict]) -> list[float]:
    """The returns of those that begin and end in one of these parts, by a loop."""
    found = []
    for part in parts:
        for rows in part:
            total: float | None = None
            for row in rows:
                total = 0.0 if bool(row["is_init"]) else total
                total = None if total is None else total + float(row["next", "reward"])
                if bool(row["next", "done"]):
                    found += [] if total is None else [total]
                    total = None
    return sorted(found)


def stored(parts: list[TensorDict], size: int = 1000) -> ReplayBuffer:
    buffer = ReplayBuffer(storage=LazyTensorStorage(size))
    for part in parts:
        buffer.extend(part.reshape(-1))
    return buffer


def whole(found: Any) -> list[float]:
    return sorted(one.total for one in found.episodes if one.whole)


@pytest.mark.parametrize("told", ["nothing", "is_init", "step_count"])
@pytest.mark.parametrize("how", ["one batch", "several", "going on", "a list", "a TensorDict"])
@pytest.mark.parametrize("kind", STATES)
def test_returns_are_those_of_a_loop_over_environments(kind: str, how: str, told: str) -> None:
    if how == "several":
        parts = [walks(kind, seed=seed) for seed in (1, 2, 3)]
    else:
        data = walks(kind, 2 * STEPS)
        parts = [data[:, :STEPS].clone(), data[:, STEPS:].clone()] if how == "going on" else [data]
    expected = episodes_in(parts)
    parts = [part.exclude(*({"is_init", "step_count"} - {told})) for part in parts]
    given: Any = stored(parts)
    if how == "a list":
        given = [part.reshape(-1) for part in parts]
    elif how == "a TensorDict":
        given = parts[0].reshape(-1)
    found = returns(given)
    assert whole(found) == pytest.approx(expected)
    if told != "nothing":
        entries = ReplayBuffer(storage=LazyTensorStorage(1000))
        for part in parts:
            entries.extend(part)
        assert whole(returns(entries)) == pytest.approx(expected)
    if len(parts) == 1 and told == "nothing":  # rows by themselves are those of a batch
        assert torch.equal(found.rows.isnan(), returns(parts[0]).rows.isnan())
        torch.testing.assert_close(found.rows, returns(parts[0]).rows, equal_nan=True)


def numbered(data: TensorDict, first: int = 0) -> TensorDict:
    """With numbers of trajectories as collectors give them."""
    ids = data["is_init"].squeeze(-1).cumsum(1) - 1
    data["collector", "traj_ids"] = first + ids + 100 * torch.arange(ENVS)[:, None]
    return data


@pytest.mark.parametrize("told", ["nothing", "is_init", "step_count"])
@pytest.mark.parametrize("kind", STATES)
def test_numbers_join_what_goes_on_and_nothing_else(kind: str, told: str) -> None:
    hidden = {"is_init", "step_count"} - {told}
    data = numbered(walks(kind, 2 * STEPS))
    one = [part.exclude(*hidden) for part in data.split(STEPS, 1)]  # a collector gives one batch after the other
    assert whole(returns(stored(one))) == pytest.approx(episodes_in([data]))
    entries = ReplayBuffer(storage=LazyTensorStorage(1000))  # of which each is cut off by itself
    for part in one:
        entries.extend(part)
    assert whole(returns(entries)) == pytest.approx(episodes_in(list(data.split(STEPS, 1))))
    several = [numbered(walks(kind, seed=seed)) for seed in (1, 2, 3)]  # three that number theirs alike
    assert whole(returns(stored([part.exclude(*hidden) for part in several]))) == pytest.approx(episodes_in(several))


def corridor(paths: dict[int, list[list[int]]]) -> TensorDict:
    """One row for each environment, of the places that it comes to, by where its episodes begin; they end at 3."""
    rows = [(start, path) for start, several in paths.items() for path in several]
    then = torch.tensor([[start, *(start if place == 3 else place for place in path[:-1])] for start, path in rows])
    now = torch.tensor([path for _, path in rows])
    data = TensorDict({"place": then, "next": {"place": now}}, batch_size=then.shape)
    data["next", "done"], data["is_init"] = (now == 3)[..., None], torch.zeros_like(now, dtype=torch.bool)[..., None]
    data["is_init"][:, 0], data["is_init"][:, 1:] = True, data["next", "done"][:, :-1]
    data["next", "reward"] = torch.randn(*then.shape, 1, generator=torch.Generator().manual_seed(0)).double()
    return data


@pytest.mark.parametrize("last", [[1, 2, 3, 1, 5], [1, 2, 1, 2, 5], [1, 2, 3, 1, 2]])
def test_episodes_begin_where_others_were_cut_off_if_many_begin_there(last: list[int]) -> None:
    data = corridor({0: [[1, 3, 1, 2, 3], last, [1, 3, 1, 2, 3]], 5: [[4, 3, 4, 4, 3], [4, 3, 4, 3, 4]]})
    found = returns(data.exclude("is_init").reshape(-1))
    assert whole(found) == pytest.approx(episodes_in([data]))


def test_counts_that_happen_to_go_on_join_nothing() -> None:
    """Two batches of episodes that were cut off at different steps: counts of other environments may follow."""
    data = walks("vectors", 6 * STEPS).exclude("is_init")
    parts = list(data.split(4, 1))
    found = returns(stored(parts))
    count, env = torch.cat([part["step_count"].flatten() for part in parts]), torch.arange(ENVS)[:, None]
    env = torch.cat([env.expand(part.batch_size).flatten() for part in parts])
    assert bool((count.diff() == 1)[env.diff() != 0].any())
    assert all(len(env[one.rows].unique()) == 1 for one in found.episodes)


@pytest.mark.parametrize("kind", STATES)
def test_of_numbered_trajectories_some_steps_may_not_be_stored(kind: str) -> None:
    data = numbered(walks(kind, 3 * STEPS)).exclude("is_init")
    few = data[:, ::2].reshape(-1)
    found = returns(few.exclude("step_count"))
    joined = returns(few)
    assert found.episode.tolist() == joined.episode.tolist()
    assert len(found.episodes) >= len(few["collector", "traj_ids"].unique())


@pytest.mark.parametrize("shape", [(4, ENVS), (2, 2, ENVS), (4 * ENVS,)], ids=str)
@pytest.mark.parametrize("kind", STATES)
def test_an_entry_may_hold_several_trajectories(kind: str, shape: tuple[int, ...]) -> None:
    parts = [walks(kind, seed=seed) for seed in range(4)]
    data = torch.stack(parts).exclude("is_init", "step_count").reshape(*shape, STEPS)
    buffer = ReplayBuffer(storage=LazyTensorStorage(100))
    buffer.extend(data)
    for given in (data, buffer):
        assert whole(returns(given)) == pytest.approx(episodes_in(parts))


@pytest.mark.parametrize("first", [0, 1], ids=["from 0", "from 1"])
@pytest.mark.parametrize("told", ["is_init", "step_count"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_what_rows_say_to_have_begun_before_is_not_whole(cut: int, told: str, first: int) -> None:
    """Also where none of them says to begin: of a run, the later steps were stored, or the end of one episode."""
    data = walks("vectors", 4 * STEPS)
    data["step_count"] += first
    lasting = [row for row in data if int(row["next", "done"].flatten().long().argmax()) >= cut]
    assert lasting
    for row in lasting:
        end = int(row["next", "done"].flatten().long().argmax()) + 1
        for last in (end, 4 * STEPS):
            part = row[cut:last].exclude(*({"is_init", "step_count"} - {told}))
            expected = [] if last == end else episodes_in([row[None, end:]])
            for given in (part, stored([part[None]]), [part], part[None]):
                assert whole(returns(given)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", STATES)
def test_a_ring_knows_only_what_is_left(kind: str) -> None:
    parts = [walks(kind, seed=seed) for seed in (1, 2, 3)]
    size, rows = 2 * ENVS * STEPS - 7, torch.cat([part.reshape(-1) for part in parts])
    rows["row"] = torch.arange(len(rows))
    left = rows[-size:]
    buffer = ReplayBuffer(storage=LazyTensorStorage(size))
    for part in rows.exclude("is_init", "step_count").split(ENVS * STEPS):
        buffer.extend(part)
    found = whole(returns(buffer))
    known, total = [], None  # what follows an end within a row of the batch begins
    for place in range(1, size):
        row, before = left[place], left[place - 1]
        begins = bool(before["next", "done"]) and bool(row["is_init"])
        total = 0.0 if begins else None if bool(row["is_init"]) or int(row["row"]) % STEPS == 0 else total
        total = None if total is None else total + float(row["next", "reward"])
        if bool(row["next", "done"]):
            known += [] if total is None else [total]
            total = None
    assert found == pytest.approx(sorted(known))


@pytest.mark.parametrize("kind", ["vectors", "numbers"])
def test_where_rows_do_not_go_on_at_all_the_ends_alone_tell(kind: str) -> None:
    """As behind a transform that looks several steps ahead, or of rows that are stored at random."""
    data = walks(kind).reshape(-1).exclude("is_init", "step_count")
    key, _ = STATES[kind]
    data["next", key] = data["next", key].flip(0)
    bare = data.exclude(("next", key))
    torch.testing.assert_close(returns(data).rows, returns(bare).rows, equal_nan=True)


def test_frames_of_other_environments_are_not_put_together(tmp_path: Path) -> None:
    data = walks("vectors").exclude("is_init", "step_count")
    net = TensorDictModule(nn.Sequential(nn.Identity(), nn.Linear(9, 1)), ["frames"], ["value"])

    def frames_of(rows: TensorDict, name: str = "all") -> Tensor:
        buffer = ReplayBuffer(
            storage=LazyTensorStorage(1000),
            transform=CatFrames(N=3, dim=-1, in_keys=["observation"], out_keys=["frames"], padding="same"),
        )
        buffer.extend(rows)
        with ActivationCaching("module.0").prepare(net) as hooked:
            return analyze(hooked, buffer, tmp_path / name, progress=False)["cache", "module.0"]

    apart = torch.cat([frames_of(rows, str(number)) for number, rows in enumerate(data)])
    torch.testing.assert_close(frames_of(data.reshape(-1)), apart)

"""Transforms of replay buffers that look across rows: what a row is does not depend on the chunk it is read in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.data import (
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.samplers import SliceSampler
from torchrl.envs import (
    CatFrames,
    Compose,
    ObservationNorm,
    RandomCropTensorDict,
    RewardSum,
    TimeMaxPool,
    Transform,
    VecNorm,
)
from torchrl.envs.transforms import ModuleTransform, NextStateReconstructor, VecNormV2
from torchrl.modules import GRUModule, ProbabilisticActor

from tdhook_rl import ActivationCaching, Saliency, targets
from tdhook_rl import Compose as Methods
from tdhook_rl.errors import InputError
from tdhook_rl.latent import ActivationAddition
from tdhook_rl.replay import analyze, in_order

LENGTHS = (7, 1, 30, 12, 3, 27)
ROWS = sum(LENGTHS)


def stream(lengths: tuple[int, ...] = LENGTHS, shape: tuple[int, ...] = (3,)) -> TensorDict:
    """Trajectories one after the other, as one environment gives them."""
    rows = sum(lengths)
    torch.manual_seed(0)
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    count = torch.cat([torch.arange(length) for length in lengths])
    done = torch.zeros(rows, 1, dtype=torch.bool)
    done[torch.tensor(lengths).cumsum(0) - 1] = True
    seen = torch.randn(rows + 1, *shape)
    return TensorDict(
        {
            "observation": seen[:-1],
            "trajectory": number,
            "step_count": count[:, None],
            "is_init": count[:, None] == 0,
            "reward": torch.randn(rows, 1),
            "next": {"observation": seen[1:], "done": done, "terminated": done, "reward": torch.randn(rows, 1)},
        },
        [rows],
    )


def facts(data: TensorDict, *keys: Any) -> TensorDict:
    return data.select("observation", *keys)


def filled(data: TensorDict, *transforms: Any, storage: Any = None, **options: Any) -> ReplayBuffer:
    made = ReplayBuffer(storage=LazyTensorStorage(len(data)) if storage is None else storage, **options)
    made.extend(data)
    for transform in transforms:
        made.append_transform(transform)
    return made


def stacks(data: TensorDict, frames: int, padding: float | None = None, future: bool = False) -> torch.Tensor:
    """By hand: the frames of each row's own trajectory, the end of it repeated where there are no more."""
    number, seen = data["trajectory"], data["observation"]
    rows = []
    for row in range(len(data)):
        same = (number == number[row]).nonzero().flatten().tolist()
        at = same.index(row)
        places = [at + step if future else at - frames + 1 + step for step in range(frames)]
        found = []
        for place in places:
            inside = min(max(place, 0), len(same) - 1)
            blank = padding is not None and place != inside
            found.append(torch.full_like(seen[0], padding) if blank else seen[same[inside]])
        rows.append(torch.cat(found))
    return torch.stack(rows)


def read(buffer: ReplayBuffer, chunk: int) -> TensorDictBase:
    return torch.cat([batch for _, batch in in_order(buffer, chunk)])


def stacking(frames: int = 4, **options: Any) -> CatFrames:
    options = {"dim": -1, "in_keys": ["observation"], "out_keys": ["stack"], **options}
    return CatFrames(N=frames, **options)


# ------------------------------------------------------------------ frames of the row's own trajectory


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("frames", [1, 2, 4, 40])
def test_frames_are_those_of_the_trajectory(frames: int, chunk: int) -> None:
    data = stream()
    buffer = filled(facts(data, ("next", "done")), stacking(frames))
    assert torch.equal(read(buffer, chunk)["stack"], stacks(data, frames))


OPTIONS: dict[str, tuple[Callable[[], Any], Callable[[TensorDict], torch.Tensor]]] = {
    "constant": (lambda: stacking(padding="constant", padding_value=7.0), lambda data: stacks(data, 4, 7.0)),
    "future": (lambda: stacking(future=True), lambda data: stacks(data, 4, future=True)),
    "normalised before": (
        lambda: Compose(ObservationNorm(1.0, 2.0, in_keys=["observation"]), Compose(stacking())),
        lambda data: 1 + 2 * stacks(data, 4),
    ),
    "a function after": (
        lambda: Compose(stacking(), lambda data: data.set("stack", data["stack"] * 3)),
        lambda data: 3 * stacks(data, 4),
    ),
    "stacked twice": (
        lambda: Compose(stacking(3), stacking(2, in_keys=["stack"])),
        lambda data: stacks(data.copy().set("observation", stacks(data, 3)), 2),
    ),
}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_frames(option: str, chunk: int) -> None:
    make, right = OPTIONS[option]
    data = stream()
    torch.testing.assert_close(read(filled(data, make()), chunk)["stack"], right(data))


def test_pixels() -> None:
    data = stream((5, 9, 20), (1, 4, 4))
    buffer = filled(data, stacking(dim=-3))
    for chunk in (3, 100):
        found = read(buffer, chunk)["stack"]
        assert torch.equal(found, stacks(data, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: stacking(3, in_keys=["observation", ("next", "observation")], out_keys=["stack", ("next", "stack")]),
        lambda: stacking(3, in_keys=[("next", "observation")], out_keys=["stack"]),
        lambda: NextStateReconstructor(keys=["observation"]),
    ],
    ids=["beside the next", "the next", "the next state put together"],
)
def test_no_chunk_gives_other_rows(make: Callable[[], Any]) -> None:
    data = stream().exclude(("collector", "traj_ids"))
    data["collector", "traj_ids"] = data["trajectory"]
    whole = read(filled(data, make()), 1000)
    for chunk in (1, 2, 13):
        found = read(filled(data, make()), chunk)
        for key, value in whole.items(True, True):
            torch.testing.assert_close(found[key], value, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_trajectories_that_are_stored_by_turns(chunk: int) -> None:
    """Batches of three environments, each cut at the end of the batch: rows before a row are elsewhere."""
    data = stream((20, 16, 24))
    order = torch.cat([(data["trajectory"] == one).nonzero().flatten()[at : at + 4]
                       for at in range(0, 24, 4) for one in range(3)])  # fmt: skip
    turns = data[order]
    buffer = filled(turns, stacking(), sampler=SliceSampler(slice_len=2, traj_key="trajectory"), batch_size=2)
    assert torch.equal(read(buffer, chunk)["stack"], stacks(turns, 4))
    elsewhere = turns.exclude("trajectory").set(("collector", "traj_ids"), turns["trajectory"])
    assert torch.equal(read(filled(elsewhere, stacking()), chunk)["stack"], stacks(turns, 4))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("keys", [(), ("step_count",), ("is_init",), ("trajectory",)], ids=str)
def test_a_ring_that_went_round(keys: tuple[str, ...], chunk: int, tmp_path: Path) -> None:
    """Rows whose first frames were written over have no results; all others have those of their trajectory."""
    data = stream()
    size = 50  # the first 30 of 80 rows are gone: the middle of the third trajectory
    buffer = ReplayBuffer(storage=LazyTensorStorage(size))
    for part in facts(data, ("next", "done"), *keys).split(10):
        buffer.extend(part)
    buffer.append_transform(stacking())
    net = nn.Sequential(nn.Linear(12, 5), nn.Tanh())
    right = net(stacks(data, 4)).detach()[-size:].roll(30, 0)
    lost = torch.zeros(size, dtype=torch.bool)
    lost[30:33] = True
    with (
        ActivationCaching("1").prepare(net, in_keys=["stack"], out_keys=["logits"]) as hooked,
        pytest.warns(UserWarning, match="^3 of 50 rows have no results.*CatFrames"),
    ):
        found = analyze(hooked, buffer, tmp_path, batch_size=chunk)
    assert torch.equal(found["computed", "cache"], ~lost)
    torch.testing.assert_close(found["cache", "1"][~lost], right[~lost])
    assert found["cache", "1"][lost].isnan().all()


STORAGES: dict[str, Callable[[Path], Any]] = {
    "memmap": lambda folder: LazyMemmapStorage(ROWS, scratch_dir=folder),
    "list": lambda _: ListStorage(ROWS),
    "stack": lambda _: LazyStackStorage(ROWS),
    "larger than its rows": lambda _: LazyTensorStorage(ROWS * 3),
}


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_explained(storage: str, tmp_path: Path) -> None:
    data = stream()
    buffer = filled(data, stacking(), storage=STORAGES[storage](tmp_path / "buffer"))
    before = [row.clone() for row in buffer.storage[:]] if storage == "stack" else None
    net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    with Saliency(target=targets.logit(0)).prepare(net, in_keys=["stack"], out_keys=["logits"]) as hooked:
        found = analyze(hooked, buffer, tmp_path / "results", batch_size=11)["attr", "stack"]
    inputs = stacks(data, 4).requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(net(inputs)[:, 0].sum(), inputs)[0])
    if before is not None:  # reading does not write
        assert all((one == other).all() for one, other in zip(before, buffer.storage[:], strict=True))


def test_entries_that_are_trajectories() -> None:
    data = torch.stack([stream((20,)), stream((20,)), stream((20,))])
    data.names = [None, "time"]
    buffer = filled(data, stacking(), storage=LazyTensorStorage(3))
    whole, parts = read(buffer, 1000), read(buffer, 20)
    assert torch.equal(whole["stack"], parts["stack"])
    assert torch.equal(parts["stack"][1], stacks(data[1], 4))


# ------------------------------------------------------------------ transforms that work row by row


class Doubled(Transform):
    def forward(self, data: TensorDictBase) -> TensorDictBase:
        return data.set("observation", data["observation"] * 2)


class Remembers(Transform):
    """Gives each row the observation of the row that came before it, in whatever batch."""

    def forward(self, data: TensorDictBase) -> TensorDictBase:
        return data.set("stack", torch.cat([data["observation"][:1], data["observation"][:-1]]))


PLAIN: dict[str, Callable[[], Any]] = {
    "a function": lambda: lambda data: data.set("stack", data["observation"].tanh()),
    "a transform of the user's": Doubled,
    "a module": lambda: ModuleTransform(module=TensorDictModule(nn.Linear(3, 4), ["observation"], ["stack"])),
    # Buffers call their transforms in eval mode.
    "batch statistics": lambda: ModuleTransform(module=TensorDictModule(nn.BatchNorm1d(3), ["observation"], ["stack"])),
    # Next to frames it is given the rows before a row of its own trajectory as well.
    "the row before, beside frames": lambda: Compose(stacking(), Remembers()),
}


@pytest.mark.parametrize("name", PLAIN)
def test_row_by_row(name: str) -> None:
    transform = PLAIN[name]()
    buffer = filled(stream(), transform)
    whole = read(buffer, 1000)
    for chunk in (1, 7):
        found = read(buffer, chunk)
        for key in whole.keys(True, True):
            torch.testing.assert_close(found[key], whole[key])


# ------------------------------------------------------------------ what is refused, by name


class OnlyAtEnds(Transform):
    """Looks at its neighbour where an episode ends."""

    def forward(self, data: TensorDictBase) -> TensorDictBase:
        before = data["observation"].roll(1, 0)
        return data.set("stack", torch.where(data["next", "done"], before, data["observation"]))


class CountsCalls(Transform):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, data: TensorDictBase) -> TensorDictBase:
        self.calls += 1
        return data.set("stack", data["observation"] + self.calls)


class MyFrames(CatFrames):
    """A subclass may do anything."""

    def forward(self, data: TensorDictBase) -> TensorDictBase:
        return super().forward(data)


def standardised(data: TensorDictBase) -> TensorDictBase:
    return data.set("stack", data["observation"] - data["observation"].mean(0))


def noisy(data: TensorDictBase) -> TensorDictBase:
    return data.set("stack", data["observation"] + torch.randn_like(data["observation"]))


def summed(data: TensorDictBase) -> TensorDictBase:
    return data.set("stack", data["observation"].cumsum(0))


def every_other(data: TensorDictBase) -> TensorDictBase:
    return data[::2]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "the row before": (Remembers, "Remembers"),
    "at ends only": (OnlyAtEnds, "OnlyAtEnds"),
    "a count of calls": (CountsCalls, "CountsCalls"),
    "a subclass": (lambda: MyFrames(4, -1, ["observation"], ["stack"]), "MyFrames"),
    "a mean over the batch": (lambda: standardised, "standardised"),
    "noise": (lambda: noisy, "noisy"),
    "fewer rows": (lambda: every_other, "every_other"),
    "crops": (lambda: RandomCropTensorDict(3), "RandomCropTensorDict"),
    "sums": (lambda: RewardSum(), "RewardSum"),
    "pooling": (lambda: TimeMaxPool(in_keys=["observation"], T=3), "TimeMaxPool"),
    "a normaliser that counts": (lambda: VecNorm(in_keys=["observation"]), "VecNorm"),
    "another that counts": (lambda: VecNormV2(in_keys=["observation"]), "VecNormV2"),
    "behind one that is known": (
        lambda: Compose(ObservationNorm(0.0, 1.0, in_keys=["observation"]), Remembers()),
        "Remembers",
    ),
    "beside frames": (lambda: Compose(stacking(), summed), "summed"),
    "TorchRL's recipe for slices": (
        lambda: CatFrames(4, -1, ["observation"], ["stack"], reset_key="_reset").make_rb_transform_and_sampler(8)[0],
        "CatFrames",
    ),
}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, chunk: int) -> None:
    make, expected = REFUSED[name]
    with pytest.raises(InputError, match=expected):
        read(filled(stream(), make()), chunk)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_collate_function_that_looks_across_rows(chunk: int) -> None:
    with pytest.raises(InputError, match="collate_fn"):
        read(filled(stream(), collate_fn=standardised), chunk)


def test_nothing_says_where_trajectories_end() -> None:
    with pytest.raises(InputError, match="CatFrames reads rows of one trajectory, and no entry"):
        read(filled(facts(stream()), stacking()), 7)
    with pytest.raises(InputError, match="CatFrames"):
        read(filled(facts(stream(), "trajectory"), stacking()), 7)


def test_a_writer_that_keeps_no_order() -> None:
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(20), writer=TensorDictMaxValueWriter(rank_key="rank"), batch_size=2
    )
    data = stream()
    buffer.extend(data.set("rank", torch.randn(ROWS)))
    buffer.append_transform(stacking())
    with pytest.raises(InputError, match=r"CatFrames.*TensorDictMaxValueWriter"):
        read(buffer, 7)


# ------------------------------------------------------------------ methods that see more than a row


def recurrent(rows: TensorDict) -> tuple[ProbabilisticActor, TensorDict]:
    torch.manual_seed(0)
    rnn = GRUModule(input_size=3, hidden_size=5, in_key="observation", out_key="hidden")
    head = TensorDictModule(nn.Linear(5, 3), ["hidden"], ["logits"])
    actor = ProbabilisticActor(TensorDictSequential(rnn, head), in_keys=["logits"], distribution_class=Categorical)
    states = {"recurrent_state": torch.zeros(len(rows), 1, 5), "action": torch.randint(0, 3, (len(rows),))}
    return actor, rows.copy().update(states)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_whole_trajectories_are_explained_whole(chunk: int, tmp_path: Path) -> None:
    actor, data = recurrent(stream())
    method = Saliency(target=targets.chosen_logit(), inputs=["observation"], horizon="trajectory")
    with method.prepare(actor) as hooked:
        parts = [hooked.annotate(one)["attr", "observation"] for one in data.split(LENGTHS)]
        found = analyze(hooked, filled(data), tmp_path, batch_size=chunk)["attr", "observation"]
    torch.testing.assert_close(found, torch.cat(parts))


def test_trajectories_that_are_in_pieces_are_refused(tmp_path: Path) -> None:
    data = stream((20, 20))
    actor, turns = recurrent(data[torch.cat([torch.arange(0, 10), torch.arange(20, 30), torch.arange(10, 20)])])
    with (
        Saliency(inputs=["observation"], horizon="trajectory").prepare(actor) as hooked,
        pytest.raises(InputError, match="horizon='trajectory' reads whole trajectories"),
    ):
        analyze(hooked, filled(turns), tmp_path, batch_size=4)


def test_means_over_a_batch_are_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    data = stream().select("observation")
    data["positive"] = data.select("observation")
    data["negative"] = data.select("observation")
    method = Methods(ActivationAddition(["0"]), ActivationCaching("0"))
    with (
        method.prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked,
        pytest.raises(
            InputError, match=r"the results of ActivationAddition \(.*\) are of all rows of a batch together"
        ),
    ):
        analyze(hooked, filled(data), tmp_path, batch_size=4)

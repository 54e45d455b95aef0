"""Data sets as others write them: text beside numbers, infos of some episodes, keys that end in a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NestedKey, TensorDict, lazy_stack
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Saliency, SteeringVectors, targets
from tdhook_rl.arguments.keys import get_entry
from tdhook_rl.errors import InputError, MissingKeyError, TargetError
from tdhook_rl.reading.minari_episodes import episodes_of
from tdhook_rl.replay import analyze, load_results, probe_grid, returns
from tdhook_rl.rollout import GroupSplit
from tdhook_rl.sweeps import patch_sites

LENGTHS = (4, 1, 3)


class Episode(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.rewards)


class Dataset:
    """What is asked of a Minari dataset, with observations and infos as they are given."""

    def __init__(self, observed: Callable[[int], Any], acted: Callable[[int], Any], infos: list[dict]) -> None:
        self.episode_indices = np.arange(len(LENGTHS))
        self.episodes = [
            Episode(
                id=number, observations=observed(steps + 1), actions=acted(steps), rewards=np.ones(steps),
                terminations=np.arange(steps) == steps - 1, truncations=np.zeros(steps, bool), infos=info,
            )
            for number, (steps, info) in enumerate(zip(LENGTHS, infos, strict=True))
        ]  # fmt: skip

    def iterate_episodes(self) -> Iterator[Episode]:
        return iter(self.episodes)

    __iter__ = iterate_episodes


NUMBERS = np.random.default_rng(0)
OBSERVED: dict[str, tuple[Callable[[int], Any], NestedKey]] = {
    "an array": (lambda rows: NUMBERS.normal(size=(rows, 3)), "observation"),
    "beside text": (
        lambda rows: {"image": NUMBERS.normal(size=(rows, 3)), "mission": ["go to the door"] * rows},
        ("observation", "image"),
    ),
    "beside text, inside": (
        lambda rows: {"camera": {"image": NUMBERS.normal(size=(rows, 3)), "of": {"name": ["left"] * rows}}},
        ("observation", "camera", "image"),
    ),
    "a tuple with text": (lambda rows: (NUMBERS.normal(size=(rows, 3)), ["a"] * rows), ("observation", "0")),
}
INFOS: dict[str, tuple[list[dict], set[tuple[str, ...]]]] = {
    "none": ([{}, {}, {}], set()),
    "the same": ([{"x": np.arange(steps + 1)} for steps in LENGTHS], {("info", "x")}),
    "of one": ([{"x": np.arange(5.0), "y": np.arange(5)}, {"y": np.arange(2)}, {"y": np.arange(3)}], {("info", "y")}),
    "of another kind": ([{"x": np.arange(5.0)}, {"x": np.arange(2)}, {"x": np.arange(4)}], set()),
    "inside": ([{"a": {"b": np.arange(4), "c": np.arange(4)}}, {"a": {"b": np.arange(1)}}, {"a": {"b": np.arange(3)}}],
               {("info", "a", "b")}),
    "text": ([{"x": np.array(["a"] * steps)} for steps in LENGTHS], set()),
}  # fmt: skip


def actor(key: NestedKey) -> ProbabilisticActor:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    module = TensorDictModule(net, in_keys=[key], out_keys=["logits"])
    return ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical)


@pytest.mark.parametrize("infos", INFOS)
@pytest.mark.parametrize("observed", OBSERVED)
def test_numbers_of_all_episodes_are_read(observed: str, infos: str, tmp_path: Path) -> None:
    make, key = OBSERVED[observed]
    given, kept = INFOS[infos]
    dataset = Dataset(make, lambda rows: NUMBERS.integers(2, size=rows), given)
    episodes = list(episodes_of(dataset))
    for episode, original in zip(episodes, dataset.episodes, strict=True):
        inside: Any = original.observations
        for step in () if isinstance(key, str) else key[1:]:
            inside = inside[int(step) if step.isdigit() else step]
        assert np.array_equal(episode[key].numpy(), inside[:-1])
        assert {one for one in episode.keys(True, True) if one[0] == "info"} == kept
        for one in kept:
            value: Any = original.infos
            for step in one[1:]:
                value = value[step]
            assert np.array_equal(episode[one].numpy(), value[: len(original)])
    policy = actor(key)
    with Saliency().prepare(policy) as hooked:
        analyze(hooked, dataset, tmp_path, progress=False)
    rows = torch.cat([one.select(key, "action") for one in episodes])
    leaf = rows[key].clone().requires_grad_()
    score = policy.module[0].module(leaf).log_softmax(-1).gather(-1, rows["action"][:, None]).sum()
    [gradient] = torch.autograd.grad(score, leaf)
    found = load_results(tmp_path)
    torch.testing.assert_close(found["attr", key] if isinstance(key, str) else found[("attr", *key)], gradient)


def test_actions_in_words_are_not_there(tmp_path: Path) -> None:
    dataset = Dataset(OBSERVED["an array"][0], lambda rows: ["left"] * rows, [{}, {}, {}])
    with Saliency().prepare(actor("observation")) as hooked, pytest.raises(TargetError, match="'action', which the"):
        analyze(hooked, dataset, tmp_path, progress=False)


@pytest.mark.parametrize("key", [("observation", "image"), ("observation", "a", "b"), ("nothing", "a"), "nothing"])
def test_there_is_nothing_below_a_tensor(key: NestedKey) -> None:
    data = TensorDict({"observation": torch.randn(5, 3, dtype=torch.float64), "action": torch.zeros(5).long()}, [5])
    other, usual, deep = data.clone(), actor("observation"), actor(key)
    assert get_entry(data, key) is None
    with Saliency().prepare(deep) as hooked, pytest.raises(MissingKeyError, match="which the data lacks"):
        hooked.annotate(data)
    with pytest.raises(MissingKeyError, match="which the data lacks"):
        patch_sites(deep, data, other, "module.0.module.0")
    with pytest.raises(MissingKeyError, match="which the data lacks"):
        patch_sites(usual, data, other, "module.0.module.0", groups=key)
    with pytest.raises(TargetError, match="which the policy does not output"):
        patch_sites(usual, data, other, "module.0.module.0", metric=key)
    for option in ("alpha", "when"):
        method = SteeringVectors({"module.0.module.0": torch.ones(4).double()}, **{option: key})
        with method.prepare(usual) as hooked, pytest.raises(MissingKeyError, match="which the data lacks"):
            hooked(data.clone())


def test_entries_where_a_tensor_is_read_are_named() -> None:
    image = torch.randn(5, 3, dtype=torch.float64)
    data = TensorDict({"observation": {"image": image}, "action": torch.zeros(5).long()}, [5])
    with Saliency().prepare(actor("observation")) as hooked:
        with pytest.raises(InputError, match=r"a TensorDict there, of \('observation', 'image'\)"):
            hooked.annotate(data)


#: What observations and modules may be called: letters that no file system takes, or that mean a place there.
CALLED = ("joint pos [rad]", "goal/xy", "..", "50%", "ключ 鍵", ("state?", "a:b"))


@pytest.mark.parametrize("key", CALLED, ids=str)
def test_results_of_entries_whatever_they_are_called(key: NestedKey, tmp_path: Path) -> None:
    module = TensorDictModule(nn.Linear(3, 2), in_keys=[key], out_keys=["logits"])
    actor = ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical)
    data = actor(TensorDict({key: torch.randn(5, 3)}, batch_size=5)).detach()
    with Saliency().prepare(actor) as policy:
        expected = policy.annotate(data)
        with pytest.raises(KeyboardInterrupt):
            analyze(policy, data, tmp_path / "out", batch_size=2, progress=interrupted)
        analyze(policy, data, tmp_path / "out", batch_size=2, progress=False)  # goes on
    found, place = load_results(tmp_path / "out"), ("attr", *((key,) if isinstance(key, str) else key))
    assert torch.equal(found[place], expected[place])
    assert all(tmp_path in one.resolve().parents for one in (tmp_path / "out").rglob("*"))


def interrupted(done: int, rows: int) -> None:
    raise KeyboardInterrupt


def walks() -> list[TensorDict]:
    draws = torch.Generator().manual_seed(0)
    found = []
    for number, length in enumerate((5, 2, 7, 3, 6, 4)):
        seen = torch.randn(length + 1, 3, generator=draws)
        done = (torch.arange(length) == length - 1)[:, None]
        reward = torch.randn(length, 1, generator=draws)
        rows = {"observation": seen[:-1], "episode": torch.full((length,), number), "label": seen[:-1, 0] > 0}
        found.append(TensorDict({**rows, "next": {"observation": seen[1:], "reward": reward, "done": done}}, [length]))
    return found


#: Trajectories of different lengths in one TensorDict.
RAGGED: dict[str, Callable[[list[TensorDict]], TensorDict]] = {
    "a stack": lambda walks: lazy_stack(walks),
    "stacks in a stack": lambda walks: lazy_stack([lazy_stack(walks[:3]), lazy_stack(walks[3:])]),
    "behind a dimension of one": lambda walks: lazy_stack([one[None] for one in walks]),
    "before one": lambda walks: lazy_stack([one[None] for one in walks], 1),
}


@pytest.mark.parametrize("kind", RAGGED)
def test_trajectories_of_different_lengths_are_a_list_of_them(kind: str, tmp_path: Path) -> None:
    listed, given = walks(), RAGGED[kind](walks())
    assert -1 in given.batch_size
    found, expected = returns(given), returns(listed)
    assert [one.total for one in found.episodes] == [one.total for one in expected.episodes]
    assert torch.equal(found.rows, expected.rows)
    torch.manual_seed(0)
    policy = TensorDictModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), ["observation"], ["logits"])
    with Saliency(target=targets.logit(0)).prepare(policy) as hooked:
        results = [analyze(hooked, one, tmp_path / f"{number}") for number, one in enumerate((given, listed))]
    assert (results[0] == results[1]).all()
    options: dict[str, Any] = {"split": GroupSplit("episode", held_out=0.5), "min_rows": 1, "untrained": False}
    cells = [
        probe_grid(policy, one, sites="module.0", concepts={"it": "label"}, **options)[0] for one in (given, listed)
    ]
    assert cells[0].trained == cells[1].trained


def test_where_time_comes_first_there_are_no_trajectories() -> None:
    with pytest.raises(InputError, match="time is the last one"):
        returns(lazy_stack(walks(), 1))

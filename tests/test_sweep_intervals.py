"""Intervals of what a sweep says: they hold the truth as often as they say, or say why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.report.sweep_pages import played_in_words, sweep_page
from tdhook_rl.statistics import grouped_mean
from tdhook_rl.sweeps import Condition, SweepResult, steering_sweep
from tdhook_rl.sweeps.outcomes import Outcomes
from tdhook_rl.sweeps.sweep_file import write_sweep
from tests.test_steering_sweep import known


@pytest.mark.parametrize(("spread", "episodes"), [(0.1, 8), (0.1, 64), (0.5, 8), (0.5, 64)])
def test_specificity_covers_or_says_that_controls_are_large_by_chance(spread: float, episodes: int) -> None:
    """Of controls that do little the largest is so by chance, and the figure too low."""
    held, silent = [], []
    for seed in range(80):
        draws = np.random.default_rng(seed)
        slopes = 0.1 * draws.normal(size=6)
        common = draws.normal(size=episodes)
        own = [common + slope + spread * draws.normal(size=episodes) for slope in (0.8, *slopes)]
        conditions = [Condition(), Condition(draw=1), Condition("up", 1.0)]
        conditions += [Condition("up", 1.0, "random", draw) for draw in range(6)]
        values = {"score": torch.from_numpy(np.stack([common, common, *own]))}
        found = SweepResult(conditions=conditions, values=values).specificity("score")
        held.append(0.8 / np.abs(slopes).max() in found)
        silent.append("may be so by chance" not in found.words)
    assert np.mean(np.array(held)[silent]) >= 0.8 if sum(silent) > 20 else np.mean(held) < 0.93


@pytest.mark.parametrize("episodes", [8, 32, 128])
def test_alpha_50_covers(episodes: int) -> None:
    """The truth is a half, on straight lines."""
    found = [known(episodes, seed=seed, spread=0.4).alpha_50("score") for seed in range(100)]
    there = [one for one in found if one.known]
    assert len(there) > 60
    assert 0.88 <= np.mean([0.5 in one for one in there]) <= 1.0
    assert np.mean([one.estimate for one in found]) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("below", [(-0.5,), (-3.0,), (-0.5, -3.0)])
@pytest.mark.parametrize("does", [False, True])
def test_alpha_50_is_of_strengths_above_0_whatever_is_beside(below: tuple[float, ...], does: bool) -> None:
    """A larger strength to the other side does nothing where this one does, or the other way round."""
    above = known(24, effect=0.8 if does else 0.0, seed=1)
    base = above.of("score")
    noise = 0.01 * torch.randn(len(below), 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.stack([base + (0.0 if does else 5.0) + one for one in noise])
    values = {"score": torch.cat([above.values["score"], rows])}
    both = SweepResult(conditions=[*above.conditions, *(Condition("up", one) for one in below)], values=values)
    alone, beside = above.alpha_50("score"), both.alpha_50("score")
    assert beside.known == alone.known == does
    assert beside.estimate == alone.estimate
    assert (beside.low, beside.high) == pytest.approx((alone.low, alone.high), nan_ok=True)


@pytest.mark.parametrize("below", [(), (-1.0,)])
def test_one_strength_says_nothing_of_where_half_is_reached(below: tuple[float, ...]) -> None:
    """A straight line is halfway in its middle: that is no finding, and no interval without a width."""
    draws = torch.Generator().manual_seed(0)
    conditions = [Condition(), Condition(draw=1), *(Condition("up", one) for one in (*below, 0.8))]
    start = torch.rand(24, generator=draws, dtype=torch.float64)
    rows = [start, start, *(start + one + 0.01 * torch.rand(24, generator=draws) for one in (*below, 0.8))]
    found = SweepResult(conditions=conditions, values={"score": torch.stack(rows)})
    assert found.effect("score", alpha=0.8).p < 1e-6
    half = found.alpha_50("score")
    assert not half.known
    assert "one strength above 0" in half.words
    page = sweep_page(found)
    assert "Half of it" not in page.lead
    assert "one strength above 0" in page.html()


@pytest.mark.parametrize("number", [1, 3, 7])
def test_strengths_are_found_by_what_they_are_not_by_their_last_bit(number: int) -> None:
    played = sum([0.1] * number)
    conditions = [Condition(), Condition(draw=1), Condition("up", played), Condition("up", played, "random", 0)]
    values = {"score": torch.arange(8, dtype=torch.float64).reshape(4, 2)}
    found = SweepResult(conditions=conditions, values=values)
    for asked in (played, number / 10):
        assert found.of("score", alpha=asked).tolist() == [4.0, 5.0]
        assert found.of("score", alpha=asked, control="random").tolist() == [6.0, 7.0]
        assert found.row("score", alpha=asked).effect.estimate == 4.0
    with pytest.raises(InputError, match=r"did not play vector 'up' at alpha"):
        found.of("score", alpha=number / 10 + 1e-4)


@pytest.mark.parametrize("runs", [1, 4])
def test_alpha_50_holds_the_strengths_whose_mean_is_not_told_from_half_way(runs: int) -> None:
    found = SweepResult.together([known(12, effect=0.8 + 0.1 * run, seed=run, spread=0.3) for run in range(runs)])
    half, groups = found.alpha_50("score"), None if runs == 1 else found.runs
    ahead = torch.stack([found.of("score", alpha=alpha) for alpha in (0.0, 0.5, 1.0)])
    ahead = ahead - (ahead[0] + ahead[-1]) / 2
    held = []
    for alpha in np.linspace(0, 1, 401):
        lower, share = divmod(2 * alpha, 1) if alpha < 1 else (1, 1.0)
        at = ahead[int(lower)] * (1 - share) + ahead[int(lower) + 1] * share
        held += [alpha] if 0.0 in grouped_mean(at, groups, method="t") else []
    assert half.known
    assert (half.low, half.high) == pytest.approx((min(held), max(held)))


@pytest.mark.parametrize("runs", [1, 3])
def test_saved_sweeps_of_several_runs_have_the_intervals_that_they_had(runs: int, tmp_path: Path) -> None:
    found = SweepResult.together([known(8, effect=0.2 + 0.6 * run, seed=run) for run in range(runs)])
    found.save(tmp_path)
    loaded = SweepResult.load(tmp_path)
    assert loaded.records() == found.records()
    assert loaded.episodes() == found.episodes()
    options = {"alphas": [0.5, 1.0], "episodes": 8}
    with pytest.raises(InputError, match="several runs together"):
        steering_sweep(make_actor(), CueCorners(), {"up": {FC2: torch.ones(64)}}, folder=tmp_path, **options)
    played = torch.ones(len(found.conditions))
    write_sweep(tmp_path / "sweep", found.conditions, found.values, {}, played, torch.arange(3))
    with pytest.raises(ArtifactError, match="which run"):
        SweepResult.load(tmp_path)


@pytest.mark.parametrize("cut", [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.25, 0.75)])
@pytest.mark.parametrize("sizes", [(4, 4), (2, 6)])
def test_several_runs_say_of_themselves_what_holds_of_all(cut: tuple[float, ...], sizes: tuple[int, ...]) -> None:
    facts = [{"max_steps": 9, "seed": run, "unfinished": one, "layout": f"layout {one}"} for run, one in enumerate(cut)]
    parts = [replace(known(size, seed=run), facts=facts[run]) for run, size in enumerate(sizes)]
    both = SweepResult.together(parts)
    of_all = sum(one * size for one, size in zip(cut, sizes, strict=True)) / sum(sizes)
    assert both.facts["unfinished"] == pytest.approx(of_all)
    assert both.facts["max_steps"] == 9
    assert "seed" not in both.facts
    assert ("layout" in both.facts) == (cut[0] == cut[1])
    assert ("all ended" in played_in_words(both)) == (of_all == 0)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda alphas: torch.tensor(alphas).float()])
def test_strengths_are_whatever_holds_numbers(make: Callable[[list[float]], Any]) -> None:
    vector = {"up": {FC2: torch.ones(64)}}
    options = {"controls": 0, "episodes": 2, "max_steps": 2, "outcomes": {"length": "length"}, "progress": False}
    found = steering_sweep(make_actor(), CueCorners(max_steps=2), vector, alphas=make([0.0, 0.5, 1.0]), **options)
    assert found.alphas() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("shape", [[[0, 1], [2]], [[0], [1, 2]], [[0, 1], [2, 3]], [[[0, 1], [2]], [3]]])
@pytest.mark.parametrize("kept", [False, True])
def test_what_is_together_adds_all_of_its_runs(shape: Any, kept: bool, tmp_path: Path) -> None:
    """Runs that were put together before, and kept as such, are no single run; in whatever order and depth."""

    def joined(part: Any) -> SweepResult:
        if isinstance(part, int):
            return replace(known(6 + part, effect=0.3 * part, seed=part), facts={"run": part})
        found = SweepResult.together([joined(one) for one in part])
        if kept:
            found = SweepResult.load(found.save(tmp_path / str(part)).parent)
        return found

    found, flat = joined(shape), joined(sorted(int(one) for one in str(shape) if one.isdigit()))
    assert found.runs is not None
    assert flat.runs is not None
    assert found.runs.tolist() == flat.runs.tolist()
    assert found.records() == flat.records()


NAMES = ["unfinished", "done", "mask", "runs", "outcome", "return", "length", "a/b", "x.y", " "]


@pytest.mark.filterwarnings("ignore:.*did not end")
@pytest.mark.parametrize("how", ["by name", "in a mapping"])
def test_outcomes_have_any_name(how: str, tmp_path: Path) -> None:
    """None is taken for what a sweep keeps of its own, also where it goes on and is read again."""
    made = {name: partial(_steps, times=float(place + 1)) for place, name in enumerate(NAMES)}
    outcomes = made if how == "by name" else lambda episodes: {name: one(episodes) for name, one in made.items()}
    options = {"alphas": [1.0], "controls": 0, "episodes": 3, "max_steps": 4, "progress": False}
    actor, vectors = make_actor(), {"up": {FC2: torch.ones(64)}}
    for folder in (None, tmp_path, tmp_path):
        found = steering_sweep(actor, CueCorners(), vectors, outcomes=outcomes, folder=folder, **options)
        for again in [found] if folder is None else [found, SweepResult.load(folder)]:
            assert again.outcomes == NAMES
            for place, name in enumerate(NAMES):
                assert torch.equal(again.of(name), (place + 1) * again.of("unfinished"))
            assert 0 < again.facts["unfinished"] <= 1
            assert len(again.table()) == len(NAMES)
    found.save(tmp_path / "copy")
    assert SweepResult.load(tmp_path / "copy").outcomes == NAMES
    with pytest.raises(InputError, match=r"does not say which episodes were cut"):
        steering_sweep(actor, CueCorners(), vectors, outcomes=outcomes, folder=tmp_path / "copy", **options)
    with pytest.raises(InputError, match=r"an outcome has no name"):
        steering_sweep(actor, CueCorners(), vectors, outcomes=lambda data: {"": _steps(data, 1.0)}, **options)


def _steps(episodes: TensorDictBase, times: float) -> torch.Tensor:
    return episodes["mask"].sum(-1) * times


KEYS = [
    (["reward"], ["return"]),
    (["reward", "cost"], ["return/reward", "return/cost"]),
    ([("a", "reward"), ("b", "reward")], ["return/a", "return/b"]),
    ([("a", "reward"), ("a", "cost")], ["return/a.reward", "return/a.cost"]),
    ([("a", "reward"), ("a", "cost"), ("b", "reward")], ["return/a.reward", "return/a.cost", "return/b"]),
]


@pytest.mark.parametrize(("keys", "names"), KEYS)
def test_every_reward_has_a_return(keys: list[Any], names: list[str]) -> None:
    """Also those of one group, by what tells them apart."""
    episodes = TensorDict({"mask": torch.ones(2, 3, dtype=torch.bool)}, batch_size=[2, 3])
    for place, key in enumerate(keys):
        episodes["next", *((key,) if isinstance(key, str) else key)] = torch.full((2, 3, 1), float(place + 1))
    found = Outcomes("return", keys).of(episodes)
    assert {name: one.tolist() for name, one in found.items()} == {
        name: [3.0 * (place + 1)] * 2 for place, name in enumerate(names)
    }


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_a_half_way_of_no_width_says_so(spread: float) -> None:
    half = known(8, effect=1.0, seed=0, spread=spread).alpha_50("score")
    assert half.known
    assert ("all 8 groups are alike" in half.words) == (half.low == half.high) == (spread == 0)


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_a_strength_is_found_by_its_number_in_any_dtype(given: torch.dtype) -> None:
    """Of those that are all but equal the nearest; what is in no dtype the same was not played."""
    played = [*torch.linspace(-1, 1, 21, dtype=given).tolist(), 0.3 * (1 + 5e-7)]
    conditions = [Condition(), Condition(draw=1), *(Condition("up", one) for one in played)]
    values = torch.arange(len(conditions), dtype=torch.float64)[:, None].expand(-1, 4)
    found = SweepResult(conditions=conditions, values={"o": values})
    for place, strength in enumerate(played):
        if tenths := round(10 * strength) / 10:
            others = [float(np.float32(strength)), float(np.float32(tenths)), tenths] if place < 21 else []
            for asked in [strength, *others]:
                assert found.of("o", alpha=asked)[0] == place + 2
    for asked in (0.05, 0.1001, 1.00001):
        with pytest.raises(InputError, match=f"did not play vector 'up' at alpha {asked:g}"):
            found.of("o", alpha=asked)


@pytest.mark.parametrize("make", [Tensor.bool, Tensor.int, Tensor.half, Tensor.float, Tensor.numpy, Tensor.tolist])
def test_outcomes_of_any_dtype_are_numbers(make: Callable[[Tensor], Any], tmp_path: Path) -> None:
    conditions = [Condition(), Condition(draw=1), *(Condition("up", one) for one in (0.5, 1.0))]
    conditions += [Condition("up", one, "random", draw) for one in (0.5, 1.0) for draw in range(2)]
    won = (torch.rand(len(conditions), 12, generator=torch.Generator().manual_seed(0)) > 0.4).double()
    won[1] = won[0]
    plain, found = (SweepResult(conditions=conditions, values={"won": one}) for one in (won, make(won)))
    assert found.records() == plain.records()
    assert found.chosen("won") is not None
    assert SweepResult.load(found.save(tmp_path).parent).records() == plain.records()
    for wrong, message in (
        ({"values": {"won": won[0]}}, r"has shape \(12,\): it is \(8, episodes\)"),
        ({"values": {"won": won[:3]}}, r"has shape \(3, 12\)"),
        ({"values": {"won": won, "lost": won[:, :5]}}, r"of as many episodes as the others"),
        ({"values": {"won": won * 1j}}, r"real numbers"),
        ({"values": {"won": won}, "runs": torch.zeros(3)}, r"each of 12 episodes, got \(3,\)"),
    ):
        with pytest.raises(InputError, match=message):
            SweepResult(conditions=conditions, **wrong)

"""What is asked of a buffer and its results, held to loops over rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, MissingKeyError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.replay import analyze, by_feature, episodes, returns, rows_where, smallest_margins
from tdhook_rl.report import player
from tdhook_rl.report.figures import grouped_bars
from tdhook_rl.statistics import grouped_mean

LENGTHS = (4, 1, 7, 5, 3, 6, 4, 2, 5, 3)
ROWS = sum(LENGTHS)


def stream(ends: bool = True) -> TensorDict:
    """Episodes one after the other; the last is cut."""
    gen = torch.Generator().manual_seed(0)
    done = torch.zeros(ROWS, 1, dtype=torch.bool)
    done[torch.tensor(LENGTHS).cumsum(0)[:-1] - 1] = True
    data = TensorDict(
        {
            "observation": torch.randn(ROWS, 3, generator=gen),
            "logits": torch.randn(ROWS, 4, generator=gen),
            "next": {"reward": torch.randn(ROWS, 1, generator=gen)},
        },
        batch_size=ROWS,
    )
    return data.set(("next", "done"), done) if ends else data


def slow_returns(rewards: list[float], lengths: tuple[int, ...], gamma: float) -> list[float]:
    found, at = [], 0
    for length in lengths:
        part = rewards[at : at + length]
        found += [sum(gamma**n * one for n, one in enumerate(part[start:])) for start in range(length)]
        at += length
    return found


def ring(data: TensorDict, size: int = 25) -> tuple[TensorDictReplayBuffer, torch.Tensor]:
    """A buffer that went round, and where each of the rows that are left lies."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(size), batch_size=4)
    for part in data.split(9):
        buffer.extend(part)
    return buffer, torch.arange(ROWS - size, ROWS) % size


def padded(data: TensorDict) -> TensorDict:
    longest = max(LENGTHS)
    parts = []
    for one in data.split(list(LENGTHS)):
        pad = torch.zeros_like(one[:1]).expand(longest - len(one))
        row = torch.cat([one, pad])
        parts.append(row.set("mask", torch.arange(longest) < len(one)))
    return torch.stack(parts)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("kind", ["rows", "pieces", "padded"])
def test_returns(kind: str, gamma: float) -> None:
    data = stream()
    given: Any = {"rows": data, "pieces": [data[:7], data[7:]], "padded": padded(data)}[kind]
    if kind == "pieces":  # trajectories go on over pieces where rows say so
        numbers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
        data["collector", "traj_ids"] = numbers
        given = [data[:7], data[7:]]
    found = returns(given, gamma=gamma, batch_size=8)
    expected = torch.tensor(slow_returns(data["next", "reward"][:, 0].tolist(), LENGTHS, gamma)).double()
    real = found.episode >= 0
    assert int(real.sum()) == ROWS
    assert set(found.episode[~real].tolist()) <= {-1}
    rows = found.rows[real]
    cut = ROWS - LENGTHS[-1]
    torch.testing.assert_close(rows[:cut], expected[:cut], check_dtype=False)
    assert rows[cut:].isnan().all()  # their end is not in the buffer
    assert [len(one.rows) for one in found.episodes] == list(LENGTHS)
    assert [one.ended for one in found.episodes] == [True] * 9 + [False]
    starts = torch.tensor((0, *LENGTHS)).cumsum(0)[:-1]
    torch.testing.assert_close(torch.tensor([one.total for one in found.episodes]).double(), expected[starts])
    whole = [one.total for one in found.episodes if one.whole]
    assert found.mean().estimate == pytest.approx(sum(whole) / 9)
    assert found.mean().groups == 9


@pytest.mark.parametrize("shape", [(12,), (3, 4), (3, 1, 4), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("agents", [1, 2, 3])
def test_rewards_and_ends_of_several_agents(agents: int, shape: tuple[int, ...]) -> None:
    """A step is worth their mean, and an episode ends for all where it does for one, whatever shape entries have."""
    reward = torch.randn(12, agents).double()
    done = torch.zeros(12, agents, dtype=torch.bool)
    ends = torch.arange(12) % shape[-1] == shape[-1] - 1 if len(shape) > 1 else torch.arange(12) % 4 == 3
    done[ends, -1] = True
    rows = TensorDict({"next": {"reward": reward, "done": done}, "logits": torch.randn(12, 2)}, [12]).reshape(shape)
    found = returns(rows, batch_size=5)
    length = int(ends.nonzero()[0]) + 1
    totals = [float(one.sum()) for one in reward.mean(1).split(length)]
    assert [one.total for one in found.episodes] == pytest.approx(totals)
    assert all(one.whole for one in found.episodes)
    margins = rows["logits"].reshape(12, 2).diff(dim=1).abs()[:, 0]
    assert torch.equal(smallest_margins(rows, k=12, batch_size=5)["index"], margins.argsort())


def test_a_ring_that_went_round_cuts_an_episode_at_either_end() -> None:
    data = stream()
    buffer, where = ring(data)
    found = returns(buffer)
    assert found.episodes[0].rows.tolist() == where[: len(found.episodes[0].rows)].tolist()
    assert [one.begun for one in found.episodes] == [False] + [True] * (len(found.episodes) - 1)
    assert [one.ended for one in found.episodes] == [True] * (len(found.episodes) - 1) + [False]
    expected = torch.tensor(slow_returns(data["next", "reward"][:, 0].tolist(), LENGTHS, 1.0)).double()
    kept = found.rows[where]
    torch.testing.assert_close(kept[:-3], expected[ROWS - 25 : -3])
    # What is not whole is not ranked.
    assert all(one.whole for one in episodes(buffer, k=20))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_margins_are_told_apart_as_finely_as_they_are_stored(dtype: torch.dtype) -> None:
    steps = torch.tensor([3, 1, 4, 2, 5])
    resolution = 1 if dtype == torch.int64 else torch.finfo(dtype).eps
    first = torch.ones(5, dtype=torch.float64)
    rows = TensorDict({"logits": torch.stack([first, first + steps * resolution], 1).to(dtype)}, 5)
    found = smallest_margins(rows, k=5, batch_size=2)
    assert found["index"].tolist() == steps.argsort().tolist()
    assert found["margin"].double().tolist() == (steps.sort().values * resolution).tolist()


@pytest.mark.parametrize("order", ["worst", "best"])
def test_episodes_with_their_rows_and_results(order: str) -> None:
    data = stream()
    attr = torch.arange(ROWS * 3.0).reshape(ROWS, 3)
    results = TensorDict({"attr": {"observation": attr}, "computed": {"attr": torch.ones(ROWS).bool()}}, ROWS)
    some = results[10:].copy().set("index", torch.arange(10, ROWS))
    totals = sorted((one.total for one in returns(data).episodes if one.whole), reverse=order == "best")
    for given in (results, some):
        found = episodes(data, given, order=order, k=3)
        assert [one.total for one in found] == totals[:3]
        for one in found:
            assert torch.equal(one.data["observation"], data["observation"][one.rows])
            known = one.rows >= (10 if given is some else 0)
            assert torch.equal(one.data["attr", "observation"][known], attr[one.rows[known]])
            assert one.data["attr", "observation"][~known].isnan().all()
            assert torch.equal(one.data["computed", "attr"], known)


@pytest.mark.parametrize("order", ["worst", "best"])
@pytest.mark.parametrize("place", range(len(LENGTHS) - 1))
def test_a_return_that_is_no_number_has_no_place(place: int, order: Any) -> None:
    """Wherever it lies among the others, these are ranked as without it."""
    data = stream()
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    data["next", "reward"][starts[place]] = torch.nan
    known = [one.total for one in returns(data).episodes if one.whole and one.number != place]
    with pytest.warns(UserWarning, match="1 of 9 episodes have a reward that is NaN: they are not ranked"):
        found = episodes(data, order=order, k=100)
    assert [one.total for one in found] == sorted(known, reverse=order == "best")
    data["next", "reward"][:] = torch.nan
    with pytest.raises(InputError, match="no return of 9 episodes is a number"):
        episodes(data)


@pytest.mark.parametrize("kind", ["rows", "padded"])
def test_rows_of_which_something_is_true(kind: str) -> None:
    data = stream()
    given = padded(data) if kind == "padded" else data
    found = rows_where(given, lambda rows: rows["observation"][:, 0] > 0.5, batch_size=8)
    assert torch.equal(found["observation"], data["observation"][data["observation"][:, 0] > 0.5])
    assert len(rows_where(given, lambda rows: rows["observation"][:, 0] > 0.5, most=3, batch_size=8)) == 3
    assert len(rows_where(given, lambda rows: rows["observation"][:, 0] > 99)) == 0


def test_results_are_seen_by_what_is_asked() -> None:
    data, attr = stream(), torch.randn(ROWS, 3)
    results = TensorDict({"attr": {"observation": attr}}, ROWS)
    found = rows_where(data, lambda rows: rows["attr", "observation"][:, 1] > 1, results)
    assert torch.equal(found["index"], (attr[:, 1] > 1).nonzero().flatten())


#: What policies put out (entry, shape), the action beside it, and whether it has a number for each choice.
PUT_OUT: dict[str, tuple[str, tuple[int, ...], torch.Tensor, bool]] = {
    "index": ("logits", (4,), torch.randint(0, 4, (6,)), True),
    "index in a dimension": ("action_value", (4,), torch.randint(0, 4, (6, 1)), True),
    "one-hot": ("logits", (4,), torch.eye(4)[torch.randint(0, 4, (6,))], True),
    "several decisions": ("logits", (3, 4), torch.randint(0, 4, (6, 3)), True),
    "atoms": ("action_value", (5, 4), torch.randint(0, 4, (6,)), False),
    "atoms, one-hot": ("action_value", (5, 4), torch.eye(4, dtype=torch.long)[torch.randint(0, 4, (6,))], False),
    "several choices": ("logits", (6,), torch.randint(0, 2, (6, 3)), False),
    "parts of a mixture": ("logits", (3,), torch.randn(6, 2), False),
    "several choices, one-hot": ("action_value", (5,), torch.tensor([[0, 1, 0, 1, 0]] * 6), False),
    "bits": ("logits", (3,), torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]] * 2), False),
    "one-hot, padded": ("logits", (3,), torch.tensor([[0, 0, 0], [0, 0, 1], [1, 0, 0]] * 2), True),
    "as many parts as actions": ("logits", (2,), torch.randn(6, 2), False),
}


@pytest.mark.parametrize("kind", PUT_OUT)
def test_margins_are_of_the_choices_that_actions_are_of(kind: str) -> None:
    key, shape, action, fits = PUT_OUT[kind]
    rows = TensorDict({key: torch.randn(6, *shape), "action": action}, 6)
    if not fits:
        with pytest.raises(InputError, match=r"no number for each choice.*name it by key="):
            smallest_margins(rows)
    two = rows[key].topk(2, -1).values
    margins = (two[..., 0] - two[..., 1]).reshape(6, -1).amin(1)
    named = smallest_margins(rows, k=6, key=key)
    assert torch.equal(named["index"], margins.argsort())
    if fits:
        assert torch.equal(smallest_margins(rows, k=6)["index"], named["index"])


def test_smallest_margins() -> None:
    data = stream()
    two = data["logits"].topk(2, -1).values
    order = (two[:, 0] - two[:, 1]).argsort()[:5]
    found = smallest_margins(data, k=5, batch_size=7)
    assert torch.equal(found["index"], order)
    assert found["margin"].tolist() == sorted(found["margin"].tolist())
    elsewhere = TensorDict({"cache": {"head": data["logits"]}}, ROWS)
    again = smallest_margins(data.exclude("logits"), elsewhere, k=5, key=("cache", "head"))
    assert torch.equal(again["index"], order)
    assert smallest_margins(data, k=100)["index"].unique().numel() == ROWS
    # What the policy thought then, if the results say something else.
    otherwise = TensorDict({"logits": data["logits"].flip(0)}, ROWS)
    assert torch.equal(smallest_margins(data, otherwise, k=5)["index"], order)
    single = data.copy().set("logits", data["logits"][:, None])  # of a group of one agent
    assert torch.equal(smallest_margins(single, k=5)["index"], order)


@pytest.mark.parametrize("allowed", [None, "action_mask"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8, torch.int64], ids=str)
def test_a_mask_of_actions_may_be_of_ones(dtype: torch.dtype, allowed: str | None) -> None:
    """As Gymnasium has it: what is closed takes no part."""
    data = stream()
    mask = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    two = data["logits"].masked_fill(~mask, -torch.inf).topk(2, -1).values
    margin = two[:, 0] - two[:, 1]
    found = smallest_margins(data.set("action_mask", mask.to(dtype)), k=ROWS, allowed=allowed)
    assert found["index"].tolist() == margin.argsort(stable=True)[: int(margin.isfinite().sum())].tolist()
    assert torch.equal(found["margin"], margin[found["index"]])


@pytest.mark.parametrize("batch_size", [7, 10_000])
def test_of_margins_that_are_the_same_the_first(batch_size: int) -> None:
    values = torch.tensor([0.5, 0.25]).repeat(500)
    rows = TensorDict({"logits": torch.stack([values, torch.zeros(1000)], 1)}, [1000])
    assert smallest_margins(rows, k=20, batch_size=batch_size)["index"].tolist() == list(range(1, 41, 2))


@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("kind", ["rows", "padded"])
def test_attribution_by_feature(kind: str, some: bool) -> None:
    data = stream()
    numbers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    attr, computed = torch.randn(ROWS, 3), torch.rand(ROWS) > 0.2
    attr[~computed] = float("nan")
    rows = data.copy().set(("attr", "observation"), attr).set(("computed", "attr"), computed)
    given = padded(rows) if kind == "padded" else rows
    results = given.select(("attr", "observation"), ("computed", "attr"))
    entries = torch.arange(len(given))
    if some:
        entries = entries[1::2]
        index = entries.reshape(-1, *[1] * (given.ndim - 1)).expand(given[1::2].batch_size)
        results = results[1::2].copy().set("index", index)
    seen = torch.zeros(ROWS, dtype=torch.bool)
    seen[torch.isin(numbers if kind == "padded" else torch.arange(ROWS), entries)] = True
    able = computed & seen
    found = by_feature(results, given, names=["a", "b", "c"])
    for number, name in enumerate("abc"):
        expected = grouped_mean(attr[able, number].abs(), numbers[able])
        assert found[name]["attr.observation"] == expected
    positive = by_feature(results, given, where=lambda rows: rows["observation"][:, 0] > 0)
    able &= data["observation"][:, 0] > 0
    assert positive["1"]["attr.observation"] == grouped_mean(attr[able, 1].abs(), numbers[able])


def test_padding_is_no_attribution() -> None:
    """Though results of all methods are not masked."""
    attr = torch.rand(ROWS, 3) + 1
    found = padded(stream().set(("attr", "observation"), attr))
    found["attr", "observation"][~found["mask"]] = 1e6
    means = by_feature(found.select(("attr", "observation")), found.exclude("attr"))
    for feature in range(3):
        one = means[str(feature)]["attr.observation"]
        assert (one.rows, one.groups) == (ROWS, len(LENGTHS))
        assert one.estimate == pytest.approx(float(attr[:, feature].mean()), abs=1e-5)


@pytest.mark.parametrize(("groups", "method"), [(200, "auto"), (201, "t"), (300, "t")])
def test_the_interval_of_many_episodes_is_that_of_t(groups: int, method: Any) -> None:
    episode, value = torch.arange(2 * groups) // 2, torch.rand(2 * groups, 1)
    rows = TensorDict({"next": {"done": (torch.arange(2 * groups) % 2 == 1)[:, None]}}, [2 * groups])
    found = by_feature(TensorDict({"attr": {"x": value}}, [2 * groups]), rows)["0"]["attr.x"]
    assert found == grouped_mean(value[:, 0], episode, method=method)
    assert grouped_mean(value[:, 0], episode, method="auto") != grouped_mean(value[:, 0], episode, method="t")


def test_what_figures_and_the_player_take(tmp_path: Path) -> None:
    actor, env = make_actor(), CueCorners(batch_size=[4], seed=0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(160), batch_size=4)
    buffer.extend(env.rollout(40, actor, break_when_any_done=False).reshape(-1).detach())
    with Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit())).prepare(actor) as policy:
        analyze(policy, buffer, tmp_path / "results", rows=slice(100), progress=False)
        worst = episodes(buffer, tmp_path / "results", k=2)
        shown = player([one.data for one in worst], policy=policy, env=CueCorners(batch_size=[1]))
    assert "data-player" in shown.fragment()
    means = by_feature(tmp_path / "results", buffer)
    assert len(means) == 90
    drawing = grouped_bars(means, unit="mean |attribution|", of="episodes")
    assert "attr.observation" in drawing.alt.lower()


# ------------------------------------------------------------------ what cannot be answered

RESULTS = TensorDict({"attr": {"observation": torch.zeros(ROWS, 3)}, "cache": {"0": torch.zeros(ROWS, 2)}}, ROWS)

WRONG: dict[str, tuple[Callable[[TensorDict], Any], type[Exception], str]] = {
    "no ends": (lambda data: returns(stream(ends=False)), InputError, "returns reads rows of one trajectory, and no"),
    "no ends in trajectories": (lambda data: returns(stream(ends=False).reshape(5, 8)), InputError, "no entry says"),
    "no rewards": (lambda data: returns(data.exclude(("next", "reward"))), MissingKeyError, r"\('next', 'reward'\)"),
    "another reward": (lambda data: returns(data, reward=("next", "rewards")), MissingKeyError, "nearest"),
    "no discount": (lambda data: returns(data, gamma=1.5), InputError, "between 0 and 1"),
    "no episodes": (lambda data: episodes(data, k=0), InputError, "k= is a positive integer, got 0"),
    "no margins": (lambda data: smallest_margins(data, k=0), InputError, "k= is a positive integer, got 0"),
    "no rows": (lambda data: rows_where(data, lambda rows: rows["done"], most=-1), InputError, "most= is a positive"),
    "nothing whole": (lambda data: returns(data[:2]).mean(), InputError, "none of 1 episodes"),
    "results of others": (lambda data: episodes(data[:20], RESULTS), InputError, "the results are of 40 entries"),
    "fewer results": (lambda data: episodes(data, RESULTS[:20]), InputError, "the results are of 20 entries"),
    "other rows": (lambda data: by_feature(RESULTS, data.reshape(8, 5)), InputError, "of 1 rows each"),
    "no logits": (lambda data: smallest_margins(data.exclude("logits")), MissingKeyError, "'action_value' or 'logits'"),
    "one action": (lambda data: smallest_margins(data, key=("next", "reward")), InputError, r"\(40, 1\)"),
    "no attribution": (lambda data: by_feature(RESULTS.select("cache"), data), MissingKeyError, "no attribution, only"),
    "another key": (lambda data: by_feature(RESULTS, data, key=("attr", "x")), MissingKeyError, "have no"),
    "other names": (lambda data: by_feature(RESULTS, data, names=["a"]), InputError, "3 features: one each"),
    "no row": (lambda data: by_feature(RESULTS, data, where=lambda rows: rows["observation"][:, 0] > 99),
               InputError, "no row is left"),
    "no truth": (lambda data: rows_where(data, lambda rows: rows["observation"]), InputError, "truth value for each"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_questions(kind: str) -> None:
    ask, error, message = WRONG[kind]
    with pytest.raises(error, match=message):
        ask(stream())


def test_where_no_episode_is_whole() -> None:
    with pytest.warns(UserWarning, match="none of 1 episodes is whole"):
        assert [len(one.rows) for one in episodes(stream()[:2], k=3)] == [2]

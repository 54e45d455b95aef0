"""What a probe is asked of the future: rows wait for their trajectory, however batches are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tdhook_rl.errors import MissingKeyError
from tdhook_rl.probes.board import CLASSES
from tdhook_rl.replay import probe_grid
from tdhook_rl.rollout import EPISODE, Future, GroupSplit, Return
from tests.walks import Walks, net, suite, sums


@pytest.mark.parametrize("cuts", [[60], [1] * 60, [7, 1, 20, 3, 29]], ids=["one batch", "step by step", "cut"])
@pytest.mark.parametrize("counted", [True, False], ids=["with step counts", "without"])
def test_futures_go_on_across_batches(cuts: list[int], counted: bool) -> None:
    """However the steps are cut into batches, each row gets what came later in its own trajectory."""
    steps, envs, ahead, gamma = 60, 5, 4, 0.9
    whole = Walks(envs, seed=2).batch(steps, counted)
    number, value, reward = (whole[key].reshape(envs, steps) for key in (EPISODE, "value", ("next", "reward")))
    label, known = torch.zeros_like(value), torch.zeros_like(value, dtype=torch.bool)
    returns, ended = torch.zeros(envs, steps).double(), torch.zeros_like(known)
    for env in range(envs):
        for step in range(steps):
            if step + ahead < steps and number[env, step + ahead] == number[env, step]:
                label[env, step], known[env, step] = value[env, step + ahead], True
            rest = (number[env] == number[env, step]).nonzero().squeeze(-1)
            rest = rest[rest >= step]
            ended[env, step] = bool(whole["next", "done"][env, rest[-1]])
            returns[env, step] = sum(gamma**k * float(reward[env, one]) for k, one in enumerate(rest.tolist()))
    policy = net()
    one = suite(policy, {"later": Future("value", ahead), "return": Return(gamma=gamma)})
    start = 0
    for cut in cuts:
        counts = one.update(whole[:, start : start + cut])
        start += cut
    flat = whole.reshape(-1).set("label", label.reshape(-1)).set("sum", returns.reshape(-1))
    by_hand, sums_by_hand = suite(policy, {"later": "label"}), suite(policy, {"return": "sum"})
    by_hand.update(flat[known.reshape(-1)])
    sums_by_hand.update(flat[ended.reshape(-1)])
    torch.testing.assert_close(sums(one, "later"), sums(by_hand, CLASSES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums(one, "return"), sums(sums_by_hand, "return"), rtol=1e-4, atol=1e-5)
    assert one._later is not None
    assert one._later.left_out == {"later": int((ended & ~known).sum()), "return": 0}
    assert counts["waiting"] == int((~ended).sum())
    assert one.table()["module.1", "later"].left_out == int((ended & ~known).sum())


def test_rows_that_are_missing_cut_a_trajectory_where_steps_are_counted() -> None:
    data = Walks(8, length=1000).batch(30, counted=True)
    one = suite(net(), {"later": Future("value", 2)})
    one.update(data[:, :10])
    one.update(data[:, 20:])
    assert one._later is not None
    assert one._later.left_out["later"] == 8 * 2  # the two rows before the gap


@pytest.mark.parametrize("gaps", [[(10, 20)], [(1, 2), (3, 9), (40, 41)], [(0, 5), (50, 60)]], ids=str)
@pytest.mark.parametrize("length", [3, 11, 100])
def test_returns_over_rows_that_are_missing_are_not_known(length: int, gaps: list[tuple[int, int]]) -> None:
    """A sum that lacks rewards is no return: of batches that were left out, as of a buffer with holes."""
    steps, envs = 60, 6
    data = Walks(envs, length=length).batch(steps, counted=True)
    data["row"] = torch.arange(envs * steps).reshape(envs, steps)
    given = torch.ones(steps, dtype=torch.bool)
    for start, stop in gaps:
        given[start:stop] = False
    left = given.nonzero().squeeze(-1)
    parts = [data[:, piece] for piece in left.split([1] * len(left))]
    known, label = torch.zeros(envs, steps, dtype=torch.bool), torch.zeros(envs, steps).double()
    for env in range(envs):
        for step in left.tolist():
            rest = step
            while rest < steps and given[rest]:
                label[env, step] += float(data["next", "reward"][env, rest])
                if bool(data["next", "done"][env, rest]):
                    known[env, step] = True
                    break
                rest += 1
    flat = data.reshape(-1).set("sum", label.reshape(-1))
    policy = net()
    one, by_hand = suite(policy, {"return": Return()}), suite(policy, {"return": "sum"})
    for part in parts:
        one.update(part)
    found = [cell.left_out for cell in probe_grid(policy, torch.cat(parts, 1), sites="module.1", untrained=False,
                                                  concepts={"return": Return()})]  # fmt: skip
    assert found == [envs * len(left) - int(known.sum())]
    if bool(known.any()):
        by_hand.update(flat[known.reshape(-1)])
        torch.testing.assert_close(sums(one, "return"), sums(by_hand, "return"), rtol=1e-4, atol=1e-5)
    assert one._later is not None
    assert one._later.left_out["return"] + len(one._later) == envs * len(left) - int(known.sum())


def test_so_many_rows_wait_and_the_oldest_are_left_out() -> None:
    data = Walks(4, length=10_000).batch(60)
    one = suite(net(), {"return": Return()}, most_waiting=100)
    for start in range(0, 60, 20):
        counts = one.update(data[:, start : start + 20])
    assert counts["waiting"] == 100
    assert one._later is not None
    assert one._later.left_out["return"] == 140
    assert int(one._later._rows["arrived"].min()) == 140


@pytest.mark.parametrize("key", [EPISODE, ("next", "done")])
def test_a_future_needs_to_know_which_rows_follow(key: Any) -> None:
    data = Walks(4).batch(10).exclude(key)
    with pytest.raises(MissingKeyError, match="a future is asked for, and nothing says"):
        suite(net(), {"later": Future("value", 2)}, split=GroupSplit("value")).update(data)


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_shuffled_labels_are_drawn_from_enough_rows_however_small_the_first_batch(cut: int) -> None:
    """A first batch in which no future is known yet, or one of a single row, decides nothing."""
    data = Walks(40, length=13).batch(60)
    one = suite(net(), {"later": Future("value", 2), "return": Return(gamma=0.9), "value": "value"})
    for start in range(0, 60, cut):
        one.update(data[:, start : start + cut])
    for cell in one.table():
        assert cell.shuffled is not None
        assert cell.shuffled.known, cell.concept
        assert cell.selectivity is not None
        assert cell.selectivity.known
        seen = one._board._groups[CLASSES if cell.concept == "value" else cell.concept].columns[0].seen
        assert len(seen.unique()) > 2
        assert len(seen) >= 1000


def test_sums_of_suites_count_what_waited_and_share_nothing() -> None:
    ones = [suite(net(), {"return": Return(), "later": Future("value", 2), "value": "value"}) for _ in range(2)]
    for seed, one in enumerate(ones):
        one.update(Walks(4, seed=seed, length=1000).batch(5))
    before = [sums(one, CLASSES)["weight"].clone() for one in ones]
    merged = ones[0] + ones[1]
    assert merged._later is not None
    assert merged._later.left_out == {"return": 40, "later": 16}
    merged.update(Walks(16, seed=5).batch(20))
    for one, weight in zip(ones, before, strict=True):
        assert torch.equal(sums(one, CLASSES)["weight"], weight)
        assert one._later is not None
        assert len(one._later) == 20
        assert one._later.left_out == {"return": 0, "later": 0}
    empty = suite(net(), {"return": Return(), "later": Future("value", 2), "value": "value"})
    grown = empty + ones[0]
    grown.update(Walks(16, seed=5).batch(20))
    assert torch.equal(sums(ones[0], CLASSES)["weight"], before[0])

"""Schedules keep the keys and leave out rows; the record says what was in force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer

from tdhook_rl import (
    ActivationCaching,
    Compose,
    ControlRecord,
    LinearProbe,
    ProbeReadout,
    Saliency,
    Scheduled,
    SteeringVectors,
)
from tdhook_rl.attribution import IntegratedGradients, Occlusion
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, KeyCollisionError, MissingKeyError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent import ActivationAddition
from tdhook_rl.replay import analyze
from tdhook_rl.scheduled import TAKEN_OVER
from tests.method_table import SAMPLES
from tests.policies import CASES, categorical

SITE = CASES["categorical"].site
METHODS = {
    "saliency": lambda when: Saliency(when=when),
    "latent": lambda when: Saliency(when=when, input_modules=[SITE]),
    "integrated_gradients": lambda when: IntegratedGradients(when=when, baseline=0.0, n_steps=4),
    "occlusion": lambda when: Occlusion(when=when),
    "caching": lambda when: ActivationCaching(SITE),
}


def results_of(hooked) -> list:
    return [key for key in hooked.result_keys if key[0] != "computed"]


def check(found: TensorDict, whole: TensorDict, keys: list, rows: torch.Tensor) -> None:
    """Computed rows are those of the whole batch; the others are NaN, and the mask says which."""
    for key in keys:
        assert torch.equal(found["computed", key[0]], rows)
        assert found[key].shape == whole[key].shape
        torch.testing.assert_close(found[key][rows], whole[key][rows])
        assert bool(found[key][~rows].isnan().all())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("batch", [(7,), (3, 4)])
def test_a_row_mask(name: str, when: str, batch: tuple[int, ...]) -> None:
    actor = categorical()
    data = CASES["categorical"].data(*batch)
    rows = torch.rand(batch) < 0.4
    data["hard"] = rows
    torch.manual_seed(1)
    with METHODS[name](when).prepare(actor) as hooked:
        whole = hooked.annotate(hooked(data.clone())).detach()
        keys = results_of(hooked)
    torch.manual_seed(1)
    with Scheduled(METHODS[name](when), where="hard").prepare(actor) as hooked:
        found = hooked(data.clone()).detach()
        assert torch.equal(found["action"], whole["action"])
        found = found if when == "step" else hooked.annotate(found, chunk_size=3)
        assert results_of(hooked) == keys
    check(found, whole, keys, rows)


#: What a schedule answers by itself: it reads its mask too, plans, speaks for its root alone, and picks rows, for which
#: no pass is shared. What explains inputs, and what is compiled, is asked of the method that it holds.
OWN = {"reads", "plan", "exclusive", "bound", "method_name", "shares_forward", "shares_pass", "linear", "declared",
       "compiled"}  # fmt: skip


def test_a_scheduled_method_is_asked_for_as_it_is_by_itself() -> None:
    assert set(BoundMethod.__annotations__) == {"result_keys", *TAKEN_OVER, *OWN}
    case, seen = CASES["categorical"], set()
    for name, sample in SAMPLES.items():
        method = sample.make(case)
        if isinstance(method, Scheduled) or not method.observes or len(method._methods()) != 1:
            continue
        with method.prepare(case.build()) as alone:
            one = next(iter(alone._hooked.bound), None)
        if one is None or not one.result_keys:
            continue
        with Scheduled(method, every=2).prepare(case.build()) as hooked:
            (scheduled,) = hooked._hooked.bound
            for key in ("result_keys", *TAKEN_OVER):
                own, theirs = getattr(scheduled, key), getattr(one, key)
                # A store is of each preparation its own.
                assert (type(own) is type(theirs)) if key in ("store", "last") else (own == theirs), (name, key)
            seen |= {key for key in TAKEN_OVER if getattr(one, key)}
    assert seen >= {"reads_forward", "replays", "whole_batch", "last"}


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("kind", [Saliency, IntegratedGradients])
def test_a_scheduled_method_is_compiled_where_it_is_told_to(kind: Any, when: str) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    options = {"when": when} if kind is Saliency else {"when": when, "baseline": 0.0}
    net, data = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        TensorDict({"input": torch.randn(6, 3)}, [6]),
    )
    plain, compiled = kind(**options), kind(**options, compile={"backend": backend})
    found = []
    for method in (plain, compiled):
        with Scheduled(method, fraction=0.5).prepare(net) as hooked:
            found.append(hooked(data.clone()) if when == "step" else hooked.annotate(data))
    assert graphs
    torch.testing.assert_close(found[1]["attr", "input"], found[0]["attr", "input"], equal_nan=True)


@pytest.mark.parametrize("caller", [True, False])
def test_the_cache_of_what_is_scheduled_is_that_of_its_last_call(caller: bool) -> None:
    net, cache = nn.Sequential(nn.Linear(3, 2)), TensorDict() if caller else None
    rows = [TensorDict({"input": torch.randn(4, 3)}, [4]) for _ in range(3)]
    with Scheduled(ActivationCaching("0", cache=cache), every=2).prepare(net) as hooked:
        for data, computed in zip(rows, (rows[0], rows[0], rows[2]), strict=True):
            hooked(data.clone())
            assert torch.equal(hooked.hooking_context.cache["0"], net(computed["input"]))


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_scheduled_mean_is_over_all_rows_that_are_chosen(chunk_size: int | None, tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(20, 3)
    data = TensorDict({"input": x, "positive": {"input": x}, "negative": {"input": 2 * x}}, [20])
    data["hard"] = torch.arange(20) % 3 == 0
    with Scheduled(ActivationAddition(["0"]), where="hard").prepare(net) as hooked:
        found = hooked.annotate(data, chunk_size=chunk_size)["steer", "0"]
        with pytest.raises(InputError, match=r"the results of Scheduled \(.*'steer'.*\) are of all rows of a batch"):
            analyze(hooked, data, tmp_path, batch_size=4)
    expected = (net(x[::3]) - net(2 * x[::3])).mean(0).expand(7, 2)
    torch.testing.assert_close(found[::3], expected)


def test_a_scheduled_record_is_not_made_up_afterwards() -> None:
    """What was in force in a forward that no policy of this kind has made is not known."""
    record = Scheduled(ControlRecord(), where="hard")
    data = TensorDict({"input": torch.randn(4, 3), "hard": torch.tensor([True, False, True, True])}, [4])
    with Compose(SteeringVectors({"0": torch.ones(2)}), record).prepare(nn.Sequential(nn.Linear(3, 2))) as hooked:
        stored = hooked(data.clone())
        hooked.controls["steering.alpha"] = 2.0
        kept = hooked.annotate(stored)["control", "steering.alpha"]
        assert torch.equal(kept[data["hard"]], torch.ones(3))
        assert "control" not in hooked.annotate(data)


@pytest.mark.parametrize("name", METHODS)
def test_no_row_at_all_has_the_same_keys_and_shapes(name: str) -> None:
    actor = categorical()
    data = CASES["categorical"].data(5).set("hard", torch.zeros(5, dtype=torch.bool))
    with Scheduled(METHODS[name]("step"), where="hard").prepare(actor) as hooked:
        first, second = hooked(data.clone()), hooked(data.clone())
        for key in results_of(hooked):
            assert bool(first[key].isnan().all())
            assert first[key].shape == second[key].shape
            assert first[key].dtype == second[key].dtype
            assert not bool(first["computed", key[0]].any())


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
def test_every_so_many_forwards(batch: tuple[int, ...]) -> None:
    actor = categorical()
    with Scheduled(Saliency(when="step"), every=3).prepare(actor) as hooked:
        found = [hooked(CASES["categorical"].data(*batch)) for _ in range(7)]
    computed = [bool(one["computed", "attr"].all()) for one in found]
    assert computed == [True, False, False, True, False, False, True]
    for one, real in zip(found, computed, strict=True):
        assert one["computed", "attr"].shape == batch
        assert bool(one["attr", "observation"].isnan().all()) is not real
        assert bool(one["attr", "observation"].isnan().any()) is not real


def test_every_so_many_batches_counts_batches_and_not_chunks() -> None:
    actor = categorical()
    data = actor(CASES["categorical"].data(8)).detach()
    with Scheduled(Saliency(), every=2).prepare(actor) as hooked:
        found = [hooked.annotate(data, chunk_size=3) for _ in range(4)]
    assert [int(one["computed", "attr"].sum()) for one in found] == [8, 0, 8, 0]


@pytest.mark.parametrize("when", ["step", "batch"])
def test_a_fraction_of_the_rows_is_drawn_anew_and_leaves_the_generators_alone(when: str) -> None:
    actor = categorical()
    data = CASES["categorical"].data(4, 10)
    masks = []
    with Scheduled(Saliency(when=when), fraction=0.25, seed=3).prepare(actor) as hooked:
        for _ in range(3):
            acted = hooked(data.clone()).detach()
            state = torch.get_rng_state()
            found = acted if when == "step" else hooked.annotate(acted)
            assert torch.equal(torch.get_rng_state(), state)
            masks.append(found["computed", "attr"])
    assert [int(mask.sum()) for mask in masks] == [10, 10, 10]
    assert not torch.equal(masks[0], masks[1])
    with Scheduled(Saliency(when=when), fraction=0.25, seed=3).prepare(actor) as hooked:
        acted = hooked(data.clone()).detach()
        again = acted if when == "step" else hooked.annotate(acted)
    assert torch.equal(again["computed", "attr"], masks[0])


def test_schedules_combine() -> None:
    actor = categorical()
    data = CASES["categorical"].data(10).set("hard", torch.arange(10) < 4)
    with Scheduled(Saliency(when="step"), every=2, fraction=0.5, where="hard").prepare(actor) as hooked:
        found = [hooked(data.clone())["computed", "attr"] for _ in range(2)]
    assert [int(mask.sum()) for mask in found] == [2, 0]
    assert not bool(found[0][4:].any())


def test_what_a_schedule_left_out_is_not_computed_behind_its_back() -> None:
    actor = categorical()
    data = CASES["categorical"].data(10)
    with Scheduled(Saliency(when="step"), fraction=0.3).prepare(actor) as hooked:
        acted = hooked(data).detach()
        again = hooked.annotate(acted)
    torch.testing.assert_close(again["attr", "observation"], acted["attr", "observation"], equal_nan=True)


@pytest.mark.parametrize("buffer", [False, True])
def test_in_collectors_every_step_has_the_keys(buffer: bool) -> None:
    actor = make_actor()
    method = Compose(Scheduled(Saliency(when="step"), every=4), ActivationCaching(FC2))
    with method.prepare(actor) as policy:
        storage = ReplayBuffer(storage=LazyTensorStorage(200), batch_size=8) if buffer else None
        collector = Collector(
            CueCorners(batch_size=[4], seed=0),
            policy,
            frames_per_batch=40,
            total_frames=80,
            replay_buffer=storage,
            auto_register_policy_transforms=False,
        )
        batches = [data.clone() if data is not None else None for data in collector]
        collector.shutdown()
    data = storage[:] if buffer else torch.cat(batches, -1)
    mask = data["computed", "attr"]
    assert mask.numel() == 80
    assert int(mask.sum()) == 20
    assert torch.equal(mask, ~data["attr", "observation"].isnan().any(-1))
    assert bool(data["computed", "cache"].all())


def test_it_travels_to_workers() -> None:
    with Scheduled(Saliency(when="step"), every=4).prepare(make_actor()) as policy:
        collector = MultiSyncCollector(
            [lambda: CueCorners(batch_size=[2])] * 2, policy, frames_per_batch=32, total_frames=32, cat_results="stack"
        )
        masks = next(iter(collector))["computed", "attr"].clone()
        collector.shutdown()
    assert int(masks.sum()) == masks.numel() // 4


def test_a_schedule_that_never_fires_is_reported() -> None:
    data = CASES["categorical"].data(2).set("hard", torch.zeros(2, dtype=torch.bool))
    with Scheduled(Saliency(when="step"), where="hard").prepare(categorical()) as hooked:
        for _ in range(99):
            hooked(data.clone())
        with pytest.warns(UserWarning, match=r"Saliency .*'hard'.* no row in 100 calls"):
            hooked(data.clone())


def test_bad_schedules_say_so() -> None:
    for options, message in (
        ({"every": 0}, "every= is a positive"),
        ({"every": 2.0}, "every= is a positive"),
        ({"fraction": 0.0}, "fraction= is above 0"),
        ({"fraction": 1.5}, "fraction= is above 0"),
        ({}, "leaves nothing out"),
    ):
        with pytest.raises(InputError, match=message):
            Scheduled(Saliency(), **options)
    with pytest.raises(InputError, match="takes one method"):
        Scheduled(Compose(Saliency(), ActivationCaching(SITE)), every=2)
    with pytest.raises(InputError, match="writes no results"):
        Scheduled(SteeringVectors({SITE: torch.ones(16)}), every=2).prepare(categorical()).__enter__()
    both = Compose(Scheduled(Saliency(), every=2), Saliency(target={"other": lambda run: run.outputs["logits"]}))
    with pytest.raises(KeyCollisionError, match="cannot speak for both"):
        both.prepare(categorical()).__enter__()
    with Scheduled(Saliency(when="step"), where="hard").prepare(categorical()) as hooked:
        with pytest.raises(MissingKeyError, match="'hard'"):
            hooked(CASES["categorical"].data(3))
        with pytest.raises(InputError, match="must be boolean"):
            hooked(CASES["categorical"].data(3).set("hard", torch.ones(3)))
        with pytest.raises(InputError, match="one value for each row"):
            hooked(CASES["categorical"].data(3).set("hard", torch.ones(3, 2, dtype=torch.bool)))


def record_method() -> Compose:
    probe = LinearProbe(weight=torch.zeros(2, 64), bias=torch.zeros(2), path=FC2)
    return Compose(SteeringVectors({FC2: torch.randn(64)}, alpha=0.0), ProbeReadout({"xor": probe}), ControlRecord())


def test_the_record_follows_the_controls() -> None:
    with record_method().prepare(make_actor()) as policy:
        env = CueCorners(batch_size=[3], seed=0)
        first = env.rollout(2, policy, break_when_any_done=False)
        policy.controls["steering.alpha"] = 0.5
        policy.controls["probe.xor.bias"] = torch.ones(2)
        policy.controls["probe.xor.bias"] = torch.ones(2)
        second = env.rollout(2, policy, break_when_any_done=False)
    assert first["control", "steering.alpha"].shape == (3, 2)
    assert bool((first["control", "steering.alpha"] == 0).all())
    assert bool((second["control", "steering.alpha"] == 0.5).all())
    assert bool((first["control", "probe.xor.bias"] == 0).all())
    assert bool((second["control", "probe.xor.bias"] == 2).all())
    assert bool((second["control", "probe.xor.weight"] == 0).all())


def test_the_record_in_running_workers_shows_which_rows_were_steered() -> None:
    with record_method().prepare(make_actor()) as policy:
        collector = MultiSyncCollector(
            [lambda: CueCorners(batch_size=[2])] * 2, policy, frames_per_batch=32, total_frames=160, cat_results="stack"
        )
        seen = []
        for index, data in enumerate(collector):
            seen.append(data["control", "steering.alpha"].clone())
            policy.controls["steering.alpha"] = float(index + 1)
        collector.shutdown()
    assert bool((seen[0] == 0).all())
    assert bool((seen[-1] >= 3).all())  # workers may be one batch ahead of what is set


def test_records_of_nothing_say_so() -> None:
    with pytest.raises(InputError, match="found no control"):
        ControlRecord().prepare(categorical()).__enter__()
    method = Compose(SteeringVectors({SITE: torch.ones(16)}), ControlRecord(names=["steering.alfa"]))
    with pytest.raises(MissingKeyError, match=r"nearest: 'steering\.alpha'"):
        method.prepare(categorical()).__enter__()


def test_a_net_that_is_no_policy() -> None:
    net = nn.Linear(4, 2)
    data = TensorDict({"input": torch.randn(8, 4)}, batch_size=8)
    with Scheduled(Saliency(), fraction=0.5).prepare(net) as hooked:
        found = hooked(data)
    assert int(found["computed", "attr"].sum()) == 4

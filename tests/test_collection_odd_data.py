"""Collection from environments whose keys collide or change, and of numbers that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, set_interaction_type
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.modules import QValueActor

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import KeyCollisionError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.rollout import summarise
from tests.collecting import Learner, check_all, make_collector, rows_of
from tests.method_table import SAMPLES, pairs
from tests.policies import CASES, Case

# ---------------------------------------------------------------------- keys


class Renamed(CueCorners):
    """An environment with one more entry, under a given key."""

    def __init__(self, key: Any, **options: Any) -> None:
        super().__init__(**options)
        self._key = key
        spec = self.observation_spec.clone()
        spec[key] = spec["elapsed"].clone()
        self.observation_spec = spec

    def _describe(self, *args: Any) -> TensorDict:
        data = super()._describe(*args)
        return data.set(self._key, data["elapsed"]) if hasattr(self, "_key") else data


@pytest.mark.parametrize("key", ["cache", ("cache", FC2), ("attr", "observation", "deep")])
def test_a_result_that_would_overwrite_the_environment_is_refused(key: Any) -> None:
    policy = Compose(ActivationCaching(FC2), Saliency()).prepare(make_actor(), return_context=False)
    with pytest.raises(KeyCollisionError, match="collides with the environment's key"):
        Collector(Renamed(key, batch_size=[2]), policy, frames_per_batch=8, total_frames=8)


@pytest.mark.parametrize("root", ["next", "collector", "computed"])
def test_roots_of_others_are_refused(root: str) -> None:
    with pytest.raises(KeyCollisionError, match=f"starts with '{root}'"):
        ActivationCaching(FC2, cache_key=root).prepare(make_actor()).__enter__()


@pytest.mark.parametrize("storing", [{}, {"storing_device": "cpu"}])
def test_mixed_devices_with_a_buffer(storing: dict[str, str]) -> None:
    buffer = ReplayBuffer(storage=LazyTensorStorage(256), batch_size=8)
    learner = Learner()
    collector = make_collector(learner.policy, policy_device="cpu:0", replay_buffer=buffer, **storing)
    assert len(list(collector)) == 4
    collector.shutdown()
    check_all(learner, rows_of([learner.policy.annotate(buffer[:])]))


class Changing(CueCorners):
    """At some steps (or resets) an entry comes, goes, or changes its shape."""

    def __init__(self, how: str, **options: Any) -> None:
        super().__init__(**options)
        self.how = how
        self.calls = 0

    def _alter(self, data: TensorDict, reset: bool) -> TensorDict:
        self.calls += 1
        now = self.calls % 3 == 0
        if (self.how == "a key at some steps" and now) or (self.how == "a key at resets" and reset):
            data.set("extra", torch.ones(*data.batch_size, 2))
        if self.how == "a result at some steps" and now:
            data.set(("cache", FC2), torch.full((*data.batch_size, 64), 9.0))
        if self.how == "no observation at some steps" and now and not reset:
            data.pop("observation")
        if self.how == "another shape at some steps" and now and not reset:
            data.set("observation", data["observation"][..., :10])
        return data

    def _reset(self, tensordict: TensorDictBase | None = None, **options: Any) -> TensorDictBase:
        return self._alter(super()._reset(tensordict, **options), True)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._alter(super()._step(tensordict), False)

    def maybe_reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        return super(CueCorners, self).maybe_reset(tensordict)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("a key at some steps", {}),
        ("a key at resets", {}),
        ("a key at resets", {"use_buffers": False}),
        ("a result at some steps", {}),
        ("no observation at some steps", {"use_buffers": False}),
        ("no observation at some steps", {}),
        ("another shape at some steps", {}),
    ],
    ids=str,
)
def test_where_the_environment_changes_its_keys_the_hooked_policy_does_what_the_plain_one_does(
    how: str, options: dict[str, Any]
) -> None:
    def collect(policy: Any) -> TensorDict | Exception:
        torch.manual_seed(2)
        env = Changing(how, max_steps=4, seed=0)
        collector = Collector(env, policy, frames_per_batch=16, total_frames=64, **options)
        try:
            return torch.cat([data.to_tensordict() for data in collector])
        except Exception as error:
            return error
        finally:
            collector.shutdown()

    actor = make_actor()
    method = Compose(ActivationCaching(FC2), Saliency(when="step"), SteeringVectors({FC2: torch.ones(64)}, alpha=0.0))
    plain = collect(actor)
    found = collect(method.prepare(actor, return_context=False))
    if isinstance(plain, Exception):
        assert type(found) is type(plain)
        assert str(found) == str(plain)
        return
    for key in plain.keys(True, True):
        assert torch.equal(found[key], plain[key]), key
    with torch.no_grad():
        torch.testing.assert_close(found["cache", FC2], actor.module[0].module[:4](found["observation"]))
    assert bool(found["computed", "cache"].all())


# ---------------------------------------------------------------------- numbers


def deterministic_case(name: str) -> tuple[Case, nn.Module]:
    case = CASES[name]
    policy = case.build()
    for module in policy.modules():
        if hasattr(module, "distribution_kwargs"):
            module.distribution_kwargs = {"validate_args": False}  # which refuses NaN, with or without hooks
    return case, policy


@pytest.mark.parametrize(
    ("method", "name"),
    pairs(dict.fromkeys(("relu", "value", "q_value", "pixels")), observes=True, second=[]),
)
def test_a_row_with_nan_stays_in_its_row_and_is_not_given_numbers(method: str, name: str) -> None:
    row = SAMPLES[method]
    case, policy = deterministic_case(name)
    with row.make(case).prepare(policy) as hooked:
        clean = case.data(4)
        broken = clean.clone()
        broken[case.key][1].view(-1)[0] = torch.nan
        found = []
        for data in (clean, broken):
            torch.manual_seed(1)
            with torch.no_grad(), set_interaction_type(InteractionType.DETERMINISTIC):
                found.append(hooked.annotate(hooked(data.clone()), on_mismatch="ignore"))
        keys = [key for key in hooked.result_keys if key[0] != "computed"]
    for key in keys:
        whole, value = (one[key].reshape(4, -1) for one in found)
        assert torch.equal(value[[0, 2, 3]], whole[[0, 2, 3]])
        # What no neighbour of the NaN and no perturbation reaches may be a number.
        local = method in ("Occlusion", "SARFA", "PerturbationSaliency") or (name == "pixels" and key[0] == "cache")
        assert not bool(torch.isfinite(value[1]).any() if not local else torch.isfinite(value[1]).all())


class Breaking(CueCorners):
    """Now and then an observation has a NaN."""

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        data = super()._step(tensordict)
        broken = (data["elapsed"] == 2).unsqueeze(-1) & (torch.arange(90) == 5)
        return data.set("observation", data["observation"].masked_fill(broken, torch.nan))


def test_training_goes_on_through_nan_and_the_summary_counts_it() -> None:
    net = nn.Sequential(nn.Linear(90, 16), nn.ReLU(), nn.Linear(16, 4))
    actor = QValueActor(net, in_keys=["observation"], spec=CueCorners().action_spec)
    method = Compose(ActivationCaching("module.0.module.1"), Saliency(target=targets.chosen_q()))
    with method.prepare(actor) as policy:
        collector = Collector(
            Breaking(batch_size=[4], seed=0, max_steps=4),
            policy,
            frames_per_batch=64,
            total_frames=192,
            postproc=policy.annotate,
        )
        batches = list(collector)
        collector.shutdown()
        summaries = [summarise(data, policy.result_keys) for data in batches]
    assert len(batches) == 3
    for data, summary in zip(batches, summaries, strict=True):
        broken = data["observation"].isnan().any(-1)
        assert bool(broken.any())
        for key in (("cache", "module.0.module.1"), ("attr", "observation")):
            assert torch.equal(~torch.isfinite(data[key]).all(-1), broken)
            assert torch.equal(torch.isfinite(data[key]).any(-1), ~broken)
            assert summary[f"nonfinite.{'.'.join(key)}"] == pytest.approx(float(broken.double().mean()))
            assert summary[".".join(key)] == pytest.approx(float(data[key][~broken].abs().double().mean()))

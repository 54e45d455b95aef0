"""``keep=``: these results go on with a batch, in every batch, and what only a logger reads is not among them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack, tensorclass
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.trainers import ReplayBufferTrainer

from tdhook_rl import ActivationCaching, Compose, ControlRecord, Saliency, Scheduled, SteeringVectors, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.batches.keeping import kept_keys
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.report import FileSink, Monitor
from tdhook_rl.rollout import AnnotateHook, check
from tdhook_rl.targets import Target
from tests.monitoring import batch_of, said
from tests.test_annotate_hook_buffers import STORAGES
from tests.test_trainer import make_trainer

#: Two attributions under one root, activations, one that is there by turns, and a record that each step writes.
METHOD = Compose(
    SteeringVectors({FC2: torch.ones(64)}, alpha=0.1),
    ActivationCaching(FC2),
    Saliency(target=targets.chosen_logit(), inputs=["observation"], input_modules=[FC2]),
    IntegratedGradients(target=targets.margin(), n_steps=2, baseline=0.0, attribution_key="path"),
    Scheduled(Saliency(target=targets.entropy(), attribution_key="turns"), every=2),
    ControlRecord(),
)
CHOICES: list[Any] = [
    [], "attr", ["attr"], [("attr", "observation")], [("attr", FC2), "turns"], ["cache", "control"], ["path", "attr"],
    [("control", "steering.alpha")], None,
]  # fmt: skip


def entries(data: TensorDictBase, policy: Any) -> set[Any]:
    return {key for key in policy.result_keys if data.get(key, None) is not None}


def marks(keys: set[Any], policy: Any) -> set[Any]:
    """The keys with what says which rows were computed."""
    roots = {key[0] for key in keys}
    return keys | {key for key in policy.result_keys if key[0] == "computed" and key[1].split(".")[0] in roots}


def chosen(keep: Any, policy: Any) -> set[Any]:
    keys = [key for key in policy.result_keys if key[0] != "computed"]
    wanted = keys if keep is None else [keep] if isinstance(keep, str) else keep
    return marks({key for key in keys for one in wanted if key == one or key[0] == one}, policy)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("keep", CHOICES, ids=str)
@pytest.mark.parametrize("before", ["plain", "annotated", "others'", "padded", "stacked"])
def test_what_is_kept_is_there_and_nothing_else(before: str, keep: Any) -> None:
    torch.manual_seed(0)
    actor = make_actor()
    with METHOD.prepare(actor) as policy:
        data = batch_of(policy, steps=4, envs=6)
        if before == "annotated":
            data = policy.annotate(data)
        elif before == "others'":
            with Saliency(target=targets.logit(0)).prepare(actor) as other:
                data = other.annotate(data, on_mismatch="ignore")
        elif before == "padded":
            data["collector", "mask"] = torch.arange(4).expand(6, 4) < 3
        elif before == "stacked":
            data = lazy_stack(list(data.unbind(0)), 0)
        held = set(data.keys(True, True))
        with METHOD.prepare(actor) as fresh:  # a schedule counts the batches of its policy
            right = fresh.annotate(data, on_mismatch="ignore")
        kept = policy.annotate(data, keep=keep, on_mismatch="ignore")
        assert entries(kept, policy) == chosen(keep, policy) == set(kept_keys(policy, keep))
        for key in entries(kept, policy):
            if not key[-1].endswith(".stamp") and key[0] != "turns":
                assert same(kept[key], right[key])
        assert set(data.keys(True, True)) == held  # the batch stays as it is
        rest = {key for key in held if key not in policy.result_keys}
        assert rest <= set(kept.keys(True, True))
        assert not {key for key in kept.keys() if key in ("attr", "cache", "path") and kept[key].is_empty()}
        # What was left out is computed again where it is asked for.
        assert entries(policy.annotate(kept, on_mismatch="ignore"), policy) >= entries(right, policy) - {
            key for key in policy.result_keys if "control" in str(key) and before != "plain"
        } - chosen(["control"], policy)


def test_what_is_not_kept_is_not_computed() -> None:
    def fail(run: Any) -> Any:
        raise RuntimeError("asked for")

    method = Compose(Saliency(target=Target("fails", fail), attribution_key="dear"), ActivationCaching(FC2))
    with method.prepare(make_actor()) as policy:
        data = batch_of(policy)
        assert policy.annotate(data, keep=["cache"])["cache", FC2].shape == (8, 10, 64)
        with pytest.raises(RuntimeError, match="asked for"):
            policy.annotate(data)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (["atr"], r"keep= names 'atr', which is no result of this policy; nearest: 'attr'"),
        ([("attr", "x")], "no result"),
        (["computed"], "no result"),
        (["observation"], "A root keeps all under it"),
    ],
)
def test_a_key_that_is_no_result(keep: Any, words: str) -> None:
    with Saliency().prepare(make_actor()) as policy:
        with pytest.raises(InputError, match=words):
            policy.annotate(batch_of(policy), keep=keep)
        with pytest.raises(InputError, match=words):
            AnnotateHook(policy, keep=keep)


@tensorclass
class Steps:
    observation: torch.Tensor
    logits: torch.Tensor | None = None
    action: torch.Tensor | None = None
    attr: TensorDict | None = None
    computed: TensorDict | None = None


def test_a_tensorclass_needs_fields_for_what_is_kept_only() -> None:
    method = Compose(Saliency(target=targets.logit(0)), ActivationCaching(FC2))
    with method.prepare(make_actor()) as policy:
        data = Steps(observation=torch.rand(3, 90), batch_size=[3])
        kept = policy.annotate(data, keep=["attr"])
        assert set(kept.computed.keys()) == {"attr", "attr.stamp"}
        assert policy.annotate(kept, keep=[]).attr is None
        with pytest.raises(InputError, match="has no field 'cache'"):
            policy.annotate(data)


# ------------------------------------------------------------------ loops


@pytest.mark.parametrize("storage", STORAGES)
def test_a_monitor_reads_what_the_buffer_does_not_keep(storage: str, tmp_path: Path) -> None:
    """The loop with a collector that annotates: three batches into a ring of two."""
    method = Compose(Saliency(target=targets.chosen_logit()), ActivationCaching(FC2))
    buffer = TensorDictReplayBuffer(storage=STORAGES[storage](160, tmp_path / "memory"), batch_size=16)
    with method.prepare(make_actor()) as policy, Monitor(policy, tmp_path / "seen", every=2) as monitor:
        collector = Collector(
            CueCorners(batch_size=[8]), policy, frames_per_batch=80, total_frames=240, postproc=policy.annotate,
            auto_register_policy_transforms=False,
        )  # fmt: skip
        for batch in collector:
            monitor.step(batch)
            buffer.extend(policy.annotate(batch, keep=["attr"]).reshape(-1))
        collector.shutdown()
        rows = buffer[:]
        assert entries(rows, policy) == chosen(["attr"], policy)
        assert bool(rows["computed", "attr"].all())
        plain = rows.exclude(*policy.result_keys)
        assert same(rows["attr", "observation"], policy.annotate(plain)["attr", "observation"])
    curves = FileSink.read(tmp_path / "seen" / "log.csv")
    assert [step for step, _ in curves[f"cache.{FC2}.mean"]] == [80, 240]


def test_a_collectors_postproc_keeps(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy:
        options: dict[str, Any] = {
            "frames_per_batch": 80, "total_frames": 160, "postproc": partial(policy.annotate, keep=["path"]),
            "auto_register_policy_transforms": False,
        }  # fmt: skip
        report = check(policy, CueCorners(batch_size=[8]), options)
        assert not [one for one in report.findings if one.check in ("kept", "annotate") and one.level != "ok"]
        collector = Collector(CueCorners(batch_size=[8]), policy, **options)
        for batch in collector:
            assert entries(batch, policy) == chosen(["path"], policy)
        collector.shutdown()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("keep", [["attr"], [], None], ids=str)
def test_a_trainers_buffer_holds_what_is_kept_and_its_monitor_sees_all(keep: Any, every: int, tmp_path: Path) -> None:
    actor = make_actor()
    method = Compose(Saliency(target=targets.taken_action_log_prob()), ActivationCaching(FC2))
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=32)
    with method.prepare(actor) as policy:
        trainer = make_trainer(policy, actor, tmp_path, None, direct=False)
        hook = AnnotateHook(policy, keep=keep, every=every)
        hook.register(trainer)
        monitor = Monitor(policy, tmp_path / "seen")
        monitor.register(trainer)
        ReplayBufferTrainer(buffer, flatten_tensordicts=True).register(trainer)
        with said():  # off schedule the monitor explains by itself, after the update
            trainer.train()
        monitor.close()
        rows = buffer[:]
        assert entries(rows, policy) == chosen(keep, policy)
        if keep is None or keep:
            computed = rows["computed", "attr"].reshape(4, -1).all(-1).tolist()
            assert computed == [True, every == 1, True, every == 1]
    curves = FileSink.read(tmp_path / "seen" / "log.csv")
    assert len(curves[f"cache.{FC2}.mean"]) >= 2
    assert len(curves["attr.observation"]) >= 2


class Trains:
    """What the hook reads of a trainer."""

    def __init__(self, buffer: Any) -> None:
        self.replay_buffer = buffer


def test_a_buffer_with_results_that_are_left_out_now() -> None:
    old = TensorDictReplayBuffer(storage=LazyTensorStorage(200), batch_size=4)
    method = Compose(Saliency(target=targets.chosen_logit()), ActivationCaching(FC2))
    with method.prepare(make_actor()) as policy:
        data = batch_of(policy)
        old.extend(policy.annotate(data).reshape(-1))
        hook = AnnotateHook(policy, keep=["attr"])
        hook._trainer = Trains(old)
        with pytest.raises(InputError, match=r"holds 80 rows with \('cache', .* which keep= leaves out"):
            hook.annotate_batch(data)
        new = TensorDictReplayBuffer(storage=LazyTensorStorage(200), batch_size=4)
        new.extend(policy.annotate(old[:], keep=["attr"], on_mismatch="ignore"))
        hook._trainer = Trains(new)
        new.extend(hook.annotate_batch(data).reshape(-1))
        assert entries(new[:], policy) == chosen(["attr"], policy)
        assert bool(new[:]["computed", "attr"].all())


def test_choices_are_what_they_say() -> None:
    with METHOD.prepare(make_actor()) as policy:
        found = [frozenset(kept_keys(policy, keep)) for keep in CHOICES]
    assert found[0] == frozenset()
    assert found[1] == found[2]
    assert len(set(found)) == len(found) - 1
    assert all(one <= found[-1] for one in found)

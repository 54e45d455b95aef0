"""Batch-level use: a collector's postproc, a Trainer hook, an Evaluator's metrics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector, Evaluator
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from torchrl.record import CSVLogger
from torchrl.trainers import Trainer

from tdhook_rl import ActivationCaching, Compose, Saliency, Scheduled, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, PreparationError
from tdhook_rl.examples.agent import FC2, make_actor, make_critic
from tdhook_rl.report import FileSink, Monitor
from tdhook_rl.rollout import AnnotatedMetrics, AnnotateHook, summarise
from tdhook_rl.rollout.trainer_policy import policy_of_trainer

FRAMES = 128


def make_method() -> Compose:
    return Compose(ActivationCaching(FC2), Saliency(target=targets.taken_action_log_prob()))


def make_trainer(policy, actor: nn.Module, folder: Path, buffer: ReplayBuffer | None, direct: bool) -> Trainer:
    critic = make_critic()
    loss = ClipPPOLoss(actor, critic)
    collector = Collector(
        CueCorners(batch_size=[8], seed=0),
        policy,
        frames_per_batch=FRAMES,
        total_frames=4 * FRAMES,
        replay_buffer=buffer if direct else None,
        auto_register_policy_transforms=False,
    )
    trainer = Trainer(
        collector=collector,
        total_frames=4 * FRAMES,
        frame_skip=1,
        optim_steps_per_batch=1,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), 1e-3),
        logger=CSVLogger("run", log_dir=str(folder)),
        progress_bar=False,
        seed=0,
        log_interval=1,
        replay_buffer=buffer,
    )
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    if not direct:
        trainer.register_op("batch_process", lambda batch: advantage(batch).reshape(-1))
    else:
        trainer.register_op("process_optim_batch", lambda batch: advantage(buffer[:]).reshape(-1))
    return trainer


def logged(folder: Path) -> dict[str, list[float]]:
    return {
        str(path.relative_to(folder / "run" / "scalars").with_suffix("")): [
            float(line.split(",")[1]) for line in path.read_text().splitlines()
        ]
        for path in sorted((folder / "run" / "scalars").rglob("*.csv"))
    }


def test_a_trainer_is_handed_annotated_batches_and_logs_their_summary(tmp_path: Path) -> None:
    actor = make_actor()
    with make_method().prepare(actor) as policy:
        trainer = make_trainer(policy, actor, tmp_path, None, direct=False)
        hook = AnnotateHook(policy)
        hook.register(trainer)
        seen = []
        trainer.register_op("batch_process", lambda batch: seen.append(batch) or batch)
        trainer.train()
    assert len(seen) == 4
    for batch in seen:
        assert bool(batch["computed", "attr"].all())
        assert batch["attr", "observation"].shape == batch["observation"].shape
    assert not torch.equal(seen[0]["attr", "observation"], seen[1]["attr", "observation"])
    rows = logged(tmp_path)
    assert len(rows["interp/attr.observation"]) == 4
    expected = float(hook.last["attr", "observation"].abs().double().mean())
    assert rows["interp/attr.observation"][-1] == pytest.approx(expected)


@pytest.mark.parametrize("ndim", [1, 2])
def test_where_batches_go_straight_to_the_buffer_its_newest_rows_are_explained(tmp_path: Path, ndim: int) -> None:
    actor = make_actor()
    # Three batches of 8 environments; stored as trajectories, or by time with ndim=2.
    size = 3 * 8 if ndim == 1 else 3 * FRAMES
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(size, ndim=ndim), batch_size=32)
    with make_method().prepare(actor) as policy:
        trainer = make_trainer(policy, actor, tmp_path, buffer, direct=True)
        hook = AnnotateHook(policy, rows=4)
        hook.register(trainer)
        found = []
        trainer.register_op("pre_steps_log", lambda batch: found.append((batch, hook.last)))
        trainer.train()
    assert [batch for batch, _ in found] == [None] * 4
    assert all(last.shape[ndim - 1 :][0] == 4 and "attr" in last.keys() for _, last in found)
    # The buffer holds three batches, and the fourth went to its start.
    end = 8 if ndim == 1 else FRAMES // 8
    newest = buffer.storage.get(torch.arange(end - 4, end))
    newest = newest if ndim == 1 else newest.transpose(0, 1)  # time is last in what is explained
    assert torch.equal(found[-1][1]["observation"], newest["observation"])
    assert len(logged(tmp_path)["interp/attr.observation"]) == 4


def test_every_and_the_state_of_the_hook(tmp_path: Path) -> None:
    actor = make_actor()
    with make_method().prepare(actor) as policy:
        trainer = make_trainer(policy, actor, tmp_path, None, direct=False)
        hook = AnnotateHook(policy, every=3)
        hook.register(trainer, "explain")
        trainer.train()
        assert trainer._modules["explain"] is hook
        state = hook.state_dict()
        assert state == {"batches": 4, "written": 0}
        other = AnnotateHook(policy, every=3)
        other.load_state_dict(state)
        batch = CueCorners(batch_size=[2]).rollout(3, policy, break_when_any_done=False)
        with_results = [bool(other.annotate_batch(batch)["computed", "attr"].all()) for _ in range(3)]
    assert len(logged(tmp_path)["interp/attr.observation"]) == 2
    assert with_results == [False, False, True]  # batches 4 and 5, then 6


class Held:
    """What is read of a trainer to find its policy."""

    def __init__(self, acts: Any = None, loss: Any = None, **hooks: Any) -> None:
        self.collector, self.loss_module, self._modules = SimpleNamespace(policy=acts), loss, hooks


def test_hooks_made_without_a_policy_take_the_trainers() -> None:
    actor, critic = make_actor(), make_critic()
    with make_method().prepare(actor) as policy, Saliency().prepare(critic) as value:
        explored = TensorDictSequential(policy, TensorDictModule(nn.Identity(), ["action"], ["action"]))
        hook = AnnotateHook(policy)
        for held, found in {
            Held(policy, ClipPPOLoss(actor, value)): policy,  # what acts comes first
            Held(explored): policy,
            Held(actor, ClipPPOLoss(actor, value)): value,
            Held(actor, ClipPPOLoss(actor, critic), annotate=hook): policy,
        }.items():
            assert policy_of_trainer(held, "Monitor") is found
        with pytest.raises(
            PreparationError, match=r"Monitor was made without a policy, .* no hooked one \(no policy\)"
        ):
            policy_of_trainer(Held(), "Monitor")
        with pytest.raises(
            PreparationError, match=r"the collector's policy is a plain \w+Actor; the loss's actor_network"
        ):
            AnnotateHook().register(Held(actor, ClipPPOLoss(actor, critic)))
        with pytest.raises(PreparationError, match="AnnotateHook takes a hooked policy"):
            AnnotateHook().annotate_batch(TensorDict({}, [1]))
        with pytest.raises(PreparationError, match="this monitor has no policy yet"):
            Monitor().step(TensorDict({}, [1]))


def test_a_trainer_without_batches_and_without_a_buffer_says_so() -> None:
    with make_method().prepare(make_actor()) as policy:
        hook = AnnotateHook(policy)
        with pytest.raises(InputError, match="hands over no batches"):
            hook.log(None)
        with pytest.raises(InputError, match="every= is a positive integer"):
            AnnotateHook(policy, every=0)


def test_evaluator_metrics() -> None:
    actor = make_actor()
    with make_method().prepare(actor) as policy:
        evaluator = Evaluator(
            CueCorners(batch_size=[4], seed=0),
            policy,
            num_trajectories=4,
            max_steps=20,
            metrics_fn=AnnotatedMetrics(policy),
        )
        try:
            found = evaluator.evaluate(actor)
        finally:
            evaluator.shutdown()
    names = {"attr.observation", f"cache.{FC2}", "computed.attr", "computed.cache"}
    assert {f"eval/{name}" for name in names} <= set(found)
    assert found["eval/attr.observation"] > 0
    assert found["eval/computed.attr"] == 1.0


def test_the_summary_leaves_out_padding_and_what_was_not_computed() -> None:
    data = TensorDict(
        {
            "attr": {"observation": torch.tensor([[[1.0], [-3.0]], [[float("nan")], [100.0]]])},
            "probe": {"xor": torch.tensor([[[0.2], [0.4]], [[float("nan")], [0.9]]])},
            "computed": {
                "attr": torch.tensor([[True, True], [False, True]]),
                "probe": torch.tensor([[True, True], [False, True]]),
            },
            "collector": {"mask": torch.tensor([[True, True], [True, False]])},
        },
        batch_size=[2, 2],
    )
    found = summarise(data, [("attr", "observation"), ("probe", "xor"), ("computed", "attr"), ("absent", "key")])
    assert found == pytest.approx({"attr.observation": 2.0, "probe.xor": 0.3, "computed.attr": 2 / 3})


def test_a_postproc_with_a_schedule(tmp_path: Path) -> None:
    with Scheduled(Saliency(), every=2).prepare(make_actor()) as policy:
        collector = Collector(
            CueCorners(batch_size=[4], seed=0),
            policy,
            frames_per_batch=32,
            total_frames=128,
            postproc=policy.annotate,
            auto_register_policy_transforms=False,
        )
        shares = [summarise(data, policy.result_keys)["computed.attr"] for data in collector]
        collector.shutdown()
    assert shares == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("ndim", [0, 1, 2], ids=["batches", "a buffer of trajectories", "a buffer by time"])
def test_a_monitor_looks_at_what_a_trainer_collects(tmp_path: Path, ndim: int) -> None:
    actor = make_actor()
    storage = LazyTensorStorage(3 * 8 if ndim == 1 else 3 * FRAMES, ndim=max(ndim, 1))
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=32) if ndim else None
    with make_method().prepare(actor) as policy, Monitor(policy, tmp_path / "local", rows=4) as monitor:
        trainer = make_trainer(policy, actor, tmp_path, buffer, direct=bool(ndim))
        monitor.register(trainer)
        states: list[dict] = []
        trainer.register_op("pre_steps_log", lambda batch: states.append(trainer.state_dict()["monitor"]))
        trainer.train()
    curve = FileSink.read(tmp_path / "local" / "log.csv")["attr.observation"]
    assert [step for step, _ in curve] == [FRAMES, 2 * FRAMES, 3 * FRAMES, 4 * FRAMES]
    assert [(state["frames"], state["steps"]) for state in states] == [(n * FRAMES, n) for n in (1, 2, 3, 4)]
    assert not any("attr" in name for name in logged(tmp_path))  # the trainer's own log is left as it is


def test_a_monitor_counts_frames_as_the_trainer_does(tmp_path: Path) -> None:
    actor = make_actor()
    with make_method().prepare(actor) as policy, Monitor(policy, tmp_path / "local") as monitor:
        trainer = make_trainer(policy, actor, tmp_path, None, direct=False)
        trainer.frame_skip, trainer.total_frames = 3, 12 * FRAMES
        monitor.register(trainer)
        trainer.train()
    curve = FileSink.read(tmp_path / "local" / "log.csv")["attr.observation"]
    assert [step for step, _ in curve] == [3 * FRAMES * batch for batch in (1, 2, 3, 4)]
    assert curve[-1][0] == trainer.collected_frames

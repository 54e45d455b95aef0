"""TorchRL's DQN and SAC trainers with a monitor as hook, and what is kept in their buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, GymEnv, InitTracker, RewardSum, StepCounter, TransformedEnv
from torchrl.modules import MLP, EGreedyModule, QValueActor, ValueOperator
from torchrl.objectives import DQNLoss, SACLoss, SoftUpdate
from torchrl.record.loggers.csv import CSVLogger
from torchrl.trainers.algorithms import DQNTrainer, SACTrainer

from tdhook_rl import Saliency, targets
from tdhook_rl.report import FileSink, Monitor
from tdhook_rl.rollout import AnnotateHook
from tests.training_scripts import OPTIONS, continuous_actor

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental:UserWarning", "ignore:.*shows no:UserWarning")


def env_of(name: str) -> TransformedEnv:
    transforms = Compose(InitTracker(), StepCounter(20), RewardSum(["reward"], ["reward_sum"]))
    env = TransformedEnv(GymEnv(name), transforms)
    env.set_seed(0)
    return env


def dqn() -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """Environment, what acts, the hooked part of it, the loss, and further arguments of the trainer."""
    env = env_of("CartPole-v1")
    model = QValueActor(MLP(4, 2, num_cells=[16]), in_keys=["observation"], spec=env.action_spec_unbatched)
    hooked = Saliency(target=targets.chosen_q()).prepare(model, return_context=False)
    greedy = EGreedyModule(annealing_num_steps=100, spec=model.spec)
    return (
        env,
        TensorDictSequential(hooked, greedy),
        hooked,
        DQNLoss(model, delay_value=True),
        {"greedy_module": greedy},
    )


def sac() -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    env = env_of("Pendulum-v1")
    actor = continuous_actor(env, log_prob=False)
    critic = ValueOperator(MLP(4, 1, num_cells=[16]), in_keys=["action", "observation"])
    hooked = Saliency(target=targets.taken_action_log_prob()).prepare(actor, return_context=False)
    return env, hooked, hooked, SACLoss(actor, critic, num_qvalue_nets=2), {}


@pytest.mark.parametrize("keep", ["no hook", [], ["attr"]], ids=str)
@pytest.mark.parametrize(("make", "kind"), [(dqn, DQNTrainer), (sac, SACTrainer)])
def test_a_monitor_is_a_hook_that_takes_policy_and_logger_from_the_trainer(
    make: Any, kind: Any, keep: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    env, acts, hooked, loss, options = make()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(500), batch_size=16)
    trainer = kind(
        collector=Collector(env, acts, frames_per_batch=20, total_frames=100, **OPTIONS),
        total_frames=100, frame_skip=1, optim_steps_per_batch=2, loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), 1e-3), logger=CSVLogger("run", log_dir=str(tmp_path)),
        progress_bar=False, replay_buffer=buffer, target_net_updater=SoftUpdate(loss, eps=0.9), log_interval=1,
        **options,
    )  # fmt: skip
    if keep != "no hook":
        AnnotateHook(keep=keep).register(trainer)
    monitor = Monitor()
    monitor.register(trainer)
    trainer.train()
    monitor.close()
    hooked.restore()
    assert monitor.policy is hooked
    assert monitor.folder == tmp_path / "run" / "interp"
    curves = FileSink.read(monitor.folder / "log.csv")
    assert [step for step, _ in curves["attr.observation"]] == [20, 40, 60, 80, 100]
    rows = buffer[:]
    held = {key for key in hooked.result_keys if rows.get(key, None) is not None}
    assert held == (set(hooked.result_keys) if keep == ["attr"] else set())
    if held:
        assert bool(rows["computed", "attr"].all())

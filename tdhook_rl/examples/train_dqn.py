"""Results in a replay buffer: which go on is chosen once, and what only the logger reads does not.

A DQN agent acts through its hooked network. The monitor reads saliencies and activations of each batch; of
both, ``keep=["attr"]`` lets the saliencies on into the buffer, with their masks, so that what is sampled carries
them.

    python -m tdhook_rl.examples.train_dqn --frames 20480 --folder runs/dqn
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import MLP, EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.report import Monitor

KEEP = ["attr"]  # all under this root; [] for none, ("attr", "observation") for one


def train(frames: int = 20_480, seed: int = 0, folder: Path | None = None) -> TensorDict:
    """Train for some frames; returns the rows of the buffer."""
    torch.manual_seed(seed)
    env = CueCorners(batch_size=[32], seed=seed)
    net = MLP(CueCorners.observation_features, CueCorners.n_actions, num_cells=[64, 64], activation_class=torch.nn.ReLU)
    model = QValueActor(net, in_keys=["observation"], spec=CueCorners().action_spec)
    greedy = EGreedyModule(spec=model.spec, eps_init=1.0, eps_end=0.05, annealing_num_steps=frames // 2)
    loss = DQNLoss(model, action_space="categorical", delay_value=True)
    loss.make_value_estimator(gamma=0.95)
    updater, optimizer = SoftUpdate(loss, eps=0.95), torch.optim.Adam(loss.parameters(), lr=1e-3)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(8192), batch_size=256)
    method = Compose(ActivationCaching("module.0.module.0.module.3"), Saliency(target=targets.chosen_q()))
    with method.prepare(TensorDictSequential(model, greedy)) as policy:
        monitor = Monitor(policy, folder or tempfile.mkdtemp(), env=env, seed=seed)
        options = {"frames_per_batch": 512, "total_frames": frames, "auto_register_policy_transforms": False}
        collector = Collector(env, policy, postproc=policy.annotate, **options)
        try:
            for batch in collector:
                monitor.step(batch)  # reads all of it
                buffer.extend(policy.annotate(batch, keep=KEEP).reshape(-1))
                greedy.step(batch.numel())
                for _ in range(8):
                    losses = loss(buffer.sample())
                    optimizer.zero_grad()
                    losses["loss"].backward()
                    optimizer.step()
                    updater.step()
        finally:
            collector.shutdown()
            monitor.close()
    rows, lights = buffer[:], CueCorners.light_features()
    size = rows["attr", "observation"].abs()
    print(f"{len(rows)} rows hold saliencies; of the lights: {size[:, lights].mean(0).tolist()}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20_480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new folder for the logs")
    train(**vars(parser.parse_args()))

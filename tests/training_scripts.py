"""The loops of TorchRL's own training scripts, small: PPO, DQN, SAC, SAC whose collector fills the buffer, MAPPO, IQL.

What matters of each script is as there: where it gets its batches, what it does with them first, how and at which steps
it logs, what its collector post-processes. ``watch`` stands for what a user adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import Compose, EnvBase, GymEnv, InitTracker, RewardSum, StepCounter, TransformedEnv
from torchrl.modules import (
    MLP,
    EGreedyModule,
    MultiAgentMLP,
    ProbabilisticActor,
    QValueActor,
    QValueModule,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss, DQNLoss, HardUpdate, SACLoss, SoftUpdate, ValueEstimators
from torchrl.objectives.value import GAE
from torchrl.record.loggers.wandb import WandbLogger

__all__ = ["SCRIPTS", "Watch", "Watched"]

OPTIONS = {"auto_register_policy_transforms": False}


class Watched(Protocol):
    """What a script gets for its policy: what acts, and what is called with each batch."""

    policy: Any

    def step(self, batch: TensorDictBase | None = None) -> Any: ...


#: Given the policy, and the buffer that a collector fills by itself.
Watch = Callable[..., AbstractContextManager[Watched]]
Weights = dict[str, torch.Tensor]


def gym(name: str, seed: int) -> TransformedEnv:
    env = TransformedEnv(GymEnv(name), Compose(InitTracker(), StepCounter(20), RewardSum()))
    env.set_seed(seed)
    return env


def weights_of(*modules: nn.Module) -> Weights:
    return {f"{n}.{k}": v.detach().clone() for n, one in enumerate(modules) for k, v in one.state_dict().items()}


def ended(data: TensorDictBase) -> dict[str, float]:
    """Of episodes that end in a batch, as the scripts log them."""
    done = data["next", "done"]
    rewards, lengths = data["next", "episode_reward"][done], data["next", "step_count"][done]
    if not len(rewards):
        return {}
    return {"train/reward": rewards.mean().item(), "train/episode_length": lengths.sum().item() / len(lengths)}


def continuous_actor(env: TransformedEnv, log_prob: bool) -> ProbabilisticActor:
    net = nn.Sequential(MLP(3, 2, num_cells=[16, 16], activation_class=nn.Tanh), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=env.action_spec_unbatched,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": env.action_spec_unbatched.space.low, "high": env.action_spec_unbatched.space.high},
        return_log_prob=log_prob,
    )


def ppo(logger: Any, watch: Watch, seed: int = 0) -> Weights:
    """PPO on continuous actions: a buffer without replacement each epoch, ``log_scalar`` at collected frames."""
    env = gym("Pendulum-v1", seed)
    actor = continuous_actor(env, log_prob=True)
    critic = ValueOperator(MLP(3, 1, num_cells=[16]), in_keys=["observation"])
    with watch(actor) as watched:
        collector = Collector(env, watched.policy, frames_per_batch=40, total_frames=160, **OPTIONS)
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(40), sampler=SamplerWithoutReplacement(), batch_size=20
        )
        advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=False)
        loss_module = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.0, normalize_advantage=True)
        optimisers = [torch.optim.Adam(one.parameters(), lr=3e-3, eps=1e-5) for one in (actor, critic)]
        frames = 0
        for data in collector:
            watched.step(data)
            frames += data.numel()
            log_info, losses = ended(data), []
            for _ in range(2):
                with torch.no_grad():
                    data = advantage(data)
                buffer.extend(data.reshape(-1))
                for batch in buffer:
                    loss = loss_module(batch)
                    losses.append(loss.select("loss_critic", "loss_entropy", "loss_objective").detach())
                    (loss["loss_objective"] + loss["loss_entropy"]).backward()
                    loss["loss_critic"].backward()
                    for optimiser in optimisers:
                        optimiser.step()
                        optimiser.zero_grad()
            log_info |= {f"train/{key}": value.mean().item() for key, value in torch.stack(losses).items()}
            for key, value in log_info.items():
                logger.log_scalar(key, value, frames)
            collector.update_policy_weights_()
        collector.shutdown()
    return weights_of(actor, critic)


def dqn(logger: Any, watch: Watch, seed: int = 0) -> Weights:
    """DQN: epsilon-greedy behind the network, random frames first, logs before it trains."""
    env = gym("CartPole-v1", seed)
    model = QValueActor(MLP(4, 2, num_cells=[16]), in_keys=["observation"], spec=env.action_spec_unbatched)
    greedy = EGreedyModule(annealing_num_steps=100, eps_init=1.0, eps_end=0.05, spec=model.spec)
    with watch(TensorDictSequential(model, greedy)) as watched:
        collector = Collector(
            env, watched.policy, frames_per_batch=20, total_frames=120, init_random_frames=40, **OPTIONS
        )
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=16)
        loss_module = DQNLoss(model, loss_function="l2", delay_value=True)
        loss_module.make_value_estimator(gamma=0.99)
        updater = HardUpdate(loss_module, value_network_update_interval=3)
        optimiser = torch.optim.Adam(loss_module.parameters(), lr=1e-2)
        frames = 0
        for data in collector:
            watched.step(data)
            data = data.reshape(-1)
            buffer.extend(data)
            frames += data.numel()
            greedy.step(data.numel())
            log_info = ended(data)
            if frames < 40:
                for key, value in log_info.items():
                    logger.log_scalar(key, value, step=frames)
                continue
            losses = []
            for _ in range(3):
                loss = loss_module(buffer.sample())["loss"]
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                updater.step()
                losses.append(loss.detach())
            log_info["train/q_loss"] = torch.stack(losses).mean().item()
            log_info["train/epsilon"] = greedy.eps
            for key, value in log_info.items():
                logger.log_scalar(key, value, step=frames)
            collector.update_policy_weights_()
        collector.shutdown()
    return weights_of(model)


def sac_parts(seed: int) -> tuple[TransformedEnv, Any, Any, Callable[[TensorDictBase], TensorDictBase]]:
    """Environment, actor, critic, and one update."""
    env = gym("Pendulum-v1", seed)
    actor = continuous_actor(env, log_prob=False)
    critic = ValueOperator(MLP(4, 1, num_cells=[16]), in_keys=["action", "observation"])
    loss_module = SACLoss(actor, critic, num_qvalue_nets=2, delay_qvalue=True)
    loss_module.make_value_estimator(gamma=0.99)
    updater = SoftUpdate(loss_module, eps=0.9)
    optimiser = torch.optim.Adam(loss_module.parameters(), lr=3e-3)

    def update(sample: TensorDictBase) -> TensorDictBase:
        losses = loss_module(sample)
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).sum().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        updater.step()
        return losses.detach().select("loss_actor", "loss_qvalue", "loss_alpha")

    return env, actor, loss_module, update


def sac(logger: Any, watch: Watch, seed: int = 0) -> Weights:
    """SAC: batches into a buffer, metrics in one call."""
    env, actor, loss_module, update = sac_parts(seed)
    with watch(actor) as watched:
        collector = Collector(
            env, watched.policy, frames_per_batch=20, total_frames=120, init_random_frames=40, **OPTIONS
        )
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(200), batch_size=16)
        frames = 0
        for data in collector:
            watched.step(data)
            collector.update_policy_weights_()
            data = data.reshape(-1)
            buffer.extend(data)
            frames += data.numel()
            metrics: dict[str, Any] = ended(data)
            if frames >= 40:
                losses = torch.stack([update(buffer.sample()) for _ in range(3)]).mean()
                metrics |= {f"train/{key.removeprefix('loss_')}_loss": value for key, value in losses.items()}
            logger.log_metrics(metrics, frames)
        collector.shutdown()
    return weights_of(actor, loss_module)


def sac_of_a_filling_buffer(logger: Any, watch: Watch, seed: int = 0) -> Weights:
    """SAC whose collector runs by itself and fills the buffer: there are no batches to hand over."""
    env, actor, loss_module, update = sac_parts(seed)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(2000), batch_size=16, shared=True)
    with watch(actor, buffer) as watched:
        collector = Collector(
            env, watched.policy, frames_per_batch=20, total_frames=-1, replay_buffer=buffer, extend_buffer=True,
            postproc=lambda data: data.reshape(-1), **OPTIONS,
        )  # fmt: skip
        collector.start()
        try:
            for number in range(6):
                while buffer.write_count < 40 * (number + 1):
                    time.sleep(0.01)
                collector.update_policy_weights_()
                losses = torch.stack([update(buffer.sample()) for _ in range(2)]).mean()
                watched.step(None)
                logger.log_metrics({f"train/{key}": value for key, value in losses.items()}, step=number)
        finally:
            collector.shutdown()
    return weights_of(actor, loss_module)


class Meet(EnvBase):
    """Two agents on a plane are paid for being near each other; each sees itself and the other."""

    def __init__(self, *, discrete: bool, copies: int = 4, seed: int = 0) -> None:
        super().__init__(batch_size=[copies])
        self._discrete, self._draws, group = discrete, torch.Generator().manual_seed(seed), (copies, 2)
        action = Categorical(4, shape=group) if discrete else Bounded(-1.0, 1.0, shape=(*group, 2))
        flag = Categorical(2, shape=(copies, 1), dtype=torch.bool)
        self.observation_spec = Composite(
            agents=Composite(observation=Unbounded((*group, 4)), shape=group),
            elapsed=Unbounded((copies, 1), dtype=torch.long), shape=(copies,),
        )  # fmt: skip
        self.action_spec = Composite(agents=Composite(action=action, shape=group), shape=(copies,))
        self.reward_spec = Composite(agents=Composite(reward=Unbounded((*group, 1)), shape=group), shape=(copies,))
        self.done_spec = Composite(done=flag, terminated=flag.clone(), shape=(copies,))

    def _seen(self, places: torch.Tensor, elapsed: torch.Tensor) -> TensorDict:
        seen = torch.cat([places, places.flip(-2)], -1)
        group = TensorDict({"observation": seen}, batch_size=[*self.batch_size, 2])
        return TensorDict({"agents": group, "elapsed": elapsed}, batch_size=self.batch_size)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        places = torch.randn(*self.batch_size, 2, 2, generator=self._draws)
        return self._seen(places, torch.zeros(*self.batch_size, 1, dtype=torch.long))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["agents", "action"]
        if self._discrete:
            action = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]])[action]
        places = tensordict["agents", "observation"][..., :2] + 0.2 * action
        elapsed = tensordict["elapsed"] + 1
        data = self._seen(places, elapsed)
        distance = (places[:, :1] - places[:, 1:]).norm(dim=-1, keepdim=True)
        data["agents", "reward"] = -distance.expand(*self.batch_size, 2, 1)
        data["done"] = elapsed >= 10
        data["terminated"] = torch.zeros_like(data["done"])
        return data

    def _set_seed(self, seed: int | None) -> None:
        self._draws.manual_seed(seed or 0)


def done_of_agents(data: TensorDictBase) -> TensorDictBase:
    """The scripts' postproc: each agent is done when the episode is."""
    for key in ("done", "terminated"):
        value = data["next", key].unsqueeze(-2)
        data["next", "agents", key] = value.expand(data["next", "agents", "reward"].shape)
    return data


def agents_of(logger: Any, watch: Watch, env: TransformedEnv, policy: Any, train: Callable[..., Any]) -> None:
    """The loop of the multi-agent scripts: their postproc, rows that stay open, and the row's end by hand."""
    with watch(policy) as watched:
        collector = Collector(
            env, watched.policy, frames_per_batch=80, total_frames=240, postproc=done_of_agents, **OPTIONS
        )
        frames = 0
        for number, data in enumerate(collector):
            watched.step(data)
            losses = train(data)
            collector.update_policy_weights_()
            frames += data.numel()
            metrics = {f"train/learner/{key}": value.mean().item() for key, value in losses.items()}
            metrics |= {"train/reward": data["next", "agents", "reward"].mean().item(), "train/total_frames": frames}
            if isinstance(logger, WandbLogger):
                logger.experiment.log(metrics, commit=False)
                logger.experiment.log({"eval/reward": float(number)}, commit=False)
                logger.experiment.log({}, commit=True)
            else:
                for key, value in (metrics | {"eval/reward": float(number)}).items():
                    logger.log_scalar(key, value, step=number)
        collector.shutdown()


def agents_env(seed: int, discrete: bool) -> TransformedEnv:
    env = Meet(discrete=discrete, seed=seed)
    return TransformedEnv(env, RewardSum(in_keys=[env.reward_key], out_keys=[("agents", "episode_reward")]))


AGENTS = {"done": ("agents", "done"), "terminated": ("agents", "terminated"), "reward": ("agents", "reward")}


def mappo(logger: Any, watch: Watch, seed: int = 0) -> Weights:
    """Multi-agent PPO with a central critic."""
    env = agents_env(seed, discrete=False)
    options = {"n_agents": 2, "share_params": True, "depth": 1, "num_cells": 16, "activation_class": nn.Tanh}
    net = nn.Sequential(MultiAgentMLP(4, 4, centralised=False, **options), NormalParamExtractor())
    keys = [("agents", "loc"), ("agents", "scale")]
    policy = ProbabilisticActor(
        TensorDictModule(net, in_keys=[("agents", "observation")], out_keys=keys), in_keys=keys,
        spec=env.full_action_spec_unbatched, out_keys=[env.action_key], distribution_class=TanhNormal,
        return_log_prob=True,
    )  # fmt: skip
    critic = ValueOperator(MultiAgentMLP(4, 1, centralised=True, **options), in_keys=[("agents", "observation")])
    loss_module = ClipPPOLoss(policy, critic, clip_epsilon=0.2, entropy_coeff=0.0, normalize_advantage=False)
    loss_module.set_keys(action=env.action_key, **AGENTS)
    loss_module.make_value_estimator(ValueEstimators.GAE, gamma=0.9, lmbda=0.9)
    optimiser = torch.optim.Adam(loss_module.parameters(), 3e-3)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(80), sampler=SamplerWithoutReplacement(), batch_size=40)

    def train(data: TensorDictBase) -> TensorDictBase:
        with torch.no_grad():
            loss_module.value_estimator(
                data, params=loss_module.critic_network_params, target_params=loss_module.target_critic_network_params
            )
        buffer.extend(data.reshape(-1))
        found = []
        for _ in range(4):
            losses = loss_module(buffer.sample())
            found.append(losses.detach().select("loss_objective", "loss_critic"))
            (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
            optimiser.step()
            optimiser.zero_grad()
        return torch.stack(found)

    agents_of(logger, watch, env, policy, train)
    return weights_of(policy, critic)


def iql(logger: Any, watch: Watch, seed: int = 0) -> Weights:
    """Independent Q-learning of agents."""
    env = agents_env(seed, discrete=True)
    net = MultiAgentMLP(4, 4, n_agents=2, centralised=False, share_params=True, depth=1, num_cells=16)
    value, chosen = ("agents", "action_value"), ("agents", "chosen_action_value")
    spec = env.full_action_spec_unbatched
    choose = QValueModule(
        action_value_key=value, out_keys=[env.action_key, value, chosen], spec=spec, action_space=None
    )
    qnet = TensorDictSequential(TensorDictModule(net, [("agents", "observation")], [value]), choose)
    greedy = EGreedyModule(eps_init=0.3, eps_end=0.0, annealing_num_steps=100, action_key=env.action_key, spec=spec)
    loss_module = DQNLoss(qnet, delay_value=True, action_space="categorical")
    loss_module.set_keys(action_value=value, action=env.action_key, value=chosen, **AGENTS)
    loss_module.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    updater = SoftUpdate(loss_module, eps=0.9)
    optimiser = torch.optim.Adam(loss_module.parameters(), 3e-3)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(80), sampler=SamplerWithoutReplacement(), batch_size=40)

    def train(data: TensorDictBase) -> TensorDictBase:
        buffer.extend(data.reshape(-1))
        found = []
        for _ in range(4):
            losses = loss_module(buffer.sample())
            found.append(losses.detach())
            losses["loss"].backward()
            optimiser.step()
            optimiser.zero_grad()
            updater.step()
        greedy.step(frames=data.numel())
        return torch.stack(found)

    agents_of(logger, watch, env, TensorDictSequential(qnet, greedy), train)
    return weights_of(qnet)


SCRIPTS: dict[str, Callable[..., Weights]] = {
    one.__name__: one for one in (ppo, dqn, sac, sac_of_a_filling_buffer, mappo, iql)
}

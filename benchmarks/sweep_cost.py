"""What sweeps cost: beside loops of rollouts and plain rows; what steering adds to a step; what common noise saves.

python -m benchmarks.sweep_cost
python -m benchmarks.sweep_cost --rounds 5

Process CPU time on one thread: where other programs want the processors as well, wall time counts them in.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymEnv, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from benchmarks.pairs import compare, measure
from tdhook_rl import SteeringVectors
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import make_actor
from tdhook_rl.examples.steer_at_eval import contrast
from tdhook_rl.experiments.checkpoints import load
from tdhook_rl.sweeps import SteeringVector, steering_sweep

SITES = ["module.0.module.1", "module.0.module.3", "module.0.module.5"]
ALPHAS = [0.1 * step for step in range(1, 12)]
CONTROLS, EPISODES, STEPS = 8, 64, 30


def line(text: str, ratio: float, budget: float, at_least: bool = False) -> None:
    kept = ratio >= budget if at_least else ratio <= budget
    print(f"{text}: {ratio:.2f} ({'at least' if at_least else 'at most'} {budget:g}: {'yes' if kept else 'NO'})")


def vectors() -> dict[str, SteeringVector]:
    draw = torch.Generator().manual_seed(0)
    return {path: SteeringVector(vector=torch.randn(64, generator=draw), path=path) for path in SITES}


def grid(rounds: int) -> None:
    """3 sites x 11 strengths x 8 controls x 64 episodes, beside a rollout of 64 environments for each condition."""
    actor, directions = make_actor(), vectors()
    conditions = len(SITES) * len(ALPHAS) * (1 + CONTROLS)

    def ours() -> None:
        steering_sweep(
            actor, CueCorners(max_steps=STEPS), directions, alphas=ALPHAS, controls=CONTROLS, episodes=EPISODES,
            max_steps=STEPS, progress=False,
        )  # fmt: skip

    def loop() -> None:
        env = CueCorners(batch_size=[EPISODES], max_steps=STEPS)
        for path, vector in directions.items():
            rows = torch.cat([vector.vector[None], vector.random_like(CONTROLS)])
            with torch.no_grad(), SteeringVectors(vector).prepare(actor) as policy:
                for row in rows:
                    policy.controls[f"steering.{path}"] = row
                    for alpha in ALPHAS:
                        policy.controls["steering.alpha"] = alpha
                        env.set_seed(0)
                        env.rollout(STEPS, policy, break_when_any_done=False)

    found = measure({"ours": ours, "loop": loop}, rounds)
    each = {name: float(torch.tensor(times).median()) for name, times in found.items()}
    print(f"{conditions} conditions x {EPISODES} episodes: {each['ours']:.2f} s, in loops {each['loop']:.2f} s")
    line("  times as fast as loops of rollouts", each["loop"] / each["ours"], 8.0, at_least=True)


def rows(rounds: int) -> None:
    """1,000 conditions of 16 episodes, beside as many rows that are not steered."""
    actor = make_actor()
    vector = vectors()[SITES[1]]

    def ours() -> None:
        steering_sweep(
            actor, CueCorners(max_steps=STEPS), vector, alphas=[0.1 * step for step in range(1, 101)], controls=9,
            episodes=16, max_steps=STEPS, progress=False,
        )  # fmt: skip

    def plain() -> None:
        env = CueCorners(max_steps=STEPS)
        resets = TensorDict({"_reset": torch.ones(16_000, 1, dtype=torch.bool)}, batch_size=[16_000])
        with torch.no_grad():
            start = env.reset(resets).exclude("_reset")
            env.rollout(STEPS, actor, auto_reset=False, tensordict=start, break_when_all_done=True)

    found = measure({"ours": ours, "plain": plain}, rounds)
    each = {name: float(torch.tensor(times).median()) for name, times in found.items()}
    print(f"1,000 conditions x 16 episodes: {each['ours']:.2f} s, as many plain rows {each['plain']:.2f} s")
    line("  of the time of plain rows", each["ours"] / each["plain"], 1.2)


def step(rounds: int) -> None:
    """A step of policy and 128 environments, with steering and without: vectorised ones, and Gymnasium's."""
    actor, path = make_actor(), SITES[1]
    vector = vectors()[path].vector
    by_hand = copy.deepcopy(actor)
    by_hand.get_submodule(path).register_forward_hook(lambda module, args, output: output + 0.5 * vector)
    policies = {
        "plain": actor,
        "by hand": by_hand,
        "steered": SteeringVectors({path: vector}, alpha=0.5).prepare(actor, return_context=False),
        "steered by row": SteeringVectors({path: vector}, alpha="alpha").prepare(actor, return_context=False),
    }
    corners = CueCorners(batch_size=[128], max_steps=STEPS)

    def playing(policy: nn.Module) -> Callable[[], None]:
        def play() -> None:
            start = corners.reset()
            start["alpha"] = torch.full((128,), 0.5)
            with torch.no_grad():
                corners.rollout(STEPS, policy, auto_reset=False, tensordict=start, break_when_any_done=False)

        return play

    show("in env.rollout of CueCorners", {name: playing(one) for name, one in policies.items()}, rounds * 8)
    del policies["steered by row"]
    runs = {name: collecting(corners, policy) for name, policy in policies.items()}
    show("in a collector of CueCorners", runs, rounds * 8)
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    cart_actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["logits"]), in_keys=["logits"],
        distribution_class=OneHotCategorical, return_log_prob=True,
    )  # fmt: skip
    carts = SerialEnv(128, partial(GymEnv, "CartPole-v1"))
    steered = SteeringVectors({"module.0.module.3": vector}, alpha=0.5).prepare(cart_actor, return_context=False)
    runs = {"plain": collecting(carts, cart_actor), "steered": collecting(carts, steered)}
    show("in a collector of CartPole", runs, rounds * 3)


def collecting(env: EnvBase, policy: nn.Module) -> Callable[[], object]:
    collector = Collector(
        env, policy, frames_per_batch=128 * STEPS, total_frames=-1, auto_register_policy_transforms=False
    )
    batches = iter(collector)
    return lambda: next(batches)


def show(where: str, runs: dict[str, Callable[[], object]], rounds: int) -> None:
    print(f"a step of 128 environments {where}")
    for ratio in compare(runs, {name: ["plain"] for name in runs if name != "plain"}, rounds)[1]:
        line(f"  {ratio.name}, of the time without", 1 / ratio.median, 1.05)


def noise() -> None:
    """How many episodes a small effect takes with common starts and noise, and without."""
    actor = load("cue_corners", 0).agent.actor
    sign = {"sign": lambda start: 1.0 - 2.0 * (start["concept", "paying_corner"] == 0)}
    for alpha in (0.1, 0.2, 0.5):
        played = []
        with set_exploration_type(ExplorationType.RANDOM):
            for seed in (0, 1):
                result = steering_sweep(
                    actor, CueCorners(), contrast(actor), alphas=[alpha], controls=0, episodes=2048, max_steps=STEPS,
                    progress=False, seed=seed, **sign,
                )  # fmt: skip
                played.append(result)
        one, other = played
        paired = one.of("return", alpha=alpha) - one.of("return")
        apart = other.of("return", alpha=alpha) - one.of("return")
        print(
            f"  return at alpha {alpha}: SD of a difference {float(paired.std()):.3f} with common noise, "
            f"{float(apart.std()):.3f} without: {float(apart.var() / paired.var()):.1f} times fewer episodes"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds_asked = parser.parse_args().rounds
    torch.set_num_threads(1)
    grid(rounds_asked)
    rows(rounds_asked)
    step(rounds_asked)
    noise()

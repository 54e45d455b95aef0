"""What sweeps cost: beside loops of rollouts and plain rows; what steering adds to a step; what common noise saves.

python -m benchmarks.sweep_cost
python -m benchmarks.sweep_cost --rounds 5

Process CPU time on one thread: where other programs want the processors as well, wall time counts them in. What common
noise saves is told in episodes, not in time.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymEnv, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.pairs import measure
from tdhook_rl import SteeringVectors
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import make_actor
from tdhook_rl.examples.steer_at_eval import contrast
from tdhook_rl.experiments.checkpoints import load
from tdhook_rl.sweeps import SteeringVector, steering_sweep

SITES = ["module.0.module.1", "module.0.module.3", "module.0.module.5"]
ALPHAS = [0.1 * step for step in range(1, 12)]
CONTROLS, EPISODES, STEPS = 8, 64, 30
LOOPS, ROWS = "loops of rollouts", "plain rows"


def vectors() -> dict[str, SteeringVector]:
    draw = torch.Generator().manual_seed(0)
    return {path: SteeringVector(vector=torch.randn(64, generator=draw), path=path) for path in SITES}


def grid(rounds: int) -> Iterator[Figure]:
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

    found = measure({"steering_sweep": ours, LOOPS: loop}, rounds)
    case = f"{conditions} x {EPISODES} episodes"
    yield from figures_of("a sweep", case, "steering_sweep", found, [Budget(LOOPS, 1 / 8, "8 times as fast")])


def rows(rounds: int) -> Iterator[Figure]:
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

    found = measure({"steering_sweep": ours, ROWS: plain}, rounds)
    yield from figures_of("a sweep", "1,000 x 16 episodes", "steering_sweep", found, [Budget(ROWS, 1.2)])


def step(rounds: int) -> Iterator[Figure]:
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

    runs = {name: playing(one) for name, one in policies.items()}
    yield from beside_plain("CueCorners, env.rollout", runs, rounds * 8)
    del policies["steered by row"]
    runs = {name: collecting(corners, policy) for name, policy in policies.items()}
    yield from beside_plain("CueCorners, a collector", runs, rounds * 8)
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    cart_actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["logits"]), in_keys=["logits"],
        distribution_class=OneHotCategorical, return_log_prob=True,
    )  # fmt: skip
    carts = SerialEnv(128, partial(GymEnv, "CartPole-v1"))
    steered = SteeringVectors({"module.0.module.3": vector}, alpha=0.5).prepare(cart_actor, return_context=False)
    runs = {"plain": collecting(carts, cart_actor), "steered": collecting(carts, steered)}
    yield from beside_plain("CartPole, a collector", runs, rounds * 3)


def collecting(env: EnvBase, policy: nn.Module) -> Callable[[], object]:
    collector = Collector(
        env, policy, frames_per_batch=128 * STEPS, total_frames=-1, auto_register_policy_transforms=False
    )
    batches = iter(collector)
    return lambda: next(batches)


def beside_plain(case: str, runs: dict[str, Callable[[], object]], rounds: int) -> Iterator[Figure]:
    found = measure(runs, rounds)
    for name in runs:
        if name.startswith("steered"):
            budgets = [Budget("plain", 1.05), Budget("by hand")]
            yield from figures_of("a step of 128", case, name, found, budgets)


def figures(rounds: int = 3) -> Iterator[Figure]:
    """Sweeps beside loops and plain rows, then steps with steering beside those without and with a hook by hand."""
    for measured in (grid, rows, step):
        yield from measured(rounds)


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
    show(figures(rounds_asked))
    noise()

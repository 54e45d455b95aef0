"""The demo: train an agent in front of you, and ask what it looks at, what it knows, and change its mind.

PPO learns CueCorners with the hooked policy in the collector: activations, saliencies and a probe that is
refitted and read out while the agent learns, all of it logged by a monitor. Every few batches the same states are
looked at: what can be read from the network now. Then a steering vector is extracted from paired states, its effect
measured against random vectors of equal norm, and episodes are played with it and without. Everything goes into one
folder.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor

from tdhook_rl import (
    ActivationCaching,
    Compose,
    ControlRecord,
    LinearProbe,
    ProbeReadout,
    Saliency,
    SteeringVectors,
    targets,
)
from tdhook_rl.artifacts import save_artifact
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2, PPO, make_actor, make_critic
from tdhook_rl.examples.steer_at_eval import contrast
from tdhook_rl.report import Monitor, player
from tdhook_rl.rollout import (
    EPISODE,
    GroupSplit,
    NetworkDiagnostics,
    OnlineProbe,
    alike_episodes,
    ignore_interrupts,
    starting_workers,
)
from tdhook_rl.statistics import Interval, grouped_mean
from tdhook_rl.sweeps import SteeringVector, SweepResult, first_episode, steering_sweep

ENVS = 128
BATCH = 2048
#: Every how many batches the same states are looked at; in the beginning at each, as the agent learns quickly.
LOOK = 4
EPISODES = 1024
CONCEPTS = ("xor", "unneeded_xor")
#: Which state it is, apart from the time: without this grouping the held-out rows repeat the training rows.
STATE = [("concept", "cell"), ("concept", "bits")]

Curve = list[tuple[int, float]]
Known = list[tuple[int, Interval]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The knobs of the demo."""

    frames: int = 81_920
    seed: int = 0
    workers: int = 0
    logger: str = "wandb"

    def __post_init__(self) -> None:
        if self.frames < BATCH:
            raise InputError(f"--frames must be at least one batch of {BATCH}, got {self.frames}")
        if self.workers < 0 or (self.workers and ENVS % self.workers):
            raise InputError(
                f"--workers is 0 (collect in this process) or a number that divides the {ENVS} environments "
                f"(1, 2, 4, 8, ...), got {self.workers}"
            )


@dataclass
class Findings:
    """What the demo measured.

    Attributes:
        success: of the trained agent, in fresh episodes.
        behaviour: the success in each batch, by frames.
        known: what probes read of each concept in the same states, by the frames that the network was trained on; at 0
            the untrained network.
        lights: the mean absolute gradient of each light, by network.
        planes: of every cell of the observation, ``(3, 6, 5)``, in the trained network.
        response: to the steering vector.
        episode: the longest of those that were played without it.
    """

    success: Interval | None = None
    behaviour: Curve = field(default_factory=list)
    known: dict[str, Known] = field(default_factory=dict)
    lights: dict[str, list[Interval]] = field(default_factory=dict)
    planes: Tensor | None = None
    response: SweepResult | None = None
    vector: SteeringVector | None = None
    episode: Any = None
    seconds: float = 0.0

    @property
    def saliency_ratio(self) -> float:
        """What the two lights that matter have of the gradient, over the two that do not."""
        needed, other = self.lights["trained"][:2], self.lights["trained"][2:]
        return sum(map(float, needed)) / sum(map(float, other))


def run(
    settings: Settings, folder: Path, logger: Any = None, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Findings:
    """Train, probe, explain, steer and play.

    Args:
        settings: the knobs.
        folder: where the log, the probes, the vector, the weights and the player go.
        logger: beside the log in the folder, as of :class:`Monitor`.
        progress: called with what is being done, and how many of how many frames are through.
    """
    start = time.monotonic()
    torch.manual_seed(settings.seed)
    actor = make_actor()
    untrained = copy.deepcopy(actor)
    found = Findings()
    states = _states(settings)
    blank = LinearProbe(weight=torch.zeros(2, 64), bias=torch.zeros(2), path=FC2)
    method = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()), ProbeReadout({"xor": blank}))
    lights = CueCorners.light_features().tolist()
    probes = {name: _probe(GroupSplit(EPISODE, STATE, held_out=0.3), name, decay=0.5) for name in CONCEPTS}
    with method.prepare(actor) as policy, ActivationCaching(FC2).prepare(untrained) as reference:
        monitor = Monitor(
            policy,
            logger,
            folder=folder,
            env=CueCorners(),
            groups={"needed": lights[:2], "not needed": lights[2:]},
            # The states that the agent meets change as it learns, so these scores are of other states than `known`.
            probes={f"{name}_on_policy": probe for name, probe in probes.items()},
            untrained=reference,
            diagnostics=NetworkDiagnostics(actor, sites=[FC2]),
            seed=settings.seed,
            experiment="demo",
            config=asdict(settings),
        )
        with monitor:
            _train(settings, actor, policy, states, probes["xor"], monitor, found, progress)
            progress("looking at fresh episodes", settings.frames, settings.frames)
            _examine(settings, actor, untrained, states, folder, found)
            progress("steering", settings.frames, settings.frames)
            _steer(settings, actor, folder, found, monitor)
            monitor.log(_summary(found))
    progress("playing episodes", settings.frames, settings.frames)
    _play(settings, actor, folder, found)
    save_artifact(folder / "actor", "policy", actor.state_dict(), asdict(settings))
    found.seconds = time.monotonic() - start
    return found


def _states(settings: Settings) -> TensorDictBase:
    """Rows of random behaviour, which visits every state: probes are not scored on the paths of one policy."""
    env = CueCorners(batch_size=[EPISODES], seed=settings.seed + 10_000)
    with torch.random.fork_rng(devices=[]):  # random actions are drawn from torch's generator
        torch.manual_seed(settings.seed + 10_000)
        wandered = env.rollout(env.max_steps, break_when_any_done=False)
    wandered["episode"] = torch.arange(EPISODES)[:, None].expand(wandered.batch_size)
    return wandered.select("observation", "concept", "action", "episode")[first_episode(wandered)]


def _probe(split: GroupSplit, concept: str, decay: float = 1.0) -> OnlineProbe:
    # With a decay, as the network moves: old activations count for less.
    return OnlineProbe(features=("cache", FC2), label=("concept", concept), split=split, decay=decay)


def _train(
    settings: Settings,
    actor: ProbabilisticActor,
    policy: ProbabilisticActor,
    states: TensorDictBase,
    probe: OnlineProbe,
    monitor: Monitor,
    found: Findings,
    progress: Callable[[str, int, int], None],
) -> None:
    ppo = PPO(actor, make_critic())
    _look(actor, states, 0, found)
    collector = _collector(settings, policy)
    try:
        for number, data in enumerate(collector, start=1):
            monitor.step(data)  # before the update: explained by the network that acted
            probe.push(policy.controls, "probe.xor")
            metrics = _measure(data)
            found.behaviour.append((monitor.frames, metrics["success"]))
            ppo.update(data)
            collector.update_policy_weights_()
            if number < LOOK or number % LOOK == 0 or monitor.frames + BATCH > settings.frames:
                metrics |= _look(actor, states, monitor.frames, found)
            monitor.log(metrics)
            read = float(found.known["xor"][-1][1])
            progress(f"training  success {metrics['success']:.2f}  xor probe {read:.2f}", monitor.frames,
                     settings.frames)  # fmt: skip
    finally:
        collector.shutdown()


def _look(actor: ProbabilisticActor, states: TensorDictBase, frames: int, found: Findings) -> dict[str, float]:
    """What can be read of the concepts in the same states, now."""
    with ActivationCaching(FC2).prepare(actor) as hooked:
        seen = hooked.annotate(states, on_mismatch="ignore")
    numbers: dict[str, float] = {}
    for name in CONCEPTS:
        score = _fitted(seen, name).scores["accuracy"]
        found.known.setdefault(name, []).append((frames, score))
        numbers |= {f"known.{name}": score.estimate, f"known.{name}_low": score.low, f"known.{name}_high": score.high}
    return numbers


def _fitted(seen: TensorDictBase, concept: str) -> OnlineProbe:
    """A probe on some episodes and states, scored on others."""
    probe = _probe(GroupSplit("episode", STATE, held_out=0.3, seed=1), concept)
    probe.update(seen)
    return probe


def _collector(settings: Settings, policy: ProbabilisticActor) -> Any:
    common: dict[str, Any] = {
        "frames_per_batch": BATCH,
        "total_frames": settings.frames // BATCH * BATCH,
        "postproc": policy.annotate,
        "auto_register_policy_transforms": False,
    }
    if not settings.workers:
        return Collector(CueCorners(batch_size=[ENVS], seed=settings.seed), policy, **common)
    share = ENVS // settings.workers
    makers = [
        partial(_worker_env, batch_size=[share], seed=settings.seed * 1000 + worker)
        for worker in range(settings.workers)
    ]
    with starting_workers():
        return MultiSyncCollector(makers, policy, cat_results=0, **common)


def _worker_env(**options: Any) -> CueCorners:
    ignore_interrupts()
    return CueCorners(**options)


def _measure(data: TensorDictBase) -> dict[str, float]:
    reward, ended = data["next", "reward"], data["next", "done"]
    readout = data["probe", "xor"].argmax(-1) == data["concept", "xor"]
    return {
        "success": float((reward[ended] > 0).float().mean()) if bool(ended.any()) else float("nan"),
        "reward": float(reward.mean()),
        "readout.xor": float(readout.float().mean()),
    }


def _examine(
    settings: Settings,
    actor: ProbabilisticActor,
    untrained: ProbabilisticActor,
    states: TensorDictBase,
    folder: Path,
    found: Findings,
) -> None:
    """Success in fresh episodes, and the saliency of both networks in the same states; the probes are kept."""
    env = CueCorners(batch_size=[EPISODES], seed=settings.seed + 10_001)
    with torch.no_grad():
        played = env.rollout(env.max_steps, actor, break_when_any_done=False)
    won = outcomes(played)["cued"]
    found.success = grouped_mean(won.double(), bounds=(0.0, 1.0), method="t")
    method = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))
    for network, policy in (("trained", actor), ("untrained", untrained)):
        with method.prepare(policy) as hooked:
            seen = hooked.annotate(states, on_mismatch="ignore")
        sizes = seen["attr", "observation"].abs()
        of_lights = sizes[:, CueCorners.light_features()].T
        found.lights[network] = [grouped_mean(one, states["episode"], method="t") for one in of_lights]
        if network == "trained":
            found.planes = sizes.mean(0).reshape(3, 6, 5)
            for name in CONCEPTS:
                fitted = _fitted(seen, name)
                score = fitted.scores["accuracy"]
                fitted.probe.facts.update(accuracy=score.estimate, low=score.low, high=score.high, groups=score.groups)
                fitted.probe.save(folder / f"probe_{name}")


def _steer(settings: Settings, actor: ProbabilisticActor, folder: Path, found: Findings, monitor: Monitor) -> None:
    vector = contrast(actor)
    vector.save(folder / "vector_corner_a")
    monitor.save("vector.corner_a", vector)
    found.vector = vector
    with set_exploration_type(ExplorationType.RANDOM):
        found.response = steering_sweep(
            actor, CueCorners(), vector, outcomes=outcomes, sign=_away, controls=8, episodes=512, max_steps=30,
            seed=settings.seed + 20_000, progress=False,
        )  # fmt: skip
    monitor.log({"steering": found.response})


def _away(start: TensorDictBase) -> Tensor:
    """The vector points towards corner A; away from the corner that pays is -1 where A pays."""
    return torch.where(start["concept", "paying_corner"] == 0, -1.0, 1.0)


def _play(settings: Settings, actor: ProbabilisticActor, folder: Path, found: Findings) -> None:
    """Eight episodes with the vector and without, from the same starts with the same draws, for the player."""
    env, vector = CueCorners(batch_size=[8]), found.vector
    method = Compose(
        SteeringVectors({vector.path: vector.vector}, alpha=0.0),
        ControlRecord(["steering.alpha"]),
        ActivationCaching(FC2),
        ProbeReadout({"xor": LinearProbe.load(folder / "probe_xor")}),
        Saliency(target=targets.chosen_logit()),
    )
    played = {}
    with method.prepare(actor) as policy:
        for name, alpha in (("not steered", 0.0), ("steered to corner A", 1.0)):
            policy.controls["steering.alpha"] = alpha
            played[name] = alike_episodes(policy, env, episodes=8, max_steps=env.max_steps, seed=settings.seed)
        found.episode = max(played["not steered"], key=len)
        player(played, policy=policy, env=env, title="Eight episodes, steered and not").record(folder)


def _summary(found: Findings) -> dict[str, float]:
    numbers = {"final.success": float(found.success), "final.saliency_ratio": found.saliency_ratio}
    numbers |= {f"final.probe.{name}": float(curve[-1][1]) for name, curve in found.known.items()}
    for outcome in ("other", "cued"):
        rates = zip(found.response.alphas(), found.response.response(outcome), strict=True)
        numbers |= {f"final.steer.{outcome}.{alpha}": rate.estimate for alpha, rate in rates}
    return numbers


def outcomes(rollout: TensorDictBase) -> dict[str, Tensor]:
    """Whether the first episode of each row ended at the goal that pays, or at the other."""
    reward, first = rollout["next", "reward"].squeeze(-1), first_episode(rollout)
    return {"cued": ((reward > 0.5) & first).any(-1), "other": ((reward < -0.5) & first).any(-1)}

"""The demo: train an agent in front of you, and ask what it looks at, what it knows, and change its mind.

PPO learns CueCorners with the hooked policy in the collector: activations, saliencies and a probe that is
refitted and read out while the agent learns. Then a steering vector is extracted from paired states and its
effect measured against random vectors of equal norm. Everything goes into one folder.
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
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, Compose, LinearProbe, ProbeReadout, Saliency, targets
from tdhook_rl.artifacts import save_artifact
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2, PPO, make_actor, make_critic
from tdhook_rl.examples.steer_at_eval import contrast
from tdhook_rl.report import Sinks
from tdhook_rl.rollout import EPISODE, GroupSplit, OnlineProbe, ignore_interrupts, starting_workers
from tdhook_rl.sweeps import DoseResponse, SteeringVector, dose_response, first_episode

__all__ = ["Findings", "Settings", "outcomes", "run"]

ENVS = 128
BATCH = 2048
CONCEPTS = {"xor": "needed", "unneeded_xor": "not needed"}
#: Which state it is, apart from the time: without this grouping the held-out rows repeat the training rows.
STATE = [("concept", "cell"), ("concept", "bits")]

Curves = dict[str, list[tuple[int, float]]]


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
    """What the demo measured."""

    success: float = 0.0
    probes: dict[str, dict[str, float]] = field(default_factory=dict)  # concept -> trained / untrained accuracy
    saliency: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # network -> lights (4,), planes (3, 6, 5)
    response: DoseResponse | None = None
    vector: SteeringVector | None = None
    curves: Curves = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def saliency_ratio(self) -> float:
        lights = self.saliency["trained"]["lights"]
        return float(lights[:2].mean() / lights[2:].mean())


def run(
    settings: Settings, folder: Path, sinks: Sinks, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Findings:
    """Train, probe, explain and steer.

    Args:
        settings: the knobs.
        folder: where the probe, the vector and the weights are saved.
        sinks: where measurements are streamed.
        progress: called with what is being done, and how many of how many frames are through.
    """
    start = time.monotonic()
    torch.manual_seed(settings.seed)
    actor = make_actor()
    untrained = copy.deepcopy(actor)
    found = Findings()
    _train(settings, actor, untrained, sinks, found, progress)
    progress("probing fresh episodes", settings.frames, settings.frames)
    _examine(settings, actor, untrained, folder, found)
    progress("steering", settings.frames, settings.frames)
    _steer(settings, actor, folder, found)
    save_artifact(folder / "actor", "policy", actor.state_dict(), asdict(settings))
    summary = {"final.success": found.success, "final.saliency_ratio": found.saliency_ratio}
    summary |= {f"final.probe.{name}": scores["trained"] for name, scores in found.probes.items()}
    for outcome in ("other", "cued"):
        rates = found.response.of_vector(outcome).tolist()
        summary |= {f"final.steer.{outcome}.{a}": rate for a, rate in zip(found.response.alphas, rates, strict=True)}
    sinks.log(summary, settings.frames)
    found.seconds = time.monotonic() - start
    return found


def _train(
    settings: Settings,
    actor: ProbabilisticActor,
    untrained: ProbabilisticActor,
    sinks: Sinks,
    found: Findings,
    progress: Callable[[str, int, int], None],
) -> None:
    ppo = PPO(actor, make_critic())
    probes = {
        (name, network): OnlineProbe(
            features=("cache", FC2),
            label=("concept", name),
            split=GroupSplit(EPISODE, STATE, held_out=0.3),
            decay=0.5,  # the network moves: old activations count for less
        )
        for name in CONCEPTS
        for network in ("trained", "untrained")
    }
    blank = LinearProbe(weight=torch.zeros(2, 64), bias=torch.zeros(2), path=FC2)
    method = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()), ProbeReadout({"xor": blank}))
    with method.prepare(actor) as policy, ActivationCaching(FC2).prepare(untrained) as reference:
        collector = _collector(settings, policy)
        frames = 0
        try:
            for data in collector:
                frames += data.numel()
                metrics = _measure(data)
                states = reference.annotate(data.select("observation", "concept", "collector"))
                for (name, network), probe in probes.items():
                    scores = probe.update(data if network == "trained" else states)
                    metrics[f"probe.{name}.{network}"] = scores["accuracy"]
                probes["xor", "trained"].push(policy.controls, "probe.xor")
                sinks.log(metrics, frames)
                for name, value in metrics.items():
                    found.curves.setdefault(name, []).append((frames, value))
                ppo.update(data)
                collector.update_policy_weights_()
                success, accuracy = metrics["success"], metrics["probe.xor.trained"]
                progress(f"training  success {success:.2f}  xor probe {accuracy:.2f}", frames, settings.frames)
        finally:
            collector.shutdown()


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
    lights = data["attr", "observation"].abs()[..., CueCorners.light_features()].flatten(0, -2).mean(0)
    readout = data["probe", "xor"].argmax(-1) == data["concept", "xor"]
    return {
        "success": float((reward[ended] > 0).float().mean()) if bool(ended.any()) else float("nan"),
        "reward": float(reward.mean()),
        "readout.xor": float(readout.float().mean()),
        "saliency.relevant": float(lights[:2].mean()),
        "saliency.irrelevant": float(lights[2:].mean()),
    }


def _examine(
    settings: Settings, actor: ProbabilisticActor, untrained: ProbabilisticActor, folder: Path, found: Findings
) -> None:
    """Fresh episodes: success, probes on held-out episodes and states, and saliency of both networks."""
    episodes = 1024
    env = CueCorners(batch_size=[episodes], seed=settings.seed + 10_000)
    with torch.no_grad():
        played = env.rollout(env.max_steps, actor, break_when_any_done=False)
    found.success = float(outcomes(played, first_episode(played))["cued"].float().mean())
    # Random behaviour visits every state, so that probes are not scored on the paths of one policy.
    wandered = env.rollout(env.max_steps, break_when_any_done=False)
    wandered["episode"] = torch.arange(episodes)[:, None].expand(wandered.batch_size)
    data = wandered.select("observation", "concept", "action", "episode")[first_episode(wandered)]
    method = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))
    for network, policy in (("trained", actor), ("untrained", untrained)):
        with method.prepare(policy) as hooked:
            seen = hooked.annotate(data)
        mean = seen["attr", "observation"].abs().mean(0)
        found.saliency[network] = {"lights": mean[CueCorners.light_features()], "planes": mean.reshape(3, 6, 5)}
        for name in CONCEPTS:
            probe = OnlineProbe(
                features=("cache", FC2),
                label=("concept", name),
                split=GroupSplit("episode", STATE, held_out=0.3, seed=1),
            )
            scores = probe.update(seen)
            found.probes.setdefault(name, {})[network] = scores["accuracy"]
            if network == "trained":
                probe.probe.facts.update({key: value for key, value in scores.items() if value == value})
                probe.probe.save(folder / f"probe_{name}")


def _steer(settings: Settings, actor: ProbabilisticActor, folder: Path, found: Findings) -> None:
    vector = contrast(actor)
    vector.save(folder / "vector_corner_a")
    found.vector = vector
    found.response = dose_response(
        actor,
        CueCorners(),
        vector,
        outcomes=outcomes,
        # The vector points towards corner A; away from the corner that pays is -1 where A pays.
        sign=lambda start: torch.where(start["concept", "paying_corner"] == 0, -1.0, 1.0),
        controls=8,
        episodes=512,
        max_steps=30,
        seed=settings.seed + 20_000,
    )


def outcomes(rollout: TensorDictBase, first: Tensor) -> dict[str, Tensor]:
    """Whether the first episode of each row ended at the goal that pays, or at the other."""
    reward = rollout["next", "reward"].squeeze(-1)
    return {"cued": ((reward > 0.5) & first).any(-1), "other": ((reward < -0.5) & first).any(-1)}

"""What the tests of collectors share: one policy with five methods on it, and an oracle that knows every version of it.

A run collects, changes the weights and the controls on the way, and remembers each version. A row of data must then
be, in all that is written in it, what one of these versions computes from the observation of the row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.collectors import Collector

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
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor

ALPHA = 0.5
LIGHT = 61
VECTOR = torch.linspace(-1, 1, 64)
PROBES = [
    LinearProbe(weight=torch.linspace(-1, 1, 128).reshape(2, 64) * scale, bias=torch.zeros(2), path=FC2)
    for scale in (1.0, -1.0)
]


def lit(rows: TensorDictBase) -> Tensor:
    """Whether one of the lights is on, which is when the policy is steered."""
    return rows["observation"][..., LIGHT] > 0.5


def everything() -> Compose:
    return Compose(
        ActivationCaching(FC2),
        Saliency(target=targets.taken_action_log_prob(), when="step", attribution_key="live"),
        ProbeReadout({"x": PROBES[0]}),
        SteeringVectors({FC2: VECTOR}, alpha=ALPHA, when=lit),
        ControlRecord(),
        Saliency(target=targets.taken_action_log_prob()),
    )


def env_functions(count: int = 2, batch_size: tuple[int, ...] = (2,)) -> list[Callable[[], CueCorners]]:
    return [partial(CueCorners, batch_size=batch_size, max_steps=4, seed=seed) for seed in range(count)]


def prepared_actor() -> nn.Module:
    """A hooked policy made where it is called: in a worker, when it is a ``policy_factory``."""
    torch.manual_seed(0)
    return everything().prepare(make_actor(), return_context=False)


@dataclass
class Learner:
    """The learner's actor, the hooked policy, and every version that the weights have had."""

    actor: nn.Module = field(default_factory=make_actor)
    policy: nn.Module = None  # type: ignore[assignment]
    versions: list[nn.Sequential] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.policy is None:
            self.policy = everything().prepare(self.actor, return_context=False)
        self.remember()

    def remember(self) -> None:
        net = copy.deepcopy(self.actor.module[0].module)
        self.versions.append(net.requires_grad_(False))

    def step(self) -> None:
        """What an optimiser would do."""
        with torch.no_grad():
            for parameter in self.actor.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.remember()


def logits_of(net: nn.Sequential, data: TensorDictBase) -> tuple[Tensor, Tensor]:
    """The hidden activation, and the logits as steered by what the row says was in force."""
    hidden = net[:4](data["observation"])
    alpha = data["control", "steering.alpha"] * data["steered", "steering"]
    return hidden, net[4:](hidden + alpha.unsqueeze(-1) * VECTOR)


def version_of(data: TensorDictBase, versions: list[nn.Sequential]) -> Tensor:
    """Which version acted in each row, ``(rows,)``; -1 where it was none of them."""
    found = torch.full(data.batch_size, -1)
    for index, net in enumerate(versions):
        same = torch.isclose(data["logits"], logits_of(net, data)[1], rtol=1e-4, atol=1e-5).all(-1)
        found[same] = index
    return found


def expected(data: TensorDictBase, net: nn.Sequential) -> dict[str, Tensor]:
    """What a version computes from the observations of the rows: activation, probe, gradient."""
    observation = data["observation"].clone().requires_grad_()
    rows = data.select("action", "control", "steered").set("observation", observation)
    hidden, logits = logits_of(net, rows)
    chosen = logits.log_softmax(-1).gather(-1, data["action"].unsqueeze(-1)).sum()
    (gradient,) = torch.autograd.grad(chosen, observation)
    hidden = hidden.detach()
    readings = torch.stack([probe.probabilities(hidden) for probe in PROBES])
    which = data["control", "probe.x.weight"].clamp_max(1)
    return {
        "cache": hidden,
        "probe": torch.where(which.unsqueeze(-1) == 0, readings[0], readings[1]),
        "gradient": gradient,
    }


def rows_of(batches: list[TensorDictBase]) -> TensorDict:
    """All batches as rows, padding left out."""
    flat = [batch.reshape(-1) for batch in batches]
    flat = [batch[batch["collector", "mask"]] if ("collector", "mask") in batch.keys(True) else batch for batch in flat]
    return torch.cat([batch.to_tensordict() for batch in flat])


RESULTS = {
    "caching": ("cache", ("cache", FC2)),
    "probe readout": ("probe", ("probe", "x")),
    "saliency per step": ("gradient", ("live", "observation")),
    "saliency per batch": ("gradient", ("attr", "observation")),
}


def check(data: TensorDictBase, versions: list[nn.Sequential], what: str, allowed: int = 0) -> None:
    """Every row holds what the version that acted computes, for one of ``RESULTS`` or for ``"steering"``.

    Args:
        data: rows.
        versions: the versions of the weights.
        what: the method.
        allowed: rows that may straddle two versions, because the weights changed during the step.
    """
    which = version_of(data, versions)
    assert int((which < 0).sum()) <= allowed, f"{int((which < 0).sum())} rows were computed by no version"
    steered = (data["control", "steering.alpha"] != 0) & lit(data)
    assert bool(steered.any())
    assert torch.equal(data["steered", "steering"], steered)
    if what == "steering":
        return
    name, key = RESULTS[what]
    assert bool(data["computed", key[0]].all())
    wrong = 0
    for index in which.unique().tolist():
        if index < 0:
            continue
        rows = data[which == index]
        found, wanted = rows[key], expected(rows, versions[index])[name]
        wrong += int((~torch.isclose(found, wanted, rtol=1e-3, atol=1e-5).all(-1)).sum())
    assert wrong <= allowed, f"{wrong} of {len(data)} rows of {what} are not what the network computes"


def make_collector(policy: Any, *, batch_size: tuple[int, ...] = (2,), **options: Any) -> Collector:
    """A collector of CueCorners in this process."""
    options = {"frames_per_batch": 32, "total_frames": 128, "auto_register_policy_transforms": False} | options
    return Collector(env_functions(1, batch_size)[0](), policy, **options)


def check_all(learner: Learner, rows: TensorDictBase) -> None:
    """Everything that a learner's policy wrote, and its steering."""
    for what in ("steering", *RESULTS):
        check(rows, learner.versions, what)

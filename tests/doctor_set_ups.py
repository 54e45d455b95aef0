"""Policies and environments that do what they should not, for the tests of the doctor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_rl import ActivationCaching, Compose, Saliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2
from tdhook_rl.rollout import Finding, Report

FEATURES = CueCorners.observation_features


class Changed(CueCorners):
    """CueCorners of which each step is changed by ``change(step, data)``; steps count from 0."""

    def __init__(self, change: Callable[[int, TensorDictBase], Any], **options: Any) -> None:
        super().__init__(batch_size=[2], seed=0, **options)
        self.change = change
        self.count = 0

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        data = super()._step(tensordict)
        self.change(self.count, data)
        self.count += 1
        return data


class Acting(TensorDictModule):
    """A policy that always goes up, and whose forward may do what a policy should not."""

    def __init__(self, also: Callable[[int, TensorDictBase], Any], out_keys: tuple = ()) -> None:
        super().__init__(nn.Linear(FEATURES, 4), in_keys=["observation"], out_keys=["logits"])
        self.also = also
        self.count = 0
        self.out_keys = ["logits", "action", *out_keys]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        logits = self.module(tensordict["observation"])
        tensordict.update({"logits": logits, "action": torch.zeros_like(logits[..., 0], dtype=torch.long)})
        self.also(self.count, tensordict)
        self.count += 1
        return tensordict


class Greedy(nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


class Overflow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sign() * torch.inf


def env() -> CueCorners:
    return CueCorners(batch_size=[2], seed=0)


def found(report: Report, check: str, level: str) -> Finding:
    """The one finding of a check and a level."""
    matching = [one for one in report.findings if (one.check, one.level) == (check, level)]
    assert len(matching) == 1, str(report)
    return matching[0]


def hooked(policy: nn.Module, *methods: Any) -> Any:
    return Compose(*(methods or (ActivationCaching(FC2), Saliency()))).prepare(policy, return_context=False)

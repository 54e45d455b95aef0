"""Policies that are steered by hooks of torch, to hold interventions against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.envs import Compose as EnvCompose
from torchrl.envs import InitTracker, StepCounter, TransformedEnv

from tdhook_rl import LinearProbe, SteeringVectors
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2
from tdhook_rl.latent import AtSteps, ProbeGate
from tests.policies import CASES, POLICIES, Case

CASE = CASES["categorical"]
SITE = CASE.site
BATCHES = [(), (5,), (3, 2)]


def by_case(function: Callable[[Case, tuple[int, ...]], None]) -> Callable[..., None]:
    """On every policy, at every batch shape."""
    mark = pytest.mark.parametrize("batch", BATCHES, ids=str)
    return mark(pytest.mark.parametrize("case", POLICIES.values(), ids=list(POLICIES))(function))


def some_batch(case: Case, batch: tuple[int, ...]) -> None:
    """Skip batch shapes that the policy itself does not take."""
    if case in [POLICIES[name] for name in ("batch_norm", "batch_norm_eval", "bytes")] and len(batch) != 1:
        pytest.skip("the policy takes one batch dimension")


def positive(case: Case, rows: TensorDictBase) -> Tensor:
    """A condition that about half of the rows of a case fulfil."""
    values = rows[case.key].double().reshape(*rows.batch_size, -1)
    return values.sum(-1) > (0 if values.min() < 0 else 127.5 * values.shape[-1])


def ramp(case: Case, rows: TensorDictBase) -> Tensor:
    """A strength for each row, 0 in some."""
    return rows[case.key].double().reshape(*rows.batch_size, -1).mean(-1).sin().clamp_min(0)


def by_hand(policy: nn.Module, case: Case, change: Callable[[Tensor, Callable], Tensor], batch: tuple) -> nn.Module:
    """A copy of a policy with a hook of torch; ``change(value, spread)`` is given a way to spread numbers of rows."""
    policy = copy.deepcopy(policy)

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        lead = batch if value.shape[: len(batch)] == batch else (torch.Size(batch).numel(),)
        rest = (1,) * (value.ndim - len(lead))
        changed = change(value, lambda rows: rows.reshape(*lead, *rest))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    policy.get_submodule(case.site).register_forward_hook(hook)
    return policy


def acting(policy: nn.Module, data: TensorDict) -> TensorDict:
    torch.manual_seed(4)
    return policy(data.clone())


def require_equal(found: TensorDictBase, expected: TensorDictBase, keys: Any) -> None:
    for key in keys:
        torch.testing.assert_close(found[key], expected[key], equal_nan=True)


def counted(*batch: int, max_steps: int = 6, seed: int = 0) -> TransformedEnv:
    env = CueCorners(batch_size=batch, max_steps=max_steps, seed=seed)
    return TransformedEnv(env, EnvCompose(InitTracker(), StepCounter()))


def replayed(data: TensorDictBase, actor: nn.Module, vector: Tensor) -> Tensor:
    """The logits of rows from their observations and what the data says of steering."""
    net = actor.module[0].module
    acts = data["steered", "steering"]
    alpha = data.get(("steered", "steering.alpha"), torch.ones(acts.shape))
    hidden = net[:4](data["observation"])
    return net[4:](torch.where(acts[..., None], hidden + alpha[..., None] * vector, hidden))


def gated() -> SteeringVectors:
    probe = LinearProbe(weight=torch.linspace(-1, 1, 128).reshape(2, 64), bias=torch.zeros(2), path=FC2)
    return SteeringVectors(
        {FC2: torch.linspace(-1, 1, 64)},
        alpha=lambda rows: 1 - rows["step_count"] / 8,
        when=[AtSteps(range(1, 6)), lambda rows: rows["observation"].sum(-1) > -100, ProbeGate(probe, above=0.05)],
    )

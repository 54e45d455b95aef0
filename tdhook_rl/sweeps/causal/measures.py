"""What can be compared between a policy and the same with something taken out: decisions, values, a metric."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule
from torch import Tensor

from tdhook_rl.calls.decisions import critic_keys, drawn_decisions, keys_named, require_own_parameters
from tdhook_rl.calls.passes import Pass
from tdhook_rl.errors import InputError
from tdhook_rl.metrics.drift import policy_divergence
from tdhook_rl.replaying.samples import components
from tdhook_rl.sweeps.causal.bench import Ran
from tdhook_rl.sweeps.causal.metrics import Metric, Reading, copied, greedy_actions
from tdhook_rl.targets import Target, chosen_q, state_value


class Measures:
    """Compares passes over copies of states with one over the states as they are.

    Args:
        whole: the pass of the whole policy.
        metric: what is measured beside what the policy has.
        actions: what was stored as actions of the states.

    Raises:
        InputError: if there is nothing to compare.
    """

    def __init__(self, whole: Ran, metric: Metric, actions: TensorDictBase) -> None:
        self._whole = whole
        run = whole.result
        self._readings: dict[str, Reading] = {}
        if metric is not None:
            self._readings["metric"] = Reading(metric, run, run, actions)
        value = _value(run)
        if value is not None:
            self._readings["value"] = Reading(value, run, run)
        self._before = {name: one.read(whole) for name, one in self._readings.items()}
        self._decisions = {one.key for one in drawn_decisions(run)}
        if self._decisions:
            drawing = [one.module for one in run.distributions]
            require_own_parameters(drawing, "the divergence of policies")
        actions = greedy_actions(run)
        self._actions = {key: one for key, one in actions.items() if not one.is_floating_point()}
        # What is drawn is compared by its distribution.
        self._points = {key: one for key, one in actions.items() if one.is_floating_point()}
        self._points = {key: one for key, one in self._points.items() if key not in self._decisions}
        if not self._readings and not self._decisions and not actions:
            raise InputError(
                f"the network puts out {', '.join(map(repr, run.out_keys))}, which is neither a decision nor a value: "
                "say with metric= what is compared"
            )

    def __call__(self, ran: Ran) -> dict[str, Tensor]:
        """By name ``(copies, states)``."""
        found = {name: one.read(ran) - self._before[name] for name, one in self._readings.items()}
        shape = (ran.copies, -1)
        if self._decisions:
            found["kl"] = _by_state(self._divergence(ran), ran).sum(-1).cpu().reshape(shape)
        now = greedy_actions(ran.result) if self._actions or self._points else {}
        if self._actions:
            others = [~_by_state(_of_all(one, ran) == now[key], ran).all(-1) for key, one in self._actions.items()]
            found["changed"] = torch.stack(others).any(0).double().cpu().reshape(shape)
        if self._points:
            ways = [_by_state((now[key] - _of_all(one, ran)).double(), ran) for key, one in self._points.items()]
            found["moved"] = torch.cat(ways, -1).norm(dim=-1).cpu().reshape(shape)
        return found

    def _divergence(self, ran: Ran) -> Tensor:
        with torch.no_grad():
            whole = self._whole.result.outputs
            whole = whole if ran.copies == 1 else torch.cat([whole] * ran.copies, whole.ndim - 1)
            before, after = (_parameters(outputs).reshape(-1) for outputs in (whole, ran.result.outputs))
            total = torch.zeros(len(before), dtype=torch.float64, device=before.device)
            for drawn in self._whole.result.distributions:
                module: ProbabilisticTensorDictModule = drawn.module  # type: ignore[assignment]
                sides = [components(module, module.get_dist(one)) for one in (before, after)]
                for key in self._decisions & sides[0].keys():
                    total = total + policy_divergence(sides[0][key], sides[1][key]).values.to(total)
            return total.reshape(ran.result.outputs.batch_size)


def _of_all(value: Tensor, ran: Ran) -> Tensor:
    return copied(value, ran.copies, ran.result)


def _by_state(value: Tensor, ran: Ran) -> Tensor:
    """What there is of each state in a row of its own; the copies of an ensemble stand before the states."""
    place = ran.result.outputs.ndim - 1
    return value.movedim(place, 0).reshape(value.shape[place], -1)


def _value(run: Pass) -> Target | None:
    """The values that a network gives, of states and of the actions that it chooses."""
    keys = [key for key in dict.fromkeys(critic_keys(run)) if key in run.out_keys]
    if keys:
        return state_value(keys[0])
    q_keys = [key for key in keys_named(run.outputs, "action_value") if key in run.actions]
    return chosen_q(q_keys[0] if len(q_keys) == 1 else "action_value") if q_keys else None


def _parameters(outputs: TensorDictBase) -> TensorDict:
    """What distributions are made of, in float64: what is left of a small divergence in float32 is rounding."""
    found = TensorDict({}, outputs.batch_size, device=outputs.device)
    for key, value in outputs.items(True, True):
        if isinstance(value, Tensor):
            found.set(key, value.double() if value.is_floating_point() else value)
    return found

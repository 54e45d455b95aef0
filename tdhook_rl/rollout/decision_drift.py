"""How decisions and values in the same states differ from those of the last update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torch.distributions import Distribution

from tdhook_rl.errors import MissingKeyError, nearest
from tdhook_rl.metrics.drift import Divergence, policy_divergence, without_density
from tdhook_rl.policies.actors import supports
from tdhook_rl.policies.draws import action_keys
from tdhook_rl.statistics.interval import Interval, none
from tdhook_rl.statistics.means import grouped_mean

_VALUES = ("state_value", "action_value", "state_action_value")


class DecisionDrift:
    """Follows what a network decides and what it takes states to be worth.

    Args:
        policy: the network.
        out_keys: what it puts out.
        action_key: of the action; found unless given.
        value_key: of the value; found unless given.

    Raises:
        MissingKeyError: if the network puts out no such action or value.
    """

    def __init__(
        self,
        policy: nn.Module,
        out_keys: Sequence[NestedKey],
        action_key: NestedKey | None = None,
        value_key: NestedKey | None = None,
    ) -> None:
        known = [unravel_key(key) for key in out_keys]
        for key, what in ((action_key, "churn"), (value_key, "value drift")):
            if key is not None and unravel_key(key) not in known:
                raise MissingKeyError(
                    f"{what} compares the network's {key!r}, which it does not output; {nearest(key, known)}"
                )
        values = [key for name in _VALUES for key in known if (key if isinstance(key, str) else key[-1]) == name]
        self._value = next(iter(values), None) if value_key is None else unravel_key(value_key)
        self._support = None if self._value is None else supports(policy).get(self._value)
        drawing = {one: [unravel_key(key) for key in one.dist_sample_keys] for one in policy.modules()
                   if isinstance(one, ProbabilisticTensorDictModule)}  # fmt: skip
        actions = [key for key in action_keys(known) if key in known] if action_key is None else [action_key]
        # Without an action by that name, whatever is drawn last is one, such as the parts of a composite.
        self._actions = [unravel_key(key) for key in actions[:1]] or next(reversed(drawing.values()), [])
        self._drawing = next((one for one in reversed(drawing) if set(self._actions) & set(drawing[one])), None)
        self._last: dict[str, Any] = {}
        self._by_state: dict[str, Tensor] = {}
        self.samples = 0

    def look(self, outputs: TensorDictBase) -> dict[str, float]:
        """The measures, by name: NaN at the first update; those that the network has nothing for are left out.

        Args:
            outputs: ``(states,)``: what the network puts out.
        """
        now = self._read(outputs)
        found: dict[str, float] = {}
        self._by_state = {}
        if "action" in now:
            self._note("churn", found, self._churn(now))
        if "distribution" in now:
            self._note("kl_churn", found, self._divergence(now))
        if "value" in now:
            found |= self._drift(now)
        self._last = now
        return found

    def intervals(self, groups: Tensor | None) -> dict[str, Interval]:
        """Of the measures of the last update, each a mean over states, by group.

        Args:
            groups: of each state; each a group of its own without.
        """
        return {name: _interval(name, values, groups) for name, values in self._by_state.items()}

    # ------------------------------------------------------------------ inner

    def _read(self, outputs: TensorDictBase) -> dict[str, Any]:
        found: dict[str, Any] = {}
        actions = [outputs.get(key, None) for key in self._actions]
        if actions and all(isinstance(action, Tensor) for action in actions):
            found["action"] = torch.cat([action.reshape(len(action), -1).double() for action in actions], -1)
        if self._drawing is not None:
            keys = self._drawing.in_keys
            if all(outputs.get(key, None) is not None for key in keys):
                # In float64: what is left of a small divergence in float32 is rounding.
                known = TensorDict({}, outputs.batch_size)
                for key in keys:
                    value = outputs.get(key)
                    known.set(key, value.double() if value.is_floating_point() else value.clone())
                distribution = self._drawing.get_dist(known)
                if not without_density(distribution):
                    found["distribution"] = distribution
        value = None if self._value is None else outputs.get(self._value, None)
        if isinstance(value, Tensor):
            value = value.double()
            if self._support is not None:  # log-probabilities of returns
                value = (value.exp() * self._support.to(value)[:, None]).sum(-2)
            found["value"] = value.reshape(len(value), -1)
        return found

    def _note(self, name: str, found: dict[str, float], values: Tensor | None) -> None:
        if values is None:
            found[name] = math.nan
            return
        self._by_state[name] = values
        found[name] = float(values.mean())

    def _churn(self, now: Mapping[str, Any]) -> Tensor | None:
        before = self._last.get("action")
        if before is None:
            return None
        return (before != now["action"]).any(-1).double()

    def _divergence(self, now: Mapping[str, Any]) -> Tensor | None:
        before: Distribution | None = self._last.get("distribution")
        if before is None:
            return None
        found: Divergence = policy_divergence(before, now["distribution"])
        self.samples = found.samples
        return found.values

    def _drift(self, now: Mapping[str, Any]) -> dict[str, float]:
        before = self._last.get("value")
        if before is None:
            return {"value_drift": math.nan, "value_drift_relative": math.nan}
        found: dict[str, float] = {}
        change, size = (now["value"] - before).abs().mean(-1), before.abs().mean(-1)
        self._note("value_drift", found, change)
        self._note("value_drift_relative", found, ratio_by_state(change, size))
        return found


def ratio_by_state(above: Tensor, below: Tensor) -> Tensor | None:
    """Values whose mean is the ratio of two means, and whose spread is that of the ratio to first order."""
    whole = below.mean()
    if not whole > 0:
        return None
    ratio = above.mean() / whole
    return ratio + (above - ratio * below) / whole


def _interval(name: str, values: Tensor, groups: Tensor | None) -> Interval:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        shape = {"confidence": 0.95, "groups": 0, "rows": len(values)}
        return none(float(values.mean()), f"not finite in {int((~finite).sum())} of {len(values)} states", **shape)
    return grouped_mean(values, groups, bounds=(0.0, 1.0) if name == "churn" else None)

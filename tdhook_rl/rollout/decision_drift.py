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

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.errors import MissingKeyError, nearest
from tdhook_rl.internals.torchrl_names import closed_values
from tdhook_rl.metrics.drift import policy_divergence, without_density
from tdhook_rl.policies.actors import supports
from tdhook_rl.policies.draws import action_keys
from tdhook_rl.statistics.interval import Interval, none
from tdhook_rl.statistics.means import grouped_mean

_VALUES = ("state_value", "action_value", "state_action_value")


class DecisionDrift:
    """Follows what a network decides and what it takes states to be worth: of groups of agents all together.

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
        named = ([key for key in known if key_parts(key)[-1] == name] for name in _VALUES)
        self._values = next(filter(None, named), []) if value_key is None else [unravel_key(value_key)]
        self._supports = supports(policy)
        drawing = {one: [unravel_key(key) for key in one.dist_sample_keys] for one in policy.modules()
                   if isinstance(one, ProbabilisticTensorDictModule)}  # fmt: skip
        actions = [key for key in action_keys(known) if key in known] if action_key is None else [action_key]
        # Without an action by that name, whatever is drawn last is one, such as the parts of a composite.
        self._actions = [unravel_key(key) for key in actions] or next(reversed(drawing.values()), [])
        last = {key: one for one, keys in drawing.items() for key in keys}  # the one whose draw stays
        self._drawing = list(dict.fromkeys(last[key] for key in self._actions if key in last))
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
        if "distributions" in now:
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
        distributions = [self._distribution(one, outputs) for one in self._drawing]
        if distributions and None not in distributions:
            found["distributions"] = distributions
        values = [self._value(key, outputs) for key in self._values]
        if values and all(value is not None for value in values):
            numbers, closed = zip(*values, strict=True)  # type: ignore[arg-type]
            found |= {"value": torch.cat(numbers, -1), "open": ~torch.cat(closed, -1)}
        return found

    def _distribution(self, drawing: ProbabilisticTensorDictModule, outputs: TensorDictBase) -> Distribution | None:
        known = TensorDict({}, outputs.batch_size)
        for key in drawing.in_keys:
            value = outputs.get(key, None)
            if value is None:
                return None
            # In float64: what is left of a small divergence in float32 is rounding.
            known.set(key, value.double() if value.is_floating_point() else value.clone())
        distribution = drawing.get_dist(known)
        return None if without_density(distribution) else distribution

    def _value(self, key: NestedKey, outputs: TensorDictBase) -> tuple[Tensor, Tensor] | None:
        """Values, and those in which a mask of actions has put the lowest number there is."""
        value = outputs.get(key, None)
        if not isinstance(value, Tensor):
            return None
        closed = closed_values(value)
        value = value.double()
        if (support := self._supports.get(key)) is not None:  # log-probabilities of returns
            value, closed = (value.exp() * support.to(value)[:, None]).sum(-2), closed.all(-2)
        return value.reshape(len(value), -1), closed.reshape(len(value), -1)

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
        before: list[Distribution] | None = self._last.get("distributions")
        if before is None:
            return None
        found = [policy_divergence(*both) for both in zip(before, now["distributions"], strict=True)]
        self.samples = max(one.samples for one in found)
        return torch.stack([one.values for one in found]).sum(0)

    def _drift(self, now: Mapping[str, Any]) -> dict[str, float]:
        before = self._last.get("value")
        if before is None:
            return {"value_drift": math.nan, "value_drift_relative": math.nan}
        found: dict[str, float] = {}
        both = now["open"] & self._last["open"]
        sizes = (now["value"] - before).abs(), before.abs()
        change, size = (one.where(both, 0.0).sum(-1) / both.sum(-1) for one in sizes)
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

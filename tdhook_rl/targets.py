"""The scalar to explain: one number for each row, computed from a replay of the policy.

The taken action is the one stored in the data, never a new sample. Each function returns a
:class:`Target` for ``target=`` of an attribution method. A name such as ``"logits"`` also finds the only nested
output that is called so, as those of agents are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.errors import TargetError, nearest
from tdhook_rl.hooks import Portable
from tdhook_rl.passes import Pass, is_point, sample_keys
from tdhook_rl.writing import get_entry

__all__ = [
    "Target",
    "chosen_logit",
    "chosen_q",
    "default_target",
    "entropy",
    "logit",
    "margin",
    "output_sum",
    "state_value",
    "taken_action_log_prob",
]


@dataclass(frozen=True)
class Target:
    """A named function from a replay to one number for each row.

    Args:
        name: how messages and reports call it.
        function: maps a :class:`tdhook_rl.passes.Pass` to a tensor of the batch shape.
        reads_inputs: whether it may look at inputs in ``Pass.stored``; the targets of this module look at actions.
    """

    name: str
    function: Callable[[Pass], Tensor]
    reads_inputs: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "function", Portable(self.function))

    def __call__(self, run: Pass) -> Tensor:
        return per_row(self.function(run), run.outputs.batch_size, self.name)


class LinearTarget(Target):
    """A target of this module that is linear in one output, if the policy has one and no distribution over returns."""

    def slope(self, run: Pass) -> Tensor | None:
        """The derivative with respect to that output; ``None`` if the target is not of it."""
        return self.function.function.slope(run)  # type: ignore[attr-defined]


class DefaultTarget:
    """What :func:`default_target` chooses, once there is a replay to choose by."""

    name = "(default)"

    def __call__(self, run: Pass) -> Tensor:
        return default_target(run)(run)

    def slope(self, run: Pass) -> Tensor | None:
        """As of :class:`LinearTarget`, if that is what is chosen."""
        chosen = default_target(run)
        return chosen.slope(run) if isinstance(chosen, LinearTarget) else None


def taken_action_log_prob() -> Target:
    """The log-probability of the stored action, for policies with a distribution."""
    return _own("taken_action_log_prob", _taken_action_log_prob)


def entropy() -> Target:
    """The entropy of the action distribution."""
    return _own("entropy", _entropy)


def chosen_logit(key: NestedKey = "logits") -> Target:
    """The logit of the stored action (an index, or one-hot), before normalisation."""
    return _linear("chosen_logit", _Chosen(unravel_key(key)))


def logit(index: int, key: NestedKey = "logits") -> Target:
    """The logit of one action, whichever was taken."""
    return _linear(f"logit({index})", _Indexed(unravel_key(key), index))


def margin(key: NestedKey = "logits") -> Target:
    """The logit of the stored action minus the largest logit of the others."""
    return _own("margin", _Margin(unravel_key(key)))


def state_value(key: NestedKey = "state_value") -> Target:
    """The estimated value of the state."""
    return _linear("state_value", _Entry(unravel_key(key)))


def chosen_q(key: NestedKey = "action_value") -> Target:
    """The estimated Q-value of the stored action; of a distributional Q-network the expectation over its atoms."""
    return _linear("chosen_q", _Chosen(unravel_key(key)))


def output_sum() -> Target:
    """The sum of the module's floating-point outputs that depend on its inputs."""
    return _linear("output_sum", _OutputSum())


def default_target(run: Pass) -> Target:
    """What is explained unless told otherwise: the taken action of a policy, the value of a critic, or all outputs.

    The action of a deterministic policy is explained before exploration noise, summed over its dimensions.
    """
    if run.distributions and not is_point(run.distributions[-1][1]):
        return taken_action_log_prob()
    values = named(run.outputs, "action_value")
    if values is not None and stored_action(run, values) is not None:
        return chosen_q(values)
    decided = [key for module, _ in run.distributions for key in sample_keys(module)]
    for key in (*decided, *(named(run.outputs, name) for name in ("action", "state_value", "state_action_value"))):
        if key in run.out_keys and _explains(run.outputs.get(key)):
            return _linear(str(key), _Entry(key))
    return output_sum()


def no_path(target: Callable[[Pass], Tensor]) -> str:
    """What is said where no gradient reaches a target."""
    return (
        f"no gradient reaches the target {getattr(target, 'name', target)!s} from the explained inputs: the policy "
        "detaches, rounds or samples on the way (an action has no gradient; its log-probability has)"
    )


def _linear(name: str, function: Callable[[Pass], Tensor]) -> Target:
    return LinearTarget(name, function, reads_inputs=False)


def _own(name: str, function: Callable[[Pass], Tensor]) -> Target:
    return Target(name, function, reads_inputs=False)


def named(data: TensorDictBase, name: str) -> NestedKey | None:
    """The key of an entry with this name: at the top, else the first among nested ones (those of agents)."""
    if name in data.keys():
        return name
    return next((key for key in data.keys(True, True) if isinstance(key, tuple) and key[-1] == name), None)


def stored_action(run: Pass, values: NestedKey) -> Tensor | None:
    """The stored action of logits or values: beside them, at the top, or where the policy's distribution has it."""
    keys: list[NestedKey] = [] if isinstance(values, str) else [(*values[:-1], "action")]
    keys += ["action", *(key for module, _ in run.distributions for key in sample_keys(module))]
    return next((action for action in (run.stored.get(key, None) for key in keys) if action is not None), None)


def _taken_action_log_prob(run: Pass) -> Tensor:
    module, distribution = _last_distribution(run, "taken_action_log_prob")
    actions = [run.stored.get(key, None) for key in sample_keys(module)]
    if any(action is None for action in actions):
        raise TargetError(
            f"taken_action_log_prob explains the stored action {sample_keys(module)[0]!r}, which the data lacks: "
            "annotate data that a policy has collected, or choose another target"
        )
    if len(actions) == 1:
        found = distribution.log_prob(actions[0])
        if found.numel() != distribution.batch_shape.numel():
            raise TargetError(
                f"the stored action {sample_keys(module)[0]!r} of shape {tuple(actions[0].shape)} is broadcast against "
                f"the policy's {type(distribution).__name__} over {tuple(distribution.batch_shape)}: store it in the "
                "shape in which the policy gives it"
            )
        return found
    log_prob = distribution.log_prob(run.stored)
    if isinstance(log_prob, TensorDictBase):
        batch = run.outputs.batch_size
        return torch.stack([per_row(v, batch, "taken_action_log_prob") for v in log_prob.values(True, True)]).sum(0)
    return log_prob


def _entropy(run: Pass) -> Tensor:
    _, distribution = _last_distribution(run, "entropy")
    try:
        return distribution.entropy()
    except NotImplementedError:
        raise TargetError(f"{type(distribution).__name__} has no closed-form entropy: choose another target") from None


@dataclass(frozen=True)
class _Entry:
    key: NestedKey

    def __call__(self, run: Pass) -> Tensor:
        return _entry(run, self.key)[1]

    def slope(self, run: Pass) -> Tensor | None:
        key, value = _entry(run, self.key)
        return torch.ones_like(value) if key in run.out_keys else None


@dataclass(frozen=True)
class _Indexed:
    key: NestedKey
    index: int

    def __call__(self, run: Pass) -> Tensor:
        _, logits = _values(run, self.key)
        return self._of(logits)

    def slope(self, run: Pass) -> Tensor | None:
        key, logits = _entry(run, self.key)
        if key not in run.out_keys:
            return None
        slope = torch.zeros_like(logits)
        self._of(slope).fill_(1)
        return slope

    def _of(self, logits: Tensor) -> Tensor:
        if not -logits.shape[-1] <= self.index < logits.shape[-1]:
            raise TargetError(
                f"logit({self.index}) was asked, but {self.key!r} has {logits.shape[-1]} entries in its last dimension"
            )
        return logits.select(-1, self.index)


@dataclass(frozen=True)
class _Chosen:
    key: NestedKey

    def __call__(self, run: Pass) -> Tensor:
        key, values = _values(run, self.key)
        return (values * one_hot_action(run, values, key)).sum(-1)

    def slope(self, run: Pass) -> Tensor | None:
        key, values = _entry(run, self.key)
        return one_hot_action(run, values, key) if key in run.out_keys else None


@dataclass(frozen=True)
class _Margin:
    key: NestedKey

    def __call__(self, run: Pass) -> Tensor:
        key, values = _values(run, self.key)
        chosen = one_hot_action(run, values, key).bool()
        return values[chosen].reshape(values.shape[:-1]) - values.masked_fill(chosen, -torch.inf).amax(-1)


@dataclass(frozen=True)
class _OutputSum:
    def __call__(self, run: Pass) -> Tensor:
        batch = run.outputs.batch_size
        return torch.stack([value.reshape(*batch, -1).sum(-1) for value in self._terms(run)]).sum(0)

    def slope(self, run: Pass) -> Tensor | None:
        terms = self._terms(run)
        return torch.ones_like(terms[0]) if len(terms) == 1 else None

    @staticmethod
    def _terms(run: Pass) -> list[Tensor]:
        terms = [value for value in (run.outputs.get(key, None) for key in run.out_keys) if _explains(value)]
        if not terms:
            raise TargetError(
                f"none of the outputs {run.out_keys} depends on the explained input through a gradient: "
                "they are integers, detached or constant; give a target="
            )
        return terms


def _explains(value: Any) -> bool:
    """Whether an output depends on the inputs; where no gradient is recorded, a difference is wanted, and any does."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.requires_grad or not torch.is_grad_enabled()


def _entry(run: Pass, key: NestedKey) -> tuple[NestedKey, Tensor]:
    """An output and its key; a name also finds the only nested output that is called so."""
    value = get_entry(run.outputs, key)
    if value is None and isinstance(key, str):
        nested = [one for one in run.out_keys if isinstance(one, tuple) and one[-1] == key]
        if len(nested) == 1:
            key, value = nested[0], run.outputs.get(nested[0], None)
    if value is None:
        known = [str(k) for k in run.outputs.keys(True, True)]
        raise TargetError(f"the target reads {key!r}, which the policy does not output; {nearest(str(key), known)}")
    return key, value


def _values(run: Pass, key: NestedKey) -> tuple[NestedKey, Tensor]:
    """Logits or values of the actions; of a distributional Q-network the expectations over its atoms."""
    key, values = _entry(run, key)
    support = run.supports.get(key)
    return key, values if support is None else (values.exp() * support.to(values).unsqueeze(-1)).sum(-2)


def one_hot_action(run: Pass, values: Tensor, key: NestedKey = "logits") -> Tensor:
    """The stored action in the shape of logits or values, which are under ``key``."""
    action = stored_action(run, key)
    if action is None:
        raise TargetError("the target explains the stored action 'action', which the data lacks")
    if action.shape == values.shape:
        return action.to(values.dtype)
    if action.ndim == values.ndim and action.shape[-1] == 1:
        action = action.squeeze(-1)
    if action.is_floating_point() or action.shape != values.shape[:-1]:
        raise TargetError(
            f"the stored action of shape {tuple(action.shape)} ({action.dtype}) names no entry of values of shape "
            f"{tuple(values.shape)}: the target is for discrete actions, an index or one-hot"
        )
    # Not one_hot, which looks at the values and therefore fails inside vmap.
    return (action.unsqueeze(-1) == torch.arange(values.shape[-1], device=action.device)).to(values.dtype)


def _last_distribution(run: Pass, name: str) -> tuple[Any, torch.distributions.Distribution]:
    if not run.distributions:
        raise TargetError(
            f"{name} needs a policy with a distribution (ProbabilisticActor); this one has none: "
            "use chosen_q(), state_value() or logit(i)"
        )
    return run.distributions[-1]


def per_row(value: Tensor, batch: torch.Size, name: str) -> Tensor:
    """A target value as one number for each row; trailing dimensions (action dimensions) are summed.

    Raises:
        TargetError: if the value does not start with the batch shape, or is an integer.
    """
    if not isinstance(value, Tensor):
        raise TargetError(f"target {name} is a {type(value).__name__}, not a tensor")
    if not value.is_floating_point():
        raise TargetError(
            f"target {name} is an integer tensor ({value.dtype}), which has no gradient: explain what it was "
            "computed from, such as the logits"
        )
    if value.shape[: len(batch)] != batch:
        raise TargetError(
            f"target {name} has shape {tuple(value.shape)}; it must start with the batch shape {tuple(batch)}"
        )
    return value.reshape(*batch, -1).sum(-1) if value.ndim > len(batch) else value

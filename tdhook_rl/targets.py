"""The scalar to explain: one number for each row, computed from a replay of the policy.

The taken action is the one stored in the data, never a new sample. Each function returns a
:class:`Target` for ``target=`` of an attribution method. All decisions of a policy (groups of agents, heads that
decide one after the other, several critics) are explained together, by a sum, unless ``key`` chooses: an output or
action key, the name of a group, or for log-probability and entropy a list of them. A name such as ``"logits"`` also
finds the nested outputs that are called so, as those of agents are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.checked import checked
from tdhook_rl.calls.decisions import (
    Keys,
    action_of,
    as_one_hot,
    choose,
    critic_keys,
    drawn_decisions,
    has_slope,
    keys_named,
    one_hot_action,
    outputs_named,
    require_choice,
    require_drawn_choice,
    undrawn_keys,
    warn_beside_values,
    warn_left_out,
)
from tdhook_rl.calls.passes import Pass, Slope
from tdhook_rl.errors import TargetError
from tdhook_rl.replaying.batching import row_vectors
from tdhook_rl.sites.hooks import Portable

__all__ = [
    "Target", "chosen_logit", "chosen_q", "default_target", "entropy", "logit", "margin", "output_sum",
    "state_value", "taken_action_log_prob",
]  # fmt: skip

#: What to do where a target reads what is not there.
TARGET_REMEDY = (
    "A target is given what the policy reads and writes; other entries of the data are given to init_attr_targets=, "
    "under additional_init_keys="
)


@dataclass(frozen=True)
class Target:
    """A named function from a replay to one number for each row.

    Args:
        name: how messages and reports call it.
        function: maps a :class:`tdhook_rl.calls.passes.Pass` to a tensor of the batch shape.
        reads_inputs: whether it may look at inputs in ``Pass.stored``; the targets of this module look at actions.
    """

    name: str
    function: Callable[[Pass], Tensor]
    reads_inputs: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "function", Portable(self.function))

    def __call__(self, run: Pass) -> Tensor:
        sees = (run.outputs, run.stored)
        value = asked(self.function, run, what=f"the target {self.name!r}", sees=sees, remedy=TARGET_REMEDY)
        return per_row(value, run.outputs.batch_size, self.name)


class OwnTarget(Target):
    """A target of this module: it differentiates nothing by itself, and looks at no inputs."""

    def __call__(self, run: Pass) -> Tensor:
        return per_row(self.function(run), run.outputs.batch_size, self.name)

    def head_slope(self, head: Any) -> Tensor | None:
        """The derivative by the output of a chain, where it is known of a :class:`tdhook_rl.calls.heads.HeadPass`."""
        function = self.function.function  # type: ignore[attr-defined]
        return function.head_slope(head) if isinstance(function, (_LogProb, _Chosen)) else None


class LinearTarget(OwnTarget):
    """A target of this module that is linear in one output, if the policy has one and no distribution over returns."""

    def slope(self, run: Pass) -> Slope | None:
        """The derivative with respect to that output; ``None`` if the target is not of it."""
        return self.function.function.slope(run)  # type: ignore[attr-defined]


class DefaultTarget:
    """What :func:`default_target` chooses, once there is a replay to choose by."""

    name = "(default)"

    def __call__(self, run: Pass) -> Tensor:
        return default_target(run)(run)

    def slope(self, run: Pass) -> Slope | None:
        """As of :class:`LinearTarget`, if that is what is chosen."""
        chosen = default_target(run)
        return chosen.slope(run) if isinstance(chosen, LinearTarget) else None

    def head_slope(self, head: Any) -> Tensor | None:
        """As of :class:`OwnTarget`."""
        function = _Chosen("action_value", "action_value") if head.values is not None else _LogProb(None)
        return function.head_slope(head)


@checked
def taken_action_log_prob(key: Keys = None) -> Target:
    """The log-probability of the stored action: the joint one of all decisions, or of those that ``key`` names.

    Decisions that are left out because they have none (deterministic ones) are named in a warning.
    """
    return _own("taken_action_log_prob", _LogProb(key))


@checked
def entropy(key: Keys = None) -> Target:
    """The entropy of the action distribution: the sum of all, or of those that ``key`` names."""
    return _own("entropy", _Entropy(key))


@checked
def chosen_logit(key: NestedKey = "logits") -> Target:
    """The logit of the stored action (an index, or one-hot), before normalisation."""
    return _linear("chosen_logit", _Chosen(unravel_key(key), "logits"))


@checked
def logit(index: int, key: NestedKey = "logits") -> Target:
    """The logit of one action, whichever was taken; of several decisions ``key`` says which."""
    return _linear(f"logit({index})", _Indexed(unravel_key(key), index))


@checked
def margin(key: NestedKey = "logits") -> Target:
    """The logit of the stored action minus the largest logit of the others."""
    return _own("margin", _Margin(unravel_key(key)))


@checked
def state_value(key: NestedKey = "state_value") -> Target:
    """The estimated value of the state."""
    name = "state_value" if key == "state_value" else f"state_value({key!r})"
    return _linear(name, _Entry(unravel_key(key), "state_value"))


@checked
def chosen_q(key: NestedKey = "action_value") -> Target:
    """The estimated Q-value of the stored action; of a distributional Q-network the expectation over its atoms."""
    return _linear("chosen_q", _Chosen(unravel_key(key), "action_value"))


def output_sum() -> Target:
    """The sum of the module's floating-point outputs that depend on its inputs."""
    return _linear("output_sum", _OutputSum())


def default_target(run: Pass) -> Target:
    """What is explained unless told otherwise: the taken action of a policy, the value of a critic, or all outputs.

    The action of a deterministic policy is explained before exploration noise, summed over its dimensions.
    """
    # Not by the functions above, which check what a user gives them: this is asked in every pass.
    if drawn_decisions(run):
        return _own("taken_action_log_prob", _LogProb(None))
    values = [key for key in keys_named(run.outputs, "action_value") if action_of(run, key) is not None]
    if values:
        return _linear("chosen_q", _Chosen(values[0] if len(values) == 1 else "action_value", "action_value"))
    for critic, keys in ((False, undrawn_keys(run)), (True, critic_keys(run))):
        found = [key for key in dict.fromkeys(keys) if key in run.out_keys and has_slope(run.outputs.get(key))]
        if found and critic:
            warn_beside_values(run, found)
        if len(found) == 1:
            return _linear(str(found[0]), _Entry(found[0]))
        if found:
            return _own(" + ".join(map(str, found)), _Sum(tuple(found)))
    return output_sum()


#: What :func:`log_prob_keys` says of other targets.
NO_LOG_PROB = object()


def log_prob_keys(target: Any) -> Any:
    """The keys of a target that is a log-probability of this module (``None`` for all of an actor's decisions)."""
    if type(target) is DefaultTarget:
        return None
    function = target.function.function if type(target) is OwnTarget else None  # type: ignore[attr-defined]
    if not isinstance(function, _LogProb):
        return NO_LOG_PROB
    return function.key if function.key is None or isinstance(function.key, list) else [function.key]


def no_path(target: Callable[[Pass], Tensor], inputs: Iterable[NestedKey] = (), sites: Iterable[str] = ()) -> str:
    """What is said where no gradient reaches a target from inputs and from the outputs of modules."""
    inputs, sites = list(inputs), list(dict.fromkeys(sites))
    found = [f"the explained inputs {', '.join(map(repr, inputs))}"] if inputs else []
    found += [f"the output of {', '.join(map(repr, sites))}"] if sites else []
    several = (
        "; of a module that gives several tensors the first is explained (of an nn.LSTM the sequence of outputs): "
        "where the network reads another one, such as h_n, explain the module that reads it"
    )
    return (
        f"no gradient reaches the target {getattr(target, 'name', target)!s} from "
        f"{' or '.join(found) or 'the explained inputs'}: the policy detaches, rounds or samples on the way (an action "
        f"has no gradient; its log-probability has){several if sites else ''}"
    )


def _linear(name: str, function: Callable[[Pass], Tensor]) -> Target:
    return LinearTarget(name, function, reads_inputs=False)


def _own(name: str, function: Callable[[Pass], Tensor]) -> Target:
    return OwnTarget(name, function, reads_inputs=False)


@dataclass(frozen=True)
class _LogProb:
    key: Keys

    def head_slope(self, head: Any) -> Tensor | None:
        return head.log_prob_slope(self.key if self.key is None or isinstance(self.key, list) else [self.key])

    def __call__(self, run: Pass) -> Tensor:
        name = "taken_action_log_prob"
        terms = []
        chosen = choose(run, self.key, name)
        for one in chosen:
            key, distribution, action = one
            if action is None:
                raise TargetError(
                    f"{name} explains the stored action {key!r}, which the data lacks: annotate data that a policy has "
                    "collected, or choose another target"
                )
            require_drawn_choice(run, one)
            found = distribution.log_prob(action)
            if found.numel() != distribution.batch_shape.numel():
                raise TargetError(
                    f"the stored action {key!r} of shape {tuple(action.shape)} is broadcast against the policy's "
                    f"{type(distribution).__name__} over {tuple(distribution.batch_shape)}: store it in the shape in "
                    "which the policy gives it"
                )
            terms.append(per_row(found, run.outputs.batch_size, name))
        if self.key is None:
            warn_left_out(run, chosen, name)
        return _total(run, terms)


@dataclass(frozen=True)
class _Entropy:
    key: Keys

    def __call__(self, run: Pass) -> Tensor:
        terms = []
        chosen = choose(run, self.key, "entropy")
        for _, distribution, _ in chosen:
            try:
                terms.append(per_row(distribution.entropy(), run.outputs.batch_size, "entropy"))
            except NotImplementedError:
                raise TargetError(
                    f"{type(distribution).__name__} has no closed-form entropy: choose another target"
                ) from None
        if self.key is None:
            warn_left_out(run, chosen, "entropy")
        return _total(run, terms)


@dataclass(frozen=True)
class _Entry:
    key: NestedKey
    name: str = ""

    def __call__(self, run: Pass) -> Tensor:
        return _total(run, [value for _, value in outputs_named(run, self.key, self.name)])

    def slope(self, run: Pass) -> Slope | None:
        (key, value), *others = outputs_named(run, self.key, self.name)
        return None if others or key not in run.out_keys else Slope(key, torch.ones_like(value))


@dataclass(frozen=True)
class _Sum:
    keys: tuple[NestedKey, ...]

    def __call__(self, run: Pass) -> Tensor:
        return _total(run, [run.outputs.get(key) for key in self.keys])


@dataclass(frozen=True)
class _Indexed:
    key: NestedKey
    index: int

    def __call__(self, run: Pass) -> Tensor:
        return self._of(_expected(run, *self._one(run)))

    def slope(self, run: Pass) -> Slope | None:
        key, logits = self._one(run)
        if key not in run.out_keys:
            return None
        slope = torch.zeros_like(logits)
        self._of(slope).fill_(1)
        return Slope(key, slope)

    def _one(self, run: Pass) -> tuple[NestedKey, Tensor]:
        found = outputs_named(run, self.key, "logits")
        if len(found) > 1:
            names = ", ".join(repr(key) for key, _ in found)
            raise TargetError(f"logit({self.index}) is of one decision, but there are several: name one of {names}")
        return found[0]

    def _of(self, logits: Tensor) -> Tensor:
        if not -logits.shape[-1] <= self.index < logits.shape[-1]:
            raise TargetError(
                f"logit({self.index}) was asked, but {self.key!r} has {logits.shape[-1]} entries in its last dimension"
            )
        return logits.select(-1, self.index)


@dataclass(frozen=True)
class _Chosen:
    key: NestedKey
    name: str

    def __call__(self, run: Pass) -> Tensor:
        found = [(key, _expected(run, key, value)) for key, value in outputs_named(run, self.key, self.name)]
        return _total(run, [(value * one_hot_action(run, value, key)).sum(-1) for key, value in found])

    def slope(self, run: Pass) -> Slope | None:
        (key, values), *others = outputs_named(run, self.key, self.name)
        return None if others or key not in run.out_keys else Slope(key, one_hot_action(run, values, key))

    def head_slope(self, head: Any) -> Tensor | None:
        key, run = self.key, head.values
        if run is None or run.out_keys != [key] or (action := action_of(run, key)) is None:
            return None
        return as_one_hot(run, action, run.outputs.get(key), key)


@dataclass(frozen=True)
class _Margin:
    key: NestedKey

    def __call__(self, run: Pass) -> Tensor:
        terms = []
        for key, value in outputs_named(run, self.key, "logits"):
            values = _expected(run, key, value)
            chosen = one_hot_action(run, values, key).bool()
            # Several choices at once, one after the other in one vector: each has a margin.
            sizes = run.actions.get(key, (None, None))[1] or [values.shape[-1]]
            for part, choice in zip(values.split(sizes, -1), chosen.split(sizes, -1), strict=True):
                require_choice(run, choice, choice, key, one=True)
                terms.append(self._of(part, choice))
        return _total(run, terms)

    @staticmethod
    def _of(values: Tensor, chosen: Tensor) -> Tensor:
        best = values.masked_fill(~chosen, -torch.inf).amax(-1)
        return best - values.masked_fill(chosen, -torch.inf).amax(-1)


@dataclass(frozen=True)
class _OutputSum:
    def __call__(self, run: Pass) -> Tensor:
        batch = run.outputs.batch_size
        return torch.stack([row_vectors(value, batch).sum(-1) for value in self._terms(run).values()]).sum(0)

    def slope(self, run: Pass) -> Slope | None:
        (key, value), *others = self._terms(run).items()
        return None if others else Slope(key, torch.ones_like(value))

    @staticmethod
    def _terms(run: Pass) -> dict[NestedKey, Tensor]:
        outputs = {key: run.outputs.get(key, None) for key in run.out_keys}
        terms = {key: value for key, value in outputs.items() if has_slope(value)}
        if not terms:
            raise TargetError(
                f"none of the outputs {run.out_keys} depends on the explained input through a gradient: "
                "they are integers, detached or constant; give a target="
            )
        return terms


def _total(run: Pass, terms: list[Tensor]) -> Tensor:
    if len(terms) == 1:
        return terms[0]
    return torch.stack([per_row(term, run.outputs.batch_size, "of several decisions") for term in terms]).sum(0)


def _expected(run: Pass, key: NestedKey, values: Tensor) -> Tensor:
    """Logits or values of the actions; of a distributional Q-network the expectations over its atoms."""
    support = run.supports.get(key)
    return values if support is None else (values.exp() * support.to(values).unsqueeze(-1)).sum(-2)


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
    return row_vectors(value, batch).sum(-1) if value.ndim > len(batch) else value

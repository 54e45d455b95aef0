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

from tensordict import NestedKey
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.checked import checked
from tdhook_rl.calls.decisions import (
    Keys,
    action_of,
    critic_keys,
    drawn_decisions,
    has_slope,
    keys_named,
    undrawn_keys,
    warn_beside_values,
)
from tdhook_rl.calls.passes import Pass, Slope
from tdhook_rl.calls.target_values import Chosen, Entropy, Entry, Indexed, LogProb, Margin, OutputSum, Sum, per_row
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
        what = f"the target {self.name!r}"
        value = asked(self.function, run, what=what, sees=sees, reads_only=[run.stored], remedy=TARGET_REMEDY)
        return of_rows(value, run, self.name)


def of_rows(value: Tensor, run: Pass, name: str) -> Tensor:
    """One number for each row that the policy was given: the copies of an ensemble, which stand before them, add up."""
    value = per_row(value, run.outputs.batch_size, name)
    copies = value.ndim - run.stored.ndim
    return value.sum(tuple(range(copies))) if copies > 0 else value


class OwnTarget(Target):
    """A target of this module: it differentiates nothing by itself, and looks at no inputs."""

    def __call__(self, run: Pass) -> Tensor:
        return of_rows(self.function(run), run, self.name)

    def head_slope(self, head: Any) -> Tensor | None:
        """The derivative by the output of a chain, times the weights of the rows, where a
        :class:`tdhook_rl.calls.heads.HeadPass` knows it."""
        function = self.function.function  # type: ignore[attr-defined]
        return function.head_slope(head) if isinstance(function, (LogProb, Chosen)) else None


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
        function = Chosen("action_value", "action_value") if head.values is not None else LogProb(None)
        return function.head_slope(head)


@checked
def taken_action_log_prob(key: Keys = None) -> Target:
    """The log-probability of the stored action: the joint one of all decisions, or of those that ``key`` names.

    Decisions that are left out because they have none (deterministic ones) are named in a warning.
    """
    return _own("taken_action_log_prob", LogProb(key))


@checked
def entropy(key: Keys = None) -> Target:
    """The entropy of the action distribution: the sum of all, or of those that ``key`` names."""
    return _own("entropy", Entropy(key))


@checked
def chosen_logit(key: NestedKey = "logits") -> Target:
    """The logit of the stored action (an index, or one-hot), before normalisation.

    Of several choices at once (``MultiCategorical``, bits) the sum of the logits that were chosen.
    """
    return _linear("chosen_logit", Chosen(unravel_key(key), "logits"))


@checked
def logit(index: int, key: NestedKey = "logits") -> Target:
    """The logit of one action, whichever was taken; of several decisions ``key`` says which."""
    return _linear(f"logit({index})", Indexed(unravel_key(key), index))


@checked
def margin(key: NestedKey = "logits") -> Target:
    """The logit of the stored action minus the largest logit of the others that were open to the policy.

    Of several choices at once it is the sum of their margins; a bit has its logit as a margin, or the opposite of it.
    Choices that a mask of actions closes are none (``MaskedCategorical``, ``QValueActor(action_mask_key=...)``): a row
    in which one alone was open has no margin, and is not computed.
    """
    return _own("margin", Margin(unravel_key(key)))


@checked
def state_value(key: NestedKey = "state_value") -> Target:
    """The estimated value of the state."""
    name = "state_value" if key == "state_value" else f"state_value({key!r})"
    return _linear(name, Entry(unravel_key(key), "state_value"))


@checked
def chosen_q(key: NestedKey = "action_value") -> Target:
    """The estimated Q-value of the stored action; of a distributional Q-network the expectation over its atoms."""
    return _linear("chosen_q", Chosen(unravel_key(key), "action_value"))


def output_sum() -> Target:
    """The sum of the module's floating-point outputs that depend on its inputs."""
    return _linear("output_sum", OutputSum())


def default_target(run: Pass) -> Target:
    """What is explained unless told otherwise: the taken action of a policy, the value of a critic, or all outputs.

    The action of a deterministic policy is explained before exploration noise, summed over its dimensions.
    """
    # Not by the functions above, which check what a user gives them: this is asked in every pass.
    if drawn_decisions(run):
        return _own("taken_action_log_prob", LogProb(None))
    values = [key for key in keys_named(run.outputs, "action_value") if action_of(run, key) is not None]
    if values:
        return _linear("chosen_q", Chosen(values[0] if len(values) == 1 else "action_value", "action_value"))
    for critic, keys in ((False, undrawn_keys(run)), (True, critic_keys(run))):
        found = [key for key in dict.fromkeys(keys) if key in run.out_keys and has_slope(run.outputs.get(key))]
        if found and critic:
            warn_beside_values(run, found)
        if len(found) == 1:
            return _linear(str(found[0]), Entry(found[0]))
        if found:
            return _own(" + ".join(map(str, found)), Sum(tuple(found)))
    return output_sum()


def is_own(target: Any) -> bool:
    """Whether a target is one of this module, and no function of the user's."""
    return isinstance(target, (OwnTarget, DefaultTarget))


#: What :func:`log_prob_keys` says of other targets.
NO_LOG_PROB = object()


def log_prob_keys(target: Any) -> Any:
    """The keys of a target that is a log-probability of this module (``None`` for all of an actor's decisions)."""
    if type(target) is DefaultTarget:
        return None
    function = target.function.function if type(target) is OwnTarget else None  # type: ignore[attr-defined]
    if not isinstance(function, LogProb):
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

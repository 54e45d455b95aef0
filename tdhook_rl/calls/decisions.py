"""The decisions of a policy in one pass: which there are, which a key means, and the action that was taken in each."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor
from torch import distributions as D

from tdhook_rl.arguments.keys import get_entry, key_parts
from tdhook_rl.calls.chains import has_hook
from tdhook_rl.calls.drawable import require_entries, support_of
from tdhook_rl.calls.passes import Pass
from tdhook_rl.calls.real_rows import FEW, real_rows
from tdhook_rl.calls.writing import tensors_as_entries
from tdhook_rl.errors import TargetError, nearest, warn
from tdhook_rl.internals.tensordict_names import store_of
from tdhook_rl.internals.torchrl_names import is_sparse
from tdhook_rl.policies.draws import Draw, meets, sample_keys
from tdhook_rl.policies.inversion import is_one_hot
from tdhook_rl.replaying.samples import Drawn, components, is_point, parameter_names
from tdhook_rl.sites.known import own_class
from tdhook_rl.sites.runtime import vmap_level

Keys: TypeAlias = NestedKey | list[NestedKey] | None

#: What an output is called from which something is decided, though this policy does not draw it.
_DECIDING = ("logits", "probs", "loc", "action_value")
#: What values are called: "cost_value", "state_action_value_2", "value".
_VALUE = re.compile(r"(^|_)values?(_|\d|$)")


class Decision(NamedTuple):
    """One decision: where its action is stored, what it is drawn from, and what was drawn."""

    key: NestedKey
    distribution: D.Distribution
    action: Tensor | None


def drawn_decisions(run: Pass) -> list[Decision]:
    """What the policy draws to decide: no latents on the way, and nothing that it decides without drawing."""
    return [one for drawn in run.distributions if not _is_latent(drawn) for one in _parts(drawn) if not _is_point(one)]


def undrawn_keys(run: Pass) -> list[NestedKey]:
    """Where a policy that draws no decision writes what it decides: no latents on the way either."""
    points = [one.key for drawn in run.distributions if not _is_latent(drawn) for one in _parts(drawn)]
    actions = [key for key in keys_named(run.outputs, "action") if key in run.out_keys]
    return list(dict.fromkeys([*points, *actions]))


def choose(run: Pass, key: Keys, name: str) -> list[Decision]:
    """The decisions that a target is of: all, or those that a key, a group or a list of them names.

    Raises:
        TargetError: if the policy draws nothing, or nothing of that name.
    """
    if not run.distributions:
        raise TargetError(
            f"{name} needs a policy with a distribution (ProbabilisticActor); this one has none: "
            "use chosen_q(), state_value() or logit(i)"
        )
    if key is None:
        found = drawn_decisions(run)
        if not found:
            kinds = ", ".join(f"{k!r} ({type(d).__name__})" for drawn in run.distributions for k, d, _ in _parts(drawn))
            raise TargetError(
                f"{name} explains what a policy draws to decide, and this one draws no decision: {kinds}. A "
                "deterministic action is explained by the default target, a latent by key="
            )
        return found
    known = [one for drawn in run.distributions for one in _parts(drawn)]
    chosen: list[Decision] = []
    for asked in map(unravel_key, key if isinstance(key, list) else [key]):
        found = [one for one in known if meets(asked, one.key) and len(key_parts(asked)) <= len(key_parts(one.key))]
        if not found:
            raise TargetError(
                f"{name}(key={asked!r}): the policy draws nothing of that name; "
                f"{nearest(asked, [str(one.key) for one in known])}"
            )
        if points := [one for one in found if _is_point(one)]:
            raise TargetError(
                f"{name}(key={asked!r}): {points[0].key!r} is decided without drawing "
                f"({type(points[0].distribution).__name__}), so it has none: choose another target, such as "
                f"state_value({points[0].key!r}), which reads any entry"
            )
        chosen += [one for one in found if not any(one is other for other in chosen)]
    return chosen


def warn_left_out(run: Pass, chosen: Sequence[Decision], name: str) -> None:
    """Warn, once, of decisions that a target of all decisions does not contain because it cannot."""
    if torch.compiler.is_compiling():
        return
    keys = {one.key for one in chosen}
    for drawn in run.distributions:  # what is made of a decision alone is the same decision
        if (draw := _draw_of(drawn)) is not None and keys & {one.key for one in _parts(drawn)}:
            keys.update(draw.becomes)
    left = [one.key for drawn in run.distributions if not _is_latent(drawn) for one in _parts(drawn) if _is_point(one)]
    left += [key for key in keys_named(run.outputs, "action") if key in run.out_keys]
    # No gradient passes the draw of a choice, so as a latent it would not be explained at all.
    left += [
        one.key
        for drawn in run.distributions
        if _is_latent(drawn)
        for one in _parts(drawn)
        if not _is_point(one) and not one.distribution.has_rsample
    ]
    left = [key for key in dict.fromkeys(left) if key not in keys]
    if left and (message := f"{name}:{left}") not in run.warned:
        run.warned.add(message)
        warn(
            f"{name} is of {', '.join(repr(one.key) for one in chosen)}; it leaves out {', '.join(map(repr, left))}, "
            "which the policy decides as well. Name what is meant with key=, or explain several targets: "
            "target={name: target, ...}"
        )


def critic_keys(run: Pass) -> list[NestedKey]:
    """The values that a critic gives: where one is TorchRL's by its name, all outputs that are called values."""
    found = [*keys_named(run.outputs, "state_value"), *keys_named(run.outputs, "state_action_value")]
    if not any(key in run.out_keys for key in found):
        return []
    return [*found, *(key for key in run.out_keys if _VALUE.search(key_parts(key)[-1]))]


def warn_beside_values(run: Pass, values: Sequence[NestedKey]) -> None:
    """Warn, once, of outputs to decide by that are left out where values are explained unless told otherwise."""
    left = [key for key in run.out_keys if key not in values and key_parts(key)[-1] in _DECIDING]
    if torch.compiler.is_compiling() or not left or (message := f"beside values:{left}") in run.warned:
        return
    run.warned.add(message)
    warn(
        f"the default target is of {', '.join(map(repr, values))}; it leaves out {', '.join(map(repr, left))}, which "
        "the module puts out as well, but draws no action from: choose target=, such as targets.chosen_logit()"
    )


def chosen_by(head: Any, values: TensorDictBase, stored: TensorDictBase) -> TensorDictBase:
    """What the last module of a Q-network chooses by its values, for a comparison with what is stored.

    A plain one's call takes longer than its choice, and the value of that follows from both.
    """
    if own_class(head) is not _q_value_module() or head.action_mask_key is not None or has_hook(head.__dict__):
        return head(values)
    action_key, values_key, _ = [one if type(one) is str else unravel_key(one) for one in head.out_keys]
    numbers, known = get_entry(values, values_key), get_entry(stored, action_key)
    action = head.action_func_mapping[head.action_space](numbers)
    batch = values.batch_size
    if not isinstance(known, Tensor) or known.shape[stored.ndim :] != action.shape[len(batch) :]:
        return head(values)  # it may shape its choice, or refuse
    return tensors_as_entries({**store_of(values), action_key: action}, batch)


@functools.cache
def _q_value_module() -> type:
    from torchrl.modules import QValueModule

    return QValueModule


def require_own_parameters(drawing: Sequence[Any], who: str) -> None:
    """Refuse decisions that read their parameters under one key, where these are looked up once the policy has run.

    Raises:
        TargetError: if the parameters of one have been written over by those of another.
    """
    keys = [unravel_key(key) for module in drawing for key in module.in_keys]
    shared = next((key for key in keys if keys.count(key) > 1), None)
    if shared is not None:
        raise TargetError(
            f"several decisions read {shared!r}, one after the other, and {who} needs the parameters of each after the "
            "policy has run: give each head a key of its own"
        )


def keys_named(data: TensorDictBase, name: str) -> list[NestedKey]:
    """The keys of all entries with this name, at the top and nested (those of agents)."""
    return [key for key in data.keys(True, True) if key_parts(key)[-1] == name]


def outputs_named(
    run: Pass, key: NestedKey, name: str = "", what: str = "the target"
) -> list[tuple[NestedKey, Tensor]]:
    """The outputs that a key means to ``what``: itself, nested ones of this name, or those called ``name`` of a group.

    Raises:
        TargetError: if there is none.
    """
    value = get_entry(run.outputs, key)
    if isinstance(value, Tensor):
        return [(key, value)]
    if isinstance(value, TensorDictBase):
        found = [one for one in keys_named(run.outputs, name) if meets(key, one)]
    else:
        found = [one for one in run.out_keys if isinstance(key, str) and isinstance(one, tuple) and one[-1] == key]
    entries = [(one, value) for one in found if isinstance(value := run.outputs.get(one, None), Tensor)]
    if not entries:
        known = [str(k) for k in run.outputs.keys(True, True)]
        raise TargetError(f"{what} reads {key!r}, which the policy does not output; {nearest(key, known)}")
    return entries


def decided_by(run: Pass, values: NestedKey) -> Decision | None:
    """The decision that is drawn by logits or values under a key, the last one if there are several."""
    for drawn in reversed(run.distributions):
        if any(meets(unravel_key(key), values) for key in drawn.module.in_keys):  # type: ignore[union-attr]
            parts = _parts(drawn)
            if len(parts) > 1:
                names = parameter_names(drawn.module)
                group = key_parts(values)[:-1]
                parts = [one for one in parts if _contains(group, key_parts(names.get(one.key, one.key)))]
            if len(parts) == 1:
                return parts[0]
    return None


def action_of(run: Pass, values: NestedKey) -> Tensor | None:
    """The action that was taken by logits or values: of the module that reads them, or stored beside or above them.

    Raises:
        TargetError: if later modules have written over it, and what it was cannot be told from what is stored.
    """
    if (decision := decided_by(run, values)) is not None:
        return decision.action
    keys: list[NestedKey] = [run.actions[values][0]] if values in run.actions else []
    keys += [] if isinstance(values, str) else [(*values[:-1], "action")]
    keys.append("action")
    decided = [key for drawn in run.distributions for key in map(unravel_key, sample_keys(drawn.module))]
    keys += decided if len(decided) == 1 else []
    return next((action for action in (_taken(run, key) for key in dict.fromkeys(keys)) if action is not None), None)


def one_hot_action(run: Pass, values: Tensor, key: NestedKey = "logits") -> Tensor:
    """The stored action in the shape of logits or values, which are under ``key``."""
    action = action_of(run, key)
    if action is None:
        raise TargetError("the target explains the stored action 'action', which the data lacks")
    return as_one_hot(run, action, values, key)


def as_one_hot(run: Pass, action: Tensor, values: Tensor, key: NestedKey) -> Tensor:
    """A stored action in the shape of the values, under ``key``, that it chose among."""
    if action.shape == values.shape:
        require_choice(run, action, action, key)
        return action.to(values.dtype)
    if action.ndim == values.ndim and action.shape[-1] == 1:
        action = action.squeeze(-1)
    if action.is_floating_point() or action.shape != values.shape[:-1]:
        raise TargetError(
            f"the stored action of shape {tuple(action.shape)} ({action.dtype}) names no entry of values of shape "
            f"{tuple(values.shape)}: the target is for discrete actions, an index or one-hot"
        )
    # Not one_hot, which looks at the values and therefore fails inside vmap.
    chosen = action.unsqueeze(-1) == torch.arange(values.shape[-1], device=action.device)
    require_choice(run, chosen, action, key)
    return chosen.to(values.dtype)


def require_choice(run: Pass, chosen: Tensor, action: Tensor, key: NestedKey, *, one: bool = False) -> None:
    """Look at what a stored action chooses, in rows that are no padding.

    Args:
        chosen: not zero in the entries of the last dimension that the action names.
        action: the stored action, for the message.
        key: of what is chosen among.
        one: not more than one, either.

    Raises:
        TargetError: if it names none of them.
    """
    if torch.compiler.is_compiling() or vmap_level() >= 0:
        return
    if not one and chosen.ndim == 2 and chosen.is_cpu and chosen.numel() <= FEW:
        if all(map(any, chosen.tolist())):
            return
    right = chosen.sum(-1) == 1 if one else chosen.any(-1)
    if bool(right.all()):  # asked in each call, so it is brief
        return
    wrong = ~right
    real = real_rows(run.stored)
    if real is not None:
        wrong = wrong & real.reshape(*real.shape, *(1,) * (wrong.ndim - real.ndim))
    if not bool(wrong.any()):
        return
    number = chosen.shape[-1]
    if one and bool(chosen.any(-1)[wrong].any()):
        raise TargetError(
            f"margin is of one choice among {number}, but the stored action has several: only a QValueModule with "
            "var_nums= says how they are divided"
        )
    if action.shape == chosen.shape:
        raise TargetError(
            f"the stored one-hot action sets none of the {number} entries of {key!r} in some rows, so there is no "
            "choice to explain"
        )
    raise TargetError(
        f"the stored action {int(action[wrong][0])} names no entry of {key!r}, which has {number}: actions are 0 to "
        f"{number - 1}"
    )


def require_drawn_choice(run: Pass, decision: Decision) -> None:
    """As :func:`require_choice`, of the stored action of a distribution: also of numbers, which it may bound.

    Raises:
        TargetError: if it cannot have drawn that.
    """
    distribution, action = decision.distribution, decision.action
    while isinstance(distribution, D.Independent):
        distribution = distribution.base_dist
    if action is None or is_sparse(distribution):
        return
    if is_one_hot(distribution):
        require_choice(run, action, action, decision.key)
        several = (action.round() != 0).sum(-1, keepdim=True) > 1
        require_entries(run.stored, action, several, decision.key, lambda place: "one choice, not several")
    elif isinstance(distribution, D.Categorical) and action.shape == distribution.batch_shape:
        number = distribution.param_shape[-1]
        if _are_indices(action, number):
            return
        require_choice(run, action.unsqueeze(-1) == torch.arange(number, device=action.device), action, decision.key)
    elif (support := support_of(decision.distribution)) is not None:
        require_entries(run.stored, action, support.lacks(action), decision.key, support.said)


def _are_indices(action: Tensor, number: int) -> bool:
    """Whether all entries surely are, which is asked in each call: of integers it takes one operation."""
    if action.dtype is not torch.int64 or not action.numel() or torch.compiler.is_compiling() or vmap_level() >= 0:
        return False
    low, high = action.aminmax()
    return int(low) >= 0 and int(high) < number


def has_slope(value: Any) -> bool:
    """Whether an output depends on the inputs; where no gradient is recorded, a difference is wanted, and any does."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.requires_grad or not torch.is_grad_enabled()


def _taken(run: Pass, key: NestedKey) -> Tensor | None:
    for drawn in reversed(run.distributions):
        if drawn.samples.get(key) is not None:
            return drawn.samples[key]
    stored, slot = get_entry(run.stored, key), run.slots.get(key)
    if slot is None or stored is None:
        return stored
    action = run.stored.get(slot, None)
    if action is None:
        raise TargetError(
            f"the stored {key!r} is not what the policy chose: a later module writes over it, and the choice cannot be "
            "told from what is stored. Explain it while the policy acts, with when='step', or write the changed action "
            "under a key of its own"
        )
    return action


def _parts(drawn: Drawn) -> list[Decision]:
    parts = components(drawn.module, drawn.distribution)
    return [Decision(key, part, drawn.samples.get(key)) for key, part in parts.items()]


def _is_latent(drawn: Drawn) -> bool:
    draw = _draw_of(drawn)
    return draw is not None and draw.latent


def _draw_of(drawn: Drawn) -> Draw | None:
    return getattr(drawn.module, "_hooked_draw", None)


def _is_point(one: Decision) -> bool:
    return is_point(one.distribution)


def _contains(parts: tuple[str, ...], name: tuple[str, ...]) -> bool:
    return any(parts[start : start + len(name)] == name for start in range(len(parts)))

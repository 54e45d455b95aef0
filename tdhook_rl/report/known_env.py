"""What an environment says of itself: names of features and actions, and frames of states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import EnumMeta
from typing import Any

from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torchrl.envs import GymWrapper

__all__ = ["KnownEnv", "known_of"]


@dataclass(frozen=True)
class KnownEnv:
    """What is known of an environment.

    Attributes:
        names: of the features of an observation, by its key.
        render: draws states that are in a TensorDict, ``(rows, height, width, 3)``; ``None`` where it cannot.
        actions: names of the actions; empty where they have none.
        base: the environment that draws.
    """

    names: Mapping[NestedKey, Sequence[str]] = field(default_factory=dict)
    render: Callable[[TensorDictBase], Tensor] | None = None
    actions: Sequence[str] = ()
    base: Any = None


def known_of(env: Any) -> KnownEnv:
    """What an environment says, under transforms and Gymnasium's wrappers; or the environment of a collector.

    Names are read from ``feature_names``: a list for ``"observation"``, or lists by key; those of actions from
    ``action_names``, or an enumeration ``actions`` (MiniGrid's). Environments that keep their state in the TensorDict
    draw it.

    Example:
        >>> from torchrl.envs import StepCounter, TransformedEnv
        >>> from tdhook_rl.envs import TMaze
        >>> known_of(TransformedEnv(TMaze(), StepCounter())).names["observation"][:2]
        ('cue is A', 'cue is B')
    """
    names, base = None, None
    actions: tuple[str, ...] = ()
    for one in _layers(env):
        names = _own(one, "feature_names") if names is None else names
        actions = actions or _actions(one)
        if base is None and not isinstance(one, type) and _own(one, "variables") is not None:
            base = one
    listed = names if isinstance(names, Mapping) else {} if names is None else {"observation": tuple(names)}
    return KnownEnv(listed, None if base is None else base.render, actions, base)


def _actions(one: Any) -> tuple[str, ...]:
    listed = _own(one, "actions")
    if isinstance(listed, EnumMeta):
        return tuple(listed.__members__)
    return tuple(map(str, _own(one, "action_names") or ()))


def _layers(env: Any) -> Iterator[Any]:
    """An environment, and what it wraps."""
    seen: list[Any] = []
    waiting = [env]
    while waiting and len(seen) < 20:
        one = waiting.pop(0)
        if one is None or any(one is other for other in seen):
            continue
        seen.append(one)
        yield one
        made = _own(one, "create_env_fn")  # of what starts several
        made = made[0] if isinstance(made, Sequence) and made else made
        waiting += [_own(one, "base_env"), _own(one, "env"), made, _own(made, "func")]
        if isinstance(one, GymWrapper):
            waiting.append(one.unwrapped)


def _own(one: Any, name: str) -> Any:
    """An attribute, where it is the object's own: to ask environments for others may start processes."""
    if inspect.getattr_static(one, name, None) is not None:
        return getattr(one, name)
    return dict(one.named_children()).get(name) if isinstance(one, nn.Module) else None

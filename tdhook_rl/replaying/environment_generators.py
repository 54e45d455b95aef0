"""The generators that an environment draws its starts and its chances from, where they are in this process."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tdhook_rl.policies.mutable_state import kind_of

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def keep_generators(env: Any) -> Callable[[], None]:
    """What puts the generators of an environment back where they are now.

    A play seeds them, and the user's own episodes after it would begin like those of the play. Those of workers are
    out of reach.

    Args:
        env: the environment, with what it wraps: transforms, environments of ``SerialEnv``, of Gymnasium and its
            vectors.

    Example:
        >>> from torchrl.envs import GymEnv
        >>> env = GymEnv("CartPole-v1")
        >>> _, _ = env.set_seed(3), env.reset()
        >>> put_back = keep_generators(env)
        >>> first = env.reset()["observation"]
        >>> put_back()
        >>> bool((env.reset()["observation"] == first).all())
        True
    """
    held = [
        (store, name, value, kind, None if kind is None else kind.read(value))
        for store in _stores(env)
        for name, value in store.items()
        if value is None or issubclass(type(value), GENERATORS)
        for kind in [kind_of(value)]
    ]

    def put_back() -> None:
        for store, name, value, kind, state in held:
            if kind is not None:
                store[name] = value  # a seed may have put a new one in its place
                kind.write(value, state)
            elif issubclass(type(store.get(name)), GENERATORS):
                store[name] = None  # as it is before the first reset

    return put_back


def _stores(env: Any) -> list[dict[str, Any]]:
    """The attributes of all that an environment consists of."""
    found: dict[int, dict[str, Any]] = {}
    waiting = [env]
    while waiting:
        one = waiting.pop()
        if id(one) in found:
            continue
        store = found[id(one)] = getattr(one, "__dict__", {})
        for value in store.values():
            kind = type(value)
            inside = value.values() if issubclass(kind, dict) else value if issubclass(kind, (list, tuple)) else ()
            waiting += [inner for inner in (value, *inside) if _plays(inner)]
    return list(found.values())


def _plays(one: Any) -> bool:
    """Whether it is an environment, or a transform of one, by its class: a thing that is asked may answer anything."""
    kind = type(one)
    return callable(getattr(kind, "reset", None)) or issubclass(kind, torch.nn.Module)

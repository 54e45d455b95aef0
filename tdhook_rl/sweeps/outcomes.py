"""What is measured of an episode: numbers by name, from its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked, require_accepts
from tdhook_rl.arguments.tensors import numbers
from tdhook_rl.errors import InputError, nearest

#: From episodes ``(episodes, time)`` a number for each, or such numbers by name.
Outcome = Callable[[TensorDictBase], Tensor | Mapping[str, Tensor]]

RETURN, LENGTH = "return", "length"


class Outcomes:
    """Named outcomes.

    Args:
        asked: ``"return"``, ``"length"``, a function, several of these, or functions by name.
        reward_keys: of the environment.

    Raises:
        InputError: for anything else.
    """

    def __init__(self, asked: Any, reward_keys: Sequence[NestedKey]) -> None:
        self._rewards = list(reward_keys)
        if isinstance(asked, str) or callable(asked):
            asked = [asked]
        if isinstance(asked, Mapping):
            pairs = list(asked.items())
        elif isinstance(asked, Sequence):
            pairs = [(one if isinstance(one, str) else "", one) for one in asked]
        else:
            pairs = []
        for name, one in pairs:
            known = isinstance(one, str) and one in (RETURN, LENGTH)
            if not isinstance(name, str) or not (known or callable(one)):
                raise InputError(
                    f"outcomes= has {one!r:.60}: it takes 'return', 'length' and functions of the episodes; "
                    + (nearest(one, (RETURN, LENGTH)) if isinstance(one, str) else "by name where there are several")
                )
            if callable(one):
                require_accepts(one, ["episodes"], f"the outcome {name or _name(one)!r}")
        if not pairs:
            raise InputError(
                f"outcomes= is 'return', 'length', functions of the episodes, or several; got {asked!r:.60}"
            )
        self._pairs = pairs

    @property
    def keys(self) -> list[NestedKey] | None:
        """The entries of a step that they read; ``None``: all may be read."""
        if any(callable(one) for _, one in self._pairs):
            return None
        return [("next", *((key,) if isinstance(key, str) else key)) for key in self._rewards]

    def described(self, words: Callable[[Any], str]) -> list[str]:
        """Each by its name and what it is."""
        return [f"{name}: {words(one)}" if name else words(one) for name, one in self._pairs]

    def of(self, episodes: TensorDictBase) -> dict[str, Tensor]:
        """Every outcome, ``(episodes,)`` in float64.

        Args:
            episodes: ``(episodes, time)``, zero after the last step of each, with ``"mask"``.

        Raises:
            InputError: if a function does not give one finite number for each episode.
        """
        found: dict[str, Tensor] = {}
        for name, one in self._pairs:
            if one == LENGTH:
                given: Any = {name: episodes["mask"].sum(-1)}
            elif one == RETURN:
                given = self._returns(episodes, name)
            else:
                given = self._asked(one, name, episodes)
            for label, values in given.items():
                if label in found or not label:
                    said = f"two outcomes are called {label!r}" if label else "an outcome has no name"
                    raise InputError(f"{said}: give functions by name")
                found[label] = _checked(label, values, len(episodes))
        return found

    def _asked(self, function: Outcome, name: str, episodes: TensorDictBase) -> Mapping[str, Any]:
        given = asked(function, episodes, what=f"the outcome {name or _name(function)!r}", reads_only=True)
        if isinstance(given, Mapping):
            return {f"{name}/{label}" if name else str(label): values for label, values in given.items()}
        return {name or getattr(function, "__name__", "outcome"): given}

    def _returns(self, episodes: TensorDictBase, name: str) -> dict[str, Tensor]:
        """The sum of the rewards; of agents the mean, and of groups each its own, by what tells their keys apart."""
        found = {}
        paths = [(key,) if isinstance(key, str) else key for key in self._rewards]
        groups = [".".join(path[:-1] or path) for path in paths]
        for path, group in zip(paths, groups, strict=True):
            rewards = episodes["next", *path].double()
            own = group if groups.count(group) == 1 else ".".join(path)
            label = name if len(paths) == 1 else f"{name}/{own}"
            found[label] = rewards.flatten(2).mean(-1).sum(-1) if rewards.ndim > 2 else rewards.sum(-1)
        return found


def table_of(values: Mapping[str, Any], conditions: int, runs: Tensor | None = None) -> dict[str, Tensor]:
    """Outcomes by condition and episode, ``(conditions, episodes)`` each, in float64 on the CPU.

    Raises:
        InputError: for another shape, what is no number, or a run for another number of episodes.
    """
    found = {name: numbers(one, f"the outcome {name!r}").to("cpu", torch.float64) for name, one in values.items()}
    episodes = {one.shape[1] for one in found.values() if one.ndim == 2}
    for name, one in found.items():
        if one.ndim != 2 or len(one) != conditions or len(episodes) > 1:
            raise InputError(
                f"the outcome {name!r} has shape {tuple(one.shape)}: it is ({conditions}, episodes), a row for each "
                "condition, of as many episodes as the others"
            )
    if runs is not None and found and tuple(runs.shape) != (episode := next(iter(episodes)),):
        raise InputError(f"runs= names the run of each of {episode} episodes, got {tuple(runs.shape)}")
    return found


def _name(function: Outcome) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _checked(name: str, values: Any, episodes: int) -> Tensor:
    if not isinstance(values, Tensor):
        raise InputError(f"the outcome {name!r} is {type(values).__name__}, not a tensor of {episodes} numbers")
    values = numbers(values, f"the outcome {name!r}")
    values = values.squeeze(-1) if values.shape == (episodes, 1) else values
    if values.shape != (episodes,):
        raise InputError(
            f"the outcome {name!r} has shape {tuple(values.shape)}; it is one number for each of {episodes} episodes"
        )
    values = values.detach().to("cpu", torch.float64)
    broken = int((~torch.isfinite(values)).sum())
    if broken:
        raise InputError(f"the outcome {name!r} is NaN or infinite in {broken} of {episodes} episodes")
    return values

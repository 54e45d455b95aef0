"""Several plays of an environment: a seed for each, and whether the policy acts as the environment takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.data import Categorical, MultiCategorical, OneHot
from torchrl.envs import EnvBase

from tdhook_rl.errors import InputError, MissingKeyError, TdhookError, nearest, warn


def play_seed(env: EnvBase, seed: int, play: int) -> int:
    """The seed of one of several plays that follow each other.

    Vectors of Gymnasium environments seed theirs by numbers in a row, from the one that they are given on. A play
    begins behind those of the play before, whose episodes it would repeat.

    Args:
        env: the environment, of whose rows each is an episode.
        seed: of the first play.
        play: which, from 0 on.

    Example:
        >>> from tdhook_rl.envs import CueCorners
        >>> [play_seed(CueCorners(batch_size=[8]), 3, play) for play in range(3)]
        [3, 11, 19]
    """
    return seed + play * max(env.batch_size.numel(), 1)


@contextmanager
def lacking_told(env: EnvBase, policy: nn.Module) -> Iterator[None]:
    """A block that plays, in which a key that the policy reads and does not find is named.

    Raises:
        MissingKeyError: says what the environment writes.
    """
    try:
        yield
    except TdhookError:
        raise
    except KeyError as error:
        there = list(env.reset().keys(True, True))
        for key in getattr(policy, "in_keys", ()):
            if key not in there:
                raise MissingKeyError(
                    f"the policy reads {key!r}, which this environment does not write; {nearest(key, there)}. Rename "
                    "its in_keys, or append the transform that writes it (InitTracker for 'is_init', a "
                    "TensorDictPrimer for states)"
                ) from error
        raise


def require_taken(env: EnvBase, step: TensorDictBase) -> None:
    """Raise for actions that the environment would take for others.

    Args:
        env: the environment.
        step: what the policy has made of its rows.

    Raises:
        MissingKeyError: if the policy writes no action.
        InputError: for a number where choices are one-hot, of which TorchRL makes the first choice, or the other way.

    Warns:
        UserWarning: if a continuous action has another number of entries.
    """
    for key, spec in env.full_action_spec.items(True, True):
        value = step.get(key, None)
        if value is None:
            raise MissingKeyError(
                f"the environment takes its action under {key!r}, which the policy does not write; "
                f"{nearest(key, list(step.keys(True, True)))}"
            )
        takes, given = spec.shape[len(env.batch_size) :], value.shape[step.ndim :]
        if -1 in takes or given.numel() == takes.numel():
            continue
        seen = f"{_named(key)} has the shape {tuple(given)} for each row, and the environment takes {tuple(takes)}"
        if isinstance(spec, OneHot):
            raise InputError(
                f"{seen}, one-hot: TorchRL takes a number for the first choice, whichever it is. Make the environment "
                "with categorical_action_encoding=True, or draw from a OneHotCategorical"
            )
        if isinstance(spec, Categorical | MultiCategorical):
            raise InputError(
                f"{seen}, numbers of choices: leave categorical_action_encoding=True out, or draw from a Categorical"
            )
        warn(f"{seen}: what it makes of that is its own")


def _named(key: NestedKey) -> str:
    return f"the action {key!r}"

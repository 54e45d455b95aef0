"""Episodes of a Minari dataset as TensorDicts in TorchRL's format (TED), and a check of datasets that TorchRL loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data.datasets.common import BaseDatasetExperienceReplay

from tdhook_rl.errors import InputError

#: Rows that are looked at first.
FIRST = 1024
#: The kinds of arrays that are numbers.
_NUMBERS = "biuf"


def is_minari(given: Any) -> bool:
    """Whether it is a dataset of Minari's, which need not be installed."""
    return hasattr(given, "iterate_episodes") and hasattr(given, "episode_indices")


def episodes_of(dataset: Any) -> Iterator[TensorDict]:
    """Each episode of a Minari dataset, rows in order of time.

    Args:
        dataset: what ``minari.load_dataset`` returns.

    Yields:
        ``observation`` (nested where it is a dictionary), ``action``, ``("next", ...)`` with observation, reward and
        ends, ``("collector", "traj_ids")``, and ``info`` where it has an entry for each step or one more in all
        episodes; numbers as they are stored. What is no number (text) is left out.
    """
    common = _common_infos(dataset)
    for episode in dataset.iterate_episodes():
        steps = len(episode)
        terminated, truncated = _column(episode.terminations, steps), _column(episode.truncations, steps)
        found = TensorDict(
            {
                **_named("action", episode.actions, slice(0, steps)),
                **_named("observation", episode.observations, slice(0, steps)),
                "collector": {"traj_ids": torch.full((steps,), int(episode.id))},
                "next": {
                    **_named("observation", episode.observations, slice(1, steps + 1)),
                    "reward": _column(episode.rewards, steps),
                    "done": terminated | truncated,
                    "terminated": terminated,
                    "truncated": truncated,
                },
            },
            batch_size=[steps],
        )
        for key, value in _infos(episode).items():
            if _kind(key, value) in common:
                found.set(("info", *key), torch.from_numpy(np.ascontiguousarray(value[:steps])))
        yield found


def _infos(episode: Any) -> dict[tuple[str, ...], np.ndarray]:
    """What an episode has beside, with an entry for each step or one more."""
    steps = len(episode)
    return {key: value for key, value in _leaves(episode.infos or {}) if len(value) in (steps, steps + 1)}


def _kind(key: tuple[str, ...], value: np.ndarray) -> tuple[Any, ...]:
    return key, value.shape[1:], value.dtype


def _common_infos(dataset: Any) -> set[tuple[Any, ...]]:
    """What all episodes have beside: environments write some of it at the last step only, say, or in some episodes."""
    found: set[tuple[Any, ...]] | None = None
    for episode in dataset.iterate_episodes():
        own = {_kind(key, value) for key, value in _infos(episode).items()}
        found = own if found is None else found & own
        if not found:
            break
    return found or set()


def require_loaded(buffer: Any) -> None:
    """Raise an ``InputError`` for a dataset of TorchRL's that holds nothing but zeros.

    TorchRL 0.14.1 writes the files of a Minari dataset without their content, and says nothing.
    """
    if not isinstance(buffer, BaseDatasetExperienceReplay):
        return
    for rows in (slice(0, FIRST), slice(None)):
        if _has_content(buffer.storage[rows]):
            return
    name = getattr(buffer, "dataset_id", "")
    raise InputError(
        f"every entry of {type(buffer).__name__}({name!r}) is zero, so there is nothing to analyse: some versions of "
        "TorchRL write the files of a dataset without their content. Give what minari.load_dataset() returns, or its "
        "episodes in a buffer"
    )


def _has_content(found: Any) -> bool:
    values = found.values(True, True) if isinstance(found, TensorDictBase) else []
    return any(not isinstance(one, Tensor) or bool(one.any()) for one in values)


def _column(values: Any, steps: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(values)[:steps])).reshape(steps, 1)


def _named(name: str, values: Any, rows: slice) -> dict[str, Any]:
    """An entry under its name, nested where it is a dictionary or a tuple; nothing where it consists of no numbers."""
    if isinstance(values, tuple):
        values = {str(number): one for number, one in enumerate(values)}
    if isinstance(values, dict):
        inside: dict[str, Any] = {}
        for key, one in values.items():
            inside |= _named(key, one, rows)
        return {name: inside} if inside else {}
    array = np.asarray(values)
    return {name: torch.from_numpy(np.ascontiguousarray(array[rows]))} if array.dtype.kind in _NUMBERS else {}


def _leaves(infos: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    for name, value in infos.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, name))
        elif isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in _NUMBERS:
            yield (*prefix, name), value

"""Results as infos of a Minari dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.errors import ArgumentError, ArtifactError, MissingKeyError, nearest
from tdhook_rl.reading.sources import Rows
from tdhook_rl.replay.columns import plain
from tdhook_rl.replay.joined import Found, Joined, results_of
from tdhook_rl.replay.results import INDEX


@checked
def to_minari(
    results: Found,
    buffer: Rows,
    dataset_id: str,
    *,
    observation: NestedKey = "observation",
    action: NestedKey = "action",
    keys: Sequence[NestedKey] = (),
    spaces: tuple[Any, Any] | None = None,
    **facts: Any,
) -> Any:
    """Write a buffer and its results as a Minari dataset: an episode each, with results as infos of its steps.

    An info is called as its column of Parquet is (``attr.observation``), and has an entry for each observation; that of
    the last, which no row has, is NaN (0 for integers). Minari decides where: ``MINARI_DATASETS_PATH``.

    Args:
        results: of an analysis, or their folder.
        buffer: what was analysed.
        dataset_id: ``"namespace/name-v0"``, a new one.
        observation, action: their keys in the buffer.
        keys: of the buffer, to be infos too.
        spaces: of observations and actions, as Gymnasium has them; unless given, unbounded boxes, and for integers
            without dimensions as many actions as there are numbers.
        facts: for ``minari.create_dataset_from_buffers``: ``env=``, ``author=``, ``algorithm_name=``, ...

    Returns:
        the dataset, as ``minari.load_dataset`` gives it.

    Raises:
        ArgumentError: if Minari, or what it writes with, is not installed.
        ArtifactError: if there is such a dataset, or it cannot be written.
        InputError: if the results are of another buffer, or nothing says where episodes end.
        MissingKeyError: for a key that the rows lack.
    """
    try:
        import minari
        from minari.data_collector.episode_buffer import EpisodeBuffer
    except ModuleNotFoundError as error:
        raise ArgumentError(f"{error.name} is not installed: pip install 'tdhook_rl[minari]'") from None
    found = results_of(results)
    joined = Joined(buffer, found)
    courses = joined.courses("a Minari dataset")
    lengths = courses.stretch.bincount().tolist()
    own = [key_parts(key) for key in found.keys(True, True) if key != INDEX]
    infos = [*own, *(key_parts(key) for key in keys)]

    def episodes() -> Iterator[Any]:
        for number, part in enumerate(courses.rows.split(lengths)):
            rows = joined.rows(part)
            last = _of(rows, ("next", *key_parts(observation)))[-1:]
            seen = torch.cat([_of(rows, observation), last])
            terminated = _ends(rows, "terminated")
            # What was not said to be cut has ended; an episode whose end is not there was cut.
            truncated = _ends(rows, "truncated")
            if not bool((terminated | truncated)[-1]):
                (terminated if bool(courses.ended[number]) else truncated)[-1] = True
            yield EpisodeBuffer(
                id=number, observations=seen.numpy(), actions=_of(rows, action).numpy(),
                rewards=_of(rows, ("next", "reward")).reshape(len(rows)).double().numpy(),
                terminations=terminated.numpy(), truncations=truncated.numpy(),
                infos={".".join(parts): _with_last(plain(_of(rows, parts))) for parts in infos},
            )  # fmt: skip

    spaces = spaces or _spaces(joined, courses.rows, observation, action)
    try:
        return minari.create_dataset_from_buffers(
            dataset_id, buffer=list(episodes()), observation_space=spaces[0], action_space=spaces[1], **facts
        )
    except (OSError, ValueError, AssertionError) as error:
        raise ArtifactError(f"cannot write the dataset {dataset_id}: {error}") from error


def _of(rows: TensorDictBase, key: NestedKey) -> Tensor:
    value = rows.get(key, None)
    if not isinstance(value, Tensor):
        known = map(str, rows.keys(True, True))
        raise MissingKeyError(f"a Minari dataset has {key!r}, which the rows lack; {nearest(str(key), known)}")
    return value.detach().cpu()


def _ends(rows: TensorDictBase, name: str) -> Tensor:
    value = rows.get(("next", name), None)
    return torch.zeros(len(rows), dtype=torch.bool) if value is None else value.reshape(len(rows), -1).any(1).cpu()


def _with_last(values: np.ndarray) -> np.ndarray:
    last = np.full_like(values[:1], np.nan if values.dtype.kind == "f" else 0)
    return np.concatenate([values, last])


def _spaces(joined: Joined, rows: Tensor, observation: NestedKey, action: NestedKey) -> tuple[Any, Any]:
    import gymnasium

    one = joined.rows(rows[:1])
    found = []
    for key in (observation, action):
        value = _of(one, key)
        if key == action and value.ndim == 1 and not value.is_floating_point():
            most = max(int(_of(joined.rows(part), key).max()) for part in rows.split(1 << 14))
            found.append(gymnasium.spaces.Discrete(most + 1))
            continue
        kind = value.numpy().dtype
        low, high = (-np.inf, np.inf) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
        found.append(gymnasium.spaces.Box(low, high, tuple(value.shape[1:]), kind))
    return found[0], found[1]

"""An analysis on Ray Data: a pool of actors holds the hooked policy, each chunk is what it is on one machine.

Ray carries the numbers of entries and brings results back, in order; what is a chunk, what is computed of it, and the
folder and its manifest are the same as without Ray. So the results are the same to the bit, whatever actor computed
them and however often, and an analysis that was begun here goes on there.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import torch
from tensordict import TensorDict, TensorDictBase

from tdhook_rl import errors
from tdhook_rl.errors import InputError, TdhookError, WorkerError

#: Chunks of which Ray knows at once.
_BLOCKS = 4096

#: What is said of a chunk beside its results, in JSON.
Told = dict[str, Any]
Compute = Callable[[int, int], tuple[TensorDictBase, Told]]


def ray_results(
    make: Callable[[], Compute], chunks: list[tuple[int, int]], *, workers: int
) -> Iterator[tuple[int, int, TensorDictBase, Told]]:
    """The results of chunks, in their order.

    Args:
        make: called once in each actor; gives what computes the results of a chunk, and what else is said of it.
        chunks: the first place of each, and that after its last.
        workers: how many actors there are.

    Yields:
        first, last, results, and what else is said of them.

    Raises:
        InputError: if Ray is not installed, or what is sent does not pickle.
        WorkerError: if Ray gives up.
    """
    ray = _ray()
    content = _pickled(make)
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    # What a Ray of the user's own says is the user's to choose.
    levels = {name: logging.getLogger(name).level for name in (("ray", "ray.data") if own else ())}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    before = context.execution_options.preserve_order, context.enable_progress_bars
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    try:
        items = [{"first": first, "last": last} for first, last in chunks]
        found = ray.data.from_items(items, override_num_blocks=min(len(items), _BLOCKS)).map_batches(
            _Actor, fn_constructor_args=(content, sys.path), batch_size=1, num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
        )  # fmt: skip
        for row in found.iter_rows():
            if row["error"]:
                raise _error(*json.loads(row["error"]))
            yield row["first"], row["last"], _unpacked(row["content"], row["shape"]), json.loads(row["told"])
    except (TdhookError, GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise WorkerError(
            f"Ray has given up on the analysis: {lines[-1] if lines else type(error).__name__}"
        ) from error
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = before
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if own:
            ray.shutdown()


class _Actor:
    """Computes chunks in a process of Ray's."""

    def __init__(self, content: bytes, paths: list[str]) -> None:
        # Actors would take each other's cores; and sums over other parts, by other machines' threads, other last bits.
        torch.set_num_threads(1)
        # Ray tells its processes where modules are as it starts, which may have been long ago.
        sys.path += [path for path in paths if path not in sys.path]
        self._compute: Compute = _begun(content)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        first, last = int(batch["first"][0]), int(batch["last"][0])
        content, shape, said, error = b"", "", "{}", ""
        try:
            found, told = self._compute(first, last)
            content, shape = _packed(found)
            said = json.dumps(told)
        except Exception as problem:  # Ray would put pages around it, and perhaps try again
            error = json.dumps([type(problem).__name__, str(problem)])
        row = {"first": first, "last": last, "told": said, "content": content, "shape": shape, "error": error}
        return {name: [value] for name, value in row.items()}


def _begun(content: bytes) -> Compute:
    """What computes chunks; where it cannot be had, what raises the reason, as Ray would begin again and again."""
    try:
        return cloudpickle.loads(content)()  # type: ignore[no-any-return]
    except ImportError as error:
        lacking: TdhookError = WorkerError(
            f"an actor of Ray's lacks what the policy or its methods are made of ({error}): install it where actors "
            "run, or name its folder, ray.init(runtime_env={'working_dir': ...})"
        )
    except Exception as error:  # whatever a file or a user's class raises
        lacking = _error(type(error).__name__, str(error))

    def compute(first: int, last: int) -> tuple[TensorDictBase, Told]:
        raise lacking

    return compute


def _pickled(make: Callable[[], Compute]) -> bytes:
    try:
        return cloudpickle.dumps(make)
    except Exception as error:  # whatever a file, a lock or a user's class raises
        raise InputError(
            "engine='ray' sends the policy and what holds the rows to other processes, and one of them does not pickle "
            f"({type(error).__name__}: {error}): save the rows (buffer.dumps(folder)) and give the folder"
        ) from error


def _packed(found: TensorDictBase) -> tuple[bytes, str]:
    from safetensors.torch import save

    items = dict(found.items(True, True))
    names = {json.dumps([key] if isinstance(key, str) else list(key)): value for key, value in items.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in names.items()}
    return save(tensors), json.dumps(list(found.batch_size))


def _unpacked(content: bytes, shape: str) -> TensorDictBase:
    from safetensors.torch import load

    tensors = {tuple(json.loads(name)): value for name, value in load(content).items()}
    found = TensorDict({}, batch_size=json.loads(shape))
    for key, value in tensors.items():
        found.set(key, value)
    return found


def _error(kind: str, text: str) -> TdhookError:
    """What an actor raised: an error of ours as it was there, any other as what a worker ended with."""
    ours = getattr(errors, kind, None)
    if isinstance(ours, type) and issubclass(ours, TdhookError):
        return ours(text)
    return WorkerError(f"an actor of Ray's ended with {kind}: {text}")


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(f"engine='ray' needs Ray Data: pip install 'tdhook_rl[ray]' ({error})") from None
    return ray

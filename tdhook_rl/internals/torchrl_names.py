"""What is used of the insides of TorchRL: of its collectors and evaluators, replay buffers, trainers and modules.

An object of another kind than is meant has none of these: the functions then say so (``None``, ``False``, nothing), so
that nobody has to know which of TorchRL's classes keeps what. (TorchRL takes long to import, so nothing here does.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

# ---------------------------------------------------------------------- collectors


def carrier_of(collector: Any) -> TensorDictBase:
    """The TensorDict that a ``Collector`` carries from step to step; nothing public reaches it before the first batch
    is out."""
    return collector._carrier


def copies_into_buffers(collector: Any) -> bool:
    """Whether a ``Collector`` writes each step into a TensorDict that it has allocated; asked for by an argument, and
    decided by it."""
    return collector._use_buffers


def draws_random_frames(collector: Any) -> bool:
    """Whether a ``Collector`` draws its next action itself (``init_random_frames``), without a call of the policy."""
    return collector._should_use_random_frames()


def frames_so_far(collector: Any) -> int:
    """How many frames a collector has counted; some count in public (``collected_frames``) as well, or only."""
    return max(getattr(collector, "_frames", 0), getattr(collector, "collected_frames", 0))


def background_thread(collector: Any) -> Any:
    """The thread that collects after ``start()``; ``is_running()`` does not tell one that failed from one not begun."""
    return getattr(collector, "_thread", None) or getattr(collector, "_collection_thread", None)


def background_error(collector: Any) -> Exception | None:
    """What ended the collection in the background of an ``AsyncBatchedCollector``, which keeps it for ``shutdown``."""
    return getattr(collector, "_replay_error", None)


def collects_freely(collector: Any) -> bool:
    """Whether the workers of a ``MultiCollector`` collect on while nobody asks, after ``start()``."""
    return collector._running_free


def sent_policy(collector: Any) -> Any:
    """The policy that a ``MultiCollector`` was given beside a ``policy_factory``, whose weights it sends."""
    return getattr(collector, "_fallback_policy", None)


def starts_processes(kind: Any) -> bool:
    """Whether a class of collectors is one that starts processes of its own; their base class is private as well."""
    return hasattr(kind, "_run_processes")


def weight_schemes(collector: Any) -> list[Any]:
    """How a collector sends weights to its workers; they have a ``shutdown`` that the collector leaves to the exit."""
    return list((getattr(collector, "_weight_sync_schemes", None) or {}).values())


def weight_queues(schemes: Iterable[Any]) -> Iterator[Any]:
    """The queues to workers of such schemes: what lies in one for a dead worker would be waited for at exit."""
    for scheme in schemes:
        for name in ("_weight_init_queues", "_instruction_queues", "_ack_queues"):
            yield from (getattr(scheme, name, None) or {}).values()


def env_workers(owner: Any) -> Sequence[Any]:
    """The processes of a ``ParallelEnv``, or of a collector that runs environments, which show only their number."""
    return getattr(owner, "_workers", ())


def has_env_workers(env: Any) -> bool:
    """Whether an environment may have such processes."""
    return hasattr(env, "_workers")


# ---------------------------------------------------------------------- asynchronous collectors


def async_pool(collector: Any) -> Any:
    """The environments of an ``AsyncBatchedCollector``, where they have been started; ``env`` would start them."""
    return getattr(collector, "_env_pool", None)


def has_async_pool(collector: Any) -> bool:
    """Whether a collector is one that starts such a pool."""
    return hasattr(collector, "_env_pool")


def env_backend(collector: Any) -> str:
    """What an ``AsyncBatchedCollector`` runs environments in, ``"threading"`` or another; an argument alone says so."""
    return getattr(collector, "_env_backend", "threading")


def server_process(collector: Any) -> Any:
    """The process that serves the policy of an ``AsyncBatchedCollector``, if one does; a server shows whether it is
    alive, not whose number it has."""
    return getattr(getattr(collector, "_server", None), "_process", None)


def actor_id(actor: Any) -> str:
    """The number of an actor of Ray's as its errors tell it; a handle shows none."""
    return actor._actor_id.hex()


# ---------------------------------------------------------------------- evaluators


def backend_of(evaluator: Any) -> Any:
    """What evaluates, in an ``Evaluator``; ``None`` for a collector."""
    return getattr(evaluator, "_backend", None)


def collector_of(backend: Any) -> Any:
    """The collector of such a backend, which makes it at the first evaluation."""
    return getattr(backend, "_collector", None)


def evaluates_by_workers(backend: Any) -> bool:
    """Whether such a backend makes a collector with processes."""
    return getattr(backend, "_use_multi_collector", False)


def evaluated_policy(owner: Any) -> Any:
    """The policy of an evaluator's backend, which has no ``policy``."""
    return getattr(owner, "_policy", None)


# ---------------------------------------------------------------------- replay buffers


def collate_fn(buffer: Any) -> Any:
    """What a buffer makes a sample of what it has found by; to be given as an argument, and not to be asked for."""
    return getattr(buffer, "_collate_fn", None)


@contextlib.contextmanager
def read_lock(buffer: Any) -> Iterator[None]:
    """Keep writers of a buffer out while it is read: threads and, with a lock of its own, processes.

    The lock of a process that was killed while it wrote is never free again, so that it is not waited for for long.
    """
    with getattr(buffer, "_replay_lock", None) or contextlib.nullcontext():
        lock = getattr(buffer, "_write_lock", None)
        held = hasattr(lock, "acquire") and lock.acquire(timeout=5.0)
        try:
            yield
        finally:
            if held:
                lock.release()


def time_first(buffer: Any, found: Any) -> Any:
    """What a buffer with ``dim_extend`` has found in its storage, in the order in which it samples it."""
    return buffer._transpose(found)


def cursor_of(writer: Any) -> int:
    """Where a writer that goes round writes next, 0 for others: the oldest row, where the storage is full."""
    return int(getattr(writer, "_cursor", 0) or 0)


def set_written(writer: Any, count: int, cursor: int) -> None:
    """Let a new writer that goes round be where one was that has been saved; ``loads`` would read any file that the
    folder names."""
    writer.load_state_dict({"_cursor": cursor, "_write_count": count})


def length_in_time(storage: Any, otherwise: int) -> int:
    """How many rows of its first dimension a storage of several has filled; ``len`` counts all its elements."""
    return getattr(storage, "_len_along_dim0", otherwise)


def storages_of(storage: Any) -> Sequence[Any]:
    """The storages of an ensemble, which cannot be asked how many it has; of another one, that one."""
    return getattr(storage, "_storages", None) or (storage,)


def fixed_keys(storage: Any) -> Collection[Any] | None:
    """The keys that a locked storage (memory-mapped, shared) takes, also once it was emptied; all others are dropped
    in silence. ``None`` for a storage that takes others."""
    return getattr(storage, "_storage_keys", None)


# ---------------------------------------------------------------------- trainers


def batch_operations(trainer: Any) -> list[Any]:
    """What is registered at a trainer for each batch, in order; it has a call to register, and none to ask."""
    return [operation for operation, _ in getattr(trainer, "_batch_process_ops", ())]


def modules_of(trainer: Any) -> Mapping[str, Any]:
    """What a trainer saves, by name, its buffers among them."""
    return getattr(trainer, "_modules", {})


# ---------------------------------------------------------------------- environments


def forget_last_step(transform: Any) -> None:
    """Let the next reset of a vector of Gymnasium environments be one of all rows: without a mask it is taken for one
    of the rows that the last step has ended, and all observations are of that step."""
    memo: Any = getattr(transform, "_memo", None)
    if isinstance(memo, dict):
        memo.clear()


def wrapped_env(env: Any) -> Any:
    """What an environment of TorchRL wraps (Gymnasium's, say), or ``None``: the wrapper looks attributes up there only
    where it has none of the name itself."""
    return getattr(env, "__dict__", {}).get("_env")


def lower_done_flags(env: Any) -> None:
    """Make a ``ParallelEnv`` wait for its workers again: ``load_state_dict`` leaves the flags raised by which it knows
    that they are done, and the next step would be read before it is there."""
    flags: Any = getattr(env, "_shm_done_flags", ())
    for place in range(len(flags)):
        flags[place] = 0


# ---------------------------------------------------------------------- modules and distributions


def actor_keys(wrapper: nn.Module) -> Mapping[NestedKey, NestedKey]:
    """Where a ``MultiStepActorWrapper`` keeps what its network has put out, by key; its ``out_keys`` mix both."""
    return wrapper._actor_keys_map  # type: ignore[return-value]


def recurrent_step(module: Any, value: Tensor, states: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """What a ``GRUModule`` or ``LSTMModule`` computes of one step, ``(rows, 1, features)``, and of its states; its
    forward alone is public, which puts a whole TensorDict into another shape for it."""
    run = module._gru if hasattr(module, "_gru") else module._lstm
    return run(value, *value.shape[:2], value.device, value.dtype, *states)


def lends_weights(module: nn.Module) -> bool:
    """Whether a module is a multi-agent net, which lends the weights of its agents to one net without any."""
    return hasattr(module, "_empty_net")


def is_lent_weights(path: str) -> bool:
    """Whether a module stands in such a net, by its path."""
    return "_empty_net" in path.split(".")


def walks_through_time(module: nn.Module) -> bool:
    """Whether a module takes a batch apart into the tensors of each step, and calls layers of its modules on these: an
    ``RSSMRolloutV3`` whose keys are the usual ones. With others it calls its TensorDict modules."""
    return bool(getattr(module, "_fast_path", False))


def is_sparse(distribution: Any) -> bool:
    """Whether a ``MaskedCategorical`` was made with ``indices=``, and draws among these; its ``mask`` then raises."""
    return getattr(distribution, "_sparse_mask", False)


def listed_choices(distribution: Any) -> Tensor | None:
    """The numbers that a ``MaskedCategorical`` draws among, if it was made with ``indices=``."""
    return distribution._mask if is_sparse(distribution) else None


def closed_values(values: Tensor) -> Tensor:
    """Where a ``QValueModule`` has put the lowest number there is, since the mask of actions closes one; nothing else
    says so in what it writes."""
    found = values.detach()
    return found <= torch.finfo(found.dtype).min if found.is_floating_point() else torch.zeros_like(found).bool()


def open_by_mask(distribution: Any, number: int) -> Tensor | None:
    """Which of so many choices a ``MaskedCategorical`` leaves open; ``None`` for distributions without a mask."""
    mask = getattr(distribution, "_mask", None)
    if not isinstance(mask, Tensor):
        return None
    if not is_sparse(distribution):
        return mask.bool()
    padding = distribution._padding_value
    listed = mask.unsqueeze(-1) == torch.arange(number, device=mask.device)
    return (listed if padding is None else listed & (mask != padding).unsqueeze(-1)).any(-2)


def is_entrywise(function: type) -> bool:
    """Whether an autograd function is one of TorchRL's that squash actions, entry by entry."""
    return function.__module__ == "torchrl.modules.distributions.utils" and function.__name__ in (
        "_SafeTanh",
        "_SafeTanhNoEps",
        "_SafeaTanh",
        "_SafeaTanhNoEps",
    )

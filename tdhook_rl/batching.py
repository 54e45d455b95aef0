"""Any batch shape to chunks and back; what an extra pass must leave as it found it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

__all__ = [
    "GeneratorState",
    "PassNoise",
    "Traits",
    "conv_chunk",
    "frozen_statistics",
    "in_recurrent_mode",
    "map_chunks",
]

#: Input elements of one chunk for convolutional nets, where batches that leave the cache are slower on CPU: 64 frames
#: of 3 x 64 x 64, measured best from 32 to 128 for the net of IMPALA. Other nets take the whole batch.
CONV_ELEMENTS = 64 * 3 * 64 * 64
#: Below so many rows a pass of a convolutional net is mostly overhead.
CONV_ROWS = 32

_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def map_chunks(
    data: TensorDictBase, function: Callable[[TensorDictBase], TensorDictBase], chunk_size: int | None
) -> TensorDictBase:
    """Apply a row-wise function over flat chunks and give the result the batch shape of the data.

    Args:
        data: a TensorDict of any batch shape, ``()`` included.
        function: maps a TensorDict with one batch dimension (none if the data has none) to another
            with the same batch size.
        chunk_size: rows per call; ``None`` for all at once.

    Returns:
        a TensorDict with the batch size of ``data``.
    """
    if data.ndim == 0:
        return function(data)
    flat = data.reshape(-1) if data.ndim > 1 else data
    rows = flat.batch_size[0]
    if chunk_size is None or rows <= chunk_size:
        result = function(flat)
    else:
        result = torch.cat([function(flat[start : start + chunk_size]) for start in range(0, rows, chunk_size)])
    return result.reshape(data.batch_size) if data.ndim > 1 else result


def conv_chunk(inputs: Iterable[Any], batch: torch.Size) -> int:
    """Rows of one chunk for a convolutional net that reads these inputs.

    Args:
        inputs: what the net reads, tensors with the batch shape first.
        batch: the batch shape.

    Example:
        >>> conv_chunk([torch.zeros(2, 3, 64, 64)], torch.Size([2]))
        64
    """
    rows = max(batch.numel(), 1)
    elements = max((value.numel() // rows for value in inputs if isinstance(value, Tensor)), default=1)
    return max(CONV_ROWS, CONV_ELEMENTS // max(elements, 1))


def in_recurrent_mode(module: nn.Module) -> bool:
    """Whether a TorchRL recurrent module of the policy reads whole trajectories (``set_recurrent_mode``)."""
    return any(getattr(child, "recurrent_mode", False) is True for child in module.modules())


@dataclass(frozen=True)
class Traits:
    """What a policy is made of; its modules are looked through once, not at every call."""

    convolutional: bool
    recurrent: bool  # has a TorchRL recurrent module, which may be told to read whole trajectories
    batch_statistics: bool  # normalises by statistics of its batch when it trains

    @classmethod
    def of(cls, module: nn.Module) -> Traits:
        children = list(module.modules())
        return cls(
            convolutional=any(isinstance(child, _CONVOLUTIONS) for child in children),
            recurrent=any(hasattr(child, "recurrent_mode") for child in children),
            batch_statistics=any(isinstance(child, _BATCH_STATISTICS) for child in children),
        )


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Run batch-statistics layers in eval mode, so that an extra pass does not move their buffers."""
    changed = [child for child in module.modules() if isinstance(child, _BATCH_STATISTICS) and child.training]
    for child in changed:
        child.training = False
    try:
        yield
    finally:
        for child in changed:
            child.training = True


class GeneratorState:
    """The state of torch's global generators, to be put back after an extra pass."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._states = self._read()

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._cuda is not None:
            states.append(torch.cuda.get_rng_state(self._cuda))
        return states

    def restore(self) -> None:
        """Put the state back; nothing is written where nothing was drawn."""
        for index, (now, then) in enumerate(zip(self._read(), self._states, strict=True)):
            if not torch.equal(now, then):
                if index == 0:
                    torch.set_rng_state(then)
                else:
                    torch.cuda.set_rng_state(then, self._cuda)


class PassNoise:
    """The noise of several passes in a row, each of which leaves torch's generators as it found them.

    The passes draw from one stream. Between two of them other threads may draw from the generators; putting back a
    state from before the first pass would repeat their noise.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._own: GeneratorState | None = None

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """The duration of one pass."""
        before = GeneratorState(self._device)
        if self._own is not None:
            self._own.restore()
        try:
            yield
        finally:
            self._own = GeneratorState(self._device)
            before.restore()


def shallow(data: TensorDictBase) -> TensorDict:
    """An unlocked TensorDict over the same tensors; results can be added to it without touching the data."""
    copy = data.copy() if not data.is_locked else data.clone(recurse=False)
    return copy.unlock_() if copy.is_locked else copy

"""The rows of a replay buffer that were written since it was last looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase

from tdhook_rl.internals.torchrl_names import length_in_time, time_first


@dataclass
class NewestRows:
    """Looks at a buffer that a collector fills by itself.

    Args:
        most: elements that are read at once (along the first dimension of the storage).

    Attributes:
        written: how many elements the buffer had been given when it was last looked at.
        each: how many rows an element has of those that were taken last.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> buffer, newest = ReplayBuffer(storage=LazyTensorStorage(10)), NewestRows(most=2)
        >>> _ = buffer.extend(TensorDict({"x": torch.arange(5)}, 5))
        >>> newest.count(buffer), newest.take(buffer)["x"], newest.take(buffer)
        (5, tensor([3, 4]), None)
    """

    most: int = 512
    written: int = 0
    each: int = 1

    def count(self, buffer: Any) -> int:
        """How many elements are new; nothing is read."""
        return max(0, int(buffer.write_count) - self.written)

    def take(self, buffer: Any) -> TensorDictBase | None:
        """The newest of them, in the order in which they were written, time last; ``None`` where nothing is new."""
        # Storages of more dimensions count and are read along the first, which is time.
        size = length_in_time(buffer.storage, otherwise=len(buffer))
        new, self.written = self.count(buffer), int(buffer.write_count)
        if not size or not new:
            return None
        last = self.written % size  # a full ring goes on at its start
        places = torch.arange(last - min(new, size, self.most), last) % size
        found = buffer.storage.get(places)
        self.each = found.batch_size[1:].numel()
        return time_first(buffer, found) if getattr(buffer.storage, "ndim", 1) > 1 else found

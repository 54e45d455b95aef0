"""The rows of a replay buffer that were written since it was last looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase

from tdhook_rl.internals.torchrl_names import length_in_time, read_lock, time_first


@dataclass
class NewestRows:
    """Looks at a buffer that a collector fills by itself, perhaps meanwhile, in a thread or in processes.

    Args:
        most: elements that are read at once (along the first dimension of the storage).

    Attributes:
        written: how many elements the buffer had been given when it was last looked at.
        each: how many rows an element has of those that were taken last.
        new: how many elements were new then.
        missed: how many of these were not taken: there were more than ``most``, or a ring had gone round.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> buffer, newest = ReplayBuffer(storage=LazyTensorStorage(10)), NewestRows(most=2)
        >>> _ = buffer.extend(TensorDict({"x": torch.arange(5)}, 5))
        >>> newest.take(buffer)["x"], newest.new, newest.missed, newest.take(buffer)
        (tensor([3, 4]), 5, 3, None)
    """

    most: int = 512
    written: int = 0
    each: int = 1
    new: int = 0
    missed: int = 0

    def take(self, buffer: Any) -> TensorDictBase | None:
        """The newest of them, in the order in which they were written, time last; ``None`` where nothing is new."""
        with read_lock(buffer):  # a buffer counts rows before it has them
            written = int(buffer.write_count)
            # Storages of more dimensions count and are read along the first, which is time.
            size = length_in_time(buffer.storage, otherwise=len(buffer.storage))
            self.new, self.written = max(0, written - self.written), written
            taken = min(self.new, size, self.most)
            self.missed = self.new - taken
            if not taken:
                return None
            # A full ring goes on at its start.
            found = buffer.storage.get(torch.arange(written - taken, written) % size)
        self.each = found.batch_size[1:].numel()
        return time_first(buffer, found) if getattr(buffer.storage, "ndim", 1) > 1 else found

"""Controls as they were when the call under way began: whoever else sets one meanwhile changes the next call."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tdhook_rl.internals.functorch_names import transform_stack
from tdhook_rl.sites.controls import Controls

#: Seconds for which controls are read again that are being written to. Who writes takes microseconds, but may have to
#: wait for its turn in the middle; who has died there never ends.
_PATIENCE = 2.0


class _Held(NamedTuple):
    """A control as it was: the numbers, their bytes, and how often it had been set."""

    value: Tensor
    content: bytes | None  # None: the tensor itself, of which somebody takes gradients
    version: int


class HeldControls:
    """What hooks and methods read of the controls: in a call the same numbers, however often they are read.

    A thread, a process or a trainer may set controls at any time. Of one call the sites, the passes that explain it and
    what is written beside it must not see different ones, nor half of those that were set together. What is set by the
    call's own thread, in a function of the user's, is seen at once. Compiled calls, those inside ``vmap`` and the like,
    and what runs outside a call read the controls themselves.

    It is a context: a call, or a part of one, by who holds the lock of the policy.

    Args:
        live: the controls.
    """

    def __init__(self, live: Controls) -> None:
        self._live = live
        self._forget()

    def _forget(self) -> None:
        self._live.readers.add(self)
        self._last: dict[str, _Held] = {}
        self._now: dict[str, _Held] | None = None
        self._depth, self._thread = 0, 0
        self._views: dict[str, tuple[Tensor, Any, Any]] = {}
        self._counts: Any = None
        self._contents: list[bytes | None] = []  # of what was read last, when so many writings had ended
        self._ended = -1
        self._left = 0  # writings that have begun and will never end

    def __getstate__(self) -> dict[str, Any]:
        return {"_live": self._live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._live = state["_live"]
        self._forget()

    def forget_call(self) -> None:
        """Drop what a call has left that will never end."""
        self._now, self._depth = None, 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, name: object) -> bool:
        return name in self._live

    @property
    def numbers(self) -> object:
        """What the call under way reads, the same object as long as nothing was set; ``None`` where nothing is held."""
        return self._now or None

    def __getitem__(self, name: str) -> Tensor:
        if torch.compiler.is_compiling() or self._now is None or name not in self._now:
            return self._live[name]
        return self._now[name].value

    def version(self, name: str) -> Tensor:
        """How often a control had been set when the call began."""
        if torch.compiler.is_compiling() or self._now is None or name not in self._now:
            return self._live.version(name)
        return torch.tensor(self._now[name].version, device="cpu")

    def __enter__(self) -> None:
        self._depth += 1
        # In a transform memory cannot be looked at.
        if self._depth == 1 and self._live.tensors and not transform_stack():
            self._thread = threading.get_ident()
            self._now = self._last = self._read()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._now = None

    def were_set(self) -> None:
        """Read the controls anew, where the thread that has set them is that of the call under way."""
        if self._now is not None and self._thread == threading.get_ident() and not transform_stack():
            self._now = self._last = self._read()

    def _read(self) -> dict[str, _Held]:
        if len(self._views) != len(self._live.tensors) and not self._look():
            return {}
        counts = self._counts
        before = counts[1]
        if before == self._ended and counts[0] - before == self._left and self._same():
            return self._last
        end = time.monotonic() + _PATIENCE
        while True:
            before = counts[1]
            found = {name: self._one(name) for name in self._views}
            open_ones = counts[0] - before
            if open_ones == self._left:
                break
            if time.monotonic() > end:
                self._left = open_ones
                break
            time.sleep(1e-5)  # the other's turn
        self._ended, self._contents = before, [one.content for one in found.values()]
        return found

    def _same(self) -> bool:
        """Whether all are as they were read last, and nobody takes gradients of them."""
        for (control, memory, _), content in zip(self._views.values(), self._contents, strict=False):
            if control.requires_grad or memory.tobytes() != content:
                return False
        return True

    def _look(self) -> bool:
        """Find where in memory the controls are, as other processes write to it; whether it can be found here."""
        writings = self._live.writings.view(2)
        if type(writings) is not Tensor:  # a mode makes others of all that is made in it
            return False
        self._counts = memoryview(writings.numpy())
        for name, control in self._live.items():
            version = memoryview(self._live.version(name).view(1).numpy())
            self._views[name] = control, control.detach().reshape(-1).view(torch.uint8).numpy(), version
        self._ended = -1
        return True

    def _one(self, name: str) -> _Held:
        control, memory, version = self._views[name]
        number = version[0]
        if control.requires_grad or not control.numel():
            return _Held(control, None, number)
        content, last = memory.tobytes(), self._last.get(name)
        if last is not None and last.content == content:
            return last if last.version == number else last._replace(version=number)
        with torch.inference_mode(False):  # it may be read by a later call, with gradients
            copied = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(control.dtype).view(control.shape)
        if type(copied) is not Tensor:  # as in _look
            return _Held(control, None, number)
        return _Held(copied, content, number)

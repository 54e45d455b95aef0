"""Controls as they were when the call under way began: whoever sets one meanwhile changes the next call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tdhook_rl.sites.controls import Controls

#: How often controls are read again that were written to meanwhile. Who writes takes microseconds.
_TRIES = 1000


class _Held(NamedTuple):
    """A control as it was: the numbers, their bytes, and how often it had been set."""

    value: Tensor
    content: bytes | None  # None: the tensor itself, of which somebody takes gradients
    version: int


class HeldControls:
    """What hooks and methods read of the controls: in a call the same numbers, however often they are read.

    A thread, a process or a trainer may set controls at any time. Of one call the sites, the passes that explain it and
    what is written beside it must not see different ones, nor half of those that were set together. What a compiled
    call reads are the controls themselves, and so does what runs outside a call.

    Args:
        live: the controls.
    """

    def __init__(self, live: Controls) -> None:
        self._live = live
        self._forget()

    def _forget(self) -> None:
        self._last: dict[str, _Held] = {}
        self._now: dict[str, _Held] | None = None
        self._views: dict[str, tuple[Tensor, Any, Any]] = {}
        self._counts: Any = None
        self._left: tuple[int, int] | None = None  # the counts that a writer has left which never ended

    def __getstate__(self) -> dict[str, Any]:
        return {"_live": self._live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._live = state["_live"]
        self._forget()

    def forget_call(self) -> None:
        """Drop what a call has left that will never end."""
        self._now = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, name: object) -> bool:
        return name in self._live

    @property
    def holds(self) -> bool:
        """Whether a call is under way whose controls are held: the same numbers are the same tensor then."""
        return self._now is not None and not torch.compiler.is_compiling()

    def __getitem__(self, name: str) -> Tensor:
        if torch.compiler.is_compiling() or self._now is None or name not in self._now:
            return self._live[name]
        return self._now[name].value

    def version(self, name: str) -> Tensor:
        """How often a control had been set when the call began."""
        if torch.compiler.is_compiling() or self._now is None or name not in self._now:
            return self._live.version(name)
        return torch.tensor(self._now[name].version, device="cpu")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let the controls be what they are now until the end of the call; by who holds the lock of the policy."""
        if self._now is not None:
            yield
            return
        self._now = self._last = self._read()
        try:
            yield
        finally:
            self._now = None

    def _read(self) -> dict[str, _Held]:
        if self._counts is None:
            self._counts = tuple(memoryview(one.view(1).numpy()) for one in (self._live.begun, self._live.ended_writes))
        begun, ended = self._counts
        found: dict[str, _Held] = {}
        counts, names = (0, 0), list(self._live)
        for _ in range(_TRIES):
            before = ended[0]
            found = {name: self._one(name) for name in names}
            counts = begun[0], before
            if counts[0] == before or counts == self._left:
                return found
        self._left = counts
        return found

    def _one(self, name: str) -> _Held:
        view = self._views.get(name)
        if view is None:
            control, version = self._live[name], memoryview(self._live.version(name).view(1).numpy())
            memory = control.detach().reshape(-1).view(torch.uint8).numpy()
            view = self._views[name] = control, memory, version
        control, memory, version = view
        number = version[0]
        if control.requires_grad or not control.numel():
            return _Held(control, None, number)
        content, last = memory.tobytes(), self._last.get(name)
        if last is not None and last.content == content:
            return last if last.version == number else last._replace(version=number)
        with torch.inference_mode(False):  # it may be read by a later call, with gradients
            copied = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(control.dtype).view(control.shape)
        return _Held(copied, content, number)

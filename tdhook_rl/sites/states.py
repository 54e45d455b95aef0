"""The last states of recurrent modules (``h_n``, ``c_n``), which stand beside the outputs of their steps.

What acts on the output of an ``nn.LSTM`` acts on the sequence. A network that reads the last state in its place would
not notice: that is found out in the first forward, by looking at what the operations read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tdhook_rl.errors import SiteError
from tdhook_rl.internals.functorch_names import get_unwrapped, is_wrapped
from tdhook_rl.internals.torch_names import TorchDispatchMode, storage_id
from tdhook_rl.sites.containers import tensors_of
from tdhook_rl.sites.runtime import Runtime

_PLACES = {"h_n": 0, "c_n": 1}


class _Reads(TorchDispatchMode):
    """Notes which of some tensors the operations read, themselves or through a view."""

    def __init__(self) -> None:
        super().__init__()
        self._sites: dict[int, tuple[str, str, bool]] = {}  # by memory: site, class, whether it is a state
        self._held: list[Tensor] = []  # so that no memory is used again
        self._read: set[tuple[str, bool]] = set()

    def watch(self, site: str, module: nn.Module, sequence: Tensor, states: list[Tensor]) -> None:
        for tensor, state in ((sequence, False), *((one, True) for one in states)):
            self._held.append(tensor)
            self._sites[_memory(tensor)] = site, type(module).__name__, state

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._sites:
            views = {_memory(tensor) for tensor in tensors_of(result)}
            for tensor in tensors_of([args, kwargs or {}]):
                memory = _memory(tensor)
                if memory in self._sites and memory not in views:  # a view is read when something reads it
                    site, _, state = self._sites[memory]
                    self._read.add((site, state))
        return result

    @property
    def seen(self) -> set[str]:
        return {site for site, _, _ in self._sites.values()}

    def require_read(self) -> None:
        for site, kind, _ in self._sites.values():
            if (site, True) in self._read and (site, False) not in self._read:
                raise SiteError(
                    f"an intervention was placed on {site!r}, a {kind} whose sequence of outputs it changes, but the "
                    "network reads only its last state (h_n or c_n), so it would change nothing: steer the state with "
                    f"SteeringVectors({{({site!r}, 'h_n'): vector}}), or name the module that reads it"
                )


class StateHook:
    """Forward hook, behind those that act on its module, that lets :func:`watching` see what becomes of its output."""

    def __init__(self, runtime: Runtime, site: str) -> None:
        self.runtime = runtime
        self.site = site

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        reads = self.runtime.reads
        if reads is None or not isinstance(output, tuple) or len(output) != 2:
            return None
        sequence, states = output
        # Copies: they might share the memory of the sequence.
        copies = tuple(one.clone() for one in states) if isinstance(states, tuple) else states.clone()
        reads.watch(self.site, module, tensors_of(sequence)[0], tensors_of(copies))
        return sequence, copies


@contextmanager
def watching(runtime: Runtime) -> Iterator[None]:
    """A forward in which it is noticed if the network reads the last state of a module and not what was changed.

    Raises:
        SiteError: if it does.
    """
    previous, runtime.reads = runtime.reads, _Reads()
    try:
        with runtime.reads as reads:
            yield
    finally:
        runtime.reads = previous
    reads.require_read()
    runtime.cores = [site for site in runtime.cores if site not in reads.seen]


def state_of(output: Any, key: str) -> Tensor:
    """The state of this name in what a recurrent module returns: layers (times directions), rows, features."""
    states = output[1]
    return states[_PLACES[key]] if isinstance(states, tuple) else states


def with_state(output: Any, key: str, new: Tensor) -> Any:
    """The same output with a state replaced."""
    sequence, states = output
    if not isinstance(states, tuple):
        return sequence, new
    return sequence, tuple(new if place == _PLACES[key] else one for place, one in enumerate(states))


def state_names(module: nn.Module) -> list[str]:
    """The names of the states that a module returns; none for one that is not recurrent."""
    return [] if not isinstance(module, nn.RNNBase) else ["h_n", "c_n"] if isinstance(module, nn.LSTM) else ["h_n"]


def _memory(tensor: Tensor) -> int:
    while is_wrapped(tensor):
        tensor = get_unwrapped(tensor)
    return storage_id(tensor)

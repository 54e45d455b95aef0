"""What a module returns beside its first tensor: last states (``h_n``, ``c_n``), weights of attention, a second head.

What acts on the output of an ``nn.LSTM`` acts on the sequence, and on that of a module of one's own on the first of its
tensors. A network that reads another one in its place would not notice: that is found out in the first forward, by
looking at what the operations read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdhook_rl.errors import SiteError
from tdhook_rl.internals.functorch_names import get_unwrapped, is_wrapped
from tdhook_rl.internals.torch_names import TorchDispatchMode, storage_id
from tdhook_rl.sites.containers import first_tensor, other_tensors, tensors_of, with_other_tensors
from tdhook_rl.sites.known import own_class
from tdhook_rl.sites.runtime import Runtime

_PLACES = {"h_n": 0, "c_n": 1}


class _Reads(TorchDispatchMode):
    """Notes which of some tensors the operations read, themselves or through a view."""

    def __init__(self, every: bool) -> None:
        super().__init__()
        self.every = every  # module, and not only recurrent ones
        self.seen: set[str] = set()
        self._sites: dict[int, tuple[str, nn.Module, bool]] = {}  # by memory: site, module, whether it is beside
        self._held: list[Tensor] = []  # so that no memory is used again
        self._read: set[tuple[str, bool]] = set()

    def watch(self, site: str, module: nn.Module, first: Tensor, others: list[Tensor]) -> None:
        self.seen.add(site)
        for tensor, beside in ((first, False), *((one, True) for one in others)):
            self._held.append(tensor)
            self._sites[_memory(tensor)] = site, module, beside

    def hand_out(self, output: Any, network: nn.Module) -> None:
        """What the network returns or has written is read by whoever called it; what it keeps, by its next call."""
        if not self._sites:
            return
        self._note(list(output.values(True, True)) if isinstance(output, TensorDictBase) else tensors_of(output))
        if self._unread():
            self._note([one for child in network.modules() for one in _kept(list(vars(child).values()), 3)])

    def _note(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and (known := self._sites.get(_memory(tensor))):
                self._read.add((known[0], known[2]))

    def _unread(self) -> list[tuple[str, nn.Module]]:
        """The sites of which another tensor is read, and not the first."""
        sites = {site: module for site, module, _ in self._sites.values()}
        return [one for one in sites.items() if (one[0], True) in self._read and (one[0], False) not in self._read]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._sites:
            views = {_memory(tensor) for tensor in tensors_of(result)}
            for tensor in tensors_of([args, kwargs or {}]):
                memory = _memory(tensor)
                if memory in self._sites and memory not in views:  # a view is read when something reads it
                    site, _, beside = self._sites[memory]
                    self._read.add((site, beside))
        return result

    def require_read(self) -> None:
        for site, module in self._unread():
            kind = own_class(module).__name__
            if not isinstance(module, nn.RNNBase):
                raise SiteError(
                    f"an intervention was placed on {site!r}, a {kind} that returns several tensors, of which it "
                    "changes the first, but the network reads only others, so it would change nothing: name the "
                    "module that makes the one that is read, or the module that reads it"
                )
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
        if reads is None or not (reads.every or isinstance(module, nn.RNNBase)):
            return None
        others = [] if isinstance(output, Tensor) else other_tensors(output, module)
        if not others or any(one is output for one in args):
            reads.seen.add(self.site)
            return None
        copies = [one.clone() for one in others]  # they might share the memory of the first
        reads.watch(self.site, module, first_tensor(output, module, self.site), copies)
        return with_other_tensors(output, copies, module)


def may_give_several(module: nn.Module) -> bool:
    """Whether a module may return tensors beside the first, so that a first forward is looked at."""
    if isinstance(module, nn.Sequential):
        return len(module) > 0 and may_give_several(module[-1])
    if isinstance(module, TensorDictModuleBase):
        return False  # others know its entries by their keys
    several = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)
    return isinstance(module, several) or not own_class(module).__module__.startswith("torch.nn.")


@contextmanager
def watching(runtime: Runtime, every: bool = True) -> Iterator[_Reads]:
    """A forward in which it is noticed if the network reads what stands beside the tensor that was changed, and not it.

    What the forward returns is given to ``hand_out``; unless ``every``, recurrent modules only are looked at.

    Raises:
        SiteError: if it does.
    """
    previous, runtime.reads = runtime.reads, _Reads(every)
    try:
        with runtime.reads as reads:
            yield reads
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


def _kept(value: Any, depth: int) -> list[Any]:
    """Tensors in attributes, which may hold themselves."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list, deque)) else ()
    return [value] if isinstance(value, Tensor) else [one for item in items if depth for one in _kept(item, depth - 1)]


def _memory(tensor: Tensor) -> int:
    while is_wrapped(tensor):
        tensor = get_unwrapped(tensor)
    return storage_id(tensor)

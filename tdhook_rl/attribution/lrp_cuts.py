"""What was computed from the explained inputs and cut off from them, and where it takes a share of the relevance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdhook_rl.attribution.functions import Kind, Operation, operation, running_module
from tdhook_rl.attribution.lrp_hooks import LrpState, Unknown
from tdhook_rl.attribution.relevance_graph import Graph
from tdhook_rl.errors import warn
from tdhook_rl.sites.runtime import vmap_level

#: Of what is linear in one tensor at a time: where a term is added, by position and by name.
_ADDED = {
    **{"linear": (2, "bias"), "bilinear": (3, "bias"), "batch_norm": (4, "bias")},
    **dict.fromkeys(("addmm", "addmv", "addr", "addbmm", "baddbmm", "addcmul"), (0, "input")),
}
#: What takes only the shape of a tensor.
_EMPTY = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
#: Where values leave torch.
_LEAVES = ("numpy", "tolist", "array")


class CutOff:
    """The values of a pass that depend on what is explained by a path that no gradient takes.

    Where such a value is added to, or put beside, what a gradient does reach, it keeps its share of the relevance.

    Args:
        graph: which tensors depend on what is explained.
        root: the policy; what is written into its buffers, such as a running mean, is the buffer's.
        names: of the modules, by identity.
        warns: say it; else raise :class:`Unknown`, for a pass that says it.
    """

    def __init__(self, graph: Graph, root: nn.Module, names: Mapping[int, str], warns: bool) -> None:
        self._graph = graph
        self._names = names
        self._warns = warns
        self._kept = {id(value) for value in (*root.buffers(), *root.parameters())}
        self._cut: dict[int, Tensor] = {}  # by identity, and kept: an identity is given again

    def __bool__(self) -> bool:
        return bool(self._cut)

    def note(self, found: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str = "") -> Any:
        """Note a result that no gradient joins to what is explained, though it was computed from that."""
        if name in _EMPTY or name.startswith("new_"):
            return found
        results = [value for value in tensors([found], {}) if not (value.requires_grad and self._graph.carries(value))]
        values = list(tensors(args, kwargs))
        if name in _LEAVES and any(self._depends(value) for value in values):
            self._say("hands a value to numpy or Python that was computed from the inputs: what comes back is")
        # What is written in place of a buffer is the buffer's.
        if results and not any(value is one for value in values for one in results):
            if any(self._depends(value) for value in values):
                self._cut |= {id(value): value for value in results}
        return found

    def look_at(self, called: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], carries: bool) -> None:
        """Say where a value that is cut off meets what is explained, and note where it is written into a tensor."""
        if not self._cut:
            return
        if called.in_place and not carries and called.kind is Kind.MOVES and isinstance(args[0], Tensor):
            if any(id(value) in self._cut for value in tensors(args[1:], kwargs)):
                written = [one for one in (args[0], args[0]._base) if one is not None and id(one) not in self._kept]
                self._cut |= {id(one): one for one in written}
        elif carries and any(map(self._is_cut, self._terms(called, args, kwargs))):
            if called.kind is Kind.MOVES:
                self._say("joins what it computes with a value that was computed from the inputs and")
            else:
                self._say("adds a value that was computed from the inputs and")

    def look_at_inputs(self, inputs: Sequence[Any]) -> None:
        """The same for a module with a rule, between whose inputs relevance is shared."""
        if self._cut and any(map(self._is_cut, tensors(inputs, {}))):
            if any(self._graph.carries(value) for value in tensors(inputs, {})):
                self._say("adds a value that was computed from the inputs and")

    def _terms(self, called: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
        if called.kind in (Kind.MOVES, Kind.LINEAR):
            return tensors(args, kwargs)
        at, key = _ADDED.get("linear" if called.kind is Kind.WEIGHTED else called.name, (len(args), ""))
        return tensors([args[at] if at < len(args) else kwargs.get(key)], {})

    def _depends(self, value: Tensor) -> bool:
        return id(value) in self._cut or self._graph.carries(value)

    def _is_cut(self, value: Tensor) -> bool:
        # Integers and booleans choose entries, and are none; what is cut may have been written into since.
        return id(value) in self._cut and value.is_floating_point() and not self._graph.carries(value)

    def _say(self, what: str) -> None:
        if not self._warns:
            raise Unknown
        warn(
            f"LRP: {owner(self._names)} {what} cut off from them (by detach, no_grad or a comparison); it keeps its "
            "share of the relevance as a bias does, so that the relevance of the inputs does not add up to the output"
        )


class LookForCuts(TorchFunctionMode):
    """Looks for what is cut off in a pass in which functions have no rules."""

    def __init__(self, state: LrpState, graph: Graph, cuts: CutOff) -> None:
        super().__init__()
        self.state, self.graph, self.cuts = state, graph, cuts

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        if self.state.ruled or self.state.inside or vmap_level() >= 0:
            return found
        called = operation(function, args, kwargs)
        if self.cuts:
            self.cuts.look_at(called, args, kwargs, any(map(self.graph.carries, tensors(args, kwargs))))
        return self.cuts.note(found, args, kwargs, called.name)


def owner(names: Mapping[int, str]) -> str:
    """The module whose forward is running, as messages name it."""
    module = running_module()
    if module is None:
        return "the policy"
    name = names.get(id(module))
    return type(module).__name__ if not name else f"{name!r} ({type(module).__name__})"


def tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among arguments, in lists and tuples too."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value, {})

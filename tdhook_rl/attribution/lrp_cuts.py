"""The graph of an explained pass: what hands relevance on, and what is cut off from the inputs and takes a share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdhook_rl.attribution.functions import Kind, Operation, operation, running_module
from tdhook_rl.attribution.lrp_hooks import LrpState, Unknown
from tdhook_rl.errors import warn
from tdhook_rl.hooking.pooling import _MaxPool
from tdhook_rl.internals.torch_names import BackwardHookFunction, function_of, held_buffers, held_parameters
from tdhook_rl.internals.torchrl_names import is_entrywise
from tdhook_rl.sites.repeats import Several
from tdhook_rl.sites.runtime import Runtime, vmap_level

Node = Any

#: Nodes whose gradient is a way to hand relevance on: each entry of their output is one entry of an input.
MOVES = frozenset(
    f"{name}Backward"
    for name in (
        "Alias AsStrided BlockDiag Cat ChannelShuffle Clone ConstantPadNd DiagEmbed Diagonal DiagonalScatter "
        "Expand Fill Flip Gather Im2Col Index IndexCopy IndexFill IndexSelect MaskedFill MaskedScatter "
        "MaskedSelect NarrowCopy Permute PixelShuffle PixelUnshuffle Repeat ReshapeAlias Roll Rot90 Scatter Select "
        "SelectScatter Slice SliceScatter Split SplitWithSizes Squeeze Stack T Take ToCopy Transpose Tril Triu "
        "Unbind Unfold UnsafeSplit UnsafeView Unsqueeze View Where Zero "
        "ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D "
        # The relevance of a maximum, or of another entry that is chosen by its size, is that of the entry.
        "AdaptiveMaxPool2D AdaptiveMaxPool3D Amax Amin Cummax Cummin Kthvalue Max Median Min Mode Nanmedian Sort Topk "
        "MaxPool2DWithIndices MaxPool3DWithIndices MaxPool2D MkldnnMaxPool2D"
    ).split()
) | {"CopyBackwards"}


def _hand_on(gradients: tuple[Tensor | None, ...], relevance: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The relevance of a function of single entries is that of its input."""
    return (relevance[0], *gradients[1:])


class Graph:
    """The graph below tensors, seen from the tensors that are explained: inputs, and inner activations in slots.

    ``known`` are the autograd functions that share relevance out.
    """

    def __init__(self, points: list[Tensor], runtime: Runtime, known: tuple[type, ...]) -> None:
        self._points = points
        self._runtime = runtime
        self._known = (*known, _MaxPool, BackwardHookFunction)
        self._edges: set[tuple[Node, int]] = set()
        self._count = -1
        # The nodes are kept: their identity is what is looked up.
        self._leads: dict[Node, bool] = {}
        self._approved: set[Node] = set()

    def carries(self, value: Tensor) -> bool:
        """Whether a tensor depends on what is explained, by a path that gradients take."""
        if not value.requires_grad:
            return False
        self._refresh()
        return self._leads_to_points(*_edge(value))

    def approve(self, value: Tensor) -> None:
        """What was written into a tensor in place hands relevance on, whatever the node is called."""
        for one in (value, value._base):
            if one is not None and one.grad_fn is not None:
                self._approved.add(one.grad_fn)

    def unknown(self, starts: Iterable[Tensor]) -> Node | None:
        """A node between the explained tensors and these whose gradient is not known to be relevance."""
        self._refresh()
        stack = [_edge(value) for value in starts if value.requires_grad]
        seen: set[Node] = set()
        while stack:
            node, number = stack.pop()
            if node in seen or not self._leads_to_points(node, number) or not self._leads[node]:
                continue
            seen.add(node)
            if not self._is_known(node):
                return node
            # What has been written over hands nothing on.
            below = node.next_functions[1:] if type(node).__name__ == "CopyBackwards" else node.next_functions
            stack.extend((child, at) for child, at in below if child is not None)
        return None

    def _is_known(self, node: Node) -> bool:
        function = function_of(node)
        if function is not None:
            if is_entrywise(function):  # a squashed action is decided by one
                node.register_hook(_hand_on)
                return True
            return function in self._known
        return type(node).__name__.rstrip("0123456789") in MOVES or node in self._approved

    def _refresh(self) -> None:
        slots, leaves = self._runtime.slots, self._runtime.leaves
        kept = [slots[slot] for slot in leaves if slot in slots] if leaves else []
        # Of a site that is counted from the last run, or is of all, there is more with each run.
        inner = [one for value in kept for one in (value.values if isinstance(value, Several) else (value,))]
        if len(self._points) + len(inner) != self._count:
            self._count = len(self._points) + len(inner)
            self._edges = {_edge(value) for value in (*self._points, *inner) if value.requires_grad}

    def _leads_to_points(self, node: Node, number: int) -> bool:
        leads, edges_of_points = self._leads, self._edges
        stack = [node]
        while stack:
            one = stack[-1]
            if one in leads:
                stack.pop()
                continue
            children = [(child, at) for child, at in one.next_functions if child is not None]
            pending = [child for child, at in children if child not in leads]
            if pending:
                stack.extend(pending)
                continue
            leads[one] = any((child, at) in edges_of_points or leads[child] for child, at in children)
        return (node, number) in edges_of_points or leads[node]


def _edge(value: Tensor) -> tuple[Node, int]:
    """Where the gradient of a tensor enters the graph."""
    while value.grad_fn is None and value._base is not None:  # a view that an autograd function makes in its forward
        value = value._base
    if value.grad_fn is not None:
        return value.grad_fn, value.output_nr
    return torch.autograd.graph.get_gradient_edge(value).node, 0


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
        self._kept = {id(value) for value in (*held_buffers(root).values(), *held_parameters(root).values())}
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

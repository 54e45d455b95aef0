"""The graph of an explained pass: which tensors depend on what is explained, and which nodes hand relevance on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.hooking.pooling import _MaxPool
from tdhook_rl.internals.torch_names import function_of
from tdhook_rl.internals.torchrl_names import is_entrywise
from tdhook_rl.sites.runtime import Runtime

Node = Any

#: Nodes whose gradient is a way to hand relevance on: each entry of their output is one entry of an input.
MOVES = frozenset(
    f"{name}Backward"
    for name in (
        "Alias AsStrided Cat ChannelShuffle Clone ConstantPadNd Diagonal DiagonalScatter Expand Fill Flip Gather "
        "Im2Col Index IndexCopy IndexFill IndexSelect MaskedFill MaskedScatter MaskedSelect Permute PixelShuffle "
        "PixelUnshuffle Repeat ReshapeAlias Roll Rot90 Scatter Select SelectScatter Slice SliceScatter Split "
        "SplitWithSizes Squeeze Stack T Take ToCopy Transpose Tril Triu Unbind Unfold UnsafeSplit UnsafeView "
        "Unsqueeze View Where Zero "
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
    """The graph below tensors, seen from the tensors that are explained.

    Args:
        points: the explained inputs.
        runtime: whose slots hold the explained inner activations, as the pass comes to them.
        known: the autograd functions that share relevance out.
    """

    def __init__(self, points: list[Tensor], runtime: Runtime, known: tuple[type, ...]) -> None:
        self._points = points
        self._runtime = runtime
        self._known = (*known, _MaxPool)
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
        inner = [slots[slot] for slot in leaves if slot in slots] if leaves else []
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
    if value.grad_fn is not None:
        return value.grad_fn, value.output_nr
    return torch.autograd.graph.get_gradient_edge(value).node, 0

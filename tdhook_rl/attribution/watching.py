"""Replays that are watched while they run, and whose graph is looked through before it is differentiated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.attribution.lrp_cuts import Graph
from tdhook_rl.attribution.lrp_functions import no_rule
from tdhook_rl.attribution.lrp_hooks import Unknown
from tdhook_rl.calls.passes import Call, Pass
from tdhook_rl.errors import InputError


class Watch:
    """What the targets of one pass are looked through with, before relevance starts at them."""

    graph: Graph | None = None
    names: Mapping[int, str] | None = None

    def begin(self, graph: Graph, names: Mapping[int, str] | None) -> None:
        """Start a pass; ``names`` of the modules where functions have had their chance of a rule."""
        self.graph, self.names = graph, names

    def require_known(self, starts: Iterable[Tensor]) -> None:
        """Raise if relevance that starts at tensors meets what has no rule."""
        node = None if self.graph is None else self.graph.unknown(starts)
        if node is None:
            return
        if self.names is None:
            raise Unknown
        message = getattr(node, "message", None)  # of a function that was seen and has no rule
        name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
        raise InputError(message or no_rule(name, "compiled code, vmap or an autograd function of its own"))


class WatchedCall(Call):
    """A call whose replays run within a context; the inputs that they explain are noted in ``points``."""

    _context: AbstractContextManager[Any] | None
    _points: list[Tensor]

    @classmethod
    def of(cls, call: Call, context: AbstractContextManager[Any] | None, points: list[Tensor]) -> WatchedCall:
        watched = cls.__new__(cls)
        watched.__dict__.update(call.__dict__)
        watched._context, watched._points = context, points
        return watched

    def part(self, rows: Tensor) -> Call:
        """As of :class:`Call`, watched as well, as are the next two."""
        return WatchedCall.of(super().part(rows), self._context, self._points)

    def given(self, inputs: Mapping[NestedKey, Tensor]) -> Call:
        return WatchedCall.of(super().given(inputs), self._context, self._points)

    def copied(self) -> Call:
        return WatchedCall.of(super().copied(), self._context, self._points)

    def replay(
        self,
        inputs: Mapping[NestedKey, Tensor] | None = None,
        stored: TensorDictBase | None = None,
        record: bool = False,
        as_it_was: bool = False,
    ) -> Pass:
        self._points[:] = (inputs or {}).values()
        given = inputs
        if self._context is not None and inputs is not None:
            # A policy may write into its inputs, and cannot write into leaves.
            given = {key: value.clone() for key, value in inputs.items()}
        with self._context or nullcontext():
            return super().replay(given, stored, record, as_it_was)


def reached(value: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """Those outputs that a value has been computed from, without a look at what is below them."""
    if not value.requires_grad:
        return []
    edges: dict[Any, list[Tensor]] = {}
    for output in outputs:
        if output.requires_grad:
            edges.setdefault(torch.autograd.graph.get_gradient_edge(output).node, []).append(output)
    found: list[Tensor] = []
    stack, seen = [torch.autograd.graph.get_gradient_edge(value).node], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in edges:
            found.extend(edges[node])
        else:
            stack.extend(child for child, _ in node.next_functions if child is not None)
    return found

"""Relevance through what a forward computes without modules: functions and operators, each with a rule by its kind.

Sums are shared in proportion to their terms, and so is whatever is linear in what depends on the inputs; functions
of single entries hand relevance on; what moves or chooses entries does so with their relevance. The rest, such as a
product of two tensors that depend on the inputs, is refused where relevance would flow through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tdhook_rl.attribution.functions import DESCRIBED, Kind, Operation, operation
from tdhook_rl.attribution.lrp_cuts import CutOff, Graph, owner, tensors
from tdhook_rl.attribution.lrp_hooks import LrpState, ShareByFunction, ShareOut
from tdhook_rl.attribution.lrp_rules import AffineMap, Rule, ratio
from tdhook_rl.errors import InputError
from tdhook_rl.internals.torch_names import pytree
from tdhook_rl.sites.runtime import vmap_level


class _Refusal(torch.autograd.Function):
    """What a function without a rule has computed: an error if relevance flows through it."""

    @staticmethod
    def forward(ctx: Any, message: str, value: Tensor) -> Tensor:
        ctx.message = message
        return value.detach()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[None, Tensor]:
        raise InputError(ctx.message)


class FunctionRules(TorchFunctionMode):
    """The functions that are called during one explained pass, seen one by one.

    Args:
        state: of the pass; functions within modules that have a rule are their own.
        graph: which tensors depend on what is explained.
        cuts: what is cut off from the inputs.
        names: of the modules, by identity.
        weights: the name, module and rule of the layer that a parameter is the weight of, by its identity.
        weight_rule: the rule of a function such as ``F.linear`` whose weight is no layer's.
        epsilon: of sums and other linear functions.
    """

    def __init__(
        self,
        state: LrpState,
        graph: Graph,
        cuts: CutOff,
        names: Mapping[int, str],
        weights: Mapping[int, tuple[str, nn.Module, Rule]],
        weight_rule: Callable[[bool], Rule],
        epsilon: float,
    ) -> None:
        super().__init__()
        self.state = state
        self.graph = graph
        self.cuts = cuts
        self.names = names
        self.weights = weights
        self.weight_rule = weight_rule
        self.epsilon = epsilon

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.state.ruled or self.state.inside or vmap_level() >= 0:
            return function(*args, **kwargs)
        called = operation(function, args, kwargs)
        if not torch.is_grad_enabled():
            return self.cuts.note(function(*args, **kwargs), args, kwargs, called.name)
        carriers = [value for value in tensors(args, kwargs) if self.graph.carries(value)]
        self.cuts.look_at(called, args, kwargs, bool(carriers))
        if called.kind is Kind.MOVES:
            if carriers and called.name == "pad" and "circular" in (*args, *kwargs.values()):
                return self._moved(function, args, kwargs, carriers)
            found = function(*args, **kwargs)
            if called.in_place and isinstance(args[0], Tensor):
                self.graph.approve(args[0])
            elif called.name == "index_put":
                self.graph.approve(found)
            return self.cuts.note(found, args, kwargs, called.name)
        if not carriers:
            return self.cuts.note(function(*args, **kwargs), args, kwargs, called.name)
        if called.kind is Kind.STEPS and not called.in_place:
            return self.cuts.note(function(*args, **kwargs).detach(), args, kwargs, called.name)
        share = self._rule(called, args, kwargs, carriers)
        if share is None:
            return self._refused(function, called, args, kwargs)
        if share is _NATIVE:
            found = function(*args, **kwargs)
            self.graph.approve(found)
            return found
        if not called.in_place:
            return share(function, args, kwargs, carriers)
        target, args, kwargs = called.out_of_place(args, kwargs)
        target.copy_(share(called.base, args, kwargs, carriers))
        self.graph.approve(target)
        return target

    def _rule(self, called: Operation, args: tuple, kwargs: dict[str, Any], carriers: list[Tensor]) -> Any:
        """How the relevance of what is called is shared; ``None`` if no way is known."""
        one, kind = len(carriers) == 1, called.kind
        if kwargs.get("out") is not None or called.base is None:
            return None
        if kind is Kind.CHOOSES:
            return self._elementwise if one else _NATIVE
        if kind is Kind.LINEAR:
            return self._linear
        if kind is Kind.ELEMENTWISE:
            # A square written as a product of a tensor with itself is a function of its entries.
            square = called.name in ("mul", "multiply") and len(carriers) == 2 and carriers[0] is carriers[1]
            return self._elementwise if one or square else None
        if kind is Kind.WEIGHTED and one and carriers[0] is (args[0] if args else kwargs.get("input")):
            return self._weighted
        return self._linear if kind in (Kind.WEIGHTED, Kind.MULTILINEAR) and one else None

    # ------------------------------------------------------------------ kinds

    def _elementwise(self, function: Any, args: tuple, kwargs: dict[str, Any], carriers: list[Tensor]) -> Any:
        x = carriers[0]
        with torch.no_grad():
            value = function(*args, **kwargs)
        if value.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            value = value.clone()
        shape, dtype = x.shape, x.dtype
        return ShareByFunction.apply([value], lambda relevance: [relevance.sum_to_size(shape).to(dtype)], x)

    def _moved(self, function: Any, args: tuple, kwargs: dict[str, Any], carriers: list[Tensor]) -> Any:
        """Of what torch writes slice by slice: its gradient moves relevance, by a graph of its own."""
        (x,) = carriers
        leaf = x.detach().clone().requires_grad_()
        args, kwargs = pytree.tree_map(lambda value: leaf if value is x else value, (args, kwargs))
        output = function(*args, **kwargs)

        def share(relevance: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, leaf, relevance, retain_graph=True)

        return ShareByFunction.apply([output.detach().clone()], share, x)

    def _linear(self, function: Any, args: tuple, kwargs: dict[str, Any], carriers: list[Tensor]) -> Any:
        own = list({id(value): value for value in carriers}.values())
        leaves = [value.detach().clone().requires_grad_() for value in own]
        given = {id(value): leaf for value, leaf in zip(own, leaves, strict=True)}
        args, kwargs = pytree.tree_map(lambda value: given.get(id(value), value), (args, kwargs))
        output = function(*args, **kwargs)
        epsilon = self.epsilon  # not `self`, which knows the nodes of the pass: they would hold each other for ever

        def share(relevance: Tensor) -> list[Tensor | None]:
            weights = ratio(relevance, output.detach(), epsilon)
            found = torch.autograd.grad(output, leaves, weights, retain_graph=True, allow_unused=True)
            return [None if one is None else leaf.detach() * one for leaf, one in zip(leaves, found, strict=True)]

        return ShareByFunction.apply([output.detach().clone()], share, *own)

    def _weighted(self, function: Any, args: tuple, kwargs: dict[str, Any], carriers: list[Tensor]) -> Any:
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | {
            key: kwargs[key] for key in ("input", "weight", "bias") if key in kwargs
        }
        rest, options = args[3:], {key: value for key, value in kwargs.items() if key not in named}
        x, weight, bias = named["input"], named["weight"], named.get("bias")
        layer = self.weights.get(id(weight))
        rule = self.weight_rule(function is not F.linear) if layer is None else layer[2]
        with torch.no_grad():
            value = function(x, weight, bias, *rest, **options)
        weights = [None if one is None else one.detach() for one in (weight, bias)]
        applied = AffineMap(lambda x, w, b: function(x[0], w, b, *rest, **options), *weights)
        return ShareOut.apply([value], rule, applied, x.clone())

    # ------------------------------------------------------------------ what has no rule

    def _refused(self, function: Any, called: Operation, args: tuple, kwargs: dict[str, Any]) -> Any:
        found = function(*args, **kwargs)
        message = no_rule(called.name, owner(self.names))

        def marked(value: Any) -> Any:
            return _Refusal.apply(message, value) if isinstance(value, Tensor) and value.requires_grad else value

        return pytree.tree_map(marked, found)


_NATIVE = object()


def no_rule(name: str, owner: str) -> str:
    """The message of a refused function."""
    what = DESCRIBED.get(name, f"the function {name!r}")
    return (
        f"LRP has no rule for {what}, which {owner} calls in its forward, so its gradient would be taken for "
        "relevance: give that module a rule with rule_mapper=, let its gradient pass with skip_modules=, or use "
        "IntegratedGradients"
    )

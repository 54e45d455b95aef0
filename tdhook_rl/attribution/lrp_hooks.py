"""Hooks of layer-wise relevance propagation: the gradient of a module's output becomes relevance shared by a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_rl.attribution.lrp_rules import AffineMap, Epsilon, Rule, affine, as_it_ran, ratio
from tdhook_rl.errors import InputError
from tdhook_rl.internals.torch_names import DisableTorchFunction, held_buffers, pytree
from tdhook_rl.sites.runtime import Runtime, vmap_level

#: From the relevance of outputs to that of what they were computed from.
Share = Callable[..., Sequence[Tensor | None]]


class Unknown(Exception):
    """A pass by the rules of modules alone has met what needs more: that pass is made again, with more."""


class ShareOut(torch.autograd.Function):
    """The output of a module, whose gradient is relevance shared out by a rule."""

    @staticmethod
    def forward(ctx: Any, box: list[Tensor], rule: Rule, module: Any, *inputs: Tensor) -> Tensor:
        ctx.rule, ctx.module = rule, module
        ctx.save_for_backward(*inputs)
        return box[0]  # in a list: an input that is returned could not be written into afterwards

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        shared = ctx.rule.share(ctx.module, ctx.saved_tensors, relevance)
        return (None, None, None, *shared)


class ShareByFunction(torch.autograd.Function):
    """Outputs whose gradients are relevance, shared out by a function."""

    @staticmethod
    def forward(ctx: Any, outputs: list[Tensor], share: Share, *inputs: Tensor) -> Any:
        ctx.share = share
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.share(*relevance))


class LrpState:
    """What the hooks of one LRP share during a pass."""

    def __init__(self, runtime: Runtime, owner: str) -> None:
        self.runtime = runtime
        self.owner = owner
        self.begin(None, None)

    def begin(self, functions: Any, cuts: Any) -> None:
        """Start a pass, in which functions have rules too or not, and what is cut off is looked for or not."""
        self.functions = functions
        self.cuts = cuts
        self.stack: list[Any] = []
        self.inside = 0  # modules that are explained by themselves as a whole
        self.ruled = 0  # modules with a rule

    @property
    def explains(self) -> bool:
        return self.runtime.explaining == self.owner

    def __getstate__(self) -> dict[str, Any]:
        return {"runtime": self.runtime, "owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Hook:
    """A pair of hooks directly before and after the forward of a module."""

    def __init__(self, state: LrpState, name: str) -> None:
        self.state = state
        self.name = name

    def place(self, module: nn.Module) -> None:
        """Other hooks that change arguments come first, and those that change the output afterwards."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after, with_kwargs=True, prepend=True)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        raise NotImplementedError

    def begins(self) -> bool:
        """Whether the call of the module that begins is explained here, and not within another one's as a whole."""
        state = self.state
        if state.explains and state.inside:
            state.stack.append(None)
        return state.explains and not state.inside

    def called(self, module: nn.Module) -> str:
        return f"{self.name!r} ({type(module).__name__})"


class RuleHook(_Hook):
    """Of a module with a rule; acts while its own method explains."""

    def __init__(self, state: LrpState, name: str, rule: Rule) -> None:
        super().__init__(state, name)
        self.rule = rule

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.begins():
            return None
        state = self.state
        state.ruled += 1
        values = (*args, *kwargs.values()) if kwargs else args
        versions = [value._version if isinstance(value, Tensor) else 0 for value in values]
        # An activation in place, or a statement in place later on, would overwrite the input that the rule needs.
        kept = state.functions is not None or getattr(module, "inplace", False)
        if not kept:
            state.stack.append((values, values, versions, kept))
            return None
        inputs = [value.clone() if isinstance(value, Tensor) else value for value in values]
        state.stack.append((values, inputs, versions, kept))
        # What is written in place is to have no history but that of its relevance.
        given = [value.detach() if isinstance(value, Tensor) else value for value in values]
        return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        state = self.state
        begun = state.stack.pop() if state.explains else None
        if begun is None:
            return None
        try:  # what is done here is no function of the policy's
            return self._shared(module, args, kwargs, output, begun)
        finally:
            state.ruled -= 1

    def _shared(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, begun: tuple) -> Tensor:
        state = self.state
        values, inputs, versions, kept = begun
        if not isinstance(output, Tensor) or not all(isinstance(value, Tensor) for value in inputs):
            raise InputError(
                f"LRP has a rule for {self.called(module)}, but the module takes or returns something else than tensors"
            )
        if vmap_level() >= 0:
            raise InputError(f"LRP cannot see into vmap, in which {self.called(module)} runs: use IntegratedGradients")
        if state.cuts is not None:
            state.cuts.look_at_inputs(values)
        given = (*args, *kwargs.values())
        written = [at for at, version in enumerate(versions) if values[at]._version != version]
        if any(given[at] is not output for at in written):
            raise _writes(self.called(module))
        if written and not kept:
            raise Unknown
        value = output.detach().clone() if written else output.detach()
        shared = ShareOut.apply([value], self.rule, as_it_ran(module, inputs), *inputs)
        if written:
            return _written(values[written[0]], shared, state)
        return shared if state.cuts is None else state.cuts.note(shared, values, {})


class _Region(_Hook):
    """Of a module that is explained as a whole: its inputs are leaves of a graph of its own."""

    inner_rules = False

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.begins():
            return None
        state = self.state
        values, layout = pytree.tree_flatten((args, kwargs))
        own = [value if isinstance(value, Tensor) and value.requires_grad else None for value in values]
        with DisableTorchFunction():  # what is done here is no function of the policy's
            leaves = [None if value is None else value.detach().clone().requires_grad_() for value in own]
            # Copies of the leaves: a leaf cannot be written into.
            lent = [None if leaf is None else leaf.clone() for leaf in leaves]
        state.stack.append((own, leaves, lent))
        state.inside += not self.inner_rules
        given = [value if copy is None else copy for value, copy in zip(values, lent, strict=True)]
        return pytree.tree_unflatten(given, layout)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        state = self.state
        begun = state.stack.pop() if state.explains else None
        if begun is None:
            return None
        state.inside -= not self.inner_rules
        own, leaves, lent = begun
        values, layout = pytree.tree_flatten(output)
        explained = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
        inputs = [value for value in own if value is not None]
        points = [leaf for leaf in leaves if leaf is not None]
        if not explained or not inputs:
            return output if state.cuts is None else state.cuts.note(output, args, kwargs)
        found = [values[i] for i in explained]
        share = self.share(module, found, points)
        shared = ShareByFunction.apply([value.detach().clone() for value in found], share, *inputs)
        parts = [shared] if isinstance(shared, Tensor) else list(shared)
        written = [i for i, value in enumerate(lent) if value is not None and value._version]
        for at in written:
            # What the module wrote into its input is its output too.
            same = [part for value, part in zip(found, parts, strict=True) if value is lent[at]]
            if not same:
                raise _writes(self.called(module))
            parts = [_written(own[at], part, state) if part is same[0] else part for part in parts]
        for at, part in zip(explained, parts, strict=True):
            values[at] = part
        return pytree.tree_unflatten(values, layout)

    def share(self, module: nn.Module, outputs: list[Tensor], leaves: list[Tensor]) -> Share:
        raise NotImplementedError


class GradientHook(_Region):
    """Of a module whose gradient is taken for relevance, because the user says so; modules in it keep their rules."""

    inner_rules = True

    def share(self, module: nn.Module, outputs: list[Tensor], leaves: list[Tensor]) -> Share:
        return lambda *relevance: torch.autograd.grad(outputs, leaves, relevance, retain_graph=True, allow_unused=True)


class ComputedHook(_Region):
    """Of a layer that computes with other weights than a plain layer of its kind: adapters, norms of weights, masks.

    Its linear map is that of this very call, in its own graph. Rules that look at single weights need these to be
    ``module.weight`` and ``module.bias``.
    """

    def __init__(self, state: LrpState, name: str, rule: Rule) -> None:
        super().__init__(state, name)
        self.rule = rule

    def share(self, module: nn.Module, outputs: list[Tensor], leaves: list[Tensor]) -> Share:
        if len(outputs) != 1 or (len(leaves) != 1 and type(self.rule) is not Epsilon):
            raise InputError(f"LRP has a rule for {self.called(module)}, but the module returns several tensors")
        (output,) = outputs
        if type(self.rule) is Epsilon:
            epsilon = self.rule.epsilon
            return lambda relevance: _affine_share(output, leaves, relevance, epsilon, self.called(module))
        rule, (x,) = self.rule, leaves
        weights = self._weights(module, x.detach(), output.detach())
        return lambda relevance: rule.share(weights, (x.detach(),), relevance)

    def _weights(self, module: nn.Module, x: Tensor, output: Tensor) -> AffineMap:
        """The weights of the module, if it computes with these.

        Raises:
            InputError: if it computes something else.
        """
        buffers = [(buffer, buffer.clone()) for buffer in held_buffers(module).values()]
        function, weight, bias = affine(module, (x,))
        weight, bias = (None if one is None else one.detach().clone() for one in (weight, bias))
        with torch.no_grad():
            found = function((x,), weight, bias)
            for buffer, before in buffers:  # to read a spectral norm in training mode is a step of its iteration
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        if found.shape != output.shape or not torch.allclose(found, output, rtol=1e-4, atol=1e-5):
            raise InputError(
                f"{self.called(module)} computes something else than {type(module).__mro__[1].__name__} does with its "
                f"weight and bias, which the rule {type(self.rule).__name__} shares by: give it the Epsilon rule, "
                "which needs no weights, with rule_mapper="
            )
        return AffineMap(function, weight, bias)


def _affine_share(
    output: Tensor, leaves: Sequence[Tensor], relevance: Tensor, epsilon: float, name: str
) -> list[Tensor | None]:
    """The epsilon rule of an output that is affine in leaves, by its own graph."""
    with torch.enable_grad():
        weights = ratio(relevance, output.detach(), epsilon)
        found = torch.autograd.grad(output, leaves, weights, retain_graph=True, create_graph=True, allow_unused=True)
    _refuse_curved(found, leaves, name)
    return [None if one is None else leaf.detach() * one.detach() for leaf, one in zip(leaves, found, strict=True)]


def _refuse_curved(slopes: Sequence[Tensor | None], leaves: Sequence[Tensor], name: str) -> None:
    """Raise if slopes depend on where they are taken: then the output is not affine."""
    for slope in slopes:
        if slope is None or not slope.requires_grad:
            continue
        numbers = torch.arange(1, slope.numel() + 1, dtype=slope.dtype, device=slope.device)
        try:
            second = torch.autograd.grad(
                slope, leaves, numbers.cos().reshape(slope.shape), retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            raise _not_affine(name) from error
        if any(one is not None and bool((one != 0).any()) for one in second):
            raise _not_affine(name)


def _not_affine(name: str) -> InputError:
    return InputError(
        f"LRP has a rule for {name}, but what the module computes is not linear in its input: give it a rule of its "
        "own with rule_mapper=, or let its gradient pass for relevance with skip_modules="
    )


def _writes(name: str) -> InputError:
    return InputError(
        f"{name} writes into its input in place and returns something else, so LRP cannot tell what depends on what: "
        "write it out of place"
    )


def _written(target: Tensor, shared: Tensor, state: LrpState) -> Tensor:
    """Give a tensor that a module has written into the history of its relevance."""
    target.copy_(shared)
    if state.functions is not None:
        state.functions.graph.approve(target)
    return target

"""Methods that are broken on purpose, each in another way, and the check of the kit that is meant for it.

Each is the same small observing method, the norm of what a site puts out, with one fault.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.passes import Call
from tdhook_rl.method import Binder, Method
from tdhook_rl.testing import SITES

__all__ = ["BROKEN", "Norm"]

SITE = SITES[0]
BROKEN: dict[str, tuple[Callable[[], Method], str]] = {}


class _BoundNorm(BoundMethod):
    reads_forward = True
    result_keys: tuple[tuple[str, ...], ...] = (("norm", "site"),)

    def __init__(self, slot: str) -> None:
        self.slot = slot

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        return {("norm", "site"): self.norm(call.captured(self.slot, SITE), call)}

    def norm(self, value: Tensor, call: Call) -> Tensor:
        return value.norm(dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Norm(Method):
    """The norm of what a site puts out; right."""

    bound: ClassVar[type[_BoundNorm]] = _BoundNorm

    def bind(self, binder: Binder) -> BoundMethod:
        return self.bound(binder.capture(binder.site(SITE)))


def broken(check: str) -> Callable[[Any], Any]:
    """Enter a broken method, or a bound one, under its name."""

    def enter(cls: Any) -> Any:
        if issubclass(cls, Method):
            BROKEN[cls.__name__] = cls, check
        else:
            BROKEN[cls.__name__] = type(f"Norm{cls.__name__}", (Norm,), {"bound": cls}), check
        return cls

    return enter


class WithHook(Norm):
    """With a hook of its own at the site."""

    def bind(self, binder: Binder) -> BoundMethod:
        found = super().bind(binder)
        binder.on_output(binder.site(SITE), self.hook())
        return found

    def hook(self) -> Callable[..., Any]:
        raise NotImplementedError


# ---------------------------------------------------------------------- not neutral


@broken("observing_is_bit_neutral")
class DrawsFromTorch(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        return super().norm(value, call) + 0 * torch.rand(())


@broken("observing_is_bit_neutral")
class DrawsFromNumpy(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        return super().norm(value, call) + 0 * float(np.random.rand())


@broken("observing_is_bit_neutral")
class DrawsFromRandom(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        return super().norm(value, call) + 0 * random.random()


class _Nudge:
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + 1e-3


@broken("observing_is_bit_neutral")
class ChangesTheOutput(WithHook):
    def hook(self) -> Callable[..., Any]:
        return _Nudge()


class _NudgeLater(_Nudge):
    calls = 0

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        self.calls += 1
        return output + (1e-3 if self.calls == 6 else 0)


@broken("observing_is_bit_neutral")
class ChangesALaterOutput(WithHook):
    def hook(self) -> Callable[..., Any]:
        return _NudgeLater()


class _NudgeWithoutGradients(_Nudge):
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if torch.is_grad_enabled() else output + 1e-3


@broken("observing_is_bit_neutral")
class ChangesTheOutputUnderNoGrad(WithHook):
    def hook(self) -> Callable[..., Any]:
        return _NudgeWithoutGradients()


class _InPlace(_Nudge):
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        output.data.mul_(1.001)


@broken("observing_is_bit_neutral")
class WritesIntoTheOutput(WithHook):
    def hook(self) -> Callable[..., Any]:
        return _InPlace()


class _Detach(_Nudge):
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.detach()


@broken("gradients_are_the_policys")
class CutsTheGraph(WithHook):
    def hook(self) -> Callable[..., Any]:
        return _Detach()


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class _DoubleGradients(_Nudge):
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return _Double.apply(output)


@broken("gradients_are_the_policys")
class DoublesGradients(WithHook):
    def hook(self) -> Callable[..., Any]:
        return _DoubleGradients()


# ---------------------------------------------------------------------- the user's policy is touched


@broken("original_is_untouched")
class CallsBackward(_BoundNorm):
    """The gradients of the user's parameters are written."""

    replays = True

    def norm(self, value: Tensor, call: Call) -> Tensor:
        with torch.enable_grad():
            call.replay().outputs["logits"].sum().backward()
        return super().norm(value, call)


class _Nothing:
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        return None


@broken("original_is_untouched")
class HooksTheOriginal(Norm):
    def bind(self, binder: Binder) -> BoundMethod:
        original = binder.tie.original()  # type: ignore[union-attr]
        original.module[0].register_forward_hook(_Nothing())
        return super().bind(binder)


@broken("original_is_untouched")
class SetsEvalMode(Norm):
    def bind(self, binder: Binder) -> BoundMethod:
        binder.tie.original().eval()  # type: ignore[union-attr]
        return super().bind(binder)


@broken("original_is_untouched")
class FreezesParameters(Norm):
    def bind(self, binder: Binder) -> BoundMethod:
        for parameter in binder.policy.parameters():
            parameter.requires_grad_(False)
        return super().bind(binder)


@broken("original_is_untouched")
class EditsSharedWeights(Norm):
    observes = False

    def bind(self, binder: Binder) -> BoundMethod:
        with torch.no_grad():
            next(binder.policy.parameters()).mul_(0.5)
        return super().bind(binder)


@broken("original_is_untouched")
class EditsAndPutsBack(_BoundNorm):
    """In place and back again: the bits are the same, but whoever holds a graph finds its weights changed."""

    def norm(self, value: Tensor, call: Call) -> Tensor:
        with torch.no_grad():
            for parameter in call.policy.parameters():
                parameter.mul_(2.0)
                parameter.mul_(0.5)
        return super().norm(value, call)


@broken("original_is_untouched")
class AddsAnAttribute(Norm):
    def bind(self, binder: Binder) -> BoundMethod:
        binder.tie.original().module[0].seen = True  # type: ignore[union-attr]
        return super().bind(binder)


# ---------------------------------------------------------------------- after the context


class _Forever:
    """A context that does not end the hooking."""

    def __init__(self, context: Any, always: bool) -> None:
        self.context = context
        self.always = always

    def __enter__(self) -> Any:
        return self.context.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and not self.always:
            self.context.__exit__(kind, error, trace)


@broken("restored_after_exit")
class NeverEnds(Norm):
    def prepare(self, *args: Any, **options: Any) -> Any:
        return _Forever(super().prepare(*args, **options), always=True)


@broken("restored_after_an_exception")
class DoesNotEndWhenTheBodyRaises(Norm):
    def prepare(self, *args: Any, **options: Any) -> Any:
        return _Forever(super().prepare(*args, **options), always=False)


class _WritesEarly(nn.Module):
    """Writes into the data before the model has run."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # type: ignore[override]
        data = args[0] if args else kwargs.get("tensordict")
        if isinstance(data, TensorDictBase):
            data["norm", "early"] = data["observation"].norm(dim=-1, keepdim=True)


class _BoundEarly(_BoundNorm):
    result_keys = (("norm", "site"), ("norm", "early"))

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        return super().compute(call) | {("norm", "early"): call.data["observation"].norm(dim=-1, keepdim=True)}


@broken("a_raising_model_leaves_nothing_behind")
class WritesBeforeTheModelRuns(Norm):
    bound = _BoundEarly

    def bind(self, binder: Binder) -> BoundMethod:
        binder.policy.module[0].register_forward_pre_hook(_WritesEarly(), with_kwargs=True)
        return super().bind(binder)


# ---------------------------------------------------------------------- keys and shapes


@broken("declared_keys_are_written")
class WritesWhatItDoesNotDeclare(_BoundNorm):
    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        return super().compute(call) | {("norm", "more"): call.captured(self.slot, SITE)}


@broken("declared_keys_are_written")
class DeclaresWhatItDoesNotWrite(_BoundNorm):
    result_keys = (("norm", "site"), ("norm", "more"))


@broken("declared_keys_are_written")
class WritesOnce(_BoundNorm):
    calls = 0

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        self.calls += 1
        return super().compute(call) if self.calls == 1 else {}


@broken("declared_keys_are_written")
class KeepsAGraph(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        with torch.enable_grad():
            return call.replay().outputs["logits"].norm(dim=-1, keepdim=True)


@broken("declared_keys_are_written")
class HandsOnTheInput(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        return call.data["observation"][..., :1]


@broken("declared_keys_are_written")
class GivesInferenceTensors(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        with torch.inference_mode():
            return super().norm(value.detach().clone(), call)


@broken("declared_keys_are_written")
class HasNoMaskOfItsShape(_BoundNorm):
    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        mask = torch.ones(*call.batch_size, 1, dtype=torch.bool)
        return super().compute(call) | {("computed", "norm"): mask}


@broken("every_batch_shape")
class CountsDimensions(_BoundNorm):
    """Takes the second dimension for the features'."""

    def norm(self, value: Tensor, call: Call) -> Tensor:
        return value.norm(dim=-1, keepdim=True) if value.ndim == 2 else value.norm(dim=-1)


@broken("every_batch_shape")
class WantsABatch(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        return value.norm(dim=1 if value.ndim < 3 else -1, keepdim=True)


@broken("batch_equals_rows")
class StandardisesByTheBatch(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        rows = value.reshape(-1, value.shape[-1])
        return (value - rows.mean(0)).norm(dim=-1, keepdim=True)


@broken("batch_equals_rows")
class CountsRows(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        return super().norm(value, call) * 0 + call.batch_size.numel()


@broken("annotate_equals_inline")
class KnowsWhetherItIsInline(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        found = super().norm(value, call)
        return found + 1 if call.inputs else found  # a forward hands no inputs to a method that replays nothing


@broken("dtypes_are_kept")
class AlwaysSinglePrecision(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        return super().norm(value.float(), call)


@broken("empty_batches")
class NeedsARow(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        return super().norm(value, call) + 0 * value.max()


# ---------------------------------------------------------------------- the caller's data, and memory


@broken("data_is_read_only")
class ScalesTheInput(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        for given in call.inputs.values():
            given.data.mul_(1.0)
            given.mul_(1.0)
        return super().norm(value, call)


@broken("data_is_read_only")
class AsksTheInputForAGradient(_BoundNorm):
    def norm(self, value: Tensor, call: Call) -> Tensor:
        for given in call.inputs.values():
            given.requires_grad_()
        return super().norm(value, call)


@broken("nothing_is_kept")
class KeepsActivations(_BoundNorm):
    def __init__(self, slot: str) -> None:
        super().__init__(slot)
        self.kept: list[Tensor] = []

    def norm(self, value: Tensor, call: Call) -> Tensor:
        self.kept.append(super().norm(value, call))
        return self.kept[-1]


class _KeepsInputs:
    def __init__(self) -> None:
        self.last: Any = None

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.last = args


@broken("nothing_is_kept")
class KeepsTheLastInput(Norm):
    def bind(self, binder: Binder) -> BoundMethod:
        binder.on_output(binder.site("module.0.module.0"), _KeepsInputs())
        return super().bind(binder)


class _BoundCounting(_BoundNorm):
    def __init__(self, slot: str, uses: int) -> None:
        super().__init__(slot)
        self.uses = uses

    def norm(self, value: Tensor, call: Call) -> Tensor:
        return super().norm(value, call) + self.uses


@broken("second_use_equals_first")
class RemembersItsUses(Norm):
    """The configuration changes with every use."""

    uses: ClassVar[list[int]] = []

    def bind(self, binder: Binder) -> BoundMethod:
        self.uses.append(1)
        return _BoundCounting(binder.capture(binder.site(SITE)), len(self.uses))


# ---------------------------------------------------------------------- elsewhere


@broken("pickles")
class HasALambda(WithHook):
    def hook(self) -> Callable[..., Any]:
        return lambda module, args, output: None


@broken("pickles")
class LosesItsState(_BoundNorm):
    scale = 2.0

    def __init__(self, slot: str) -> None:
        super().__init__(slot)
        self.scale = 3.0

    def norm(self, value: Tensor, call: Call) -> Tensor:
        return self.scale * super().norm(value, call)

    def __reduce__(self) -> Any:
        return _without_scale, (self.slot,)

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.slot)


def _without_scale(slot: str) -> Any:
    found = LosesItsState(slot)
    found.scale = 2.0
    return found


@broken("deep_copies")
class IsNotCopied(_BoundNorm):
    """A copy goes on reading what the first one has captured."""

    def __init__(self, slot: str) -> None:
        super().__init__(slot)
        self.shift = 0.0

    def norm(self, value: Tensor, call: Call) -> Tensor:
        return super().norm(value, call) + self.shift

    def __deepcopy__(self, memo: Any) -> Any:
        twin = type(self)(self.slot)
        twin.shift = 1.0
        return twin


@broken("composes_in_either_order")
class EmptiesTheSlots(_BoundNorm):
    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        found = super().compute(call)
        call.slots.clear()
        return found


class _BoundStale(_BoundNorm):
    def __init__(self, slot: str, weight: Tensor) -> None:
        super().__init__(slot)
        self.weight = weight

    def norm(self, value: Tensor, call: Call) -> Tensor:
        return (call.inputs or call.data)["observation"] @ self.weight.to(value.dtype).mT


@broken("collects")
class CopiesTheWeights(Norm):
    """What it computes is of the weights when it was prepared."""

    def bind(self, binder: Binder) -> BoundMethod:
        weight = next(binder.policy.parameters()).detach().clone()
        return _BoundStale(binder.capture(binder.site(SITE)), weight)


@broken("is_the_policy")
class AddsAParameter(Norm):
    def bind(self, binder: Binder) -> BoundMethod:
        binder.policy.register_parameter("scale", nn.Parameter(torch.ones(())))
        return super().bind(binder)


@broken("is_the_policy")
class AddsABuffer(Norm):
    def bind(self, binder: Binder) -> BoundMethod:
        binder.policy.register_buffer("count", torch.zeros(()))
        return super().bind(binder)


@broken("is_the_policy")
class SetsItsOwnEvalMode(Norm):
    def bind(self, binder: Binder) -> BoundMethod:
        binder.policy.eval()
        return super().bind(binder)

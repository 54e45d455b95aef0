"""Guided backpropagation: gradients that pass each ReLU only where they, too, are positive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tdhook_rl.attribution.base import BoundAttribution
from tdhook_rl.attribution.functions import Operation, is_torch_module, operation, running_module
from tdhook_rl.attribution.question import Attributed, Question, TargetFunction
from tdhook_rl.attribution.saliency import Saliency, _BoundSaliency
from tdhook_rl.attribution.watching import WatchedCall, reached
from tdhook_rl.calls.passes import Pass
from tdhook_rl.errors import InPlaceError, SiteError, TdhookError
from tdhook_rl.internals.functorch_names import get_unwrapped, is_wrapped
from tdhook_rl.internals.torch_names import function_of
from tdhook_rl.method import Binder
from tdhook_rl.replaying.batching import GeneratorState
from tdhook_rl.sites.containers import first_tensor
from tdhook_rl.sites.known import own_class
from tdhook_rl.sites.paths import Site
from tdhook_rl.sites.runtime import Runtime, vmap_level


class _ClampGradient(torch.autograd.Function):
    """The identity, whose gradient keeps its positive part only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()  # a view could not be written into by a statement in place that follows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp_min(0)


class _ClampGradientIf(torch.autograd.Function):
    """The same where a condition holds."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, condition: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (condition,) = ctx.saved_tensors
        return torch.where(condition, gradient.clamp_min(0), gradient), None


class _GuideHook:
    """Forward hook of a ReLU that acts while its own method explains."""

    def __init__(self, runtime: Runtime, owner: str) -> None:
        self.runtime = runtime
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.runtime.explaining != self.owner:
            return None
        return _ClampGradient.apply(first_tensor(output, module, "ReLU"))


class _GuidedFunctions(TorchFunctionMode):
    """Guides every ReLU that runs in it, whether it is a module, a function or a statement in place."""

    def __init__(self, skipped: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.skipped = skipped
        self.found = False

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        called = operation(function, args, kwargs)
        if not _is_relu(called, args, kwargs) or (self.skipped and isinstance(running_module(), self.skipped)):
            return function(*args, **kwargs)
        self.found = True
        if not called.in_place:
            return _ClampGradient.apply(function(*args, **kwargs))
        target, args, kwargs = called.out_of_place(args, kwargs)
        # On a copy: what a function keeps for its gradient would be written over.
        guided = _ClampGradient.apply(called.base(target.clone(), *args[1:], **kwargs))
        return target.copy_(guided)


#: What a compiler can tell a ReLU by: functions, and those that write into their first argument.
_RELU = (F.relu, torch.relu, torch.Tensor.relu)
_RELU_ = (torch.relu_, torch.Tensor.relu_)
_CLAMP = (torch.clamp, torch.Tensor.clamp, torch.clip, torch.Tensor.clip, torch.clamp_min, torch.Tensor.clamp_min)
_CLAMP_ = (
    torch.clamp_,
    torch.Tensor.clamp_,
    torch.clip_,
    torch.Tensor.clip_,
    torch.clamp_min_,
    torch.Tensor.clamp_min_,
)
_THRESHOLD, _THRESHOLD_ = (F.threshold, torch.threshold), (torch.threshold_,)
_MAXIMUM = (
    torch.maximum, torch.Tensor.maximum, torch.fmax, torch.Tensor.fmax, torch.max, torch.Tensor.max,
)  # fmt: skip


class _TracedFunctions(TorchFunctionMode):
    """The same while the policy is compiled."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        low = _traced_low(function, args, kwargs)
        if low is None:
            return function(*args, **kwargs)
        in_place = function in (*_RELU_, *_CLAMP_, *_THRESHOLD_)
        if not in_place and not kwargs.get("inplace"):
            return _guided(function(*args, **kwargs), low)
        return args[0].copy_(_guided(torch.clamp(args[0].clone(), min=low), low))


def _traced_low(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a call bounds its argument by from below, and only that: 0, or tensors that may be; ``None`` otherwise."""
    if function in _RELU or function in _RELU_:
        return 0
    if function in _THRESHOLD or function in _THRESHOLD_:
        limits = (*args[1:3], *(kwargs[key] for key in ("threshold", "value") if key in kwargs))
        return 0 if limits == (0, 0) else None
    if function in _CLAMP or function in _CLAMP_:
        low = args[1] if len(args) > 1 else kwargs.get("min")
        if kwargs.get("max") is not None or len(args) > 2:
            return None
        return low if isinstance(low, Tensor) or (isinstance(low, (int, float)) and low == 0) else None
    if function in _MAXIMUM:
        pair = (*args, *(kwargs[key] for key in ("other",) if key in kwargs))
        if len(pair) == 2 and isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor):
            return pair[0] if pair[1].requires_grad else pair[1]
    return None


def _guided(value: Tensor, low: Any) -> Tensor:
    """The output of what may be a ReLU, guided where its bound is zero; a compiler cannot look whether it is."""
    if not isinstance(low, Tensor):
        return _ClampGradient.apply(value)
    return _ClampGradientIf.apply(value, (low == 0).all())


def _is_relu(called: Operation, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call computes ``max(x, 0)`` of floats."""
    name, rest = called.name, args[1:]
    if name == "relu":
        return True
    if name in ("clamp", "clip", "clamp_min"):
        low = rest[0] if rest else kwargs.get("min")
        high = rest[1] if len(rest) > 1 else kwargs.get("max")
        return high is None and _is_zero(low)
    if name == "threshold":
        limits = (*rest, *(kwargs[key] for key in ("threshold", "value") if key in kwargs))
        return len(limits) >= 2 and _is_zero(limits[0]) and _is_zero(limits[1])
    if name in ("maximum", "fmax", "max"):
        pair = (*args, *(kwargs[key] for key in ("other",) if key in kwargs))
        return len(pair) == 2 and all(isinstance(one, Tensor) for one in pair) and any(map(_is_zero, pair))
    return False


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        if value.requires_grad:
            return False
        while is_wrapped(value):  # in a transform, which hides the numbers
            value = get_unwrapped(value)
        return not value.requires_grad and not bool(value.any())
    return isinstance(value, (int, float)) and value == 0


#: Nodes of functions that may be a ReLU.
_CANDIDATES = ("Relu", "ClampMin", "Clamp", "Threshold", "Maximum", "Fmax")


class _Look:
    """A target that looks through the graph of its pass first: is there a ReLU, and is each of them guided?"""

    def __init__(self, target: TargetFunction) -> None:
        self.target = target
        self.name = getattr(target, "name", "target")
        self.guided, self.unguided = False, frozenset[str]()

    def __call__(self, run: Pass) -> Tensor:
        value = self.target(run)
        outputs = [one for one in run.outputs.values(True, True) if isinstance(one, Tensor)]
        guided, unguided = False, set()
        stack = [(one.grad_fn, False) for one in reached(value, [*outputs, *run.watched.values()]) or [value]]
        seen = set()
        while stack:
            node, under_guide = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            guides = function_of(node) is _ClampGradient
            guided |= guides
            name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
            if name in _CANDIDATES and not under_guide:
                unguided.add(name)
            stack.extend((child, guides) for child, _ in node.next_functions)
        self.guided, self.unguided = guided, frozenset(unguided)
        return value


class _BoundGuidedBackpropagation(_BoundSaliency):
    def __init__(self, config: GuidedBackpropagation, binder: Binder) -> None:
        super().__init__(config, binder)
        self._owner = binder.owner()
        self._root = binder.root
        self._skipped = tuple(config.classes_to_skip)
        self._by_function = False  # ReLUs have been met that are no module's output
        relus = [
            (name, child)
            for name, child in binder.root.named_modules()
            if isinstance(child, nn.ReLU) and not isinstance(child, self._skipped)
        ]
        if not relus and all(map(is_torch_module, binder.root.modules())):
            raise self._none()
        for name, child in relus:
            binder.on_output(Site(name, name, child, True), _GuideHook(binder.runtime, self._owner))
        self.shares_forward = False  # the hooks change gradients that the caller's own backward must not see

    def attribute(self, question: Question) -> list[Attributed]:
        call = question.call
        runtime = call.policy._hooked.runtime
        if torch.compiler.is_compiling():
            previous, runtime.explaining = runtime.explaining, self._owner
            with _TracedFunctions():
                found = super().attribute(question)
            runtime.explaining = previous
            return found
        with runtime.explained_by(self._owner):
            # Where no graph can be looked at, all functions are.
            if torch.is_inference_mode_enabled() or vmap_level() >= 0:
                return self._by_functions(question)
            looks = [_Look(target) for target in question.targets]
            looking = question._replace(targets=looks)
            if not self._by_function:
                before = GeneratorState(call.data.device)
                try:
                    found = super().attribute(looking)
                    if not any(look.unguided for look in looks):
                        if not any(look.guided for look in looks):
                            raise self._none()
                        return found
                except TdhookError as error:
                    if not isinstance(error, InPlaceError):
                        raise
                except RuntimeError:  # such as a statement in place, whose gradient by modules alone is not to be had
                    pass
                before.restore()
            found = self._by_functions(looking)
            self._by_function = True
            if not self._skipped and any("Relu" in look.unguided for look in looks):
                raise SiteError(
                    "GuidedBackpropagation met a ReLU that it cannot guide, in compiled code or an autograd function "
                    f"of {own_class(self._root).__name__}: write it as nn.ReLU or torch.relu, or use Saliency"
                )
            return found

    def _by_functions(self, question: Question) -> list[Attributed]:
        call = question.call
        functions = _GuidedFunctions(self._skipped)
        watched = WatchedCall.of(call, functions, [])
        try:
            found = super().attribute(question._replace(call=watched))
        finally:
            call.replayed = watched.replayed
        if not functions.found:
            raise self._none()
        return found

    def _none(self) -> SiteError:
        return SiteError(
            f"GuidedBackpropagation found no ReLU in {own_class(self._root).__name__}: it changes the gradient of "
            "ReLUs, of which other activations have none; use Saliency"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class GuidedBackpropagation(Saliency):
    """Guided backpropagation (Springenberg et al. 2015).

    The gradient is clamped to its positive part at every ReLU, and nowhere else: at ``nn.ReLU`` modules, and at
    ``torch.relu``, ``F.relu``, ``clamp(min=0)`` and their like in a forward, in place too. It passes the sanity check
    of weight randomisation badly (Adebayo et al. 2018): read it as what the features look like, not as evidence of
    what the decision rests on.

    Args:
        classes_to_skip: modules whose ReLUs are left as they are, such as a subclass of ``nn.ReLU``.

    The other arguments are those of :class:`tdhook_rl.attribution.Saliency`.

    Raises:
        SiteError: if the net has no ReLU, or one in compiled code or an autograd function.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with GuidedBackpropagation().prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        >>> data["attr", "input"].shape
        torch.Size([3, 4])
    """

    classes_to_skip: Sequence[type[nn.Module]] = ()

    bound_class: ClassVar[type[BoundAttribution]] = _BoundGuidedBackpropagation

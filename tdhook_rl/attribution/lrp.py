"""Layer-wise relevance propagation: the explained output is shared out, layer by layer, down to the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn

from tdhook_rl.attribution.base import BoundAttribution, Explained, GradientAttribution
from tdhook_rl.attribution.gradients import gradients
from tdhook_rl.attribution.lrp_rules import ROUTING, Rule, RuleMapper, Uniform
from tdhook_rl.decisions import action_of, drawn_decisions, every
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.hooks import Runtime
from tdhook_rl.passes import Call, Pass
from tdhook_rl.paths import Site
from tdhook_rl.targets import Target, chosen_logit, default_target

if TYPE_CHECKING:
    from tdhook_rl.method import Binder

__all__ = ["LRP"]


class _ShareOut(torch.autograd.Function):
    """The output of a module, whose gradient is relevance shared out by a rule."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, rule: Rule, module: nn.Module, *inputs: Tensor) -> Tensor:
        ctx.rule, ctx.module = rule, module
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        shared = ctx.rule.share(ctx.module, ctx.saved_tensors, relevance)
        return (None, None, None, *shared)


class _RuleHook:
    """Forward hook of a module with a rule; acts while its own method explains."""

    def __init__(self, runtime: Runtime, owner: str, name: str, rule: Rule) -> None:
        self.runtime = runtime
        self.owner = owner
        self.name = name
        self.rule = rule

    def before(self, module: nn.Module, args: tuple) -> tuple | None:
        # An in-place activation would overwrite the input that the rule needs.
        if self.runtime.explaining == self.owner and getattr(module, "inplace", False):
            return tuple(value.clone() if isinstance(value, Tensor) else value for value in args)
        return None

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.runtime.explaining != self.owner:
            return None
        if not isinstance(output, Tensor) or not all(isinstance(value, Tensor) for value in args):
            raise InputError(
                f"LRP has a rule for {self.name!r} ({type(module).__name__}), but the module takes or returns "
                "something else than tensors"
            )
        return _ShareOut.apply(output.detach(), self.rule, module, *args)


class _BoundLRP(BoundAttribution):
    def __init__(self, config: LRP, binder: Binder) -> None:
        self._owner = binder.owner()
        self._starts_at_output = config.init_attr_grads is None
        self._gap_key = config.gap_key if config.compute_relevance_gap else None
        self._gaps: dict[tuple[str, ...], Tensor] = {}
        mapper = config.rule_mapper or Uniform()
        for name, module in binder.root.named_modules():
            rule = self._rule_of(name, module, mapper, config)
            if rule is not None:
                hook = _RuleHook(binder.runtime, self._owner, name, rule)
                module.register_forward_pre_hook(hook.before)
                binder.on_output(Site(name, name, module, True), hook)
        # After the rules: an explained activation is what a rule has put out.
        super().__init__(config, binder)

    @property
    def result_keys(self) -> tuple[tuple[str, ...], ...]:
        keys = super().result_keys
        if self._gap_key is None:
            return keys
        return (*keys, *((self._gap_key, *([name] if name else [])) for name in self.names))

    @staticmethod
    def _rule_of(name: str, module: nn.Module, mapper: RuleMapper, config: LRP) -> Rule | None:
        if isinstance(module, (TensorDictModuleBase, TensorDictParams)):
            return None
        if config.skip_modules and config.skip_modules(name, module):
            return None
        if "_empty_net" in name.split("."):
            raise SiteError(
                f"the weights of {name!r} are lent to it during the call of a multi-agent net, and LRP reads weights "
                "afterwards: use Saliency or IntegratedGradients"
            )
        rule = mapper(name, module)
        works = bool(next(module.parameters(recurse=False), None) is not None) or not list(module.children())
        if rule is None and works and not isinstance(module, (*ROUTING, nn.Sequential, nn.ModuleList)):
            raise SiteError(
                f"LRP has no rule for the module {name!r} ({type(module).__name__}), so its gradient would be taken "
                "for relevance: give it one with rule_mapper=, or let it pass with skip_modules="
            )
        return rule

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        results = super().compute(call)
        gaps, self._gaps = self._gaps, {}
        return results | gaps

    def _function(self, target: Target | None, call: Call) -> Callable[[Pass], Tensor]:
        return _Default() if target is None and self._init["targets"] is None else super()._function(target, call)

    def attribute(
        self, call: Call, explained: Explained, targets: Sequence[Callable[[Pass], Tensor]]
    ) -> list[tuple[dict[NestedKey, Tensor], dict[str, Tensor]]]:
        if torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            raise InputError("LRP cannot run under inference_mode or compile: annotate the collected batch")
        inputs, sites = explained.inputs, explained.leaves
        starts = [_Start(target, self._starts_at_output) for target in targets]
        with call.policy._hooked_runtime.explained_by(self._owner):
            found, _ = gradients(call, inputs, dict.fromkeys(sites), sites, starts)
        if self._gap_key is not None:
            for name, start, (of_inputs, _) in zip(self.names, starts, found, strict=True):
                total = torch.stack([value.reshape(*call.batch_size, -1).sum(-1) for value in of_inputs.values()]).sum(
                    0
                )
                self._gaps[self._gap_key, *([name] if name else [])] = total - start.value
        return found


class _Default:
    """The logit of the taken action: a log-probability has no share-out through the normalisation."""

    name = "(default)"

    def __call__(self, run: Pass) -> Tensor:
        logits = every(run.outputs, "logits")
        decided = drawn_decisions(run)
        known = bool(logits) and all(action_of(run, key) is not None for key in logits)
        if not known or (decided and len(decided) != len(logits)):
            return default_target(run)(run)
        return (chosen_logit(logits[0]) if len(logits) == 1 else chosen_logit())(run)


class _Start:
    """A target whose gradient starts at relevance: each output that the target reads, times how much it counts.

    Of a logit that is the logit, of a sum every term by itself, of a margin one logit and the other with its sign; so
    that the relevance of the outputs adds up to the target wherever this is linear in them.
    """

    def __init__(self, target: Callable[[Pass], Tensor], at_output: bool) -> None:
        self.target = target
        self.name = getattr(target, "name", "target")
        self.at_output = at_output
        self.value: Tensor = torch.empty(0)

    def __call__(self, run: Pass) -> Tensor:
        if not self.at_output:
            value = self.target(run)
            self.value = value.detach()
            return value
        nodes = {key: value for key, value in run.outputs.items(True, True) if _has_gradient(value)}
        outputs = run.outputs.clone(recurse=False)
        points = [value.detach().requires_grad_() for value in (*nodes.values(), *run.watched.values())]
        for key, point in zip(nodes, points, strict=False):
            outputs.set(key, point)
        distributions = [one.again(outputs) for one in run.distributions]
        watched = dict(zip(run.watched, points[len(nodes) :], strict=True))
        value = self.target(replace(run, outputs=outputs, distributions=distributions, watched=watched))
        self.value = value.detach()
        if not value.requires_grad:
            return value
        counts = torch.autograd.grad(value.sum(), points, allow_unused=True)
        terms = [
            (node * (point.detach() * count)).reshape(*run.outputs.batch_size, -1).sum(-1)
            for node, point, count in zip((*nodes.values(), *run.watched.values()), points, counts, strict=True)
            if count is not None
        ]
        return torch.stack(terms).sum(0) if terms else self.value


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


@dataclass(frozen=True, eq=False, kw_only=True)
class LRP(GradientAttribution):
    """Layer-wise relevance propagation (Bach et al. 2015) of inputs and inner activations.

    Args:
        rule_mapper: ``(name, module) -> rule``, see :mod:`tdhook_rl.attribution.lrp_rules`; by default epsilon
            everywhere.
        skip_modules: ``(name, module) -> bool``: modules whose gradient is taken for relevance.
        compute_relevance_gap: also write the relevance of the inputs minus the explained output: 0 where relevance
            is conserved. Biases and epsilon absorb some; a residual sum that is not a
            :class:`~tdhook_rl.attribution.lrp_rules.Sum` module doubles it.
        gap_key: where that is written, batch-shaped.

    Relevance starts at the outputs that the target reads, each times its slope (by default at the logit of the taken
    action on policies with logits, elsewhere at every output): for a target that is linear in them, such as a logit,
    a value, a sum or a margin, that adds up to the target. With ``init_attr_grads`` it starts at what that returns.
    The other arguments are those of
    :class:`tdhook_rl.attribution.base.GradientAttribution`.

    Writes ``(attribution_key, in_key)`` and ``(attribution_key, path)``: batch + the shape of what is explained.

    Raises:
        SiteError: if a module that computes has no rule.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False))
        >>> with LRP().prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        >>> torch.allclose(data["attr", "input"].sum(-1), data["output"].squeeze(-1), atol=1e-4)
        True
    """

    rule_mapper: RuleMapper | None = None
    skip_modules: Callable[[str, nn.Module], bool] | None = None
    compute_relevance_gap: bool = False
    gap_key: str = "relevance_gap"

    bound_class: ClassVar[type[BoundAttribution]] = _BoundLRP

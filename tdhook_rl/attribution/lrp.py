"""Layer-wise relevance propagation: the explained output is shared out, layer by layer, down to the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn

from tdhook_rl.attribution.base import BoundAttribution, GradientAttribution
from tdhook_rl.attribution.functions import is_torch_module
from tdhook_rl.attribution.gradients import gradients
from tdhook_rl.attribution.lrp_cuts import CutOff, Graph, LookForCuts
from tdhook_rl.attribution.lrp_functions import FunctionRules
from tdhook_rl.attribution.lrp_hooks import (
    ComputedHook,
    GradientHook,
    LrpState,
    RuleHook,
    ShareByFunction,
    ShareOut,
    Unknown,
)
from tdhook_rl.attribution.lrp_rules import BY_WEIGHT, CONTAINERS, ROUTING, Rule, RuleMapper, Uniform, is_plain
from tdhook_rl.attribution.question import Attributed, Question, TargetFunction
from tdhook_rl.attribution.watching import Watch, WatchedCall, reached
from tdhook_rl.calls.decisions import action_of, drawn_decisions, keys_named, require_own_parameters
from tdhook_rl.calls.passes import Call, Pass
from tdhook_rl.calls.undifferentiable import in_words
from tdhook_rl.errors import InPlaceError, InputError, SiteError, TdhookError
from tdhook_rl.internals.torchrl_names import is_lent_weights
from tdhook_rl.method import Binder
from tdhook_rl.replaying.batching import GeneratorState, row_vectors
from tdhook_rl.sites.runtime import vmap_level
from tdhook_rl.targets import Target, chosen_logit, default_target


class _BoundLRP(BoundAttribution):
    is_product = True

    def __init__(self, config: LRP, binder: Binder) -> None:
        self._owner = binder.owner()
        self._starts_at_output = config.init_attr_grads is None
        self.beside = config.gap_key if config.compute_relevance_gap else None
        self._gaps: dict[tuple[str, ...], Tensor] = {}
        self._mapper = config.rule_mapper or Uniform()
        self._state = LrpState(binder.runtime, self._owner)
        self._root = binder.root
        self._layers: list[tuple[str, nn.Module, Rule]] = []
        self._by_function = False  # functions that need a rule have been met
        self._looked = False  # for what is cut off from the inputs
        for name, module in binder.root.named_modules():
            self._place(name, module, config)
        # After the rules: an explained activation is what a rule has put out.
        super().__init__(config, binder)

    def _place(self, name: str, module: nn.Module, config: LRP) -> None:
        # Within computed weights there is nothing that is called on activations.
        if isinstance(module, (TensorDictModuleBase, TensorDictParams)) or "parametrizations" in name.split("."):
            return
        if config.skip_modules and config.skip_modules(name, module):
            if not isinstance(module, CONTAINERS):
                GradientHook(self._state, name).place(module)
            return
        if is_lent_weights(name):
            raise SiteError(
                f"the weights of {name!r} are lent to it during the call of a multi-agent net, and LRP reads weights "
                "afterwards: use Saliency or IntegratedGradients"
            )
        rule = self._mapper(name, module)
        if rule is not None and (isinstance(rule, type) or not callable(getattr(rule, "share", None))):
            raise InputError(
                f"rule_mapper= gave {rule!r} for {name!r} ({type(module).__name__}): it gives a rule of "
                "tdhook_rl.attribution.lrp_rules, such as Epsilon(), or None for no rule"
            )
        if rule is not None:
            self._layers.append((name, module, rule))
            computed = type(rule) in BY_WEIGHT and not is_plain(module)
            (ComputedHook if computed else RuleHook)(self._state, name, rule).place(module)
        elif is_torch_module(module) and not isinstance(module, (*ROUTING, *CONTAINERS)):
            raise SiteError(
                f"LRP has no rule for the module {name!r} ({type(module).__name__}), so its gradient would be taken "
                "for relevance: give it one with rule_mapper=, or let it pass with skip_modules="
            )

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        results = super().compute(call)
        gaps, self._gaps = self._gaps, {}
        return results | gaps

    def _function(self, target: Target | None, call: Call) -> TargetFunction:
        return _Default() if target is None and self._init["targets"] is None else super()._function(target, call)

    def attribute(self, question: Question) -> list[Attributed]:
        if torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            raise InputError("LRP cannot run under inference_mode or compile: annotate the collected batch")
        if vmap_level() >= 0:
            raise InputError("LRP cannot run under vmap: call the hooked policy on the whole batch, or annotate it")
        watch = Watch()
        starts = [_Start(target, self._starts_at_output, watch) for target in question.targets]
        found = self._in_the_way_it_needs(question._replace(targets=starts), watch)
        if self.beside is not None:
            for name, start, (of_inputs, _) in zip(self.names, starts, found, strict=True):
                rows = question.call.batch_size
                total = torch.stack([row_vectors(value, rows).sum(-1) for value in of_inputs.values()]).sum(0)
                self._gaps[self.beside, *([name] if name else [])] = total - start.value
        return found

    def _in_the_way_it_needs(self, question: Question, watch: Watch) -> list[Attributed]:
        """By the rules of modules alone, which costs least, where the graph shows that nothing else has computed."""
        if not self._by_function:
            before = GeneratorState(question.call.data.device)
            try:
                return self._passed(question, watch, by_function=False)
            except Unknown:
                pass
            except TdhookError as error:
                if not isinstance(error, InPlaceError):
                    raise
            except RuntimeError:  # such as a statement in place: the pass with rules for functions says what it is
                pass
            before.restore()
        try:
            found = self._passed(question, watch, by_function=True)
        except RuntimeError as error:
            told = in_words(error)
            if told is None:
                raise
            raise told from error
        self._by_function = True
        return found

    def _passed(self, question: Question, watch: Watch, by_function: bool) -> list[Attributed]:
        call, runtime = question.call, self._state.runtime
        points: list[Tensor] = []  # of the pass: the replayed inputs
        graph = Graph(points, runtime, (ShareOut, ShareByFunction))
        cuts = functions = look = None
        if by_function or not self._looked:
            names = {id(module): name for name, module in self._root.named_modules()}
            cuts = CutOff(graph, self._root, names, by_function)
            functions = self._functions(graph, cuts, names) if by_function else None
            look = functions or LookForCuts(self._state, graph, cuts)
        watch.begin(graph, None if functions is None else functions.names)
        self._state.begin(functions, cuts)
        seen = WatchedCall.of(call, look, points)
        try:
            with runtime.explained_by(self._owner):
                found = gradients(question._replace(call=seen))[0]
            self._looked = True
            return found
        finally:
            call.replayed = seen.replayed
            watch.graph = None
            self._state.begin(None, None)

    def _functions(self, graph: Graph, cuts: CutOff, names: dict[int, str]) -> FunctionRules:
        mapper = self._mapper
        plain = mapper if isinstance(mapper, Uniform) else Uniform()
        weights = {
            id(module._parameters["weight"]): (name, module, rule)
            for name, module, rule in reversed(self._layers)
            if module._parameters.get("weight") is not None
        }
        return FunctionRules(
            self._state,
            graph,
            cuts,
            names,
            weights,
            lambda convolves: plain.convolution or plain.rule if convolves else plain.rule,
            getattr(mapper, "epsilon", 1e-6),
        )


class _Default:
    """The logit of the taken action: a log-probability has no share-out through the normalisation."""

    name = "(default)"

    def __call__(self, run: Pass) -> Tensor:
        logits = [key for key in keys_named(run.outputs, "logits") if not _weighs(run, key)]
        decided = drawn_decisions(run)
        known = bool(logits) and all(action_of(run, key) is not None for key in logits)
        if not known or (decided and len(decided) != len(logits)):
            return default_target(run)(run)
        return (chosen_logit(logits[0]) if len(logits) == 1 else chosen_logit())(run)


def _weighs(run: Pass, key: NestedKey) -> bool:
    """Whether logits are of the parts that a continuous action is drawn from, rather than of choices."""
    action, logits = action_of(run, key), run.outputs.get(key)
    return action is not None and action.is_floating_point() and action.shape != logits.shape


class _Start:
    """A target whose gradient starts at relevance: each output that the target reads, times how much it counts.

    Of a logit that is the logit, of a sum every term by itself, of a margin one logit and the other with its sign; so
    that the relevance of the outputs adds up to the target wherever this is linear in them.
    """

    def __init__(self, target: TargetFunction, at_output: bool, watch: Watch) -> None:
        self.target = target
        self.watch = watch
        self.name = getattr(target, "name", "target")
        self.at_output = at_output
        self.value: Tensor = torch.empty(0)

    def __call__(self, run: Pass) -> Tensor:
        if not self.at_output:
            value = self.target(run)
            self.value = value.detach()
            outputs = [one for one in run.outputs.values(True, True) if _has_gradient(one)]
            self.watch.require_known(reached(value, [*outputs, *run.watched.values()]))
            return value
        nodes = {key: value for key, value in run.outputs.items(True, True) if _has_gradient(value)}
        outputs = run.outputs.clone(recurse=False)
        points = [value.detach().requires_grad_() for value in (*nodes.values(), *run.watched.values())]
        for key, point in zip(nodes, points, strict=False):
            outputs.set(key, point.clone())  # which a function of the user's may write to
        require_own_parameters([one.module for one in run.distributions], "LRP")
        distributions = [one.again(outputs) for one in run.distributions]
        watched = dict(zip(run.watched, points[len(nodes) :], strict=True))
        value = self.target(replace(run, outputs=outputs, distributions=distributions, watched=watched))
        self.value = value.detach()
        if not value.requires_grad:
            return value
        counts = torch.autograd.grad(value.sum(), points, allow_unused=True)
        self.watch.require_known(
            node
            for node, count in zip((*nodes.values(), *run.watched.values()), counts, strict=True)
            if count is not None
        )
        terms = [
            row_vectors(_begun(node, count), run.outputs.batch_size).sum(-1)
            for node, count in zip((*nodes.values(), *run.watched.values()), counts, strict=True)
            if count is not None
        ]
        if not terms:
            return self.value
        # A row whose target is no number has no relevance either, whatever its outputs are.
        defined = row_vectors(torch.isfinite(self.value), run.outputs.batch_size).all(-1)
        return torch.where(defined, torch.stack(terms).sum(0), torch.nan)


def _begun(node: Tensor, count: Tensor) -> Tensor:
    """Zero, with a gradient that is each entry of an output times how much it counts; of what does not count, minus
    infinity too, it is zero."""
    start = torch.where(count == 0, 0.0, node.detach() * count)
    return torch.where(count == 0, 0.0, (node - node.detach()) * start)


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
            is conserved. Biases, constants that are added, and epsilon absorb some.
        gap_key: where that is written, batch-shaped.

    Relevance starts at the outputs that the target reads, each times its slope (by default at the logit of the taken
    action on policies with logits, elsewhere at every output): for a target that is linear in them, such as a logit,
    a value, a sum or a margin, that adds up to the target. With ``init_attr_grads`` it starts at what that returns.
    The other arguments are those of
    :class:`tdhook_rl.attribution.base.GradientAttribution`.

    What a forward computes without modules has rules too. Sums (``x + block(x)``, ``out += x``, means, matrix products
    with a weight) are shared in proportion to their terms, where an added constant is a bias; functions of single
    entries (``F.relu``, ``tanh``, ``x / 255``, dropout) hand relevance on; slices and maxima that of the entry that
    they take. ``F.linear`` with the weight of a layer has the layer's rule. Layers with computed weights (adapters,
    norms of weights, masks) are explained by their linear map in this very call. What relevance cannot flow through,
    such as a product of two tensors that both depend on the inputs, softmax or code that is compiled, is an error
    there; where it does not decide the target it is no matter.

    Writes ``(attribution_key, in_key)`` and ``(attribution_key, path)``: batch + the shape of what is explained.

    Raises:
        SiteError: if a layer of torch's own that computes has no rule.
        InputError: if relevance meets a function without a rule; under ``inference_mode``, ``vmap`` or compile.

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

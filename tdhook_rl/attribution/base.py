"""What gradient attributions share: which tensors are explained, which targets, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.checked import require_target
from tdhook_rl.arguments.keys import key_parts, required
from tdhook_rl.attribution.baselines import Baselines
from tdhook_rl.attribution.callbacks import ADDITIONAL, InitTargets, require_tensordict
from tdhook_rl.attribution.chain_gradients import is_linear
from tdhook_rl.attribution.explainable import as_floats, explainable_inputs, require_inputs
from tdhook_rl.attribution.question import Attributed, Question, TargetFunction
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.compiled import Compiled
from tdhook_rl.calls.passes import Call, Pass, with_batch
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.calls.writing import tensors_as_entries
from tdhook_rl.errors import InputError, TargetError, nearest
from tdhook_rl.method import Binder, Method
from tdhook_rl.policies.drawing_code import may_draw_elsewhere
from tdhook_rl.sites.hooks import Portable
from tdhook_rl.sites.missing import OFFER, Absent, Missing, PartialCapture, check_missing
from tdhook_rl.targets import DefaultTarget, OwnTarget, Target

#: What ``compile=`` may choose; passes are one graph in any case.
COMPILE_OPTIONS = ("backend", "mode", "options", "dynamic")

Init = Callable[[TensorDictBase, TensorDictBase], TensorDictBase]


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientAttribution(Method):
    """Base of the gradient attributions: what is explained, with respect to what.

    Args:
        target: what is explained, from :mod:`tdhook_rl.targets`; by default the log-probability of the taken
            action on policies (a deterministic action before exploration noise, the value of the action in
            Q-networks), the value of critics, and the sum of outputs elsewhere. A mapping of names to targets
            explains each by itself, from one forward pass, under ``(attribution_key, name, ...)``.
        init_attr_targets: instead of ``target``, ``(outputs, additional) -> TensorDict`` of the values to explain;
            their sum over entries is explained for each row.
        init_attr_inputs: ``(inputs, additional) -> TensorDict`` of the inputs to explain, selected from or computed
            from all inputs.
        init_attr_grads: ``(targets, additional) -> TensorDict`` of the weights of the targets of
            ``init_attr_targets``, of their shape or one for each row; ones by default.
        additional_init_keys: keys of the data that the three functions are given as ``additional``.
        inputs: the input keys to explain; by default every input that is not boolean, and none where
            ``input_modules`` are given.
        input_modules: modules whose output is explained, under ``(attribution_key, path)``. Of a module that runs
            several times in a call say which run: ``"act@0"``, ``"act@-1"``, or ``"act@all"`` for the gradient with
            respect to each run, in a dimension for the runs after the batch (see :mod:`tdhook_rl.sites.paths`);
            their sum is the gradient for a change of all of them.
        target_modules: modules whose output ``init_attr_targets`` is given beside the policy's outputs.
        when: ``"step"`` in every forward, as a second pass; ``"batch"`` in ``annotate`` only. By default
            ``"batch"`` on policies explained through ``target`` and ``"step"`` elsewhere.
        horizon: of recurrent policies: ``"step"`` stops gradients at the hidden state stored with each row;
            ``"trajectory"`` lets them run through time, so that an observation is explained by the sum of the
            targets from its step on (of one trajectory; ``annotate`` only, the last batch dimension is time).
        attribution_key: the root of the result keys.
        missing: ``"raise"`` where one of ``input_modules`` did not run in a call, or ran on some of its rows only;
            ``"nan"`` for NaN and a false mask in the rows without a value (experts, action chunks).
    """

    target: TargetFunction | Mapping[str, TargetFunction] | None = None
    init_attr_targets: Init | None = None
    init_attr_inputs: Init | None = None
    init_attr_grads: Init | None = None
    additional_init_keys: str | Sequence[NestedKey] = ()
    inputs: str | Sequence[NestedKey] | None = None
    input_modules: str | Sequence[str] = ()
    target_modules: str | Sequence[str] = ()
    when: Literal["step", "batch"] | None = None
    horizon: Literal["step", "trajectory"] = "step"
    attribution_key: str = "attr"
    missing: Missing = "raise"

    bound_class: ClassVar[type[BoundAttribution]]
    horizons: ClassVar[tuple[str, ...]] = ("step",)

    def __post_init__(self) -> None:
        for name in ("additional_init_keys", "inputs", "input_modules", "target_modules"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.target is not None and self.init_attr_targets is not None:
            raise TargetError("target= and init_attr_targets= both say what to explain: give one of them")
        if self.when not in (None, "step", "batch"):
            raise InputError(f"when= is 'step' or 'batch', got {self.when!r}")
        if self.horizon not in self.horizons:
            raise InputError(
                f"{type(self).__name__} has the horizons {', '.join(map(repr, self.horizons))}; got {self.horizon!r}"
            )
        if self.horizon == "trajectory" and self.when == "step":
            raise InputError(
                "horizon='trajectory' explains what is decided later as well, which no step knows: leave when= out, "
                "and annotate whole trajectories"
            )
        check_missing(self.missing)
        if self.init_attr_targets is None and (self.init_attr_grads is not None or self.target_modules):
            raise TargetError("init_attr_grads= and target_modules= belong to init_attr_targets=, which is not given")
        for one in self.target.values() if isinstance(self.target, Mapping) else [self.target]:
            if one is not None:
                require_target(one)
        if self.target == {}:
            raise TargetError("target={} names nothing to explain: leave it out for the default")

    def bind(self, binder: Binder) -> BoundAttribution:
        return self.bound_class(self, binder)

    def default_when(self, policy: TensorDictModuleBase) -> Literal["step", "batch"]:
        """Policies act at every step and are explained once a batch, which is many times cheaper."""
        if self.horizon == "trajectory":
            return "batch"
        acts = any(isinstance(child, ProbabilisticTensorDictModule) for child in policy.modules()) or any(
            key == "action" or key[-1] == "action" for key in policy.out_keys
        )
        return "batch" if acts and self.init_attr_targets is None else "step"


class BoundAttribution(BoundMethod):
    """A gradient attribution bound to a policy. Subclasses say how one target is attributed."""

    replays = True
    shows_outputs = True  # init_attr_targets is given the policy's outputs, beside those of target_modules
    declared: list[NestedKey]
    is_product = False  # attributions are products with input minus baseline, not gradients
    baselines: Baselines | None = None  # of the inputs, where the method compares them with any
    beside: str | None = None  # the root of what is written beside: one number for each row and target

    def __init__(self, config: GradientAttribution, binder: Binder) -> None:
        sites = binder.sites(config.input_modules, runs=True) if config.input_modules else []
        self.when = config.when or config.default_when(binder.policy)
        self.horizon = config.horizon
        self.root = config.attribution_key
        self.inputs: list[NestedKey] | None = None
        if config.inputs is not None:
            self.inputs = list(dict.fromkeys(unravel_key(key) for key in config.inputs))
            require_inputs("inputs= names", self.inputs, binder.policy.in_keys)
            if not self.inputs and not sites and config.init_attr_inputs is None:
                raise InputError("inputs=[] explains no input, and input_modules= names no module: name one of them")
        elif sites and config.init_attr_inputs is None:
            self.inputs = []
        self.leaves = {binder.leaf(site, config.missing == "nan"): site.name for site in sites}
        # Of sites that may miss rows: the slot in which what they gave is kept, and their path, by that of the leaf.
        self._partly: dict[str, tuple[str, str]] = {}
        if config.missing == "nan":
            kept = zip(self.leaves, sites, strict=True)
            self._partly = {slot: (binder.capture_partly(binder.root, site), site.path) for slot, site in kept}
            self.exclusive = bool(self._partly)
        self._absent = Absent()
        watched = binder.sites(config.target_modules, runs=True) if config.target_modules else []
        self.watched = {binder.watch(site): site.name for site in watched}
        self.declared = binder.observed if self.inputs is None else self.inputs
        self._known_keys: tuple[Any, tuple[tuple[str, ...], ...]] = None, ()
        self.names = list(config.target) if isinstance(config.target, Mapping) else [None]
        self._init = {
            name: None if function is None else Portable(function)
            for name, function in (
                ("targets", config.init_attr_targets),
                ("inputs", config.init_attr_inputs),
                ("grads", config.init_attr_grads),
            )
        }
        self._chosen: list[TargetFunction | None] = [
            one if one is None or hasattr(one, "name") else Target(getattr(one, "__name__", "(a function)"), one)
            for one in (config.target.values() if isinstance(config.target, Mapping) else [config.target])
        ]
        self._default = DefaultTarget()
        # The callbacks are given outputs; a target of the user's may look at the stored inputs.
        self.reads_inputs = config.init_attr_targets is None and any(
            one is not None and getattr(one, "reads_inputs", True) for one in self._chosen
        )
        self._own_targets = config.init_attr_targets is None and all(
            one is None or isinstance(one, OwnTarget) for one in self._chosen
        )
        # A function of the user's may draw; ours, and what differentiates them, do not.
        theirs = [one for one in self._chosen if one is not None and not isinstance(one, OwnTarget)]
        functions = [getattr(one, "function", one) for one in theirs] + [one for one in self._init.values() if one]
        self.may_draw = bool(functions)
        self.asks_functions = any(may_draw_elsewhere(getattr(one, "function", one)) for one in functions)
        self.linear = config.init_attr_targets is None and is_linear([one or DefaultTarget() for one in self._chosen])
        self._additional_keys = [unravel_key(key) for key in config.additional_init_keys]
        self.reads = list(self._additional_keys)

    @property
    def result_keys(self) -> tuple[tuple[str, ...], ...]:
        explains, known = self._known_keys
        if explains != self.declared:
            known = self._list_keys()
            self._known_keys = list(self.declared), known
        return known

    def _list_keys(self) -> tuple[tuple[str, ...], ...]:
        explained = [*map(key_parts, self.declared), *((site,) for site in self.leaves.values())]
        names = [(name,) if name else () for name in self.names]
        keys = tuple((self.root, *name, *key) for name in names for key in explained)
        return keys if self.beside is None else (*keys, *((self.beside, *name) for name in names))

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        if self.horizon == "step" and call.policy._hooked.traits.read_trajectories(call.policy):
            raise InputError(
                f"{self.method_name} explains rows, but a policy in recurrent mode reads "
                "trajectories, whose steps would be mixed: collect without it and call annotate on the batch, which "
                "explains each row at its stored hidden state, or the whole trajectory with horizon='trajectory'"
            )
        call.learn()
        captured = self._partial_captures(call)
        leaves = self.leaves
        if captured is not None:
            leaves = {slot: site for slot, site in leaves.items() if slot in captured}
        inputs = self._explained_inputs(call)
        if any(key not in inputs for key in self.declared):  # boolean inputs drop out
            self.declared = [key for key in self.declared if key in inputs]
        targets = self.targets_of(call)
        results: dict[tuple[str, ...], Tensor] = {}
        attributed: Sequence[Attributed] = [({}, {})] * len(self.names)
        if inputs or leaves or not self.leaves:
            attributed = self.attribute(Question(call, inputs, leaves, targets, shares=self.shares_pass))
        for name, (of_inputs, of_leaves) in zip(self.names, attributed, strict=True):
            prefix = (self.root, name) if name else (self.root,)
            for key, value in of_inputs.items():
                results[*prefix, *key_parts(key)] = value
            for slot, value in of_leaves.items():
                site = self.leaves[slot]
                value = value if captured is None else captured[slot].spread(value, call.batch_size, site)
                results[*prefix, site] = with_batch(value, call.batch_size, site, OFFER)
            for slot, site in self.leaves.items():
                if slot not in leaves:
                    module = call.policy.hooked_root.get_submodule(self._partly[slot][1])
                    results[*prefix, site] = self._absent.value(site, module, call.batch_size, call.data.device)
        if captured is not None:
            results["computed", self.root] = self._captured_rows(call, captured)
        return results

    def targets_of(self, call: Call) -> list[TargetFunction]:
        """What is explained in a call."""
        targets = [self._function(one, call) for one in self._chosen]
        if self.horizon == "trajectory" and (real := real_rows(call.data)) is not None:
            targets = [_OfRealSteps(target, real) for target in targets]
        return targets

    def _partial_captures(self, call: Call) -> dict[str, PartialCapture] | None:
        """What the explained sites give in this call, by the slot of their leaf; ``None`` where all have to run."""
        if not self._partly:
            return None
        with torch.no_grad():
            call.replay(record=True)
        found: dict[str, Any] = {slot: call.slots.get(kept) for slot, (kept, _) in self._partly.items()}
        captured = {slot: one for slot, one in found.items() if one is not None}
        for slot, one in captured.items():
            self._absent.note(self.leaves[slot], one.together(call.batch_size, self.leaves[slot])[0], call.batch_size)
        return captured

    def _captured_rows(self, call: Call, captured: Mapping[str, PartialCapture]) -> Tensor:
        rows = torch.ones(call.batch_size, dtype=torch.bool, device=call.data.device)
        for slot, site in self.leaves.items():
            one = captured.get(slot)
            rows = rows & one.together(call.batch_size, site)[1] if one is not None else torch.zeros_like(rows)
        return rows

    def attribute(self, question: Question) -> list[Attributed]:
        """For each target the attribution of each input (by key) and of each inner activation (by slot)."""
        raise NotImplementedError

    def additional(self, call: Call) -> TensorDict:
        """The entries of ``additional_init_keys``."""
        found = tensors_as_entries({}, call.batch_size)
        for key in self._additional_keys:
            found.set(key, required(call.data, key, "additional_init_keys names"))
        return found

    def _explained_inputs(self, call: Call) -> dict[NestedKey, Tensor]:
        function = self._init["inputs"]
        if function is None:
            return explainable_inputs(call, self.inputs)
        inputs = TensorDict(dict(call.inputs), batch_size=call.batch_size)
        additional = self.additional(call)
        chosen = asked(
            function, inputs, additional, what="init_attr_inputs=", reads_only=[inputs, additional], remedy=ADDITIONAL
        )
        require_tensordict(chosen, "init_attr_inputs")
        keys = [key if len(key_parts(key)) > 1 else key_parts(key)[0] for key in chosen.keys(True, True)]
        require_inputs("init_attr_inputs returned", keys, call.policy.policy_in_keys)
        if not keys:
            raise InputError("init_attr_inputs returned an empty TensorDict: it holds the inputs to explain")
        values = {key: chosen.get(key) for key in keys}
        for key, value in values.items():
            if not isinstance(value, Tensor) or value.shape[: len(call.batch_size)] != call.batch_size:
                got = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise InputError(
                    f"init_attr_inputs returned {key!r} {got}: it gives each row of the batch {tuple(call.batch_size)} "
                    "its input"
                )
        return {key: self._as_explained(call, key, value) for key, value in values.items()}

    def _as_explained(self, call: Call, key: NestedKey, value: Tensor) -> Tensor:
        """An input that the user's function has returned, as what has a gradient."""
        return as_floats(call, key, value)

    def _function(self, target: TargetFunction | None, call: Call) -> TargetFunction:
        init = self._init["targets"]
        if init is None:
            return target or self._default
        return InitTargets(init, self._init["grads"], self.additional(call), self.watched, self.shows_outputs)


def compiled(bound: BoundAttribution, config: Any) -> Compiled | None:
    """What computes the same by a compiled graph, if the method is told to.

    Raises:
        InputError: where it cannot be.
    """
    if config.compile is False:
        return None
    options = {} if config.compile is True else config.compile
    for name in options:
        if name not in COMPILE_OPTIONS:
            raise InputError(f"compile= takes arguments of torch.compile; {nearest(str(name), COMPILE_OPTIONS)}")
    if config.horizon == "trajectory" or config.missing == "nan":
        raise InputError("compile= is for passes over rows: leave it out with horizon='trajectory' or missing='nan'")
    return Compiled(bound, type(config).__name__, options)


class _OfRealSteps:
    """A target that is zero in padding: what a network would decide there is no part of a trajectory."""

    def __init__(self, target: TargetFunction, real: Tensor) -> None:
        self.target = target
        self.real = real
        self.name = getattr(target, "name", "target")

    def __call__(self, run: Pass) -> Tensor:
        value = self.target(run)
        return torch.where(self.real.reshape(value.shape), value, torch.zeros_like(value))

"""A user's policy becomes a hooked one: a tied clone, the hooks of the methods, the state that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.chains import chain_of
from tdhook_rl.calls.heads import decider_of
from tdhook_rl.calls.policy import HookedState
from tdhook_rl.calls.provenance import Provenance
from tdhook_rl.calls.recurrent_steps import OneStepMixin, steps_alone
from tdhook_rl.calls.shared_pass import can_share
from tdhook_rl.calls.writing import WritingMixin, writes_by_default
from tdhook_rl.errors import PreparationError
from tdhook_rl.hooking.binder import Binder
from tdhook_rl.hooking.collisions import check_collisions
from tdhook_rl.hooking.hooked import HookedMixin
from tdhook_rl.hooking.pooling import speed_up_pooling
from tdhook_rl.policies.actors import chunked_by, supports, value_actions
from tdhook_rl.policies.draws import Draw, draws, survey_draws
from tdhook_rl.policies.outside import compiled_functions, of_compiled
from tdhook_rl.policies.tying import Tie, tied_clone
from tdhook_rl.replaying.batching import Traits
from tdhook_rl.replaying.replay_mixin import DecidedHook, ReplayMixin
from tdhook_rl.replaying.traceable import trace_risks
from tdhook_rl.sites.classes import swap_class
from tdhook_rl.sites.inner_calls import place_inner_hooks
from tdhook_rl.sites.listed import modules
from tdhook_rl.sites.root_hooks import take_root_hooks
from tdhook_rl.sites.rows import attach_layouts
from tdhook_rl.sites.runtime import Runtime

#: Names that a hooked policy adds to its class; a policy that has one of its own is refused.
_ADDED_NAMES = (
    "annotate", "controls", "disable_context", "disable_context_hooks", "hooked_root", "hooking_context",
    "policy_in_keys", "policy_out_keys", "restore", "result_keys", "run",
)  # fmt: skip


class _Binds(Protocol):
    def bind(self, binder: Binder) -> BoundMethod | None: ...


def hooked_clone(
    module: nn.Module,
    methods: Sequence[_Binds],
    in_keys: Sequence[NestedKey] | Mapping[str, NestedKey],
    out_keys: Sequence[NestedKey],
) -> Any:
    """A clone of a policy that holds its very tensors, with the hooks of the methods in their order.

    Raises:
        PreparationError: if it cannot be hooked.
    """
    clone = root = tied_clone(module)
    wraps = not isinstance(module, TensorDictModuleBase)
    if wraps:
        clone = TensorDictModule(root, in_keys=in_keys, out_keys=out_keys)
        clone.training = root.training
    taken = [name for name in _ADDED_NAMES if hasattr(clone, name)]
    if taken:
        raise PreparationError(
            f"{type(clone).__name__} has its own attribute {taken[0]!r}, which a hooked policy needs: rename it"
        )
    has_root_hooks = take_root_hooks(clone)
    runtime = Runtime()
    runtime.methods = tuple(methods)
    attach_layouts(clone, runtime)
    binder = Binder(clone, root, runtime, Tie(module, root))
    drawn = survey_draws(clone)
    place_inner_hooks(clone, runtime)
    for child in modules(clone):
        if child is clone:
            continue
        if draws(child):
            swap_class(child, ReplayMixin)
            child.__dict__.update(_hooked_runtime=runtime, _hooked_draw=drawn.get(child, Draw()))
            continue
        if child in drawn:
            child.register_forward_hook(DecidedHook(runtime, drawn[child]))
        if writes_by_default(type(child)):
            swap_class(child, WritingMixin)
        elif type(child) in steps_alone():
            swap_class(child, OneStepMixin)
    for child in modules(clone):
        before_the_draw = getattr(child, "det_part", None)  # a sequence over the same modules, which is no submodule
        if type(before_the_draw) is TensorDictSequential:
            swap_class(before_the_draw, WritingMixin)
    bound = []
    for method in methods:
        if (one := method.bind(binder)) is not None:
            one.method_name = type(method).__name__
            bound.append(one)
    binder.place_row_hooks()
    binder.place_state_hooks()
    if binder.has_sites:
        runtime.unhooked = of_compiled(compiled_functions(clone))
    speed_up_pooling(clone)
    check_collisions(clone, bound, binder.reads)
    steps = [one for one in bound if (one.result_keys or one.consumes) and one.when == "step"]
    traits = Traits.of(clone)
    overwrites = [key for key in clone.in_keys if key in list(clone.out_keys)]
    inputs = [key for key in [*clone.in_keys, *binder.reads] if key not in overwrites]
    clone.__dict__["_hooked"] = HookedState(
        runtime=runtime,
        tie=binder.tie,
        bound=bound,
        steps=steps,
        alone=[one for one in steps if one.without_forward],
        provenance=Provenance(clone, inputs, bound),
        wraps=wraps,
        traits=traits,
        trace_risks=trace_risks(clone),
        shares=any(one.shares_forward for one in steps)
        and can_share(clone, traits)
        and not drawn
        and chunked_by(clone) is None,
        chain=None if has_root_hooks else chain_of(clone),
        decider=None if has_root_hooks else decider_of(clone),
        reads=binder.reads,
        records=binder.records,
        passes=binder.passes,
        overwrites=overwrites,
        optional=binder.optional,
        made=binder.made,
        noise=binder.noise,
        chunks=chunked_by(clone),
        draws=list(drawn.values()),
        slots={key: one.slots[key] for one in drawn.values() for key in one.rewriters},
        actions=value_actions(clone),
        supports=supports(clone),
        routes=binder.routes,
    )
    swap_class(clone, HookedMixin)
    return clone

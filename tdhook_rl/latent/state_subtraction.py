"""Activations moved, in each state, to what they are on another input: subtraction per state, and patching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.calls.inputs import stored_inputs
from tdhook_rl.calls.passes import Call, effects_of
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.latent.strength import (
    BoundSteered,
    Strength,
    as_strength,
    is_function,
    place_strength,
    require_conditions,
    where_it_acts,
)
from tdhook_rl.method import Binder, Method
from tdhook_rl.replaying.batching import GeneratorState
from tdhook_rl.sites.numbers import in_dtype, is_whole
from tdhook_rl.sites.repeats import several_runs
from tdhook_rl.sites.row_values import ROWS_REMEDY, portable_rows, require_whole_rows
from tdhook_rl.sites.rows import rows_of, with_rows
from tdhook_rl.sites.runtime import Runtime


@dataclass(frozen=True, eq=False)
class StateSubtraction(Method):
    """Add, in each state, ``alpha`` times the activation on a counterfactual input minus that on the actual input.

    What the input has and the counterfactual has not is subtracted, as Turner et al. (2023) subtract the cheese from a
    maze. With ``alpha=1`` the activation is, bit for bit, that on the counterfactual: a patch from another run, while
    the policy acts. Larger strengths go further in that direction, negative ones in the other.

    Args:
        paths: the modules, by path or pattern.
        counterfactual: given a copy of the TensorDict of the rows, which it may write into, it returns one with the
            other inputs, such as ``lambda rows: rows.set("observation", hide(rows["observation"]))``.
        alpha: the strength, as of :class:`SteeringVectors`.
        name: the prefix of the control ``"<name>.alpha"``.
        when: in which rows it acts, as of :class:`SteeringVectors`.
        steered_key: the root of the result keys.

    The policy runs twice at each step, unless alpha is the number 0: one run of the rows of both would give other last
    bits than the policy gives without the method, and draw other noise. In the run on the counterfactual nothing is
    drawn, the policy's state stays as it is, and other interventions act; a recurrent policy reads it at the hidden
    state that it has. Gradients pass through both runs. An entry that is infinite on the input, such as the logit of a
    closed action, stays so with any other alpha than 1. With ``when=``, or an alpha by row, ``(steered_key, name)``
    says in which rows it acted.

    Raises:
        SiteError: if a path matches nothing, or a module does not run on both inputs.
        InputError: if the counterfactual is no TensorDict with the same rows.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> with StateSubtraction("1", lambda rows: rows.set("input", rows["input"] * 0)).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": x}, batch_size=3))
        >>> torch.equal(data["output"], net(x * 0)), torch.equal(data["input"], x)
        (True, True)
    """

    observes = False

    paths: str | Sequence[str]
    counterfactual: Callable[[TensorDictBase], TensorDictBase]
    alpha: Any = 1.0
    name: str = "subtraction"
    when: Any = None
    steered_key: str = "steered"

    def __post_init__(self) -> None:
        require_conditions(self.when)
        if not is_function(self.counterfactual):
            raise InputError(
                f"counterfactual= is a function of the TensorDict of the rows, got {self.counterfactual!r:.80}"
            )
        object.__setattr__(self, "alpha", as_strength(self.alpha))

    def bind(self, binder: Binder) -> BoundSteered | None:
        strength, bound = place_strength(binder, self.name, self.when, self.steered_key, self.alpha)
        owner = f"{COUNTERFACTUAL}{binder.owner()}"
        slots = []
        for site in binder.intervention_sites(self.paths):
            slot = binder.slot(site)
            slots.append(slot)
            binder.on_output(site, SubtractionHook(binder.runtime, site.name, owner, slot, strength))
        function = portable_rows(self.counterfactual, f"counterfactual= of {self.name!r}")
        binder.passes.append(CounterfactualPass(owner, self.name, function, slots, strength))
        return bound


def _moved(rows: Tensor, other: Tensor, alpha: Tensor) -> Tensor:
    """``rows + alpha * (other - rows)``, to the bit ``other`` at 1, also where entries are infinite."""
    odd = rows.isinf() | other.isinf()
    moved = torch.lerp(rows.masked_fill(odd, 0), other.masked_fill(odd, 0), alpha)
    # A number plus a share of infinity is infinity, which has no slope: 0 times infinity would make NaN of alpha's.
    kept = torch.where(rows.isinf(), rows, alpha.detach().sgn() * other)
    return torch.where(odd, torch.where(alpha == 1, other, kept), moved)


#: How the owners of passes over counterfactual inputs begin: in these no such method acts.
COUNTERFACTUAL = "counterfactual:"


class CounterfactualPass:
    """Runs the policy on its counterfactual inputs, before it runs on its own."""

    def __init__(
        self,
        owner: str,
        name: str,
        function: Callable[[TensorDictBase], Any],
        slots: list[str],
        strength: Strength,
    ) -> None:
        self.strength = strength
        self.owner = owner
        self.name = name
        self.function = function
        self.slots = slots

    def run(self, policy: HookedPolicy, forward: Callable[..., Any], data: Any) -> None:
        """Find the activations on the counterfactual of what the policy is about to run on."""
        runtime = policy._hooked.runtime
        decided, replay = runtime.decided, runtime.replay
        if (
            not isinstance(data, TensorDictBase)
            or decided is None
            or (runtime.explaining or "").startswith(COUNTERFACTUAL)
            or all(slot in decided for slot in self.slots)
        ):
            return
        if self.strength.off():
            decided[self.owner] = True  # in this call: the strength may be set before the hooks read it
            return
        rows = data.copy()
        if replay is not None and replay.stored.batch_size == data.batch_size:
            rows = replay.stored.copy()
            for key, value in data.items(True, True):
                rows.set(key, value)
        rows = rows.clone()  # the function may write in place: rows["observation"][..., 3] = 0
        other = asked(self.function, rows, what=f"counterfactual= of {self.name!r}", remedy=ROWS_REMEDY)
        if not isinstance(other, TensorDictBase) or other.batch_size != data.batch_size:
            got = f"batch {tuple(other.batch_size)}" if isinstance(other, TensorDictBase) else f"{type(other).__name__}"
            raise InputError(
                f"counterfactual= of {self.name!r} returns a TensorDict with the rows that it is given, batch "
                f"{tuple(data.batch_size)}, but it returned one of {got}"
            )
        found = self._activations(policy, forward, other)
        for slot in self.slots:
            if slot in found:
                decided[slot] = found[slot]

    def _activations(self, policy: HookedPolicy, forward: Callable[..., Any], other: TensorDictBase) -> Any:
        runtime = policy._hooked.runtime
        # Of an earlier call, or of the one that is explained: decisions, and where interventions acted.
        inputs = stored_inputs(policy, other.exclude(*(record.key for record in policy._hooked.records)))
        other = other.exclude(*(key for key in policy.policy_out_keys if key not in inputs))
        before = None
        if not torch.compiler.is_compiling():
            effects = effects_of(policy)
            before = GeneratorState(other.device or effects.device, others=not effects.watch.idle)
        kept = runtime.slots, runtime.leaves, runtime.expected, runtime.start
        runtime.slots, runtime.leaves, runtime.expected = {}, {}, []
        try:
            with runtime.explained_by(self.owner):
                return Call(policy, forward, other, inputs).of_other_inputs().replay().watched
        finally:
            runtime.slots, runtime.leaves, runtime.expected, runtime.start = kept
            if before is not None:
                before.restore()


class SubtractionHook:
    """Forward hook that shows what its module gives on the counterfactual, and moves what it gives on the input."""

    def __init__(self, runtime: Runtime, site: str, owner: str, slot: str, strength: Strength) -> None:
        self.runtime = runtime
        self.site = site
        self.owner = owner
        self.slot = slot
        self.strength = strength

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        runtime = self.runtime
        runtime.intervene_at(self.site)
        under = runtime.explaining or ""
        if under.startswith(COUNTERFACTUAL) and under != self.owner:
            return None
        value, disguise = rows_of(output, module, self.site, runtime)
        require_whole_rows(value, runtime, self.site)
        if under == self.owner:
            if self.slot in runtime.replay.watched:
                raise several_runs(self.site)
            runtime.replay.watched[self.slot] = value.clone()
            return None
        other: Tensor | None = (runtime.decided or {}).get(self.slot, None)
        if other is None and (runtime.decided or {}).get(self.owner, False):
            return None
        if other is None:
            raise SiteError(
                f"the module {self.site!r} did not run on the counterfactual inputs, so there is nothing to subtract: "
                "call the policy with a TensorDict, and name a module that runs on every input"
            )
        rows = value.double() if is_whole(value) else value  # there is no lerp of whole numbers
        alpha, acts = self.strength.at(rows, self.site)
        moved = _moved(rows, in_dtype(other, rows, "the counterfactual", self.site), alpha)  # type: ignore[arg-type]
        moved = in_dtype(where_it_acts(acts, moved, rows), value, "what the subtraction leaves", self.site)
        return with_rows(output, moved, module, disguise)

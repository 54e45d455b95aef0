"""One call of a hooked policy, seen by a method, and the replays of it that gradients need.

A replay runs the policy again on given inputs with interventions on and observers off. It never samples:
where the policy would draw an action, the stored one is used and the distribution is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import get_entry
from tdhook_rl.calls.chains import Record
from tdhook_rl.calls.inputs import stored_inputs
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.writing import tensors_as_entries
from tdhook_rl.errors import InputError, SiteError, own_cause
from tdhook_rl.policies.undecorated import undecorated
from tdhook_rl.replaying.batching import shallow_copy
from tdhook_rl.replaying.samples import Drawn, Replay, require_unchanged
from tdhook_rl.replaying.start import ForwardEffects, Start
from tdhook_rl.sites.repeats import Several, require_rows, runs_of
from tdhook_rl.sites.root_hooks import in_root_hooks
from tdhook_rl.sites.rows import with_batch
from tdhook_rl.sites.states import watching


@dataclass
class Pass:
    """The outcome of a replay: the policy's outputs with their graph, and the distributions on the way.

    ``outputs`` has what the policy reads and writes, and no other entries of the data.
    """

    outputs: TensorDictBase
    stored: TensorDictBase
    distributions: list[Drawn]
    out_keys: list[NestedKey]
    watched: dict[str, Tensor]  # outputs of target modules, by slot
    # Of distributional Q-networks: the returns that the atoms stand for, by the key of their log-probabilities.
    supports: Mapping[NestedKey, Tensor] = field(default_factory=dict)
    # Where an action is kept as it was decided, if later modules write over it.
    slots: Mapping[NestedKey, str] = field(default_factory=dict)
    # Of Q-networks, see value_actions.
    actions: Mapping[NestedKey, tuple[NestedKey, list[int] | None]] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)  # of what the caller was warned already
    runs: Mapping[str, int] = field(default_factory=dict)  # how often sites ran, by slot

    def lent(self) -> Pass:
        """The same with copies of the outputs, on its graph: a function of the user's may write to these in place."""
        outputs = shallow_copy(self.outputs)
        for key in self.out_keys:
            if isinstance(value := get_entry(outputs, key), Tensor):
                outputs.set(key, value.clone())
        return replace(self, outputs=outputs)


class Slope(NamedTuple):
    """The derivative of a target with respect to one output of a pass, in the shape of that."""

    key: NestedKey
    values: Tensor


class Call:
    """One call of a hooked policy: the data it saw, what its hooks captured, and replays of it."""

    def __init__(
        self,
        policy: HookedPolicy,
        forward: Callable[..., Any],
        data: TensorDictBase,
        inputs: dict[NestedKey, Tensor],
        source: TensorDictBase | None = None,
        start: Start | None = None,
    ) -> None:
        self.policy = policy
        self._start = start
        self.data = data
        state = policy._hooked
        if inputs and (state.overwrites or state.records):
            told = [*state.overwrites, *(record.key for record in state.records)]
            # Passes over more rows than the call's read the inputs from here.
            self.data = shallow_copy(data)
            for key in told:
                if key in inputs:
                    self.data.set(key, inputs[key])
                elif self.data.get(key, None) is not None:
                    self.data = self.data.exclude(key)  # the policy was called without it
        self.source = data if source is None else source  # what the policy was called with
        self.inputs = inputs
        # The forward itself, where it can be explained without a second pass: with the leaves of its graph, or with
        # what the policy's one chain recorded.
        self.shared: tuple[Pass, Mapping[NestedKey, Tensor]] | None = None
        self.chain: tuple[Pass, Record] | None = None
        # The methods that may explain one pass, if there are several; and that pass, with the leaves of its graph, or
        # the record of its chain and what that was run on.
        self.sharers: list[Any] = []
        self.kept: tuple[Pass, Mapping[NestedKey, Tensor]] | None = None
        self.kept_record: tuple[Tensor, Record] | None = None
        # The gradients of all their targets, where one pass has given them: by the id of the target that and these.
        self.kept_gradients: dict[int, tuple[Any, dict[NestedKey, Tensor]]] | None = None
        self.traced_outputs: dict[NestedKey, Tensor] = {}  # in a trace: those that a pass over the call has met
        # The outputs of a replay of the call as it is, kept for a comparison with the stored ones.
        self.replayed: TensorDictBase | None = None
        self.compares = False  # whether that will be asked for
        self.in_step = False  # of a forward that has just run
        # How often the sites of all runs, or of one counted from the last, ran in a pass before; by slot.
        self.totals: dict[str, int] = {}
        self._forward = forward
        self._learned = not policy._hooked.draws

    @property
    def batch_size(self) -> torch.Size:
        return self.data.batch_size

    def forget_passes(self) -> None:
        """Drop what is kept for several methods, with its graphs."""
        self.kept = self.kept_record = self.kept_gradients = None

    def of_step(self, drawn: Mapping[str, Tensor]) -> Call:
        """The same call, of the forward that has just run, with what was drawn in it."""
        self.in_step = True
        if drawn:
            self._keep(drawn)
        return self

    def of_other_inputs(self) -> Call:
        """The same call, of inputs that the policy did not act on: nothing was drawn there."""
        self._learned = True
        return self

    def learn(self) -> None:
        """Find, once, what the data does not hold: samples that were written over later, the noise behind latents.

        Raises:
            InputError: if one cannot be told from what is stored.
        """
        if self._learned:
            return
        self._learned = True
        known = set(self.data.keys())
        wanted = {slot for draw in self.policy._hooked.draws for slot in draw.wanted}
        if wanted <= known:
            return
        with torch.no_grad():
            run = self.replay(learning=True)
        for draw in self.policy._hooked.draws:
            if draw.opaque:
                require_unchanged(draw, self.data, run.outputs)

    def _keep(self, entries: Mapping[str, Tensor]) -> None:
        self.data = shallow_copy(self.data)
        for slot, value in entries.items():
            if value.shape[: self.data.ndim] != self.data.batch_size:
                raise InputError(
                    f"a module draws {slot.split(':')[1]!r} for other rows ({tuple(value.shape)}) than those of the "
                    f"batch {tuple(self.data.batch_size)}, so it is not known what was drawn for each row: explain the "
                    "module that draws by itself"
                )
            self.data.set(slot, value)

    def part(self, rows: Tensor) -> Call:
        """The same call with the rows of a boolean mask only, as one batch dimension; captures stay behind."""
        inputs = {key: value[rows] for key, value in self.inputs.items()}
        part = Call(self.policy, self._forward, self.data[rows], inputs, start=self._start)
        part.in_step = self.in_step
        return part

    def given(self, inputs: Mapping[NestedKey, Tensor]) -> Call:
        """The same call with other values of some inputs; captures stay behind."""
        self.learn()  # the noise of a stored sample is that of the inputs for which it was drawn
        data = shallow_copy(self.data)
        for key, value in inputs.items():
            data.set(key, value)
        other = Call(self.policy, self._forward, data, {**self.inputs, **inputs}, start=self._start)
        other.in_step, other._learned = self.in_step, self._learned
        return other

    def copied(self) -> Call:
        """The same call on copies of its data, with the state and the noise that it had; captures stay behind."""
        inputs = {key: value.clone() for key, value in self.inputs.items()}
        other = Call(self.policy, self._forward, self.data.clone(), inputs, start=self.start)
        other.in_step, other.totals, other._learned = self.in_step, self.totals, self._learned
        return other

    @property
    def start(self) -> Start | None:
        """Where every pass over this call starts; none where a call is traced, which cannot look."""
        if self._start is None and not torch.compiler.is_compiling():
            self._start = Start(effects_of(self.policy), self.data.device)
        return self._start

    @property
    def slots(self) -> dict[str, Tensor | Several]:
        return self.policy._hooked.runtime.slots

    def as_it_was(self, inputs: Mapping[NestedKey, Tensor], stored: TensorDictBase | None) -> bool:
        """Whether a replay on these inputs computes what the call did."""
        if stored is not None:
            return False
        for key, value in inputs.items():
            if value is not self.inputs[key] and value.data_ptr() != self.inputs[key].data_ptr():
                return False
        return True

    def keep_last(self, outputs: TensorDictBase) -> None:
        """Keep what the policy puts out for the call as it is, which are the last rows of a pass over more."""
        rows, batch = self.batch_size.numel(), self.batch_size
        found = {key: get_entry(outputs, key) for key in self.policy.policy_out_keys}
        last = {key: value.detach()[-rows:] for key, value in found.items() if isinstance(value, Tensor)}
        if len(batch) != 1:
            last = {key: value.reshape((*batch, *value.shape[1:])) for key, value in last.items()}
        self.replayed = tensors_as_entries(last, batch)

    def captured(self, slot: str, site: str, offer: str = "") -> Tensor:
        """The output captured at a site, with the batch shape of the call first.

        Args:
            slot: what it was captured under.
            site: its name.
            offer: what may be done where it did not run, or on fewer rows, for the message.

        Raises:
            SiteError: if the module, or the run of it that is meant, did not run in this call.
        """
        value = self.slots.get(slot)
        if value is None:
            hint = ""
            if self.policy._hooked.traits.recurrent:
                hint = " (in recurrent mode the backend 'scan' reads trajectories without calling the recurrent core)"
            raise SiteError(
                f"the module {site!r} did not run in this call, so there is no activation to show; "
                f"name a module that the policy's forward executes{hint}{self.policy._hooked.runtime.unhooked}{offer}"
            )
        if isinstance(value, Several):
            return value.chosen(self.batch_size, site)
        require_rows(value, self.slots.get(runs_of(slot)), self.batch_size, site)  # type: ignore[arg-type]
        return with_batch(value, self.batch_size, site, offer)

    def replay(
        self,
        inputs: Mapping[NestedKey, Tensor] | None = None,
        stored: TensorDictBase | None = None,
        record: bool = False,
        as_it_was: bool = False,
        learning: bool = False,
        forward: Callable[..., Any] | None = None,
    ) -> Pass:
        """Run the policy again, with its interventions and the stored samples.

        Args:
            inputs: replacements of some of the policy's inputs, of the batch shape of ``stored``.
            stored: where the other inputs and the samples come from; the data of this call by default.
            record: let the capture hooks fill the slots of this call.
            as_it_was: nothing is replaced by other values, so the outputs may be compared with the stored ones.
            learning: keep what is found of what the data does not hold, see :meth:`learn`.
            forward: what runs in the place of the policy's own, such as a part of it.
        """
        if not self._learned:
            self.learn()
        runtime = self.policy._hooked.runtime
        inputs = inputs or {}
        own = stored is None
        stored = self.data if stored is None else stored
        entries = {**self.inputs, **inputs} if own else stored_inputs(self.policy, stored, inputs)
        if not torch.compiler.is_compiling() and effects_of(self.policy).watch.may_write_input:
            # A forward may work in place on what it is given: it is the caller's, and what is explained may be a leaf.
            entries = {key: value.clone() for key, value in entries.items()}
        data = tensors_as_entries(entries, stored.batch_size)
        replay = Replay(stored, self.in_step, learning)
        start = self.start
        previous = runtime.replay, runtime.recording, runtime.start
        runtime.replay, runtime.recording, runtime.start = replay, record, start
        try:
            with nullcontext() if start is None else start.passing():
                outputs = in_rows(run_root(self.policy, forward or self._forward, (data,), {}), data.batch_size)
        finally:
            runtime.replay, runtime.recording, runtime.start = previous
        if learning:
            self._keep(replay.learned)
        if as_it_was:
            self.replayed = outputs
        if replay.decided:
            outputs = outputs.copy()
            for key, value in replay.decided.items():
                outputs.set(key, value)
        policy = self.policy
        keys = policy.policy_out_keys
        return Pass(
            outputs, stored, replay.distributions, keys, replay.watched, policy._hooked.supports,
            policy._hooked.slots, policy._hooked.actions, runtime.warned, replay.runs,
        )  # fmt: skip


def effects_of(policy: HookedPolicy) -> ForwardEffects:
    """What is known of how a policy runs; a process, or a copy, learns it for itself."""
    runtime = policy._hooked.runtime
    if runtime.effects is None:
        runtime.effects = ForwardEffects(policy.hooked_root)
    return runtime.effects


def in_rows(output: Any, batch: torch.Size) -> Any:
    """What a policy has put out, by the rows that it was given: ``inplace=False`` makes a TensorDict without any.

    Example:
        >>> from tensordict import TensorDict
        >>> in_rows(TensorDict(x=torch.ones(4, 2)), torch.Size([4])).batch_size
        torch.Size([4])
    """
    if output.ndim >= len(batch):
        return output
    found = output.copy()
    try:
        found.batch_size = batch
    except RuntimeError:  # an entry that is of no row
        return output
    return found


def run_root(policy: HookedPolicy, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The policy's own forward, with its own keys and with the per-row keys lent to the hooks inside."""
    runtime = policy._hooked.runtime
    rows = None
    if runtime.row_hook is not None:
        rows = dict(runtime.rows) if runtime.depth else None  # a callback of the user's calls the policy on other data
    checks_sites = runtime.checks_sites()
    if checks_sites:
        runtime.fired = set()
    if not torch.compiler.is_compiling():
        runtime.caller = threading.get_ident()  # before the depth: other threads read both
    runtime.depth += 1
    forward = in_root_hooks(policy, undecorated(forward, args))
    previous = runtime.begin(args, kwargs, root=True)
    try:
        if runtime.row_hook is not None:
            runtime.row_hook.before(policy, args, kwargs)
        for one in policy._hooked.passes:
            one.run(policy, forward, runtime.source)
        if runtime.cores and not torch.compiler.is_compiling():
            with watching(runtime) as reads:
                output = forward(policy, *args, **kwargs)
                reads.hand_out(output, policy)
        else:
            output = forward(policy, *args, **kwargs)
        if checks_sites:
            runtime.require_fired()
        return output
    except RuntimeError as error:
        own = own_cause(error)
        if own is None:
            raise
        raise own from own.__cause__
    finally:
        runtime.end(previous)
        runtime.depth -= 1
        if not runtime.depth:
            runtime.rows.clear()
        elif rows is not None:
            runtime.rows.update(rows)

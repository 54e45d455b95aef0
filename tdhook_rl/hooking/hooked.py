"""The hooked module: the user's policy, seen from inside.

It is an instance of the policy's class over the policy's tensors (see :mod:`tdhook_rl.policies.tying`). Its forward
runs the policy's own forward and then publishes results beside the policy's outputs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, is_tensorclass
from torch import nn

from tdhook_rl.arguments.keys import is_tensordict
from tdhook_rl.batches.annotating_mixin import AnnotatingMixin
from tdhook_rl.batches.tensorclasses import call_on_fields
from tdhook_rl.calls.bound import BoundMethod, observers
from tdhook_rl.calls.chunks import in_deciding_rows
from tdhook_rl.calls.inputs import drawn_noise, for_samples, recorded, require_dense_inputs, rows_of_step, stored_inputs
from tdhook_rl.calls.passes import Call, effects_of, in_rows, run_root
from tdhook_rl.calls.preconditions import another_dtype_or_device, other_keys, require_data
from tdhook_rl.calls.repeatable import require_repeatable
from tdhook_rl.calls.shared_pass import chain_pass, graph_pass, sharing
from tdhook_rl.calls.untraced import traced_whole, uncompiled
from tdhook_rl.calls.writing import write_tensors, writes_by_default
from tdhook_rl.errors import InactiveError, InputError, MissingKeyError, TdhookError, TieError
from tdhook_rl.hooking.collisions import adapt_to_collector
from tdhook_rl.hooking.context import ContextView
from tdhook_rl.hooking.dist_methods import dist_methods
from tdhook_rl.internals.python_names import copied_as_pickled
from tdhook_rl.internals.tensordict_names import WRITE
from tdhook_rl.internals.torch_names import held_buffers, held_parameters, parse_to
from tdhook_rl.policies.tying import detach_graphs
from tdhook_rl.replaying.batching import GeneratorState, frozen_statistics
from tdhook_rl.replaying.start import Start
from tdhook_rl.replaying.traceable import require_compilable, require_traceable
from tdhook_rl.runs.direct import direct_methods, disabled_hooks
from tdhook_rl.runs.run import HookedModuleRun
from tdhook_rl.sites.classes import Swapped, own_code
from tdhook_rl.sites.controls import Controls
from tdhook_rl.sites.runtime import vmap_level


class HookedMixin(AnnotatingMixin, Swapped):
    """What a hooked policy can do beyond being the policy.

    Threads may call and annotate one hooked policy at once: they take turns. A single submodule of it is called without
    a turn, so that a thread which does so while another calls the policy puts its own activations into that call: call
    the submodules of the original there.

    Attributes:
        controls: the tensors that may be changed while the policy runs, also in workers.
        result_keys: the keys that the configured methods write, per step or by :meth:`annotate`.
    """

    _own_class = True

    @classmethod
    def _namespace(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Forward with the policy's signature, and what else a hooked policy has of its class."""

        @own_code
        @functools.wraps(base.forward)
        def forward(self: HookedMixin, *args: Any, **kwargs: Any) -> Any:
            return self._hooked_forward(base.forward, args, kwargs)

        # A policy that has a `get` or `set` of its own keeps it.
        direct = {name: method for name, method in direct_methods().items() if not hasattr(base, name)}
        writing = {WRITE: write_tensors} if writes_by_default(base) else {}
        own = {"_hooked_own_in_keys": _reader(base, "in_keys"), "_hooked_own_out_keys": _reader(base, "out_keys")}
        return {"forward": forward} | dist_methods(base) | direct | writing | own

    # ------------------------------------------------------------------ keys

    @property
    def out_keys(self) -> list[NestedKey]:
        own = self._hooked_own_out_keys()
        # While the policy's own forward runs it must see its own keys: it zips them with its outputs.
        return own if self._hooked.runtime.inside() else [*own, *self._step_keys()]

    @out_keys.setter
    def out_keys(self, value: list[NestedKey]) -> None:
        super(HookedMixin, type(self)).out_keys.fset(self, value)

    @property
    def in_keys(self) -> list[NestedKey]:
        return self._hooked_own_in_keys() if self._hooked.runtime.inside() else self._hooked_read_keys()

    @in_keys.setter
    def in_keys(self, value: list[NestedKey]) -> None:
        super(HookedMixin, type(self)).in_keys.fset(self, value)

    def _hooked_read_keys(self) -> list[NestedKey]:
        """What ``in_keys`` says outside of a call; a method, since ``torch.compile`` does not trace the property."""
        return [*self._hooked_own_in_keys(), *self._hooked.reads]

    @property
    def policy_in_keys(self) -> list[NestedKey]:
        """The policy's own input keys, without what interventions read and what it makes itself on the way."""
        own, made = self._hooked_own_in_keys(), self._hooked.made
        return [key for key in own if key not in made] if made else list(own)

    @property
    def policy_out_keys(self) -> list[NestedKey]:
        """The policy's own output keys, without results."""
        return list(self._hooked_own_out_keys())

    @property
    def result_keys(self) -> list[NestedKey]:
        """Every key that a configured method writes; ``("computed", root)`` masks and ``root.stamp`` included."""
        return self._with_masks(observers(self._hooked.bound))

    def _step_keys(self) -> list[NestedKey]:
        return self._with_masks(self._hooked.steps)

    def _with_masks(self, bound: list[BoundMethod]) -> list[NestedKey]:
        keys = [key for one in bound for key in one.result_keys]
        return [*keys, *self._hooked.provenance.mark_keys(keys)]

    # ------------------------------------------------------------------ running

    @property
    def controls(self) -> Controls:
        return self._hooked.runtime.controls

    @traced_whole
    def _hooked_forward(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if not torch.compiler.is_compiling():
            return uncompiled(self._hooked_untraced, forward, args, kwargs)
        self._hooked.runtime.require_active()
        require_compilable(self._hooked.trace_risks)
        output = self._hooked_call(forward, args, kwargs)
        self._close_routes(complete=True)
        return output

    def _hooked_untraced(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        runtime = self._hooked.runtime
        runtime.require_active()
        runtime.calls += 1
        if args and not is_tensordict(args[0]) and is_tensorclass(args[0]):
            return call_on_fields(self, args[0], args[1:], kwargs)
        tie = self._hooked.tie
        if tie is not None:
            tie.check(self)
        # A collector's thread and a postproc in the main thread may use one hooked policy at once.
        with runtime.lock, runtime.held:
            complete = False
            buffers = tie is not None and tie.holds_buffers()
            try:
                output = self._hooked_call(forward, args, kwargs)
                complete = True
                if tie is not None and buffers:
                    tie.hand_on_buffers()
            except Exception as error:
                self._explain(args, kwargs, error)
                raise
            finally:
                self._close_routes(complete)
            return output

    def _explain(self, args: tuple, kwargs: dict[str, Any], error: Exception) -> None:
        """Where the policy's own forward fails on what it was given, say so rather than what it says."""
        data = args[0] if args else kwargs.get("tensordict")
        found: Exception | None = None
        if isinstance(data, TensorDictBase):
            try:
                # A wrapped module is given None for an absent key, which is an error unless a method can do without.
                if self._hooked.wraps and not self._hooked.alone:
                    stored_inputs(self, data)
                if not isinstance(error, TdhookError):
                    found = another_dtype_or_device(self, data, error) or other_keys(self, error)
            except MissingKeyError as missing:
                found = None if isinstance(error, MissingKeyError) else missing
        elif isinstance(error, TdhookError):
            return
        elif args and not isinstance(data, torch.Tensor):
            try:
                require_data(data, f"a call of {type(self)._base.__name__}")
            except InputError as wrong:
                found = wrong
        if found is not None:
            raise found from error

    def _close_routes(self, complete: bool = False) -> None:
        if not self._hooked.runtime.depth:
            for route in self._hooked.routes:
                route.close(complete)

    def _hooked_call(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        runtime = self._hooked.runtime
        data = args[0] if args else kwargs.get("tensordict")
        steps = self._hooked.steps
        if runtime.depth or not steps or not is_tensordict(data):
            # Called with tensors, the policy answers with its own outputs, as before.
            return run_root(self, forward, args, kwargs)
        lacking = self._hooked.alone and any(data.get(key, None) is None for key in self._hooked_own_in_keys())
        if lacking and len(self._hooked.alone) == len(steps):
            try:
                with self._frozen_statistics():
                    found = self._compute(steps, Call(self, forward, data, {}, data))
                    self._hooked.provenance.publish(self, data, data, found)
            finally:
                runtime.slots.clear()
            return data
        require_dense_inputs(self, data)
        runtime.level = vmap_level()
        shares = self._hooked.shares and len(args) == 1 and not kwargs
        effects = None if torch.compiler.is_compiling() else effects_of(self)
        shared, layers = sharing(self, steps, data) if shares else ([], None)
        rest = [one for one in steps if one not in shared] if shared else steps
        replays = any(one.replays for one in rest)
        inputs = stored_inputs(self, data) if replays else {}
        start, given = None, inputs
        if replays and effects is None:
            require_traceable(self.modules(), self._hooked.trace_risks)
        if replays and effects is not None:
            start = runtime.start = Start(effects, data.device)
            if effects.watch.may_write_input:  # what it was given, also if it works on that in place
                inputs = {key: value.clone() for key, value in inputs.items()}
        results: dict[tuple[str, ...], torch.Tensor] = {}
        runtime.recording = True
        try:
            try:
                if layers is not None:
                    output = data
                    results = self._compute(shared, chain_pass(self, forward, data, layers))
                elif shared:
                    with graph_pass(self, forward, data, shared) as (output, call):
                        runtime.recording = False
                        results = self._compute(shared, call)
                else:
                    output = run_root(self, forward, args, kwargs)
            finally:
                runtime.recording, runtime.start = False, None
            if start is not None:
                start.forward_over(given, inputs)
            inputs |= drawn_noise(self, output) if replays and self._hooked.noise else {}
            inputs |= recorded(self, output) if replays and self._hooked.records else {}
            rows = in_rows(output, data.batch_size)
            if output.ndim > data.ndim:  # several samples of each row
                inputs, data = for_samples(inputs, data.batch_size, output), output
            seen = rows_of_step(self, rows, rest) if replays else rows
            call = Call(self, forward, seen, inputs, data, start).of_step(runtime.drawn if replays else {})
            if start is None:
                results |= self._compute(rest, call)
            else:
                # After the passes the stream of noise goes on as if there had been none.
                after = GeneratorState(start.device, start.others or any(one.asks_functions for one in rest))
                try:
                    require_repeatable(call)
                    results |= self._compute(rest, call)
                finally:
                    after.restore()
            self._hooked.provenance.publish(self, data, rows, results)
            if rows is not output:
                output.update(rows.select(*self._step_keys(), strict=False))
            return output
        finally:
            runtime.slots.clear()
            runtime.drawn.clear()

    def _frozen_statistics(self) -> AbstractContextManager[None]:
        return frozen_statistics(self) if self._hooked.traits.batch_statistics else nullcontext()

    @staticmethod
    def _compute(bound: list[BoundMethod], call: Call) -> dict[tuple[str, ...], torch.Tensor]:
        results: dict[tuple[str, ...], torch.Tensor] = {}
        call.sharers = [one for one in bound if one.shares_pass]
        for one in bound:
            results.update((one.compiled or one).compute(call))
        call.forget_passes()
        chunked = call.policy._hooked.chunks is not None
        return in_deciding_rows(call.policy, call.data, results) if chunked else results

    def register_collector(self, collector: Any) -> None:
        """Called by TorchRL's collectors when they take the policy in, in the process in which it will run.

        Raises:
            KeyCollisionError: if a result key is a key of the collector's environment.
            InputError: if the collector mixes devices where TorchRL cannot store the results.
        """
        own = getattr(super(), "register_collector", None)
        if own is not None:
            own(collector)
        adapt_to_collector(self, collector)

    def restore(self) -> None:
        """End the hooking; calling the policy afterwards raises. What leaving the ``with`` block does.

        Copies in the processes of this machine that were given the hooked policy raise from then on as well. Two kinds
        of copies do not see the end, and stay hooked until their collector is shut down: those on other machines or in
        Ray's actors, and those that a worker has compiled.
        """
        self._hooked.runtime.stop()
        self._say_if_nothing_was_annotated()

    @property
    def hooking_context(self) -> ContextView:
        """What this policy was prepared with, seen from the policy: the cache, and blocks without the hooks."""
        return ContextView(self)

    # ------------------------------------------------------------------ single modules

    @property
    def hooked_root(self) -> nn.Module:
        """The module that paths start from: the policy, or the plain module that was wrapped."""
        return self.module if self._hooked.wraps else self

    def run(self, data: TensorDictBase, *args: Any, **options: Any) -> HookedModuleRun:
        """One forward in which single modules are captured, overridden or stopped at.

        Args:
            data: the TensorDict the policy is called on.
            *args, **options: see :class:`tdhook_rl.runs.run.HookedModuleRun`.
        """
        self._hooked.runtime.require_active()
        return HookedModuleRun(self, data, *args, **options)

    def disable_context_hooks(self) -> AbstractContextManager[Any]:
        """A block in which the hooks of the context's methods neither act nor write."""
        return disabled_hooks(self)

    @contextmanager
    def disable_context(self) -> Iterator[nn.Module]:
        """A block that gives the user's own module.

        Raises:
            InactiveError: in a copy of the hooked policy, or when the user's module is gone.
        """
        original = None if self._hooked.tie is None else self._hooked.tie.original()
        if original is None:
            raise InactiveError("the user's module is not at hand here: this is a copy, or the module was deleted")
        yield original

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedMixin:
        """A copy also where the policy keeps what its last forward has computed, with the graph."""
        detach_graphs(self, memo)
        own = getattr(super(), "__deepcopy__", None)
        return copied_as_pickled(self, memo) if own is None else own(memo)

    # ------------------------------------------------------------------ what would untie the copy

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if assign and self._hooked.tie is not None:
            raise TieError(
                "load_state_dict(assign=True) would give the hooked policy tensors of its own: use assign=False"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, _ = parse_to(*args, **kwargs)
        tensors = [*held_parameters(self).values(), *held_buffers(self).values()]
        if all(
            (device is None or tensor.device == device)
            and (dtype is None or tensor.dtype == dtype or not tensor.is_floating_point())
            for tensor in tensors
        ):
            return self
        return super().to(*args, **kwargs)

    def share_memory(self) -> Any:
        for tensor in (*held_parameters(self).values(), *held_buffers(self).values()):
            tensor.share_memory_()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # requires_grad_ is not refused: TorchRL's value estimators switch it off and on again around a call.
        if self._hooked.tie is not None:
            raise TieError(
                "moving or casting a hooked policy would change or leave the tensors of the user's policy: "
                "do it on the policy before `prepare`"
            )
        return super()._apply(*args, **kwargs)


def _reader(base: type[nn.Module], name: str) -> Callable[[Any], list[NestedKey]]:
    """A method that reads a class's own keys; in place of ``super().in_keys``, which ``torch.compile`` cannot trace."""
    found = inspect.getattr_static(base, name)
    if isinstance(found, property):
        getter = found.fget
        return getter if isinstance(getter, FunctionType) else lambda self: getter(self)  # type: ignore[misc]
    return lambda self: found

"""The hooked module: the user's policy, seen from inside.

It is an instance of the policy's class over the policy's tensors (see :mod:`tdhook_rl.tying`). Its forward
runs the policy's own forward and then publishes results beside the policy's outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdhook_rl.batching import (
    GeneratorState,
    default_chunk_size,
    frozen_statistics,
    in_recurrent_mode,
    map_chunks,
    shallow,
)
from tdhook_rl.classes import Swapped
from tdhook_rl.controls import Controls
from tdhook_rl.direct import direct_methods, disabled_hooks
from tdhook_rl.errors import InactiveError, InputError, MissingKeyError, TdhookError, TieError
from tdhook_rl.hooks import Runtime, vmap_level
from tdhook_rl.passes import Bound, Call, action_keys, observers, publish, run_root, stored_inputs
from tdhook_rl.runs import HookedModuleRun

if TYPE_CHECKING:
    # What the mixin is mixed with: lets the checker see the methods that super() finds.
    class _Policy(Swapped, TensorDictModuleBase):
        pass
else:
    _Policy = Swapped

__all__ = ["HookedMixin"]


class HookedMixin(_Policy):
    """What a hooked policy can do beyond being the policy.

    Attributes:
        controls: the tensors that may be changed while the policy runs, also in workers.
        result_keys: the keys that the configured methods write, per step or by :meth:`annotate`.
    """

    _hooked_runtime: Runtime
    _hooked_bound: list[Bound]
    _hooked_steps: list[Bound]  # those that write at every forward
    _hooked_alone: list[Bound]  # those that can do without the policy's own inputs
    _hooked_reads: list[NestedKey]
    _hooked_wraps: bool  # the policy is a wrapper of ours around the user's plain module
    _hooked_routes: list[Any]  # what sites hand to each other during a call

    @classmethod
    def _namespace(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Forward with the policy's signature, and the dist methods that must refuse after the context."""

        @functools.wraps(base.forward)
        def forward(self: HookedMixin, *args: Any, **kwargs: Any) -> Any:
            return self._hooked_forward(base.forward, args, kwargs)

        guarded = {
            name: _guarded(getattr(base, name))
            for name in ("get_dist", "get_dist_params", "log_prob")
            if callable(getattr(base, name, None))
        }
        # A policy that has a `get` or `set` of its own keeps it.
        direct = {name: method for name, method in direct_methods().items() if not hasattr(base, name)}
        return {"forward": forward} | guarded | direct

    # ------------------------------------------------------------------ keys

    @property
    def out_keys(self) -> list[NestedKey]:
        own = super().out_keys
        # While the policy's own forward runs it must see its own keys: it zips them with its outputs.
        return own if self._hooked_runtime.depth else [*own, *self._step_keys()]

    @out_keys.setter
    def out_keys(self, value: list[NestedKey]) -> None:
        super(HookedMixin, type(self)).out_keys.fset(self, value)

    @property
    def in_keys(self) -> list[NestedKey]:
        own = super().in_keys
        return own if self._hooked_runtime.depth else [*own, *self._hooked_reads]

    @in_keys.setter
    def in_keys(self, value: list[NestedKey]) -> None:
        super(HookedMixin, type(self)).in_keys.fset(self, value)

    @property
    def policy_in_keys(self) -> list[NestedKey]:
        """The policy's own input keys, without what interventions read."""
        return list(super().in_keys)

    @property
    def policy_out_keys(self) -> list[NestedKey]:
        """The policy's own output keys, without results."""
        return list(super().out_keys)

    @property
    def result_keys(self) -> list[NestedKey]:
        """Every key that a configured method writes, the ``("computed", root)`` masks included."""
        return self._with_masks(observers(self._hooked_bound))

    def _step_keys(self) -> list[NestedKey]:
        return self._with_masks(self._hooked_steps)

    @staticmethod
    def _with_masks(bound: list[Bound]) -> list[NestedKey]:
        keys = [key for one in bound for key in one.result_keys]
        return [*keys, *dict.fromkeys(("computed", key[0]) for key in keys)]

    # ------------------------------------------------------------------ running

    @property
    def controls(self) -> Controls:
        return self._hooked_runtime.controls

    def _hooked_forward(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        runtime = self._hooked_runtime
        if not runtime.active:
            runtime.refuse()
        if torch.compiler.is_compiling():
            return self._hooked_call(forward, args, kwargs)
        if runtime.tie is not None:
            runtime.tie.check(self)
        # A collector's thread and a postproc in the main thread may use one hooked policy at once.
        with runtime.lock:
            complete = False
            try:
                output = self._hooked_call(forward, args, kwargs)
                complete = True
            except Exception as error:
                self._require_own_inputs(args, kwargs, error)
                raise
            finally:
                self._close_routes(complete)
            return output

    def _require_own_inputs(self, args: tuple, kwargs: dict[str, Any], error: Exception) -> None:
        """A wrapped module is given None for an absent key: where it fails, say so rather than what it says."""
        data = args[0] if args else kwargs.get("tensordict")
        if self._hooked_wraps and isinstance(data, TensorDictBase) and not isinstance(error, TdhookError):
            try:
                stored_inputs(self, data)
            except MissingKeyError as missing:
                raise missing from error

    def _close_routes(self, complete: bool = False) -> None:
        if not self._hooked_runtime.depth:
            for route in self._hooked_routes:
                route.close(complete)

    def _hooked_call(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        runtime = self._hooked_runtime
        data = args[0] if args else kwargs.get("tensordict")
        steps = self._hooked_steps
        if runtime.depth or not steps or not isinstance(data, TensorDictBase):
            # Called with tensors, the policy answers with its own outputs, as before.
            return run_root(self, forward, args, kwargs)
        lacking = any(data.get(key, None) is None for key in super().in_keys) if self._hooked_alone else False
        if lacking and len(self._hooked_alone) == len(steps):
            try:
                with frozen_statistics(self):
                    publish(data, self._compute(steps, Call(self, forward, data, {}, data)))
            finally:
                runtime.slots.clear()
            return data
        replays = any(one.replays for one in steps)
        inputs = stored_inputs(self, data) if replays else {}
        before = GeneratorState(data.device) if replays and not torch.compiler.is_compiling() else None
        runtime.level = vmap_level()
        runtime.recording = True
        try:
            try:
                output = run_root(self, forward, args, kwargs)
            finally:
                runtime.recording = False
            call = Call(self, forward, output, inputs, data)
            if before is None:
                publish(output, self._compute(steps, call))
            else:
                # Noise inside the policy repeats in the second pass; afterwards the stream goes on as if
                # there had been none.
                after = GeneratorState(data.device)
                before.restore()
                try:
                    with frozen_statistics(self):
                        publish(output, self._compute(steps, call))
                finally:
                    after.restore()
            return output
        finally:
            runtime.slots.clear()

    @staticmethod
    def _compute(bound: list[Bound], call: Call) -> dict[tuple[str, ...], torch.Tensor]:
        results: dict[tuple[str, ...], torch.Tensor] = {}
        for one in bound:
            results.update(one.compute(call))
        return results

    def annotate(self, data: TensorDictBase, *, chunk_size: int | None = None) -> TensorDict:
        """Compute what the data does not hold yet: every configured method, over a whole batch.

        The stored actions are the targets; nothing is sampled, and the generators stay as they are. The
        result can be a collector's ``postproc``.

        Args:
            data: a batch as collected or read from a buffer, of any batch shape; it is not modified and
                may be locked or memory-mapped.
            chunk_size: rows per pass; by default 64 for convolutional nets and the whole batch otherwise.

        Returns:
            a new TensorDict with the entries of ``data`` (the same tensors) and the results.

        Raises:
            MissingKeyError: if an input of the policy is absent.
            InputError: for an empty batch, or a recurrent policy in recurrent mode.
        """
        runtime = self._hooked_runtime
        if not runtime.active:
            runtime.refuse()
        result = shallow(data)
        missing = [one for one in observers(self._hooked_bound) if not _holds(data, one)]
        if not missing:
            return result
        if data.batch_size.numel() == 0:
            raise InputError(f"there is nothing to annotate: the batch has shape {tuple(data.batch_size)}")
        if in_recurrent_mode(self):
            raise InputError(
                "annotate() merges rows into chunks, which would mix trajectories in recurrent mode: "
                "leave set_recurrent_mode off, so that each row is explained at its stored hidden state"
            )
        if runtime.tie is not None:
            runtime.tie.check(self)
        forward = type(self)._base.forward
        keys = [*self.in_keys, *super().out_keys, *action_keys(self)]
        keys += [key for one in missing for key in getattr(one, "reads", ())]
        selected = data.select(*keys, strict=False)
        chunk_size = default_chunk_size(self) if chunk_size is None else chunk_size

        def analyse(bound: list[Bound], chunk: TensorDictBase) -> TensorDict:
            call = Call(self, forward, chunk, stored_inputs(self, chunk))
            runtime.level = vmap_level()
            try:
                if any(one.reads_forward for one in bound):
                    with torch.no_grad():
                        call.replay(record=True)
                computed = TensorDict({}, batch_size=chunk.batch_size)
                publish(computed, self._compute(bound, call))
                return computed
            finally:
                runtime.slots.clear()
                self._close_routes()

        with runtime.lock, frozen_statistics(self):
            before = GeneratorState(data.device)
            # A mean over the batch cannot be taken chunk by chunk.
            whole = [one for one in missing if getattr(one, "whole_batch", False)]
            by_row = [one for one in missing if one not in whole]
            try:
                parts = [
                    map_chunks(selected, functools.partial(analyse, group), size)
                    for group, size in ((whole, None), (by_row, chunk_size))
                    if group
                ]
            finally:
                before.restore()
            results = parts[0].update(parts[-1])
        for root, group in results.items():
            # A node of the caller's is copied before results join it.
            node = data.get(root, None)
            result.set(root, group if node is None else node.copy().update(group))
        return result

    def restore(self) -> None:
        """End the hooking; calling the policy afterwards raises. What leaving the ``with`` block does."""
        self._hooked_runtime.active = False

    # ------------------------------------------------------------------ single modules

    @property
    def hooked_root(self) -> nn.Module:
        """The module that paths start from: the policy, or the plain module that was wrapped."""
        return self.module if self._hooked_wraps else self

    def run(self, data: TensorDictBase, *args: Any, **options: Any) -> HookedModuleRun:
        """One forward in which single modules are captured, overridden or stopped at.

        Args:
            data: the TensorDict the policy is called on.
            *args, **options: see :class:`tdhook_rl.runs.HookedModuleRun`.
        """
        if not self._hooked_runtime.active:
            self._hooked_runtime.refuse()
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
        original = None if self._hooked_runtime.tie is None else self._hooked_runtime.tie.original()
        if original is None:
            raise InactiveError("the user's module is not at hand here: this is a copy, or the module was deleted")
        yield original

    # ------------------------------------------------------------------ what would untie the copy

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if assign and self._hooked_runtime.tie is not None:
            raise TieError(
                "load_state_dict(assign=True) would give the hooked policy tensors of its own: use assign=False"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*self.parameters(), *self.buffers()]
        if all(
            (device is None or tensor.device == device)
            and (dtype is None or tensor.dtype == dtype or not tensor.is_floating_point())
            for tensor in tensors
        ):
            return self
        return super().to(*args, **kwargs)

    def share_memory(self) -> Any:
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.share_memory_()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # requires_grad_ is not refused: TorchRL's value estimators switch it off and on again around a call.
        if self._hooked_runtime.tie is not None:
            raise TieError(
                "moving or casting a hooked policy would change or leave the tensors of the user's policy: "
                "do it on the policy before `prepare`"
            )
        return super()._apply(*args, **kwargs)


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(self: HookedMixin, *args: Any, **kwargs: Any) -> Any:
        if not self._hooked_runtime.active:
            self._hooked_runtime.refuse()
        try:
            return method(self, *args, **kwargs)
        finally:
            self._close_routes()

    return guarded


def _holds(data: TensorDictBase, bound: Bound) -> bool:
    names = set(data.keys(include_nested=True, leaves_only=True))
    for key in bound.result_keys:
        if key not in names:
            return False
        mask = data.get(("computed", key[0]), None)
        if mask is not None and not bool(mask.all()):
            return False
    return True

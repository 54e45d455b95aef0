"""Passes of a method as one compiled graph, where the user asks for it.

What is compiled is a function of the tensors that the passes read; whose results these are, and which rows have one, is
found outside as ever. What cannot be compiled is computed without, which is said once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import get_entry
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.inputs import stored_inputs
from tdhook_rl.calls.passes import Call, effects_of
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.writing import tensors_as_entries
from tdhook_rl.errors import warn
from tdhook_rl.internals.dynamo_names import is_of_library_code
from tdhook_rl.internals.torch_names import saved_tensors_hooks_on, turn_saved_tensors_hooks_on
from tdhook_rl.policies.draws import action_keys, draws, sample_keys
from tdhook_rl.replaying.traceable import require_traceable
from tdhook_rl.sites.classes import own_code
from tdhook_rl.sites.runtime import vmap_level

Results = dict[tuple[str, ...], Tensor]

#: A first call on rows of a new shape that takes so many seconds has compiled, and says so.
SAID = 0.5


class Compiled:
    """The passes of one bound method, compiled when they are first needed; copies compile for themselves.

    Attributes:
        seconds: what compiling has taken.
    """

    def __init__(self, method: BoundMethod, name: str, options: Mapping[str, Any]) -> None:
        self._method, self._name, self._options = method, name, dict(options)
        self._forget()

    def _forget(self) -> None:
        self.seconds = 0.0
        self._function: Callable[..., Any] | None = None
        self._failed = False
        self._said: set[str] = set()
        self._samples: list[NestedKey] | None = None  # what the policy draws
        self._shapes: set[tuple[Any, ...]] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_method", "_name", "_options")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def compute(self, call: Call) -> Mapping[tuple[str, ...], Tensor]:
        """The results of one call, by the compiled graph where there can be one."""
        if self._failed or torch.compiler.is_compiling():
            return self._method.compute(call)
        why = _needs_no_graph(call)
        if why is not None:
            if why not in self._said:
                self._said.add(why)
                warn(f"{self._name}(compile=...) is set aside {why}. The numbers are the same")
            return self._method.compute(call)
        hooks_on = saved_tensors_hooks_on()
        try:
            return self._run(call)
        except Exception as error:  # of the compiler, of the backend, or of what it has traced
            if hooks_on:
                turn_saved_tensors_hooks_on()
            results = self._method.compute(call)  # what is wrong with the data is said here
            self._failed = True
            reason = " ".join(str(error).split("\n\n")[0].split())
            warn(
                f"{self._name}(compile=...) goes on uncompiled: {type(error).__name__}: {reason[:300]}. The numbers "
                "are the same; leave compile= out, or change what cannot be traced"
            )
            return results

    def _run(self, call: Call) -> Results:
        policy = call.policy
        require_traceable(effects_of(policy).unsteady, policy._hooked.trace_risks)
        if self._function is None:
            self._function = torch.compile(_traced(policy, self._method, call), fullgraph=True, **self._asked())
        read = self._read(call)
        shape = tuple((key, value.shape, value.dtype) for key, value in read.items())
        data = tensors_as_entries(read, call.batch_size)
        is_new = shape not in self._shapes
        started = time.perf_counter()
        with torch.no_grad():
            results, outputs = self._function(data)
        if is_new:
            self._shapes.add(shape)
            self._say(time.perf_counter() - started)
        if outputs and not call.in_step:
            call.replayed = tensors_as_entries(outputs, call.batch_size)
        return results

    def _asked(self) -> dict[str, Any]:
        """The arguments of ``torch.compile``, which takes no options beside a mode.

        A sixth of what a call of a graph asks is left out: what names in modules of torch's and ours mean.
        """
        if "mode" in self._options:
            return self._options
        options = {"guard_filter_fn": _kept_guards, **(self._options.get("options") or {})}
        return {**self._options, "options": options}

    def _say(self, seconds: float) -> None:
        if seconds < SAID:
            return
        import torchrl

        self.seconds += seconds
        torchrl.logger.info(f"{self._name}(compile=...): compiling for rows of this shape took {seconds:.1f} s")

    def _read(self, call: Call) -> dict[NestedKey, Tensor]:
        """What the passes read of the call: all, where a function of the user's may."""
        policy = call.policy
        keys: list[NestedKey] = [*policy._hooked_read_keys(), *self._method.reads, *action_keys(policy.policy_out_keys)]
        if self._samples is None:  # to list modules takes as long as a small pass
            self._samples = [key for child in policy.modules() if draws(child) for key in sample_keys(child)]
        keys += self._samples
        if getattr(self._method, "reads_inputs", True):
            keys += [key for key in call.data.keys(True, True) if key not in keys]
        entries = {key: get_entry(call.data, key) for key in dict.fromkeys(keys)}
        return {key: value for key, value in entries.items() if isinstance(value, Tensor)} | call.inputs


def _kept_guards(guards: Sequence[Any]) -> list[bool]:
    """Which guards of a graph are kept."""
    return [not is_of_library_code(guard) for guard in guards]


def _needs_no_graph(call: Call) -> str | None:
    """Why there is no pass of a call that would be compiled, or that could be."""
    if call.chain is not None:
        return (
            "where the policy is a chain of known layers: its own forward is explained, so there is no pass to compile"
        )
    if call.shared is not None:
        return "where gradients are on: the policy's own forward is explained, so there is no pass to compile"
    if torch.is_inference_mode_enabled():
        return "in inference mode, where no graph is compiled: torch.no_grad() takes its place"
    return "inside vmap, where no graph is compiled" if vmap_level() >= 0 else None


def _traced(policy: HookedPolicy, method: BoundMethod, call: Call) -> Callable[[TensorDictBase], Any]:
    """The passes as a function of what they read: results, and the outputs of the policy that they have met."""
    forward, in_step = call._forward, call.in_step

    @own_code
    def passes(data: TensorDictBase) -> tuple[Results, dict[NestedKey, Tensor]]:
        traced = Call(policy, forward, data, stored_inputs(policy, data), data)
        traced.in_step = in_step
        results = dict(method.compute(traced))
        return results, traced.traced_outputs

    return passes

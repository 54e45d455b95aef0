"""A policy and an environment, step by step, with a record of what each of them wrote when."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor, nn

from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.doctor.dry_run import Deadline, device_of
from tdhook_rl.sites.row_values import RowHook
from tdhook_rl.sites.runtime import vmap_level

#: Steps that are made at most to see a schedule select a row.
MOST_STEPS = 512

Key = tuple[str, ...]


@dataclass
class RecordedRollout:
    """What was seen in a rollout by hand; it is filled while :meth:`run` goes on, so that an error leaves a part.

    Attributes:
        missing: inputs of the policy that the environment does not give.
        data: for the first steps, what a collector would store (detached).
        env_keys: by step, the keys that the environment gave (``("next", ...)`` included).
        written: by step, the keys that the policy wrote.
        in_place: entries of the environment that the policy changed, with the first step.
        selected: for each root of results, how many rows were computed.
        steps: how many were made.
    """

    policy: Any
    env: Any
    missing: list[Key] = field(default_factory=list)
    data: list[TensorDictBase] = field(default_factory=list)
    env_keys: list[set[Key]] = field(default_factory=list)
    written: list[set[Key]] = field(default_factory=list)
    in_place: dict[Key, int] = field(default_factory=dict)
    selected: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    sites: SiteRuns | None = None

    def reset(self, deadline: Deadline) -> TensorDictBase:
        """The first TensorDict; notes what the policy reads and the environment does not give."""
        deadline.waiting_for = "the reset of the environment"
        # Primers get the shape of a batched environment when its specs are first read, as collectors do.
        _ = self.env.full_observation_spec
        data = self.env.reset()
        self.missing = [as_tuple(key) for key in self.policy.in_keys if data.get(key, None) is None]
        return data

    def run(self, data: TensorDictBase, deadline: Deadline, steps: int, longer: int) -> None:
        """Make ``steps`` steps, or up to ``longer`` until every schedule has selected a row."""
        self.sites = SiteRuns(self.policy)
        for step in range(max(steps, min(longer, MOST_STEPS))):
            if step >= steps and (all(self.selected.values()) or deadline.left < deadline.seconds / 2):
                break
            deadline.waiting_for = f"the policy at step {step}"
            reads = {as_tuple(key) for key in self.policy.in_keys}
            # Without what the policy wrote at the step before: what is there afterwards was written now.
            given = data.exclude(*(key for written in self.written for key in written - reads))
            env_device = next((value.device for _, value in leaves(given)), None)
            given = self.moved(given)
            before = {key: (value, value._version) for key, value in leaves(given)}
            self.sites.counting = step == 0
            output = self.policy(given)
            self.sites.counting = False
            self._note_written(step, output, before)
            output = output if output is given else given.update(output)
            deadline.waiting_for = f"the environment at step {step}"
            stepped, data = self.env.step_and_maybe_reset(
                output if env_device in (None, device_of(self.policy)) else output.to(env_device)
            )
            self.env_keys.append({key for key, _ in leaves(stepped)} - self.written[-1])
            if step < steps:
                self.data.append(stepped.detach().clone())
            self.steps = step + 1

    def _note_written(self, step: int, output: TensorDictBase, before: dict[Key, tuple[Tensor, int]]) -> None:
        declared = {as_tuple(key) for key in self.policy.out_keys}
        written = set()
        for key, value in leaves(output):
            if key in declared or key not in before:
                written.add(key)
                continue
            known, version = before[key]
            if value._version != version if value is known else not torch.equal(value, known):
                self.in_place.setdefault(key, step)
        self.written.append(written)
        for key in written:
            if key[0] == "computed" and len(key) == 2 and not is_stamp(key):
                self.selected[key[1]] = self.selected.get(key[1], 0) + int(output.get(key).sum())

    @property
    def results(self) -> list[Key]:
        """The result keys that are declared for every step, masks included and stamps left out."""
        own = {as_tuple(key) for key in self.policy.policy_out_keys}
        return [key for key in map(as_tuple, self.policy.out_keys) if key not in own and not is_stamp(key)]

    def values(self, key: Key) -> list[Tensor | None]:
        """An entry of the stored steps, ``None`` where it is absent."""
        return [data.get(key, None) for data in self.data]

    def moved(self, data: TensorDictBase) -> TensorDictBase:
        """The data where the policy is."""
        device = device_of(self.policy)
        return data if device is None or all(value.device == device for _, value in leaves(data)) else data.to(device)

    def given(self) -> TensorDictBase:
        """The first stored step, as the policy was given it."""
        own = {as_tuple(key) for key in self.policy.in_keys}
        return self.moved(self.data[0].exclude(*(key for key in self.policy.out_keys if as_tuple(key) not in own)))

    def batch(self) -> TensorDictBase:
        """What the policy read and wrote in the stored steps, with time as the last batch dimension."""
        wanted = {as_tuple(key) for key in (*self.policy.in_keys, *self.policy.out_keys)}
        everywhere = set.intersection(*({key for key, _ in leaves(data)} for data in self.data))
        return self.moved(torch.stack([data.select(*(wanted & everywhere)) for data in self.data], -1))


class SiteRuns:
    """Counts how often each hooked module runs, while ``counting``.

    Attributes:
        runs: the number of runs, by module path.
        under_vmap: the paths of modules that ran inside a ``vmap``.
    """

    def __init__(self, policy: Any) -> None:
        self.counting = False
        self.runs: dict[str, int] = {}
        self.under_vmap: set[str] = set()
        self._runtime = policy._hooked.runtime
        names = {id(module): path for path, module in policy.named_modules()}
        names |= {id(module): path for path, module in policy.hooked_root.named_modules()}
        for module in policy.modules():
            if any(is_ours(hook) and not isinstance(hook, RowHook) for hook in hooks_of(module)):
                path = names[id(module)]
                self.runs[path] = 0
                module.register_forward_hook(functools.partial(self._count, path))

    def _count(self, path: str, module: nn.Module, args: tuple, output: Any) -> None:
        # Passes that methods make for themselves do not count.
        if self.counting and self._runtime.replay is None:
            self.runs[path] += 1
            if vmap_level() >= 0:
                self.under_vmap.add(path)


def hooks_of(module: nn.Module) -> list[Any]:
    """The forward and backward hooks of a module; of a bound method, the object it belongs to."""
    tables = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [getattr(hook, "__self__", hook) for table in tables for hook in table.values()]


def is_ours(hook: Any) -> bool:
    """Whether a hook was placed by a method of this library."""
    return type(hook).__module__.startswith("tdhook_rl.")


def leaves(data: TensorDictBase) -> Iterator[tuple[Key, Any]]:
    """The entries of a TensorDict that are tensors, by tuple keys."""
    for key, value in data.items(include_nested=True, leaves_only=True):
        if isinstance(value, Tensor):
            yield as_tuple(key), value


def as_tuple(key: NestedKey) -> Key:
    """A key as a tuple of its parts."""
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else key

"""Key collisions: of results, the policy's own keys, those that ``prepare`` names, and a collector's.

Collectors tell a policy that they will run it (``register_collector``), in the process in which it will run. There the
environment is known, and there results can be put where the policy is not called: in random frames.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key_list
from torch import Tensor, nn

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.passes import effects_of
from tdhook_rl.calls.writing import set_entries
from tdhook_rl.errors import InputError, KeyCollisionError, nearest
from tdhook_rl.internals.torchrl_names import carrier_of, copies_into_buffers, draws_random_frames
from tdhook_rl.replaying.batching import GeneratorState

#: Roots that are not the methods': ``step_mdp`` reads "next", collectors write "collector", masks are "computed".
RESERVED = ("next", "collector", "computed")


def listed_keys(what: str, given: Any) -> Any:
    """Keys of ``prepare`` as a list; one string is one key, and a mapping stays one.

    Raises:
        InputError: for what is no list of TensorDict keys, or an empty one.
    """
    if given is None:
        return None
    given = [given] if isinstance(given, str) else given
    keys = given.values() if isinstance(given, Mapping) and what == "in_keys" else given
    if isinstance(keys, (Tensor, nn.Module, type, bytes, Mapping)) or not isinstance(keys, Iterable):
        keys = []
    keys = list(keys)
    if not keys or not all(isinstance(key, NestedKey) and len(key) for key in keys):
        raise InputError(
            f"prepare({what}=...) takes a list of TensorDict keys, strings or tuples of them, got {given!r:.80}"
        )
    return dict(given) if isinstance(given, Mapping) else keys


def check_known(what: str, asked: Sequence[NestedKey] | None, known: Sequence[NestedKey]) -> None:
    """Refuse keys of ``prepare`` that the module does not have."""
    for key in unravel_key_list(list(asked)) if asked is not None else []:
        if key not in known:
            raise KeyCollisionError(
                f"prepare({what}=...) names {key!r}, which is not among the module's {what}; {nearest(key, known)}"
            )


def check_collisions(policy: TensorDictModuleBase, bound: list[BoundMethod], reads: list[NestedKey]) -> None:
    """Refuse result keys that meet each other or the policy's own, and masks that would speak for two methods."""
    own = {key_parts(key) for key in (*policy.in_keys, *policy.out_keys, *reads)}
    masks = {("computed", key[0]) for one in bound for key in one.result_keys}
    if masks and (clash := next((key for key in own if key[0] == "computed"), None)) is not None:
        raise KeyCollisionError(
            f"the policy's key {clash!r} is under 'computed', which holds the masks of results ({min(masks)!r}): give "
            "the policy's entry another name"
        )
    seen: dict[tuple[str, ...], BoundMethod] = {}
    nodes: set[tuple[str, ...]] = set()  # what lies above the keys seen: a tensor cannot be there
    for one in bound:
        for key in one.result_keys:
            clash = next((other for other in own if collides(key, other)), None)
            if clash is not None:
                raise KeyCollisionError(
                    f"the result key {key!r} collides with the policy's key {clash!r}: give the method another root "
                    "(attribution_key=, cache_key=, probe_key=)"
                )
            above = {key[:length] for length in range(1, len(key))}
            if key in seen or key in nodes or above & set(seen):
                raise KeyCollisionError(
                    f"two methods write {key!r}, or one writes a tensor where the other needs a node: give one "
                    "another root (attribution_key=, cache_key=, probe_key=), or an intervention another name="
                )
            if key[0] in RESERVED:
                raise KeyCollisionError(
                    f"the result key {key!r} starts with {key[0]!r}, which holds entries of TorchRL or the masks of "
                    "results: give the method another root (attribution_key=, cache_key=, probe_key=)"
                )
            if not all(key):
                raise KeyCollisionError(f"the result key {key!r} has an empty part: give every root and name letters")
            if any(part.startswith("_") for part in key):
                raise KeyCollisionError(f"the result key {key!r} starts with an underscore, which collectors drop")
            seen[key] = one
            nodes |= above
    for one in bound:
        if one.exclusive:
            roots = {key[0] for key in one.result_keys}
            shared = next((key for key, other in seen.items() if other is not one and key[0] in roots), None)
            if shared is not None:
                raise KeyCollisionError(
                    f"a scheduled method writes under {shared[0]!r} and so does another, but one mask "
                    f"('computed', {shared[0]!r}) cannot speak for both: give it another root (attribution_key=, ...)"
                )


def adapt_to_collector(policy: Any, collector: Any) -> None:
    """What :meth:`tdhook_rl.hooking.hooked.HookedMixin.register_collector` does."""
    env = getattr(collector, "env", None)
    if env is not None:
        _refuse_environment_keys(policy, env)
    if hasattr(collector, "pre_collect_hook"):
        collector.pre_collect_hook = RandomFrames(collector, collector.pre_collect_hook)


def collides(key: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two keys cannot be in one TensorDict: they are the same, or one is inside the other."""
    return other == key[: len(other)] or key == other[: len(key)]


class RandomFrames:
    """A collector's ``pre_collect_hook``: where random actions are taken, results are there but not computed.

    While ``init_random_frames`` last, the policy is not called. A collector with buffers then leaves zeros; one without
    (``use_buffers=False``, or a replay buffer) leaves the keys out, upon which storages drop them for the whole run or
    keep whatever their memory held. Zeros are put on the first step instead, and travel to the next ones.
    """

    def __init__(self, collector: Any, previous: Callable[[], None] | None) -> None:
        self._collector = weakref.ref(collector)
        self._previous = previous

    def __call__(self) -> None:
        if self._previous is not None:
            self._previous()
        collector = self._collector()
        if collector is not None:  # its weights may be shared with a process that has changed them
            collector.policy._hooked.provenance.forget()
        if collector is None or copies_into_buffers(collector) or not draws_random_frames(collector):
            return
        carrier = carrier_of(collector)
        policy = collector.policy
        if any(carrier.get(key, None) is None for key in policy._step_keys()):
            carrier.update(_blank(policy, carrier.to(collector.policy_device or carrier.device)))


def _blank(policy: Any, data: TensorDict) -> TensorDict:
    """Results in the form in which the policy writes them, all zero, and masks that say so."""
    effects = effects_of(policy)
    before = GeneratorState(data.device or effects.device, others=not effects.watch.idle)
    try:
        with policy._hooked.runtime.lock, torch.no_grad(), effects.watch.scratch():
            written = policy(data.clone())
    finally:
        before.restore()
    blank = TensorDict({}, batch_size=data.batch_size)
    set_entries(blank, {key_parts(key): torch.zeros_like(written.get(key)) for key in policy._step_keys()})
    return blank


def _refuse_environment_keys(policy: Any, env: Any) -> None:
    """Raise if a result would overwrite an entry of the environment at every step."""
    taken = _environment_keys(env)
    for key in policy.result_keys:
        clash = next((other for other in taken if collides(key_parts(key), other)), None)
        if clash is not None:
            raise KeyCollisionError(
                f"the result key {key!r} collides with the environment's key {clash!r}, which it would overwrite: give "
                "the method another root (attribution_key=, cache_key=, probe_key=)"
            )


def _environment_keys(env: Any) -> set[tuple[str, ...]]:
    specs = ("full_observation_spec", "full_reward_spec", "full_done_spec", "full_state_spec", "full_action_spec")
    keys: list[NestedKey] = []
    for name in specs:
        spec = getattr(env, name, None)
        if spec is not None:
            keys += spec.keys(True, True)
    return {key_parts(key) for key in unravel_key_list(keys)}

"""Key collisions: of the policy's outputs, the results, and the keys that a call of ``prepare`` names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key_list
from torch import Tensor, nn

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.errors import InputError, KeyCollisionError, nearest
from tdhook_rl.hooking.collection import collides

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
                f"prepare({what}=...) names {key!r}, which is not among the module's {what}; "
                f"{nearest(str(key), map(str, known))}"
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
                    "another root (attribution_key=, cache_key=, probe_key=)"
                )
            if key[0] in RESERVED:
                raise KeyCollisionError(
                    f"the result key {key!r} starts with {key[0]!r}, which holds entries of TorchRL or the masks of "
                    "results: give the method another root (attribution_key=, cache_key=, probe_key=)"
                )
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

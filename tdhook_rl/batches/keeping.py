"""Which results go on with a batch, into a replay buffer say: chosen once, the same keys in every batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import NestedKey, TensorDictBase

from tdhook_rl.arguments.checked import fits
from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.errors import ArgumentError, InputError, nearest

__all__ = ["Keep", "kept_keys", "only_kept"]

#: Results by key, or all under a root such as ``"attr"``; ``None`` for all there are.
Keep = str | Sequence[NestedKey] | None
Key = tuple[str, ...]


def kept_keys(policy: Any, keep: Keep) -> list[Key]:
    """The results that are chosen, and what says which of their rows were computed.

    Args:
        policy: the hooked policy.
        keep: their keys; one that begins several names all of these.

    Raises:
        ArgumentError: for what is no list of keys.
        InputError: for a key that is none of the policy's results.
    """
    results = [key_parts(key) for key in policy.result_keys]
    if keep is None:
        return results
    if not fits(keep, Sequence[NestedKey] | str):  # type: ignore[arg-type]
        raise ArgumentError(f"keep= is a list of keys of results, or one key; got {keep!r:.80} ({type(keep).__name__})")
    values = [key for key in results if key[0] != "computed"]
    chosen: set[Key] = set()
    for one in [keep] if isinstance(keep, str) else keep:
        parts = key_parts(one)
        under = {key for key in values if key[: len(parts)] == parts}
        if not under:
            known = [*dict.fromkeys(key[0] for key in values), *map(str, values)]
            raise InputError(
                f"keep= names {one!r}, which is no result of this policy; {nearest(str(one), known)}. A root keeps all "
                "under it, and no key at all keeps none"
            )
        chosen |= under
    roots = {key[0] for key in chosen}
    return [key for key in results if key in chosen or (key[0] == "computed" and _root_of_mark(key) in roots)]


def only_kept(policy: Any, data: TensorDictBase, keep: Keep) -> TensorDictBase:
    """The batch without the results that are not kept; it is not modified."""
    if keep is None:
        return data
    kept = set(kept_keys(policy, keep))
    left_out = [key for key in map(key_parts, policy.result_keys) if key not in kept]
    if not left_out:
        return data
    result = data.exclude(*left_out)
    empty = [root for root in {key[0] for key in left_out} if _is_empty(result.get(root, None))]
    return result.exclude(*empty) if empty else result


def _is_empty(node: Any) -> bool:
    return isinstance(node, TensorDictBase) and node.is_empty()


def _root_of_mark(key: Key) -> str:
    return key[1].removesuffix(".stamp")

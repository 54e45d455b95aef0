"""What passes over the rows of a batch read of it, and what a forward has left beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tensordict import NestedKey, PersistentTensorDict, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import get_entry, missing
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.chunks import all_decide
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.real_rows import PADDING
from tdhook_rl.calls.writing import tensors_as_entries
from tdhook_rl.errors import InputError, MissingKeyError
from tdhook_rl.internals.tensordict_names import has_names, new_unsafe, store_of
from tdhook_rl.policies.draws import action_keys, given_beside
from tdhook_rl.policies.memory import is_dense


def require_inputs(policy: HookedPolicy, data: TensorDictBase) -> None:
    """Raise :class:`MissingKeyError` if the data lacks what :func:`stored_inputs` takes, and name what is near it."""
    state = policy._hooked
    for key in policy._hooked_read_keys():
        absent = get_entry(data, key) is None
        if absent and not any(key in known for known in (state.made, state.overwrites, state.optional)):
            raise _lacking(policy, data, key)


def _is_ragged(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_dense(value)


def require_dense_inputs(policy: HookedPolicy, data: TensorDictBase) -> None:
    """Refuse inputs whose rows are not of one shape, or hold no numbers by place: there would be no result for each.

    Raises:
        InputError: that names one.
    """
    for key in policy.policy_in_keys:
        value = get_entry(data, key)
        if _is_ragged(value):
            nested = value.is_nested or value.layout is torch.jagged
            raise InputError(
                f"the policy reads {key!r}, which is a {'nested' if nested else 'sparse'} tensor ({value.layout}): a "
                "result has one shape for all rows. "
                + (
                    "Pad it (torch.nested.to_padded_tensor) beside a mask, or give the rows one by one"
                    if nested
                    else "Give it as .to_dense()"
                )
            )


def _lacking(policy: HookedPolicy, data: TensorDictBase, key: NestedKey) -> MissingKeyError:
    hint = ". Name the module's inputs with prepare(module, in_keys=[...], out_keys=[...])"
    return missing(data, key, "the policy reads", hint if policy._hooked.wraps else "")


def require_as_seen(policy: HookedPolicy, data: TensorDictBase, remedy: str, *, states: bool = False) -> None:
    """Refuse a batch in which inputs stand as the policy has written over them: they are of the step after.

    Args:
        policy: the hooked policy.
        data: the batch.
        remedy: what to do.
        states: it may never have been through the policy, which is seen from what this writes besides.

    Raises:
        InputError: for such a batch.
    """
    state = policy._hooked
    lost = [key for key in state.overwrites if key not in state.noise]
    if not lost:
        return
    written = [key for key in policy.policy_out_keys if key not in policy.policy_in_keys]
    if states and not any(get_entry(data, key) is not None for key in written):
        return
    names = ", ".join(map(repr, lost))
    raise InputError(
        f"{type(policy)._base.__name__} writes over its own inputs {names}, so a batch no longer holds what the policy "
        f"saw: {remedy}"
    )


def stored_inputs(
    policy: HookedPolicy, data: TensorDictBase, given: Mapping[NestedKey, Tensor] | None = None
) -> dict[NestedKey, Tensor]:
    """The entries that the policy reads, of which some may be given.

    What the policy writes over, such as a hidden state or a mask that it draws, it may do without; and what
    only modules read that a sequence with ``partial_tolerant`` leaves out.

    Raises:
        MissingKeyError: if the data lacks another one.
    """
    inputs = {}
    made = policy._hooked.made
    for key in policy._hooked_read_keys():
        value = given[key] if given and key in given else get_entry(data, key)
        if key in made:
            inputs.update(given_beside(policy.policy_out_keys, key, value))
            continue
        if isinstance(value, TensorDictBase):
            value = value.copy()  # the policy may write into it
        if value is None and (key in policy._hooked.overwrites or key in policy._hooked.optional):
            continue
        if value is None:
            raise _lacking(policy, data, key)
        inputs[key] = value if policy._hooked.chunks is None else all_decide(policy, key, value)
    for record in policy._hooked.records:  # of an earlier call, unless the data was collected: see `recorded`
        value = given[record.key] if given and record.key in given else get_entry(data, record.key)
        if value is not None:
            inputs[record.key] = value
    return inputs


def state_keys(policy: HookedPolicy, *states: TensorDictBase) -> list[NestedKey]:
    """What the policy reads of states: without what it can do without, where none of them holds it."""
    spare = policy._hooked.optional
    return [
        key
        for key in policy.policy_in_keys
        if key not in spare or any(get_entry(one, key) is not None for one in states)
    ]


def keys_read(policy: HookedPolicy, methods: Iterable[BoundMethod]) -> list[NestedKey]:
    """The entries of the data that passes over it read, for these methods."""
    out_keys = policy.policy_out_keys
    keys: list[NestedKey] = [*policy.in_keys, *out_keys, *action_keys(out_keys), *PADDING]
    for one in methods:
        keys += one.reads
    return keys


def rows_of_step(policy: HookedPolicy, output: TensorDictBase, methods: Iterable[BoundMethod]) -> TensorDictBase:
    """The data of a step, for the passes over it: a TensorDict, whatever the policy was called with.

    Rows of a lazy stack may have entries that do not stack, which the policy does not read, and so may a nested tensor;
    a view takes no new ones.
    """
    if type(output) is TensorDict and not any(map(_is_ragged, output.values())):
        return output
    found = rows_read(policy, output, keys_read(policy, methods))
    if found is output:  # what functions read is not known
        return found
    entries = {key: found.get(key) for key in found.keys(True, True)}
    return TensorDict(batch_size=output.batch_size, device=output.device).update(entries)


def rows_read(policy: HookedPolicy, data: TensorDictBase, keys: Iterable[NestedKey]) -> TensorDictBase:
    """Of a batch, what passes over it read: these entries, and how interventions acted (or what would say so)."""
    state = policy._hooked
    if state.passes or state.runtime.row_hook is not None or state.records:
        records = [record.key for record in state.records]
        asks = state.passes or any(not one.reads for one in getattr(state.runtime.row_hook, "functions", ()))
        if asks and (state.passes or any(data.get(key, None) is None for key in records)):
            return data  # what functions read is not known
        keys = [*keys, *records]
    keys = dict.fromkeys(keys)
    if isinstance(data, PersistentTensorDict):  # which has no `select`
        found = {key: value for key in keys if (value := get_entry(data, key)) is not None}
        return TensorDict(found, batch_size=data.batch_size, device=data.device)
    if type(data) is not TensorDict or has_names(data):
        return data.select(*keys, strict=False)
    entries: dict[str, Any] = {}
    nodes: dict[str, dict[str, Tensor]] = {}
    held = store_of(data)
    for key in keys:
        if type(key) is str:
            value = held.get(key)
            if type(value) is not Tensor:
                value = get_entry(data, key)
            if value is not None:
                entries[key] = value
        elif key[0] in held:
            if len(key) != 2:
                return data.select(*keys, strict=False)
            value = get_entry(data, key)
            if value is not None:
                nodes.setdefault(key[0], {})[key[1]] = value
    batch = data.batch_size
    for root, node in nodes.items():
        if root not in entries:  # or it is read as a whole
            entries[root] = tensors_as_entries(node, batch)
    return new_unsafe(entries, batch_size=batch, device=data.device)


def recorded(policy: HookedPolicy, output: TensorDictBase) -> dict[NestedKey, Tensor]:
    """How interventions acted in the forward that has just run: passes over its rows act where it did."""
    slots = policy._hooked.runtime.slots
    return {record.key: record.find(output, slots) for record in policy._hooked.records}


def for_samples(inputs: dict[NestedKey, Tensor], batch: torch.Size, output: TensorDictBase) -> dict[NestedKey, Tensor]:
    """The inputs of a call whose output has several samples of each row, in dimensions before those of the batch."""
    rows = output.batch_size
    if rows[len(rows) - len(batch) :] != batch:
        return inputs
    return {key: value.expand((*rows, *value.shape[len(batch) :])) for key, value in inputs.items()}


def drawn_noise(policy: HookedPolicy, output: TensorDictBase) -> dict[NestedKey, Tensor]:
    """The noise that a forward has used, which is beside its action whether it was given or drawn."""
    found = {key: output.get(key, None) for key in policy._hooked.noise}
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}

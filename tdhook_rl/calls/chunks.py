"""Action chunks in a call: a row is explained as the wrapper decides it.

Where ``MultiStepActorWrapper`` did not ask its network there is nothing to explain: results are NaN with a false mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.errors import InputError, MissingKeyError


def all_decide(policy: HookedPolicy, key: NestedKey, value: Tensor) -> Tensor:
    """An input of the policy for a pass in which its network runs in every row.

    Raises:
        InputError: if other modules read the mark of first steps too, which would lose their memory.
    """
    if key != unravel_key(policy._hooked.chunks.init_key):
        return value
    if policy._hooked.traits.recurrent:
        raise InputError(
            f"MultiStepActorWrapper around a recurrent policy is not explained: both read {key!r}, and the network "
            "runs in some steps only, so the hidden state of a row is not known"
        )
    return torch.ones_like(value)


def deciding_rows(policy: HookedPolicy, data: TensorDictBase) -> Tensor:
    """The rows in which the network ran, from the wrapper's counter.

    Raises:
        MissingKeyError: if the data does not hold it.
    """
    key = unravel_key(policy._hooked.chunks.counter_key)
    counter = data.get(key, None)
    if counter is None:
        raise MissingKeyError(
            f"in which rows the network of MultiStepActorWrapper ran is seen from {key!r}, which the data lacks: keep "
            "what the policy puts out with the data"
        )
    return counter.reshape(data.batch_size) == 1


def in_deciding_rows(
    policy: HookedPolicy, data: TensorDictBase, results: Mapping[tuple[str, ...], Tensor]
) -> dict[tuple[str, ...], Tensor]:
    """Results with nothing in the rows in which the network did not run, and masks that say so."""
    rows = deciding_rows(policy, data)
    found = {}
    for key, value in results.items():
        if key[0] == "computed":
            found[key] = value & rows
            continue
        mask = rows.reshape((*rows.shape, *(1,) * (value.ndim - rows.ndim)))
        found[key] = torch.where(mask, value, torch.nan if value.is_floating_point() else 0)
        found["computed", key[0]] = results.get(("computed", key[0]), rows) & rows
    return found

"""Policies that decide several steps at once and play them one by one (``MultiStepActorWrapper``).

The network runs in some rows only. A row is explained as the wrapper decides it: where it did not ask the network,
there is nothing to explain, and its results are NaN with a false mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor, nn

from tdhook_rl.errors import InputError, MissingKeyError

if TYPE_CHECKING:
    from tdhook_rl.module import HookedMixin

__all__ = ["all_decide", "cached_samples", "chunked_by", "deciding_rows", "in_deciding_rows"]


def chunked_by(policy: nn.Module) -> Any:
    """The wrapper in a policy that plays several actions one by one, if it has one."""
    from torchrl.modules import MultiStepActorWrapper

    found = [child for child in policy.modules() if isinstance(child, MultiStepActorWrapper)]
    return found[0] if found else None


def cached_samples(policy: nn.Module) -> dict[NestedKey, NestedKey]:
    """Where such a wrapper keeps what its network has put out, by key."""
    wrapper = chunked_by(policy)
    return {} if wrapper is None else {unravel_key(k): unravel_key(v) for k, v in wrapper._actor_keys_map.items()}


def all_decide(policy: HookedMixin, key: NestedKey, value: Tensor) -> Tensor:
    """An input of the policy for a pass in which its network runs in every row.

    Raises:
        InputError: if other modules read the mark of first steps too, which would lose their memory.
    """
    if key != unravel_key(policy._hooked_chunks.init_key):
        return value
    if policy._hooked_traits.recurrent:
        raise InputError(
            f"MultiStepActorWrapper around a recurrent policy is not explained: both read {key!r}, and the network "
            "runs in some steps only, so the hidden state of a row is not known"
        )
    return torch.ones_like(value)


def deciding_rows(policy: HookedMixin, data: TensorDictBase) -> Tensor:
    """The rows in which the network ran, from the wrapper's counter.

    Raises:
        MissingKeyError: if the data does not hold it.
    """
    key = unravel_key(policy._hooked_chunks.counter_key)
    counter = data.get(key, None)
    if counter is None:
        raise MissingKeyError(
            f"in which rows the network of MultiStepActorWrapper ran is seen from {key!r}, which the data lacks: keep "
            "what the policy puts out with the data"
        )
    return counter.reshape(data.batch_size) == 1


def in_deciding_rows(
    policy: HookedMixin, data: TensorDictBase, results: Mapping[tuple[str, ...], Tensor]
) -> dict[tuple[str, ...], Tensor]:
    """Results with nothing in the rows in which the network did not run, and masks that say so."""
    rows = deciding_rows(policy, data)
    found = {}
    for key, value in results.items():
        if key[0] == "computed":
            found[key] = value & rows
            continue
        mask = rows.reshape(*rows.shape, *(1,) * (value.ndim - rows.ndim))
        found[key] = torch.where(mask, value, torch.nan if value.is_floating_point() else 0)
        found["computed", key[0]] = results.get(("computed", key[0]), rows) & rows
    return found

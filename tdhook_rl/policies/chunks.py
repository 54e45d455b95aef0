"""Policies that decide several steps at once and play them one by one (``MultiStepActorWrapper``)."""

from __future__ import annotations

from typing import Any

from tensordict import NestedKey
from tensordict.utils import unravel_key
from torch import nn

from tdhook_rl.internals.torchrl_names import actor_keys

__all__ = ["cached_samples", "chunked_by"]


def chunked_by(policy: nn.Module) -> Any:
    """The wrapper in a policy that plays several actions one by one, if it has one."""
    from torchrl.modules import MultiStepActorWrapper

    found = [child for child in policy.modules() if isinstance(child, MultiStepActorWrapper)]
    return found[0] if found else None


def cached_samples(policy: nn.Module) -> dict[NestedKey, NestedKey]:
    """Where such a wrapper keeps what its network has put out, by key."""
    wrapper = chunked_by(policy)
    return {} if wrapper is None else {unravel_key(k): unravel_key(v) for k, v in actor_keys(wrapper).items()}

"""What TorchRL's modules in a policy say of actions: chunks that are played one by one, the values of Q-networks."""

from __future__ import annotations

from typing import Any

from tensordict import NestedKey
from tensordict.utils import unravel_key
from torch import Tensor, nn

from tdhook_rl.internals.torchrl_names import actor_keys
from tdhook_rl.sites.listed import modules


def chunked_by(policy: nn.Module) -> Any:
    """The wrapper in a policy that plays several actions one by one, if it has one."""
    from torchrl.modules import MultiStepActorWrapper

    found = [child for child in modules(policy) if isinstance(child, MultiStepActorWrapper)]
    return found[0] if found else None


def cached_samples(policy: nn.Module) -> dict[NestedKey, NestedKey]:
    """Where such a wrapper keeps what its network has put out, by key."""
    wrapper = chunked_by(policy)
    return {} if wrapper is None else {unravel_key(k): unravel_key(v) for k, v in actor_keys(wrapper).items()}


def supports(policy: nn.Module) -> dict[NestedKey, Tensor]:
    """The supports of the distributional Q-networks in a policy (``Pass.supports``)."""
    from torchrl.modules import DistributionalQValueModule

    found = [child for child in modules(policy) if isinstance(child, DistributionalQValueModule)]
    return {child.action_value_key: child.support for child in found}


def value_actions(policy: nn.Module) -> dict[NestedKey, tuple[NestedKey, list[int] | None]]:
    """Of each Q-network in a policy, by the key of its values: the key of the action that it chooses, and the sizes of
    the choices where it makes several at once."""
    from torchrl.modules import QValueModule

    found = [child for child in modules(policy) if isinstance(child, QValueModule)]
    return {child.action_value_key: (child.out_keys[0], _sizes(child.var_nums)) for child in found}


def _sizes(var_nums: Any) -> list[int] | None:
    return None if var_nums is None else [int(size) for size in var_nums]

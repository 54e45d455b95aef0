"""What Q-networks in a policy say about their values."""

from __future__ import annotations

from typing import Any

from tensordict import NestedKey
from torch import Tensor, nn

__all__ = ["supports", "value_actions"]


def supports(policy: nn.Module) -> dict[NestedKey, Tensor]:
    """The supports of the distributional Q-networks in a policy (``Pass.supports``)."""
    from torchrl.modules import DistributionalQValueModule

    found = [child for child in policy.modules() if isinstance(child, DistributionalQValueModule)]
    return {child.action_value_key: child.support for child in found}


def value_actions(policy: nn.Module) -> dict[NestedKey, tuple[NestedKey, list[int] | None]]:
    """Of each Q-network in a policy, by the key of its values: the key of the action that it chooses, and the sizes of
    the choices where it makes several at once."""
    from torchrl.modules import QValueModule

    found = [child for child in policy.modules() if isinstance(child, QValueModule)]
    return {child.action_value_key: (child.out_keys[0], _sizes(child.var_nums)) for child in found}


def _sizes(var_nums: Any) -> list[int] | None:
    return None if var_nums is None else [int(size) for size in var_nums]

"""From the action that a network of another library gives to the one that its environment gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdhook_rl.adapters.observations import require_tensors


class ToBounds(nn.Module):
    """Brings ``(*batch, actions)`` into the bounds of an action space, and into its shape.

    Args:
        low, high: the bounds, in the shape of the space.
        scaled: the action is between -1 and 1, and is scaled to the bounds; otherwise it is clipped to them.
    """

    writes_nothing = True

    low: Tensor
    high: Tensor

    def __init__(self, low: Any, high: Any, *, scaled: bool) -> None:
        super().__init__()
        self.register_buffer("low", torch.as_tensor(low).clone())
        self.register_buffer("high", torch.as_tensor(high).clone())
        self.scaled = scaled

    def forward(self, action: Tensor) -> Tensor:
        action = action.reshape(*action.shape[:-1], *self.low.shape)
        if self.scaled:
            return self.low + (0.5 * (action + 1.0) * (self.high - self.low))
        return torch.minimum(torch.maximum(action, self.low), self.high)

    def back(self, action: Tensor) -> Tensor:
        """The scaled action of one that is in the bounds."""
        scaled = 2.0 * ((action - self.low) / (self.high - self.low)) - 1.0
        return scaled.flatten(action.ndim - self.low.ndim)


class WithScale(nn.Module):
    """Adds the scale of a normal distribution, which is a parameter, or whose logarithm is one."""

    writes_nothing = True
    gives_parameters = True

    def __init__(self, log_std: nn.Parameter, *, logarithm: bool = True) -> None:
        super().__init__()
        self.log_std = log_std
        self.logarithm = logarithm

    def forward(self, loc: Tensor) -> tuple[Tensor, Tensor]:
        require_tensors(loc, 1)
        return loc, torch.ones_like(loc) * (self.log_std.exp() if self.logarithm else self.log_std)


class TwoHeads(nn.Module):
    """Mean and scale of a normal distribution by a layer each, the logarithm of the scale held between two limits."""

    writes_nothing = True
    gives_parameters = True

    def __init__(self, mu: nn.Module, log_std: nn.Module, limits: tuple[float, float]) -> None:
        super().__init__()
        self.mu = mu
        self.log_std = log_std
        self.limits = limits

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.mu(x)
        return loc, torch.ones_like(loc) * self.log_std(x).clamp(*self.limits).exp()


class StateDependentNoise(nn.Module):
    """Mean and scale of an action under generalised state-dependent exploration (gSDE).

    The variance is that which the noise has over all exploration matrices.
    """

    writes_nothing = True
    gives_parameters = True

    def __init__(self, action_net: nn.Module, log_std: nn.Parameter, noise: Any) -> None:
        super().__init__()
        self.action_net = action_net
        self.log_std = log_std
        self.full_std, self.use_expln = noise.full_std, noise.use_expln
        self.learn_features, self.epsilon = noise.learn_features, noise.epsilon

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.action_net(x)
        features = x if self.learn_features else x.detach()
        variance = torch.mm(features**2, self._std(x.shape[-1], loc.shape[-1]) ** 2)
        return loc, torch.sqrt(variance + self.epsilon)

    def _std(self, features: int, actions: int) -> Tensor:
        log_std = self.log_std
        if self.use_expln:
            below = log_std.exp() * (log_std <= 0)
            above = (torch.log1p(log_std * (log_std > 0) + self.epsilon) + 1.0) * (log_std > 0)
            std = below + above
        else:
            std = log_std.exp()
        return std if self.full_std else torch.ones(features, actions, device=std.device) * std

"""Standardised columns: steps of one size suit features of every offset and scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook_rl.latent.probing.moments import say_if_too_small


@dataclass(frozen=True)
class Scale:
    """Mean and spread of each column, in float64 where the device has it."""

    mean: Tensor
    spread: Tensor

    @classmethod
    def by(cls, values: Tensor, centred: bool, smallest: float = 0.0) -> Scale:
        """That of these values; columns that vary by less than ``smallest`` count as constant, which is said."""
        wide = values if values.device.type == "mps" else values.double()
        mean = wide.mean(0)
        spread = (wide - mean).square().mean(0).sqrt()
        eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
        rounding = 0.5 * eps * mean.abs()
        if smallest:
            say_if_too_small(spread, rounding)
        constant = spread <= rounding.clamp_min(max(smallest, torch.finfo(wide.dtype).tiny))
        if centred:
            return cls(mean, torch.where(constant, torch.inf, spread))
        # Without an intercept it is the size that counts, and a constant feature may serve as one.
        size = wide.square().mean(0).sqrt()
        return cls(torch.zeros_like(mean), torch.where(size > smallest, size, torch.inf))

    @classmethod
    def none(cls, like: Tensor) -> Scale:
        return cls(torch.zeros((), device=like.device), torch.ones((), device=like.device))

    def of(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.spread

    def grown(self, values: Tensor) -> Tensor:
        # A constant value of a regression has an infinite spread, and nothing to scale.
        return values * torch.where(self.spread.isinf(), 0.0, self.spread).to(values)

    def back(self, values: Tensor) -> Tensor:
        return self.grown(values) + self.mean.to(values)

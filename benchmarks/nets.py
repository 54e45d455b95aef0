"""The nets that attributions are timed on, with a batch and a baseline for each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["CLASS", "CLASSES", "Impala", "Problem", "impala", "mlp"]

FEATURES, CLASSES = 8, 4
#: The output that is explained.
CLASS = 1
FRAME = (3, 64, 64)
IMPALA_WIDTHS = (16, 32, 32)


@dataclass(frozen=True)
class Problem:
    """A net, a batch and its baseline; what is explained is the output ``CLASS``."""

    name: str
    net: nn.Module
    x: Tensor
    baseline: Tensor


def mlp(depth: int, width: int, batch: int) -> Problem:
    """A ReLU net of ``depth`` hidden layers whose outputs depend on its inputs at any depth (He initialisation)."""
    torch.manual_seed(0)
    widths = (FEATURES, *(width,) * depth)
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(width, CLASSES))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    x = torch.randn(batch, FEATURES)
    return Problem(f"MLP {depth} x {width}", net, x, 0.1 * torch.randn_like(x))


def impala(batch: int) -> Problem:
    """The residual convolutional net of IMPALA (Espeholt et al. 2018) on 3 x 64 x 64 frames."""
    torch.manual_seed(0)
    x = torch.rand(batch, *FRAME)
    return Problem("IMPALA 3 x 64 x 64", Impala(), x, torch.zeros_like(x))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Impala(nn.Sequential):
    """Three stages of convolution, pooling and two residual blocks, then a linear layer and the head."""

    def __init__(self) -> None:
        stages: list[nn.Module] = []
        for channels, width in pairwise((FRAME[0], *IMPALA_WIDTHS)):
            stages += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            stages += [Residual(width), Residual(width)]
        side = FRAME[1] // 2 ** len(IMPALA_WIDTHS)
        super().__init__(
            *stages,
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(IMPALA_WIDTHS[-1] * side * side, 256),
            nn.ReLU(),
            nn.Linear(256, CLASSES),
        )

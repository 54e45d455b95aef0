"""Chains of known layers for tests: a network, rows for it, and its gradient by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl.targets import Target

SQUARES = Target("squares", lambda run: run.outputs["output"].square().sum(-1), reads_inputs=False)
MODES = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])


def chain(kind: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), kind(), nn.Linear(16, 16), kind(), nn.Linear(16, 3)).double()


def data(*batch: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*batch, 6, dtype=torch.double)}, batch_size=batch)


def by_autograd(net: Callable[[Tensor], Tensor], x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(value(net(x)).sum(), x)[0]


def logit(y: Tensor) -> Tensor:
    return y[..., 1]


class Unknown(nn.Module):
    """A network that is no chain that anybody knows, although it runs one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

"""Activations that are complex numbers, as of a filter in frequencies: what a change of them adds is a real number.

The networks are linear in their complex activations, so that products with slopes are exact.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import IntegratedGradients, Saliency
from tdhook_rl.attribution import DimsConfig, GradCAM
from tdhook_rl.sweeps import attribution_patching
from tdhook_rl.targets import logit

F64, SITE = torch.float64, "filter"


class Filter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x) * self.weight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filter, self.head = Filter(), nn.Linear(8, 3, bias=False, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(self.filter(x), n=8))


def data(seed: int = 1, *batch: int) -> TensorDict:
    torch.manual_seed(seed)
    batch = batch or (4,)
    return TensorDict({"x": torch.randn(*batch, 8, dtype=F64)}, batch)


PRODUCTS: dict[str, Any] = {
    "product": lambda **options: Saliency(input_modules=[SITE], multiply_by_inputs=True, **options),
    "path": lambda **options: IntegratedGradients(input_modules=[SITE], baseline=0.0, n_steps=3, **options),
    "map": lambda **options: GradCAM({SITE: DimsConfig(None, None)}, **options),
}


@pytest.mark.parametrize("method", PRODUCTS)
def test_products_with_complex_activations_add_up(method: str) -> None:
    for batch in [(4,), (), (2, 3)]:
        options = {"compute_convergence_delta": True} if method == "path" else {}
        made = PRODUCTS[method](target=logit(0), when="step", **options)
        with made.prepare(Net(), in_keys=["x"], out_keys=["logits"]) as hooked:
            found = hooked(data(1, *batch)) if batch else hooked(data(1, 1)[0])
        assert found["attr", SITE].dtype == F64
        torch.testing.assert_close(found["attr", SITE].sum(-1), found["logits"][..., 0].detach())
        if options:
            torch.testing.assert_close(found["convergence_delta"], torch.zeros(batch, dtype=F64))


def test_attribution_patching_at_complex_activations_is_what_patching_does() -> None:
    net = Net()
    policy = TensorDictModule(net, ["x"], ["logits"])
    both: dict[str, Any] = {"sites": ["module.filter"], "metric": logit(0)}
    estimated = attribution_patching(policy, data(1), data(2), **both).estimates
    with torch.no_grad():
        clean, corrupt = (net.filter(one["x"]) for one in (data(1), data(2)))
        expected = []
        for unit in range(5):  # what is put into the corrupt run
            patched = corrupt.clone()
            patched[:, unit] = clean[:, unit]
            change = net.head(torch.fft.irfft(patched, n=8)) - net.head(torch.fft.irfft(corrupt, n=8))
            expected.append(change[:, 0])
    torch.testing.assert_close(estimated, torch.stack(expected))

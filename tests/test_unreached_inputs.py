"""Inputs and activations that no gradient reaches: NaN in every mode, told from a gradient that is zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import IntegratedGradients, Saliency, targets
from tdhook_rl.calls.real_rows import defined_values
from tdhook_rl.errors import TargetError

KEYS = ("pixels", "vector", "idle")


class CutOff(nn.Module):
    """A frozen encoder of pixels beside a vector, and an input whose weights are zero."""

    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cut, self.frozen, self.head = cut, nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(12, 3)
        nn.init.zeros_(self.head.weight[:, 8:])

    def forward(self, pixels: Tensor, vector: Tensor, idle: Tensor) -> Tensor:
        with torch.no_grad():
            pixels = self.frozen(pixels)
        return self.head(torch.cat([pixels, self.cut(vector), idle], -1))


def own(value: Tensor) -> Tensor:
    return value


MODES: dict[str, Callable[[Any, TensorDict], TensorDict]] = {
    "called": lambda hooked, data: hooked(data),
    "vmap": lambda hooked, data: torch.vmap(hooked)(data.unsqueeze(0))[0],
    "compiled": lambda hooked, data: torch.compile(hooked, backend="eager", fullgraph=True)(data),
}


def explained(method: Saliency, net: nn.Module, data: TensorDict, mode: str) -> TensorDict:
    with warnings.catch_warnings(), method.prepare(net, in_keys=list(KEYS), out_keys=["logits"]) as hooked:
        warnings.filterwarnings("ignore", "no gradient of")
        return MODES[mode](hooked, data)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", [own, torch.detach])
def test_what_no_gradient_reaches_is_nan_in_every_mode(mode: str, cut: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    net, data = CutOff(cut), TensorDict({key: torch.randn(5, 4) for key in KEYS}, [5])
    data["idle"][2] = torch.nan
    found = explained(Saliency(target=targets.logit(1), when="step"), net, data.clone(), mode)
    kept = torch.arange(5) != 2
    assert found["attr", "pixels"].isnan().all()
    assert found["computed", "attr"].tolist() == kept.tolist()
    torch.testing.assert_close(found["attr", "idle"][kept], torch.zeros(4, 4))
    if cut is torch.detach:
        assert found["attr", "vector"].isnan().all()
    else:
        right = net.head.weight[1, 4:8].expand(4, 4)
        torch.testing.assert_close(found["attr", "vector"][kept], right)


@pytest.mark.parametrize(
    "explains", [{"inputs": ["pixels"]}, {"input_modules": ["frozen.1"]}, {"input_modules": ["frozen.0", "head"]}]
)
def test_a_compiled_call_marks_sites_that_no_gradient_reaches(explains: dict[str, list[str]]) -> None:
    torch._dynamo.reset()
    net, data = CutOff(own), TensorDict({key: torch.randn(5, 4) for key in KEYS}, [5])
    found = explained(Saliency(target=targets.logit(1), when="step", **explains), net, data, "compiled")
    for key in ("pixels", "frozen.0", "frozen.1"):
        assert ("attr", key) not in found or found["attr", key].isnan().all()
    assert found["computed", "attr"].tolist() == 5 * ["head" in explains.get("input_modules", ())]
    if "head" in explains.get("input_modules", ()):
        torch.testing.assert_close(found["attr", "head"], torch.eye(3)[1].expand(5, 3))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiler_does_not_take_infinite_values_for_numbers() -> None:
    """A product with zero is zero to it."""
    torch._dynamo.reset()
    values = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf])
    scalars = {"cpp.vec_isa_ok": False}  # which vectors the machine has is else found by compiling something for each
    found = torch.compile(lambda value: defined_values([value], value.shape), backend="inductor", options=scalars)
    assert found(values).tolist() == [True, False, False, False]


class Objects(nn.Module):
    """Looks up what stands in each place, as agents of MiniGrid do; ``count`` of them is read as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.head = nn.Embedding(9, 4), nn.Linear(13, 3)

    def forward(self, places: Tensor, count: Tensor) -> Tensor:
        return self.head(torch.cat([self.kinds(places.long()).flatten(-2), count], -1))


@pytest.mark.parametrize("method", [Saliency, IntegratedGradients])
@pytest.mark.parametrize("when", ["step", "batch"])
def test_integers_that_a_table_is_looked_up_by_are_told_apart(method: type, when: str) -> None:
    policy = TensorDictModule(Objects(), ["places", "count"], ["logits"])
    places = torch.randint(0, 9, (5, 3), dtype=torch.uint8)
    data = TensorDict({"places": places, "count": torch.randn(5, 1)}, 5)
    options = {"when": when, "target": targets.logit(0), **({} if method is Saliency else {"baseline": 0.0})}
    said = r"Of integers \('places'\) .*input_modules=\['module.kinds'\], or use Occlusion"
    with method(inputs=["places"], **options).prepare(policy) as hooked, pytest.raises(TargetError, match=said):
        hooked.annotate(hooked(data.clone()))
    with method(**options).prepare(policy) as hooked, pytest.warns(UserWarning, match=said):
        found = hooked.annotate(hooked(data.clone()))
    assert found["attr", "places"].isnan().all()
    assert found["attr", "count"].isfinite().all()

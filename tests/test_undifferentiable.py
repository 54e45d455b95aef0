"""Policies that run, and of which torch takes no gradient: each is told in words of ours, and Occlusion explains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdhook_rl import LRP, GuidedBackpropagation, IntegratedGradients, Saliency, targets
from tdhook_rl.attribution import Occlusion
from tdhook_rl.errors import InPlaceError, InputError

KEYS = {"in_keys": ["observation"], "out_keys": ["logits"]}
LOGIT = targets.logit(0)


class Net(nn.Module):
    def __init__(self, middle: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.relu, self.middle = nn.Linear(4, 8), nn.Linear(8, 3), nn.ReLU(), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.middle(self, x)))


def into_the_input(net: Net, x: Tensor) -> Tensor:
    return net.first(torch.mul(x, 0.5, out=x))


def into_a_new_tensor(net: Net, x: Tensor) -> Tensor:
    return torch.tanh(net.first(x), out=torch.empty(len(x), 8))


def row_by_row(net: Net, x: Tensor) -> Tensor:
    for row in x.unbind(0):
        row.mul_(2)
    return net.first(x)


def half_of_it(net: Net, x: Tensor) -> Tensor:
    hidden = net.first(x)
    hidden.chunk(2, -1)[0].tanh_()
    return hidden


def resized(net: Net, x: Tensor) -> Tensor:
    return net.first(x).resize_(len(x), 8)


def through_numpy(net: Net, x: Tensor) -> Tensor:
    return net.first(torch.from_numpy(2 * x.numpy()))


def in_inference_mode(net: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        frozen = net.first(x)
    return net.first(x) * frozen


def reentrant(net: Net, x: Tensor) -> Tensor:
    return checkpoint(net.first, x, use_reentrant=True)


IN_PLACE = (into_the_input, into_a_new_tensor, row_by_row, half_of_it, resized)
OTHERWISE = {through_numpy: "NumPy", in_inference_mode: "inference_mode", reentrant: "use_reentrant"}
METHODS: dict[str, Callable[[], Any]] = {
    "step": lambda: Saliency(target=LOGIT, when="step"),
    "batch": lambda: Saliency(target=LOGIT, when="batch"),
    "path": lambda: IntegratedGradients(target=LOGIT, baseline=0.0, n_steps=3, when="batch"),
    "guided": lambda: GuidedBackpropagation(target=LOGIT),
    "relevance": lambda: LRP(target=LOGIT),
}


def runs(net: Net, mode: Any) -> bool:
    """Whether it runs by itself in a mode."""
    try:
        with mode():
            net(torch.randn(5, 4))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("middle", [*IN_PLACE, *OTHERWISE])
def test_what_has_no_gradient_is_told_in_words(middle: Callable[..., Tensor], name: str, mode: Any) -> None:
    net = Net(middle)
    if not runs(net, mode) or (name == "relevance" and mode is torch.inference_mode):
        pytest.skip("it does not run like this by itself")
    data = TensorDict({"observation": torch.randn(5, 4)}, [5])
    told: Exception | None = None
    with METHODS[name]().prepare(net, **KEYS) as hooked, mode():
        try:
            found = hooked.annotate(data) if name in ("batch", "path") else hooked(data.clone())
        except InputError as error:
            told = error
    if told is None:  # there is a way round it
        assert found["attr", "observation"].shape == (5, 4)
    elif "LRP has no rule" not in str(told):
        assert isinstance(told, InPlaceError) is (middle in IN_PLACE)
        assert OTHERWISE.get(middle, "in place") in str(told)


@pytest.mark.parametrize("middle", [*IN_PLACE, *OTHERWISE])
def test_occlusion_explains_it(middle: Callable[..., Tensor]) -> None:
    net, x = Net(middle), torch.randn(5, 4)
    with Occlusion(target=LOGIT).prepare(net, **KEYS) as hooked, torch.no_grad():
        found = hooked.annotate(TensorDict({"observation": x}, [5]))["attr", "observation"]
        whole = net(x.clone())[:, 0]
        right = [whole - net(x.index_fill(1, torch.tensor([i]), 0.0))[:, 0] for i in range(4)]
    torch.testing.assert_close(found, torch.stack(right, -1), rtol=1e-4, atol=1e-5)


def test_errors_of_the_policy_itself_stay_its_own() -> None:
    def fails(net: Net, x: Tensor) -> Tensor:
        raise RuntimeError("the arm is stuck")

    with Saliency(target=LOGIT, when="batch").prepare(Net(fails), **KEYS) as hooked:
        with pytest.raises(RuntimeError, match="the arm is stuck"):
            hooked.annotate(TensorDict({"observation": torch.randn(5, 4)}, [5]))

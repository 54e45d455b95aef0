"""The forms in which vectors, directions and scores are given: the same numbers mean the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import DirectionalAblation, DirectionClamping, Pruning, SteeringVectors
from tdhook_rl.errors import InputError
from tdhook_rl.latent import SteeringVector

X = torch.randn(5, 4)
VECTOR = torch.tensor([1.0, 0, 2, 0, -1, 3, 0, 1])
PACKED = SteeringVector(path="1", vector=VECTOR)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def output(method: Any) -> Tensor:
    with method.prepare(net()) as hooked:
        return hooked(TensorDict({"input": X}, [5]))["output"]


def steered(change: Callable[[Tensor], Tensor]) -> Tensor:
    plain = net()
    return plain[2](change(plain[:2](X)))


FORMS: dict[str, Any] = {
    "mapping": lambda: SteeringVectors({"1": VECTOR}, alpha=0.5),
    "integers": lambda: SteeringVectors({"1": VECTOR.long()}, alpha=0.5),
    "doubles": lambda: SteeringVectors({"1": VECTOR.double()}, alpha=0.5),
    "array": lambda: SteeringVectors({"1": VECTOR.numpy()}, alpha=0.5),
    "list": lambda: SteeringVectors({"1": VECTOR.tolist()}, alpha=0.5),
    "packed": lambda: SteeringVectors(PACKED, alpha=0.5),
    "packed in a mapping": lambda: SteeringVectors({"1": PACKED}, alpha=0.5),
    "alpha of one element": lambda: SteeringVectors({"1": VECTOR}, alpha=torch.tensor(0.5)),
    "alpha in a list": lambda: SteeringVectors({"1": VECTOR}, alpha=[0.5]),
    "names of the seed": lambda: SteeringVectors(["1"], lambda k, o: o + 0.5 * VECTOR),
    "keywords of the seed": lambda: SteeringVectors(modules_to_steer=["1"], steer_fn=lambda k, o: o + 0.5 * VECTOR),
    "keywords of tdhook": lambda: SteeringVectors(["1"], lambda module_key, output: output + 0.5 * VECTOR),
}


@pytest.mark.parametrize("form", FORMS)
def test_steering_vectors(form: str) -> None:
    torch.testing.assert_close(output(FORMS[form]()), steered(lambda h: h + 0.5 * VECTOR))


@pytest.mark.parametrize("alpha", [[0.5] * 5, torch.full((5,), 0.5)])
def test_a_strength_of_each_row_belongs_into_the_data(alpha: Any) -> None:
    with pytest.raises(InputError, match=r"alpha= holds 5 numbers.*data\["):
        SteeringVectors({"1": VECTOR}, alpha=alpha).prepare(net())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_directions_in_any_dtype(dtype: torch.dtype) -> None:
    direction = VECTOR.to(dtype)
    unit = direction.float() / direction.float().norm()
    expected = steered(lambda h: h - (h @ unit)[:, None] * unit)
    torch.testing.assert_close(output(DirectionalAblation({"1": direction})), expected)
    expected = steered(lambda h: h + (0.5 - h @ unit)[:, None] * unit)
    torch.testing.assert_close(output(DirectionClamping({"1": direction}, value=0.5)), expected)


def scores(sign: str) -> Callable[..., Tensor]:
    def score(module_key: str, parameter_name: str, parameter: Tensor) -> Tensor:
        size = torch.arange(1.0, parameter.numel() + 1).reshape(parameter.shape)
        signs = torch.ones(parameter.shape) if sign == "positive" else -torch.ones(parameter.shape)
        if sign == "both":
            signs.flatten()[::2] *= -1
        return signs * size

    return score


@pytest.mark.parametrize("amount", [0.25, 7])
@pytest.mark.parametrize("sign", ["positive", "negative", "both"])
def test_the_size_of_a_score_counts(sign: str, amount: float) -> None:
    found = output(Pruning(scores(sign), amount))
    torch.testing.assert_close(found, output(Pruning(scores("positive"), amount)))
    assert not torch.equal(found, output(Pruning(scores("positive"), 1)))

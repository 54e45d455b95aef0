"""Policies that read rows which lie beside each other: explained as they compute, or refused, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import IntegratedGradients, Occlusion
from tdhook_rl.errors import InputError
from tdhook_rl.method import Compose
from tdhook_rl.sweeps import ablate_units, patch_sites

ROWS, STEPS, FEATURES = 3, 4, 3


class Reads(nn.Module):
    """What reads a sequence, and a layer on each of its steps."""

    def __init__(self, read: nn.Module) -> None:
        super().__init__()
        self.read, self.head = read, nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(x))


class Memory(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.core = kind(FEATURES, FEATURES, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)[0]


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.key = causal, nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.key(x).transpose(-1, -2)
        past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return (scores.masked_fill(~past, -torch.inf) if self.causal else scores).softmax(-1) @ x


class Sums(nn.Module):
    def __init__(self, back: bool) -> None:
        super().__init__()
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-2).cumsum(-2).flip(-2) if self.back else x.cumsum(-2)


class Along(nn.Module):
    """A convolution along time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(FEATURES, FEATURES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(-1, -2)).transpose(-1, -2)


SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Memory(nn.LSTM),
    "gru": lambda: Memory(nn.GRU),
    "attention": lambda: Attention(causal=False),
    "causal attention": lambda: Attention(causal=True),
    "sums": lambda: Sums(back=False),
    "sums of what comes": lambda: Sums(back=True),
    "convolution": Along,
}


class OneDimension(nn.Module):
    """Rows by themselves, as scripts write it for one dimension of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES + 1, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.cat([x, x.sum(1, keepdim=True)], 1)))


#: Those of which each row is by itself, and what a layer of one dimension makes of a batch of two.
APART: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()),
    "norm": lambda: nn.LayerNorm(FEATURES),
    "one dimension": OneDimension,
}


def policy_of(make: Callable[[], nn.Module]) -> tuple[nn.Module, TensorDictModule]:
    torch.manual_seed(0)
    net = Reads(make()).double().eval()
    return net, TensorDictModule(net, ["observation"], ["action"])


def states(*batch: int, steps: int | None = None) -> TensorDict:
    shape = (*batch, FEATURES) if steps is None else (*batch, steps, FEATURES)
    return TensorDict({"observation": torch.randn(shape, dtype=torch.float64)}, batch)


def gradient(net: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(net(leaf).sum(), leaf)[0]


REFUSED: dict[str, Callable[[Any, TensorDict], Any]] = {
    "saliency": lambda policy, data: Saliency().prepare(policy, return_context=False).annotate(data),
    "caching": lambda policy, data: (
        ActivationCaching("module.head").prepare(policy, return_context=False).annotate(data)
    ),
    "path": lambda policy, data: IntegratedGradients(baseline=0.0).prepare(policy, return_context=False).annotate(data),
    "path in a step": lambda policy, data: IntegratedGradients(baseline=0.0, when="step").prepare(
        policy, return_context=False
    )(data.clone()),
    "occlusion in a step": lambda policy, data: Occlusion(baseline=0.0, when="step").prepare(
        policy, return_context=False
    )(data.clone()),
    "patching": lambda policy, data: patch_sites(policy, data, states(*data.batch_size), "module.head"),
    "ablation": lambda policy, data: ablate_units(policy, data, "module.head"),
}


@pytest.mark.parametrize("call", REFUSED)
@pytest.mark.parametrize("name", SEQUENCES)
def test_steps_are_not_laid_one_after_the_other(name: str, call: str) -> None:
    _, policy = policy_of(SEQUENCES[name])
    with pytest.raises(InputError, match="a row's output depends on the rows beside it"):
        REFUSED[call](policy, states(ROWS, STEPS))


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_are_explained_as_they_are_computed(name: str) -> None:
    net, policy = policy_of(SEQUENCES[name])
    data = states(ROWS, STEPS)
    x = data["observation"]
    expected, inside = gradient(net, x), net.read(x)
    vector = torch.randn(FEATURES, dtype=torch.float64)
    with Compose(Saliency(horizon="trajectory"), SteeringVectors({"module.read": 0 * vector})).prepare(
        policy
    ) as hooked:
        torch.testing.assert_close(hooked.annotate(data)["attr", "observation"], expected)
    several = [Saliency(target=targets.output_sum(), when="step", attribution_key=f"a{place}") for place in range(2)]
    with Compose(*several).prepare(policy) as hooked:
        found = hooked(data.clone())
        for place in range(2):
            torch.testing.assert_close(found[f"a{place}", "observation"], expected)
    rows = TensorDict({"observation": x}, [ROWS])  # time belongs to the entries
    with Compose(Saliency(), ActivationCaching("module.read")).prepare(policy) as hooked:
        found = hooked.annotate(rows)
    torch.testing.assert_close(found["attr", "observation"], expected)
    torch.testing.assert_close(found["cache", "module.read"], inside)
    with IntegratedGradients(baseline=0.0, n_steps=3, method="riemann_middle").prepare(policy) as hooked:
        path = hooked.annotate(rows)["attr", "observation"]
    by_hand = torch.stack([gradient(net, x * (place + 0.5) / 3) for place in range(3)]).mean(0) * x
    torch.testing.assert_close(path, by_hand)
    other = states(ROWS, steps=STEPS)
    assert patch_sites(policy, rows, other, "module.head")["module.head"].mean.estimate == pytest.approx(1.0)


@pytest.mark.parametrize("name", APART)
def test_rows_by_themselves_may_lie_in_any_layout(name: str) -> None:
    net, policy = policy_of(APART[name])
    data = states(ROWS, STEPS)
    flat = data.reshape(-1)
    expected = gradient(net, flat["observation"])
    with Compose(Saliency(), ActivationCaching("module.read")).prepare(policy) as hooked:
        for one in (data, flat):
            found = hooked.annotate(one, chunk_size=5)
            torch.testing.assert_close(found["attr", "observation"].reshape(-1, FEATURES), expected)
            torch.testing.assert_close(
                found["cache", "module.read"].reshape(-1, FEATURES), net.read(flat["observation"])
            )


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_is_not_cut_into_chunks(name: str) -> None:
    net, policy = policy_of(SEQUENCES[name])
    data = states(8)
    with Saliency().prepare(policy) as hooked:
        torch.testing.assert_close(hooked.annotate(data)["attr", "observation"], gradient(net, data["observation"]))
        with pytest.raises(InputError, match="8 rows are computed 3 at a time"):
            hooked.annotate(data.exclude("attr", "computed"), chunk_size=3)


class Rounded(nn.Module):
    """Rows apart, but for what products of batches of another size round in another way, on other processors."""

    def __init__(self, dtype: torch.dtype, offset: float) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, 8, dtype=dtype), nn.Linear(8, 2, dtype=dtype)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.first(x).tanh()) + self.offset
        rounds = torch.finfo(y.dtype).eps * (-1) ** len(x)
        return y + rounds * y.detach().abs().max() - self.offset


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_no_row_beside(dtype: torch.dtype, offset: float) -> None:
    torch.manual_seed(0)
    policy = TensorDictModule(Rounded(dtype, offset if dtype.itemsize > 2 else offset / 1e3), ["x"], ["action"])
    data = TensorDict({"x": torch.randn(ROWS, STEPS, FEATURES, dtype=dtype)}, (ROWS, STEPS))
    with Saliency(target=targets.output_sum(), when="batch").prepare(policy) as hooked:
        found = hooked.annotate(data)["attr", "x"]
    x = data["x"].requires_grad_()
    (expected,) = torch.autograd.grad(policy.module(x.reshape(-1, FEATURES)).float().sum(), x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)

"""Policies that read rows which lie beside each other: explained as they compute, or refused, in every layout."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, ReplayBuffer

from tdhook_rl import ActivationCaching, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import IntegratedGradients, Occlusion
from tdhook_rl.errors import InputError
from tdhook_rl.latent import SteeringVector, principal_directions
from tdhook_rl.method import Compose
from tdhook_rl.metrics import InfidelityMetric
from tdhook_rl.probes import GroupSplit
from tdhook_rl.replay import analyze, probe_grid
from tdhook_rl.rollout import NetworkDiagnostics, cka_matrix
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


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


#: Those that draw noise as well: two passes over other rows differ by that alone.
DRAWING: dict[str, Callable[[], nn.Module]] = {
    "noise after an lstm": lambda: nn.Sequential(Memory(nn.LSTM), Noise()),
    "noise before sums of what comes": lambda: nn.Sequential(Noise(), Sums(back=True)),
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
@pytest.mark.parametrize("name", [*SEQUENCES, *DRAWING])
def test_steps_are_not_laid_one_after_the_other(name: str, call: str) -> None:
    _, policy = policy_of((SEQUENCES | DRAWING)[name])
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


def _metric(policy: Any, data: TensorDict) -> Any:
    hooked = Saliency().prepare(policy, return_context=False)
    return InfidelityMetric()(hooked, hooked.annotate(data[0]))


def _labelled(data: TensorDict) -> TensorDict:
    rows = data.batch_size.numel()
    label = (torch.arange(rows) % 2).reshape(data.batch_size)
    return data.clone().set("label", label).set("traj_ids", torch.arange(rows).reshape(data.batch_size) // STEPS)


def _analysed(policy: Any, data: TensorDict, **options: Any) -> Any:
    hooked = Saliency().prepare(policy, return_context=False)
    with tempfile.TemporaryDirectory() as folder:
        return analyze(hooked, data.reshape(-1), folder, **options).clone()


def _stored(data: TensorDict) -> ReplayBuffer:
    buffer = ReplayBuffer(storage=LazyTensorStorage(100))
    buffer.extend(data.reshape(-1))
    return buffer


#: What reads the rows of a whole some at a time, or some of them.
IN_PARTS: dict[str, Callable[[Any, TensorDict], Any]] = {
    "analysis": _analysed,
    "analysis in chunks": lambda policy, data: _analysed(policy, data, batch_size=5),
    "analysis of some": lambda policy, data: _analysed(policy, data, rows=slice(1, None, 2)),
    "direction of a buffer": lambda policy, data: SteeringVector.from_contrast(
        policy, "module.read", _stored(_labelled(data)), "label"
    ),
    "direction of pairs": lambda policy, data: SteeringVector.from_pairs(policy, "module.read", data, -data),
    "directions of pairs": lambda policy, data: principal_directions(policy, "module.read", data, -data),
    "grid of probes": lambda policy, data: probe_grid(
        policy, _labelled(data), sites=["module.read"], concepts={"label": "label"},
        split=GroupSplit("traj_ids", held_out=0.4),
    ),
    "metric": _metric,
    "layers": lambda policy, data: cka_matrix(policy, [policy], "module.read", data),
    "diagnostics": lambda policy, data: NetworkDiagnostics(policy, sites=["module.read"]).update(data),
}  # fmt: skip


@pytest.mark.parametrize("call", IN_PARTS)
@pytest.mark.parametrize("name", [*SEQUENCES, *DRAWING])
def test_rows_that_are_read_together_do_not_come_in_parts(name: str, call: str) -> None:
    _, policy = policy_of((SEQUENCES | DRAWING)[name])
    with pytest.raises(InputError, match="a row's output depends on the rows beside it"):
        IN_PARTS[call](policy, states(ROWS, STEPS))


@pytest.mark.parametrize("call", IN_PARTS)
@pytest.mark.parametrize("name", [*APART, "noise"])
def test_rows_by_themselves_come_in_parts(name: str, call: str) -> None:
    _, policy = policy_of((APART | {"noise": Noise})[name])
    assert IN_PARTS[call](policy, states(ROWS, STEPS)) is not None


@pytest.mark.parametrize("batch_size", [1, 6, 100])
@pytest.mark.parametrize("name", SEQUENCES)
def test_an_analysis_of_trajectories_ends_no_sequence_and_joins_none(
    name: str, batch_size: int, tmp_path: Path
) -> None:
    """Where entries are rows, each trajectory is by itself wherever chunks end; where they are sequences, they are."""
    net, policy = policy_of(SEQUENCES[name])
    data = _labelled(states(ROWS, STEPS))
    expected = gradient(net, data["observation"]).reshape(-1, FEATURES)
    with Saliency(horizon="trajectory").prepare(policy) as hooked:
        found = analyze(hooked, data.reshape(-1), tmp_path / "all", batch_size=batch_size)
        torch.testing.assert_close(found["attr", "observation"], expected)
        again = analyze(hooked, data.reshape(-1), tmp_path / "all", batch_size=3)  # held against what is there
        torch.testing.assert_close(again["attr", "observation"], expected)
        some = analyze(hooked, data.reshape(-1), tmp_path / "some", batch_size=batch_size, rows=slice(1, None, 2))
        torch.testing.assert_close(some["attr", "observation"], expected[1::2])
    entries = TensorDict({"observation": data["observation"]}, [ROWS])
    with Saliency().prepare(policy) as hooked:
        found = analyze(hooked, entries, tmp_path / "entries", batch_size=batch_size)
    torch.testing.assert_close(found["attr", "observation"].reshape(-1, FEATURES), expected)

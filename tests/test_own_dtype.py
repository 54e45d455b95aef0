"""Perturbation of inputs in their own dtype, against loops over copies; overlapping groups and groups of rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import MaskedCategorical, ProbabilisticActor, QValueActor, QValueModule

from tdhook_rl import targets
from tdhook_rl.attribution import SARFA, IntegratedGradients, Occlusion, PerturbationSaliency, Saliency, windows
from tdhook_rl.errors import InputError
from tdhook_rl.metrics import InfidelityMetric, SensitivityMetric, deletion_insertion

DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16)
WIDTH = 5


class Typed(nn.Module):
    """Reads one dtype only, raises another error than torch's, and acts on the dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.head = dtype, nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.dtype:
            raise KeyError(f"reads {self.dtype}, not {x.dtype}")
        scale = 255 if x.dtype == torch.uint8 else 3
        return self.head(x.double() / scale)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4 * WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(x).flatten(-2))


def draw(dtype: torch.dtype, *batch: int) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(*batch, WIDTH) > 0.4
    if dtype.is_floating_point:
        return torch.randn(*batch, WIDTH).to(dtype)
    return torch.randint(1, 7, (*batch, WIDTH), dtype=dtype)


def by_loop(net: nn.Module, x: torch.Tensor, low: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    total, count = torch.zeros(x.shape, dtype=net(x).dtype), torch.zeros(x.shape)
    with torch.no_grad():
        for group in groups:
            without = x.clone()
            without[..., group] = low.expand_as(x)[..., group]
            total[..., group] += (net(x) - net(without)).sum(-1, keepdim=True)
            count[..., group] += 1
    return total / count.clamp_min(1)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_replaced_by_its_own(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    net, x = Typed(dtype), draw(dtype, *batch)
    each = [[feature] for feature in range(WIDTH)]
    low = torch.zeros(WIDTH, dtype=dtype)
    with Occlusion().prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch))
        torch.testing.assert_close(found["attr", "input"], by_loop(net, x, low, each))
        torch.testing.assert_close(hooked.annotate(TensorDict({"input": x}, batch)), found.exclude("output"))
    low = draw(dtype)
    with Occlusion(baseline=low).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch))["attr", "input"]
    torch.testing.assert_close(found, by_loop(net, x, low, each))
    low = draw(dtype, *batch)
    with Occlusion(baseline=None).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x, ("baseline", "input"): low}, batch))["attr", "input"]
    torch.testing.assert_close(found, by_loop(net, x, low, each))


def test_tokens_are_occluded_by_the_padding_token() -> None:
    net, x = Tokens(), torch.randint(1, 7, (4, WIDTH))
    with Occlusion(baseline=6, groups=[[0, 1], [3]]).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, [4]))["attr", "input"]
    torch.testing.assert_close(found, by_loop(net, x, torch.tensor(6), [[0, 1], [3]]))
    with Occlusion(baseline=7).prepare(net) as hooked, pytest.raises(InputError, match="padding token"):
        hooked(TensorDict({"input": x}, [4]))
    with Saliency().prepare(net) as hooked, pytest.raises(InputError, match="use Occlusion, which needs no gradient"):
        hooked(TensorDict({"input": x}, [4]))


@pytest.mark.parametrize(
    ("dtype", "baseline"),
    [(torch.int64, 0.5), (torch.bool, 2), (torch.uint8, -1), (torch.uint8, 256), (torch.int32, torch.full((5,), 0.1))],
)
def test_a_baseline_that_the_dtype_cannot_hold_is_refused(dtype: torch.dtype, baseline: object) -> None:
    data = TensorDict({"input": draw(dtype, 3)}, [3])
    with Occlusion(baseline=baseline).prepare(Typed(dtype)) as hooked:
        with pytest.raises(InputError, match=f"is no {dtype}"):
            hooked(data)
    with Occlusion(baseline=None).prepare(Typed(torch.int64)) as hooked:
        with pytest.raises(InputError, match=r"is no torch.int64"):
            hooked(TensorDict({"input": draw(torch.int64, 3), ("baseline", "input"): torch.full((3, 5), 0.5)}, [3]))


@pytest.mark.parametrize(
    "baseline", ["zeros", float("nan"), float("inf"), [[1.0], [2.0, 3.0]], torch.zeros(0), object()]
)
def test_what_is_no_baseline_is_refused(baseline: object) -> None:
    with pytest.raises(InputError, match="baseline= is a finite number"):
        Occlusion(baseline=baseline)


def test_booleans_only_where_there_are_no_others_or_they_are_named() -> None:
    class Both(nn.Module):
        def forward(self, x, mask):
            return (x * mask).sum(-1, keepdim=True)

    data = TensorDict({"x": draw(torch.float32, 3), "mask": draw(torch.bool, 3)}, [3])
    with Occlusion().prepare(Both(), in_keys=["x", "mask"]) as hooked:
        assert list(hooked(data.clone())["attr"].keys()) == ["x"]
    with Occlusion(inputs=["mask"]).prepare(Both(), in_keys=["x", "mask"]) as hooked:
        found = hooked(data.clone())["attr", "mask"]
    torch.testing.assert_close(found, data["x"] * data["mask"])
    with Occlusion().prepare(Typed(torch.bool)) as hooked:
        assert hooked(TensorDict({"input": data["mask"]}, [3]))["attr", "input"].shape == (3, WIDTH)


class Gated(nn.Module):
    def forward(self, x: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        return (x * torch.where(held, 2.0, 1.0)).cumsum(-1)


def gated(key: NestedKey) -> TensorDictModule:
    return TensorDictModule(Gated(), ["x", key], ["y"])


def masked(key: NestedKey) -> ProbabilisticActor:
    net = TensorDictModule(nn.Linear(WIDTH, WIDTH), ["x"], ["logits"])
    keys = {"logits": "logits", "mask": key}
    return ProbabilisticActor(net, in_keys=keys, distribution_class=MaskedCategorical, return_log_prob=True)


def masked_values(key: NestedKey) -> TensorDictSequential:
    net = TensorDictModule(nn.Linear(WIDTH, WIDTH), ["x"], ["action_value"])
    return TensorDictSequential(net, QValueModule(action_space="categorical", action_mask_key=key))


#: How booleans come, with whether they may be something that the policy sees.
BOOLEANS: dict[str, tuple[Callable[[NestedKey], Any], NestedKey, bool]] = {
    "an observation": (gated, "held", True),
    "nested": (gated, ("agents", "held"), True),
    "a mask by name": (gated, "action_mask", False),
    "a nested mask": (gated, ("agents", "mask"), False),
    "the beginnings": (gated, "is_init", False),
    "the endings": (gated, "terminated", False),
    "of a distribution": (masked, "allowed", False),
    "of values": (masked_values, "allowed", False),
}


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("method", [Saliency, IntegratedGradients, Occlusion])
def test_a_boolean_that_may_be_seen_is_said_to_be_left_out_once(method: Any, when: str, name: str) -> None:
    make, key, seen = BOOLEANS[name]
    held = torch.rand(3, WIDTH) > 0.3
    held[:, 0] = True
    policy = make(key)
    data = TensorDict({"x": torch.randn(3, WIDTH), key: held}, [3])
    data = policy(data) if when == "batch" else data
    target = None if make is not gated else lambda run: run.outputs["y"].sum(-1)
    named = ["x", key] if make is gated and method is Occlusion else ["x"]
    options = {"baseline": 0.0} if method is IntegratedGradients else {}
    for inputs, told in ((None, seen), (named, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with method(target=target, when=when, inputs=inputs, **options).prepare(policy) as hooked:
                for _ in range(2):
                    _ = hooked(data.clone()) if when == "step" else hooked.annotate(data)
        found = [str(one.message) for one in caught if "boolean" in str(one.message)]
        assert len(found) == told
        assert all(f"{key!r} is left out beside 'x'" in one and f"inputs={['x', key]}" in one for one in found)


def test_sarfa_of_tokens() -> None:
    actor = QValueActor(TensorDictModule(Tokens(), ["tokens"], ["action_value"]), action_space="categorical")
    data = actor(TensorDict({"tokens": torch.randint(1, 7, (4, WIDTH))}, [4]))
    with SARFA(inputs=["tokens"]).prepare(actor) as hooked:
        found = hooked.annotate(data)["attr", "tokens"]
    assert found.dtype == torch.float32
    assert bool((found >= 0).all())
    assert bool((found > 0).any())


@pytest.mark.parametrize("scaled", [False, True])
def test_blurred_bytes_are_bytes_where_the_network_needs_them(scaled: bool) -> None:
    class Scaling(nn.Module):
        def forward(self, x):
            x = x / 255 if not scaled or x.dtype == torch.uint8 else x
            return x.float().square().flatten(-3).sum(-1, keepdim=True)

    x = torch.randint(0, 256, (3, 2, 6, 6), dtype=torch.uint8)
    with PerturbationSaliency(stride=3).prepare(Scaling()) as hooked:
        found = hooked(TensorDict({"input": x}, [3]))["attr", "input"]
    with PerturbationSaliency(stride=3).prepare(Scaling()) as hooked:
        exact = hooked(TensorDict({"input": x.float() / (255 if scaled else 1)}, [3]))["attr", "input"]
    torch.testing.assert_close(found, exact, atol=0.03 if scaled else 1e-4, rtol=0.02 if scaled else 1e-4)


def test_overlapping_groups_give_the_mean() -> None:
    net, x = Typed(torch.float64), draw(torch.float64, 4)
    groups = windows([WIDTH], [3], [1])
    assert groups == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    masks = [torch.zeros(WIDTH, dtype=torch.bool).index_fill(0, torch.tensor(group), True) for group in groups]
    expected = by_loop(net, x, torch.zeros(WIDTH).double(), groups)
    for given in (groups, masks, torch.stack(masks), {"input": groups}):
        with Occlusion(groups=given).prepare(net) as hooked:
            torch.testing.assert_close(hooked(TensorDict({"input": x}, [4]))["attr", "input"], expected)


def test_a_group_without_a_value_says_nothing_of_the_others() -> None:
    class Log(nn.Module):
        def forward(self, x):
            return x.sum(-1, keepdim=True) + (x[..., :1] - 1).log()  # 0 has no logarithm

    with Occlusion(groups=[[0, 1], [1, 2], [3, 4]]).prepare(Log()) as hooked:
        found = hooked(TensorDict({"input": torch.full((2, WIDTH), 3.0)}, [2]))["attr", "input"]
    assert found.isnan().tolist() == [[True, True, False, False, False]] * 2


@pytest.mark.parametrize("batch", [(4,), (2, 3)])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_groups_of_each_row(batch: tuple[int, ...], chunk_size: int | None) -> None:
    net, x = Typed(torch.float64), draw(torch.float64, *batch)
    segments = torch.randint(-1, 3, (*batch, WIDTH))
    data = TensorDict({"input": x, "segments": segments}, batch)
    with Occlusion(groups="segments").prepare(net) as hooked:
        found = hooked.annotate(data, chunk_size=chunk_size)["attr", "input"]
    rows = zip(x.reshape(-1, WIDTH), segments.reshape(-1, WIDTH), strict=True)
    expected = [
        by_loop(net, row, torch.zeros(WIDTH).double(), [(of == number).nonzero()[:, 0].tolist() for number in range(3)])
        for row, of in rows
    ]
    torch.testing.assert_close(found, torch.stack(expected).reshape(found.shape))
    with Occlusion(groups="segments").prepare(net) as hooked:
        mask = hooked(TensorDict({"input": x, "segments": segments > 0}, batch))["attr", "input"]
        assert torch.equal(mask == 0, segments <= 0)
        with pytest.raises(InputError, match=r"groups='segments' holds torch\.float32"):
            hooked(TensorDict({"input": x, "segments": segments.float()}, batch))


def test_windows_of_images_and_refusals() -> None:
    groups = windows((1, 4, 4), (1, 2, 2))
    assert groups == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    for wrong in (((4,), (5,)), ((4, 4), (2,)), ((4,), (0,)), ((4,), (2.5,))):
        with pytest.raises(InputError):
            windows(*wrong)


def test_metrics_of_tokens() -> None:
    net, x = Tokens(), torch.randint(1, 7, (4, WIDTH))
    with Occlusion(target=targets.output_sum()).prepare(net) as hooked:
        data = hooked(TensorDict({"input": x}, [4]))
        found = deletion_insertion(hooked, data)
        assert bool((found.deletion <= found.random + 1e-6).all())
        with pytest.raises(InputError, match="changes inputs a little"):
            InfidelityMetric()(hooked, data)
        with pytest.raises(InputError, match="changes inputs a little"):
            SensitivityMetric()(hooked, data)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_baseline_of_features(batch: tuple[int, ...]) -> None:
    net, x, low = Typed(torch.float64), draw(torch.float64, *batch), draw(torch.float64)
    data = TensorDict({"input": x, ("baseline", "input"): low.expand(*batch, WIDTH)}, batch)
    with IntegratedGradients().prepare(net) as hooked:
        expected = hooked(data.clone())["attr", "input"]
    for baseline in (low, low.tolist(), low.numpy(), {"input": low}):
        with IntegratedGradients(baseline=baseline).prepare(net) as hooked:
            torch.testing.assert_close(hooked(data.clone())["attr", "input"], expected)
            torch.testing.assert_close(hooked.annotate(data.clone(), chunk_size=2)["attr", "input"], expected)
    with IntegratedGradients(baseline={}).prepare(net) as hooked:
        with pytest.raises(InputError, match="baseline= has none for the input 'input'"):
            hooked(data.clone())
    with IntegratedGradients(baseline=torch.zeros(WIDTH + 1)).prepare(net) as hooked:
        with pytest.raises(InputError, match=r"a row of the input 'input' has shape \(5,\)"):
            hooked(data.clone())

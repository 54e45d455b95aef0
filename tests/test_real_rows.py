"""``computed`` is true where there is a result: not in padding, nor where NaN went in or came out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, pad_sequence
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors.utils import split_trajectories
from torchrl.modules import GRUModule

from tdhook_rl import ActivationCaching, IntegratedGradients, Saliency, targets
from tdhook_rl.attribution import LRP, Occlusion
from tdhook_rl.calls.real_rows import FEW, real_rows, surely_finite
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent.probing import LinearEstimator, ProbeManager, Probing
from tdhook_rl.method import Method
from tdhook_rl.rollout import NetworkDiagnostics, OnlineProbe, summarise

KEYS = {"in_keys": ["observation"], "out_keys": ["logits"]}
ONE = targets.logit(0)


class Direction(nn.Module):
    """Looks at the direction of a vector, which a vector of zeros has not."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x / x.norm(dim=-1, keepdim=True))


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def holes(value: float) -> Callable[[], Tensor]:
    def rows() -> Tensor:
        found = torch.randn(4, 3)
        found[2, 0] = value
        return found

    return rows


def zeros() -> Tensor:
    found = torch.randn(4, 3)
    found[2] = 0.0
    return found


METHODS: dict[str, Callable[[Any], Method]] = {
    "saliency": lambda when: Saliency(target=ONE, when=when),
    "integrated": lambda when: IntegratedGradients(target=ONE, baseline=0.0, when=when),
    "occlusion": lambda when: Occlusion(target=ONE, baseline=0.0, when=when),
    "lrp": lambda when: LRP(target=ONE, when=when),
}


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_observation_that_is_not_finite(when: str, method: str, value: float) -> None:
    data = TensorDict({"observation": holes(value)()}, [4])
    with METHODS[method](when).prepare(chain(), **KEYS) as hooked:
        found = hooked(data) if when == "step" else hooked.annotate(data)
        assert found["computed", "attr"].tolist() == [True, True, False, True]
        again = hooked.annotate(found.clone().set(("attr", "observation"), found["attr", "observation"] * 0 + 7))
    # What was looked at is not computed again, whether it has a value or not.
    assert bool((again["attr", "observation"].nan_to_num(7.0) == 7).all())
    assert again["computed", "attr"].tolist() == [True, True, False, True]


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_zero_by_zero_inside(when: str, mode: Callable[[], Any]) -> None:
    data = TensorDict({"observation": zeros()}, [4])
    with Saliency(target=ONE, when=when).prepare(Direction(), **KEYS) as hooked, mode():
        found = hooked(data) if when == "step" else hooked.annotate(data)
    assert found["computed", "attr"].tolist() == [True, True, False, True]
    assert torch.isfinite(torch.tensor(summarise(found, [("attr", "observation")])["attr.observation"]))


def test_activations_that_are_nan_and_logits_that_are_infinite() -> None:
    with ActivationCaching("0").prepare(chain(), **KEYS) as hooked:
        found = hooked(TensorDict({"observation": holes(torch.nan)()}, [4]))
        assert found["computed", "cache"].tolist() == [True, True, False, True]

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x > 0, -torch.inf)

    with ActivationCaching("1").prepare(nn.Sequential(nn.Linear(3, 4), Masked()), **KEYS) as hooked:
        assert bool(hooked(TensorDict({"observation": torch.randn(4, 3)}, [4]))["computed", "cache"].all())


def test_every_row_of_a_compiled_step() -> None:
    with Saliency(target=ONE, when="step").prepare(chain(), **KEYS) as hooked, torch.no_grad():
        compiled = torch.compile(hooked, fullgraph=True, backend="aot_eager")
        found = compiled(TensorDict({"observation": holes(torch.nan)()}, [4]))
    assert found["computed", "attr"].tolist() == [True, True, False, True]


# ------------------------------------------------------------------ padding


def padded(policy: Any, nested: bool) -> TensorDict:
    data = CueCorners(batch_size=[6], max_steps=9, seed=0).rollout(24, policy, break_when_any_done=False).detach()
    data = split_trajectories(data, prefix="collector" if nested else None)
    assert not bool(data["collector", "mask"].all() if nested else data["mask"].all())
    return data


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("when", ["step", "batch"])
def test_padding_is_left_out(nested: bool, when: str) -> None:
    with Saliency(when=when).prepare(make_actor()) as policy:
        data = policy.annotate(padded(policy, nested))
    real = data["collector", "mask"] if nested else data["mask"]
    assert torch.equal(data["computed", "attr"], real)
    assert torch.equal(real_rows(data, ("attr", "observation")), real)
    assert bool(data["attr", "observation"][~real].isnan().all() if when == "batch" else True)
    alone = OnlineProbe(features="observation", label=("concept", "xor")) if nested else None
    if alone is not None:
        whole = OnlineProbe(features="observation", label=("concept", "xor")).update(data)
        expected = alone.update(data[real])
        assert {key: value for key, value in whole.items() if value == value} == {
            key: value for key, value in expected.items() if value == value
        }


def test_states_that_are_padding_or_nan_are_not_looked_at() -> None:
    actor = make_actor()
    data = padded(actor, True)
    data["observation"][0, 0] = torch.nan
    real = data["collector", "mask"].clone()
    real[0, 0] = False
    whole = NetworkDiagnostics(actor, sites=[FC2], rows=10_000).update(data)
    expected = NetworkDiagnostics(actor, sites=[FC2], rows=10_000).update(data[real])
    assert whole["states"] == expected["states"] == int(real.sum())
    assert whole[f"norm/{FC2}"] == pytest.approx(expected[f"norm/{FC2}"])


def test_what_would_be_decided_in_padding_is_no_part_of_a_trajectory() -> None:
    core = GRUModule(
        input_size=4, hidden_size=5, in_keys=["observation", "hidden", "is_init"], out_keys=["f", ("next", "hidden")]
    )
    policy = TensorDictSequential(core, TensorDictModule(nn.Linear(5, 2), ["f"], ["logits"]))
    start = torch.zeros(2, 6, 1, dtype=torch.bool)
    start[:, 0] = True
    data = TensorDict(
        {"observation": torch.randn(2, 6, 4), "hidden": torch.zeros(2, 6, 1, 5), "is_init": start}, batch_size=[2, 6]
    )
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    with Saliency(target=ONE, horizon="trajectory", inputs=["observation"]).prepare(policy) as hooked:
        found = hooked.annotate(data.clone().set(("collector", "mask"), real))
        whole, short = hooked.annotate(data[:1]), hooked.annotate(data[1:, :4])
    torch.testing.assert_close(found["attr", "observation"][:1], whole["attr", "observation"])
    torch.testing.assert_close(found["attr", "observation"][1:, :4], short["attr", "observation"])
    assert torch.equal(found["computed", "attr"], real)


def test_a_probe_manager_learns_from_real_rows() -> None:
    def fitted(data: TensorDict) -> Any:
        manager = ProbeManager(LinearEstimator, {}, lambda predictions, labels: {"rows": len(labels)})
        method = Probing("0", manager.probe_factory, additional_keys=["labels", "step_type"])
        with method.prepare(net, **KEYS) as hooked:
            hooked(data.clone().set_non_tensor("step_type", "fit"))
        return manager.fit_metrics["0_fwd"]["rows"]

    net, x = chain(), torch.randn(4, 5, 3)
    x[0, 0] = torch.nan
    data = TensorDict({"observation": x, "labels": torch.arange(20).reshape(4, 5) % 2}, [4, 5])
    assert fitted(data) == 19
    real = torch.ones(4, 5, dtype=torch.bool)
    real[2, 3:] = False
    assert fitted(data.set(("collector", "mask"), real)) == 17


def test_what_tensordict_pads_is_padding_and_masks_of_ones_own_are_not() -> None:
    net = nn.Linear(3, 2)
    pieces = [TensorDict({"observation": torch.randn(n, 3), "inner": {"r": torch.randn(n)}}, [n]) for n in (3, 5)]
    data = pad_sequence(pieces, return_mask=True)
    with Saliency(target=targets.logit(0)).prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
        found = hooked.annotate(data)
        own = hooked.annotate(data.clone().set(("masks", "wall"), data["masks", "observation"]))
    assert torch.equal(found["computed", "attr"], data["masks", "observation"])
    assert bool(own["computed", "attr"].all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (1, FEW), (2, 3, 4), (FEW + 1,), (2, 0)], ids=str)
def test_what_is_surely_finite(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Few entries are added up in Python, more by torch; both see one that is no number, and two that cancel out."""
    value = torch.ones(shape, dtype=dtype)
    assert surely_finite(value)
    for place in {0, value.numel() - 1} if value.numel() else ():
        for odd in (torch.nan, torch.inf, -torch.inf):
            broken = value.clone()
            broken.view(-1)[place] = odd
            assert not surely_finite(broken)
    if value.numel() > 1:
        value.view(-1)[0], value.view(-1)[1] = torch.inf, -torch.inf
        assert not surely_finite(value)


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["observation", "beside"])
@pytest.mark.parametrize("when", ["step", "batch"])
def test_a_row_of_which_only_the_input_is_no_number(when: str, place: str, odd: float, rows: int) -> None:
    """Its gradient is one: that it has no result is seen from its stamp, which adds up what the policy read."""
    net = nn.Bilinear(2, 2, 1, bias=False) if place == "beside" else nn.Linear(2, 1)
    policy = TensorDictModule(net, ["observation", "other"] if place == "beside" else ["observation"], ["out"])
    explained = ["observation"] if place == "observation" else ["other"]
    data = TensorDict({"observation": torch.ones(rows, 2), "other": torch.ones(rows, 2)}, batch_size=rows)
    data[explained[0]][-1, 0] = odd
    with Saliency(inputs=explained, target=targets.output_sum(), when=when).prepare(policy) as hooked:
        found = hooked(data) if when == "step" else hooked.annotate(data, on_mismatch="ignore")
    expected = torch.ones(rows, dtype=torch.bool)
    expected[-1] = False
    assert torch.equal(found["computed", "attr"], expected)

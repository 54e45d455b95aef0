"""Scores are of a row: in whatever chunks, dtypes and schedules it is scored, and of what layers compute with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tdhook_rl import IntegratedGradients, Saliency, Scheduled, targets
from tdhook_rl.attribution import Occlusion
from tdhook_rl.errors import InputError
from tdhook_rl.metrics import (
    InfidelityMetric,
    SensitivityMetric,
    action_churn,
    cascading_randomisation,
    completeness_gap,
    deletion_insertion,
    effective_rank,
    pointing_game,
    random_target_loss,
    relevance_mass,
    spectral_norms,
    stable_rank,
    unit_scores,
)
from tdhook_rl.metrics.randomisation import spearman
from tdhook_rl.weights import TaskVectors

WIDTH = 4
FIRST = targets.Target("first", lambda run: run.outputs["output"][..., 0])
SCORES: dict[str, Callable[..., Tensor]] = {
    "infidelity": lambda hooked, data, **options: InfidelityMetric(3, noise_scale=0.1, **options)(hooked, data),
    "sensitivity": lambda hooked, data, **options: SensitivityMetric(0.1, n_perturb_samples=3, **options)(hooked, data),
    "random rankings": lambda hooked, data, **options: deletion_insertion(hooked, data, **options).random,
    "deletion": lambda hooked, data, **options: deletion_insertion(hooked, data, **options).deletion,
    "completeness": lambda hooked, data, **options: completeness_gap(hooked, data, **options),
}
METHODS = {
    "saliency": Saliency(target=FIRST),
    "path": IntegratedGradients(target=FIRST, baseline=0.5, n_steps=8),
    "occlusion": Occlusion(target=FIRST, baseline=0.5),
}


def network(width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def states(*batch: int, width: int = WIDTH) -> TensorDict:
    numbers = torch.randn(*batch, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDict({"input": numbers}, batch)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("method", METHODS)
def test_a_score_does_not_depend_on_the_rows_scored_at_once(method: str, score: str) -> None:
    with METHODS[method].prepare(network()) as hooked:
        data = hooked.annotate(hooked(states(40)))
        whole = SCORES[score](hooked, data)
        for size in (1, 7, 16, 33):
            torch.testing.assert_close(SCORES[score](hooked, data, chunk_size=size), whole)
        torch.testing.assert_close(SCORES[score](hooked, data[:5]), whole[:5])
        torch.testing.assert_close(SCORES[score](hooked, data.reshape(8, 5)).reshape(-1), whole)
        torch.testing.assert_close(SCORES[score](hooked, data[0]), whole[0])
        assert len(set(whole.tolist())) > 30 or score == "completeness"  # rows have noise of their own


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_scheduled_is_scored_where_it_was_computed(method: str, score: str) -> None:
    data = states(6).set("wanted", torch.arange(6) % 2 == 0)
    with METHODS[method].prepare(network()) as hooked:
        whole = SCORES[score](hooked, hooked.annotate(hooked(data.clone())))
    with Scheduled(METHODS[method], where="wanted").prepare(network()) as hooked:
        found = SCORES[score](hooked, hooked.annotate(hooked(data.clone())))
    torch.testing.assert_close(found, whole.where(data["wanted"], torch.nan), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES)
def test_narrow_policies_have_scores_as_wide_ones_have(score: str, dtype: torch.dtype) -> None:
    """By hand in float64, of a linear network whose numbers are held exactly and whose attribution is wrong."""
    width = 2 if score == "infidelity" else 512
    net = nn.Linear(width, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(2.0**-13 if score == "infidelity" else 16.0)
    found = {}
    for kind in (dtype, torch.float64):
        data = TensorDict({"input": torch.ones(3, width, dtype=kind)}, [3])
        with Saliency().prepare(net.to(kind)) as hooked:
            data = hooked(data)
            data["attr", "input"] = torch.full_like(data["input"], 2.0**-13 if score == "infidelity" else 256.0)
            found[kind] = SCORES[score](hooked, data)
    assert found[dtype].dtype == torch.float32
    if score == "infidelity":  # differences of narrow numbers are rounded, but their squares are not lost
        assert bool((found[dtype] < 1e-8).all())
        return
    torch.testing.assert_close(found[dtype].double(), found[torch.float64], rtol=0.05, atol=0.05)


def test_squares_and_sums_of_narrow_numbers_are_not_lost() -> None:
    mask = torch.arange(400) < 100
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        values = torch.full((2, 400), 600, dtype=dtype)
        torch.testing.assert_close(relevance_mass(values, mask), torch.full((2,), 0.25))
        assert pointing_game(values, mask).tolist() == [0.0, 0.0]
    net = nn.Linear(2, 1, bias=False).half()
    data = TensorDict({"input": torch.ones(3, 2).half()}, [3])
    with Saliency().prepare(net) as hooked:
        data = hooked(data)
        data["attr", "input"] = data["attr", "input"] + 0.002  # infidelity is 2 (0.002 * 0.01) ** 2 and rounding
        assert bool((InfidelityMetric(50)(hooked, data) > 1e-10).all())


def test_correlations_with_rows_that_have_none() -> None:
    first, second = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    first[1, 2] = torch.nan
    expected = torch.tensor([spearmanr(one, two)[0] for one, two in zip(first, second, strict=True)])
    torch.testing.assert_close(spearman(first, second), expected, equal_nan=True)
    data = states(4).set("wanted", torch.tensor([True, False, True, False]))
    found = cascading_randomisation(Scheduled(METHODS["saliency"], where="wanted"), network(), data)
    for correlations in found.values():
        assert correlations.isnan().tolist() == [False, True, False, True]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(6, 8),
    "spectral": lambda: parametrizations.spectral_norm(nn.Linear(6, 8), n_power_iterations=200),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 8)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(6, 8), "weight", 0.8),
    "older spectral": lambda: nn.utils.spectral_norm(nn.Linear(6, 8), n_power_iterations=200),
    "maps": lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 2)),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_spectral_norms_are_of_the_weights_that_layers_use(name: str, inside: bool) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    layer(torch.randn(2, 3, 5, 5) if name == "maps" else torch.randn(2, 6))  # norms are iterated in forward
    layer.eval()
    expected = float(torch.linalg.matrix_norm(layer.weight.detach().double().flatten(1), 2))  # type: ignore[operator]
    found = spectral_norms(nn.Sequential(layer) if inside else layer)
    assert found == {"0" if inside else "": pytest.approx(expected, rel=1e-5)}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_weights_with_vectors_are_loaded_by_networks_that_count() -> None:
    net, tuned = Counting(), Counting()
    with TaskVectors().prepare(net) as hooked:
        weights = hooked.get_weights(hooked.get_task_vector(tuned), alpha=1.0)
    fresh = Counting()
    fresh.count.zero_()
    fresh.load_state_dict(weights)
    assert int(fresh.count) == 3
    torch.testing.assert_close(fresh.layer.weight, tuned.layer.weight)


@pytest.mark.parametrize("rows", [torch.tensor([0, 1, 1, 0]), torch.ones(3, dtype=torch.bool)])
def test_rows_of_a_random_target_loss_are_a_mask_of_all_states(rows: Tensor) -> None:
    module = TensorDictModule(network(), ["input"], ["y"])
    with pytest.raises(InputError, match=r"rows= is a mask of the batch shape \(4,\)"):
        random_target_loss(module, states(4), rows=rows)
    assert random_target_loss(module, states(4), rows=torch.tensor([0, 1, 1, 0]).bool()).shape == (2,)


@pytest.mark.parametrize("measure", [unit_scores, effective_rank, stable_rank])
def test_layers_without_features_are_refused(measure: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"a feature at least"):
        measure(torch.zeros(3, 0))
    with pytest.raises(InputError, match=r"churn compares"):
        action_churn(torch.tensor(1), torch.tensor(1))

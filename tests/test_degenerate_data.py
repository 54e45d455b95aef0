"""Metrics of rows that were not explained, dimensions of degenerate clouds, complex inputs."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import IntegratedGradients, Saliency
from tdhook_rl.errors import InputError
from tdhook_rl.latent.dimension_estimation import (
    CaPcaDimensionEstimator,
    LocalKnnDimensionEstimator,
    TwoNnDimensionEstimator,
)
from tdhook_rl.metrics import completeness_gap, deletion_insertion, pointing_game, relevance_mass
from tdhook_rl.targets import logit

F64 = torch.float64
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=generator)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=F64, generator=generator)


@pytest.mark.parametrize("how", ["nan", "one nan", "mask"])
@pytest.mark.parametrize("batch", [(8,), (2, 4)])
def test_rows_without_an_attribution_have_no_score(how: str, batch: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    with IntegratedGradients(baseline=0.0).prepare(net) as hooked:
        data = hooked(TensorDict({"input": torch.randn(*batch, 6)}, batch_size=batch))
        whole = deletion_insertion(hooked, data), completeness_gap(hooked, data)
        rows = torch.arange(8).reshape(batch) % 2 == 0
        if how == "mask":
            data["computed", "attr"][rows] = False
        else:
            attribution = data["attr", "input"].clone()
            attribution[rows, 0 if how == "one nan" else slice(None)] = torch.nan
            data["attr", "input"] = attribution
        part = deletion_insertion(hooked, data), completeness_gap(hooked, data)
    pairs = [(getattr(whole[0], name), getattr(part[0], name)) for name in ("deletion", "insertion", "deletion_curve")]
    for before, after in (*pairs, (whole[1], part[1])):
        assert bool(after[rows].isnan().all())
        torch.testing.assert_close(before[~rows], after[~rows])


def test_localisation_of_rows_without_an_attribution() -> None:
    attribution = torch.tensor([[2.0, 1.0], [torch.nan, 1.0], [1.0, 2.0]])
    mask = torch.tensor([True, False])
    for sign in ("absolute", "positive"):
        found = pointing_game(attribution, mask, sign=sign)
        torch.testing.assert_close(found, torch.tensor([1.0, torch.nan, 0.0]), equal_nan=True)
        assert relevance_mass(attribution, mask, sign=sign).isnan().tolist() == [False, True, False]


def ca_pca(points: Tensor, **settings: int) -> Tensor:
    return CaPcaDimensionEstimator(**settings)(TensorDict({"data": points}))["dimension"]


@pytest.mark.parametrize("k", [8, 15, 30])
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_ca_pca_at_the_ends_of_flat_things(k: int, noise: float) -> None:
    for dimension in (1, 2):
        flat = uniform(600, dimension) @ normal(dimension, 50)
        found = ca_pca(flat + noise * normal(600, 50), k=k)
        assert float(found.max()) <= dimension
        assert float(found.mean()) > dimension - 0.3
    lines = normal(12, 50).repeat_interleave(50, 0) + 0.01 * normal(600, 1) @ normal(1, 50)
    assert ca_pca(lines + 1e-3 * noise * normal(600, 50), k=k).unique().tolist() == [1.0]


def two_nn(points: Tensor) -> float:
    return float(TwoNnDimensionEstimator()(TensorDict({"data": points}))["dimension"])


@pytest.mark.parametrize("gap", [1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_two_nn_names_near_duplicates(gap: float, share: float) -> None:
    plane = uniform(1000, 2) @ normal(2, 10)
    copies = plane[: int(share * 1000)]
    with pytest.raises(InputError, match="near-duplicates"):
        two_nn(torch.cat([plane, copies + gap * normal(*copies.shape)]))


@pytest.mark.parametrize("estimator", [TwoNnDimensionEstimator, LocalKnnDimensionEstimator])
@pytest.mark.parametrize("times", [2, 3, 5])
def test_ratios_of_distances_name_copies_in_any_number(estimator: type, times: int) -> None:
    """A plane; each point, or each fourth, several times, a rounding apart."""
    torch.manual_seed(0)
    plane = torch.rand(200, 2, dtype=torch.float64) @ torch.randn(2, 10, dtype=torch.float64)
    for copied in (plane, plane[::4]):
        copies = [copied + 1e-9 * torch.randn_like(copied) for _ in range(times - 1)]
        with pytest.raises(InputError, match="near-duplicates"):
            estimator()(TensorDict({"data": torch.cat([plane, *copies])}))


@pytest.mark.parametrize("rows", [200, 1000])
@pytest.mark.parametrize("share", [0.03, 0.05, 0.08])
def test_two_nn_names_a_few_near_duplicates(share: float, rows: int) -> None:
    for dimension in (2, 3, 5):
        cloud = uniform(rows, dimension) @ normal(dimension, 10)
        copies = cloud[: int(share * rows)]
        with pytest.raises(InputError, match="near-duplicates"):
            two_nn(torch.cat([cloud, copies + 1e-8 * normal(*copies.shape)]))


def test_two_nn_of_what_has_a_dimension() -> None:
    for dimension in (1, 2, 5):
        for points in (uniform(1000, dimension), normal(1000, dimension), normal(300, dimension).exp()):
            assert abs(two_nn(points @ normal(dimension, 20)) - dimension) < 0.2 * dimension + 0.1
    few = uniform(1000, 2)
    assert abs(two_nn(torch.cat([few, few[:10] + 1e-9 * normal(10, 2)])) - 2) < 0.3  # those the fit leaves out
    for rows in (3, 5, 10, 20):
        two_nn(uniform(rows, 2))


def test_complex_numbers_are_called_so() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(x).flatten(-2).sum(-1, keepdim=True)

    data = TensorDict({"input": torch.randn(3, 4, dtype=torch.complex64)}, batch_size=3)
    with Saliency().prepare(Reads()) as hooked, pytest.raises(InputError, match=r"complex input 'input'"):
        hooked(data)
    with pytest.raises(InputError, match="complex numbers"):
        TwoNnDimensionEstimator()(TensorDict({"data": torch.randn(9, 4, dtype=torch.complex64)}))


class Divides(nn.Module):
    """Has no number where all features are zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.pow(2).sum(-1, keepdim=True).log().expand_as(x)


class Root(nn.Module):
    """Has a number at zero, and an infinite slope."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 5}, {"compile": {"backend": "aot_eager"}}, {"site": "0"}], ids=str
)
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("layer", [Divides, Logarithm, Root])
def test_a_row_whose_target_is_no_number_has_no_path(layer: type[nn.Module], when: str, options: dict) -> None:
    """Also where it is none at the end only, which no point of a quadrature is; a slope is not asked for there."""
    net = nn.Sequential(nn.Identity(), layer(), nn.Linear(3, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    x[2] = 0.0
    given = {key: value for key, value in options.items() if key != "site"}
    inner = {"input_modules": [options["site"]]} if "site" in options else {}
    method = IntegratedGradients(target=logit(0, "output"), baseline=0.1, n_steps=6, when=when, **given, **inner)
    with method.prepare(net) as hooked, torch.no_grad():
        data = hooked(TensorDict({"input": x}, batch_size=4))
        data = hooked.annotate(data) if when == "batch" else data
    assert data["computed", "attr"].tolist() == [True, True, layer is Root, True]
    found = data["attr", "0" if inner else "input"]
    assert found.isfinite().all(-1).tolist() == [True, True, layer is Root, True]
    if "compile" in options:
        return  # nothing is compiled in inference mode
    with torch.inference_mode(), method.prepare(net) as hooked:
        data = hooked.annotate(hooked(TensorDict({"input": x}, batch_size=4)))
    assert data["computed", "attr"].tolist() == [True, True, layer is Root, True]

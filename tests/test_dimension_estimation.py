"""Intrinsic dimension: brute-force oracles, known manifolds, any batch shape, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook_rl.errors import InputError, KeyCollisionError, MissingKeyError
from tdhook_rl.latent.dimension_estimation import (
    CaPcaDimensionEstimator,
    LocalKnnDimensionEstimator,
    LocalPcaDimensionEstimator,
    TwoNnDimensionEstimator,
)
from tdhook_rl.latent.dimension_estimation.local import _misfit

LOCAL = [
    LocalKnnDimensionEstimator(k=12),
    LocalPcaDimensionEstimator(k=12),
    LocalPcaDimensionEstimator(k=12, criterion="ratio"),
    CaPcaDimensionEstimator(k=12),
]
ALL = [TwoNnDimensionEstimator(), *LOCAL]
NAMES = ["two_nn", "knn", "pca_gap", "pca_ratio", "ca_pca"]


def rotated(points: Tensor, width: int = 10) -> Tensor:
    """The points in a random orientation of a larger space, off its origin."""
    basis = torch.linalg.qr(torch.randn(width, width, dtype=points.dtype)).Q[: points.shape[-1]]
    return points @ basis + 3.0


def plane(rows: int, dimension: int, width: int = 10, dtype: torch.dtype = torch.float64) -> Tensor:
    return rotated(torch.rand(rows, dimension, dtype=dtype), width)


def sphere(rows: int, dimension: int) -> Tensor:
    points = torch.randn(rows, dimension + 1, dtype=torch.float64)
    return rotated(points / points.norm(dim=-1, keepdim=True))


def estimate(estimator, points: Tensor) -> Tensor:
    return estimator(TensorDict({"data": points}))["dimension"]


def neighbourhoods(points: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each point its sorted distances to the others, and their order, one pair at a time."""
    rows = list(points)
    apart = [[np.sqrt(sum((x - y) ** 2)) if x is not y else np.inf for y in rows] for x in rows]
    return [(np.sort(row), np.argsort(row)) for row in apart]


def test_two_nn_equals_the_fit_by_hand() -> None:
    points = plane(60, 3)
    ratios = sorted(d[1] / d[0] for d, _ in neighbourhoods(points.numpy()))
    for discard, kept in ((0.1, 54), (0.0, 59)):
        x = np.log(ratios[:kept])
        y = np.array([-np.log(1 - (i + 1) / 60) for i in range(kept)])
        slope = np.linalg.lstsq(x[:, None], y, rcond=None)[0].item()
        found = TwoNnDimensionEstimator(return_xy=True, discard=discard)(TensorDict({"data": points}))
        np.testing.assert_allclose(found["dimension"].item(), slope, rtol=1e-10)
        np.testing.assert_allclose(found["dimension_x"].numpy(), x, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(found["dimension_y"].numpy(), y, rtol=1e-10)


def test_local_knn_equals_loops() -> None:
    points = plane(50, 3)
    expected = [9 / sum(np.log(d[10] / d[j]) for j in range(10)) for d, _ in neighbourhoods(points.numpy())]
    np.testing.assert_allclose(estimate(LocalKnnDimensionEstimator(k=11), points).numpy(), expected, rtol=1e-9)


def test_the_auto_number_of_neighbours_is_the_square_root() -> None:
    points = plane(50, 3)
    for kind in (LocalKnnDimensionEstimator, LocalPcaDimensionEstimator, CaPcaDimensionEstimator):
        assert torch.equal(estimate(kind(), points), estimate(kind(k=7), points))
    assert len({float(estimate(LocalKnnDimensionEstimator(k=k), points)[0]) for k in (7, 8)}) == 2


@pytest.mark.parametrize("width", [4, 30])
def test_the_local_pcas_equal_loops_over_covariances(width: int) -> None:
    # Anisotropic noise, so that neither answer is the same for every point.
    points = torch.randn(60, width, dtype=torch.float64) * 0.7 ** torch.arange(width).double()
    gaps, counts, adjusted = [], [], []
    for i, (apart, order) in enumerate(neighbourhoods(points.numpy())):
        local = points.numpy()[[i, *order[:9]]]
        values = np.linalg.eigvalsh(np.cov(local.T))[::-1][: min(9, width)]
        gaps.append(1 + max(range(len(values) - 1), key=lambda j: values[j] / values[j + 1]))
        counts.append(sum(value > 0.2 * values[0] for value in values))
        values = np.linalg.eigvalsh(np.cov(points.numpy()[order[:9]].T))[::-1] / apart[9] ** 2
        scores = {}
        for d in range(1, min(8, width) + 1):
            if values[d - 1] < 0.01 * values[0]:
                continue
            tail = sum(values[d:])
            share = (3 * d + 4) / (2 * d * (d + 1))
            scores[d] = np.sqrt(sum((v + share * tail - 1 / (d + 2)) ** 2 for v in values[:d])) + 2 * tail
        adjusted.append(min(scores, key=scores.__getitem__))
    assert min(len(set(gaps)), len(set(counts)), len(set(adjusted))) > 1
    assert estimate(LocalPcaDimensionEstimator(k=9), points).tolist() == gaps
    assert estimate(LocalPcaDimensionEstimator(k=9, criterion="ratio", alpha=0.2), points).tolist() == counts
    assert estimate(CaPcaDimensionEstimator(k=9), points).tolist() == adjusted


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_curvature_correction_is_what_a_cylinder_needs(d: int) -> None:
    # Moments of the volume of x_{d+1} = a u_1^2 / 2 within distance 1, by a midpoint rule for every |u_rest|.
    a = 0.3
    u = (np.arange(40000) + 0.5) / 40000
    height = a * u**2 / 2
    rest = np.clip(1 - u**2 - height**2, 0, None)  # squared radius of the ball of the d - 1 other coordinates
    weight = np.sqrt(1 + (a * u) ** 2) * (rest ** ((d - 1) / 2) if d > 1 else (u**2 + height**2 < 1))
    weight = weight / weight.sum()
    along = (weight * u**2).sum()
    across = (weight * rest).sum() / (d + 1)  # each coordinate of a uniform (d - 1)-ball
    normal = (weight * height**2).sum() - (weight * height).sum() ** 2
    mean = (along + (d - 1) * across) / d
    spectrum = torch.tensor([mean] * d + [normal], dtype=torch.float64)
    left = float(_misfit(spectrum)[d - 1]) - 2 * normal
    flat = np.sqrt(d) * (1 / (d + 2) - mean)
    assert flat > 1e-4
    assert left < 0.06 * flat


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_planes(name: str, dimension: int) -> None:
    estimator = ALL[NAMES.index(name)]
    tolerance = {"two_nn": 0.35, "knn": 0.35, "ca_pca": 0.25}.get(name, 0.01)
    for dtype in (torch.float64, torch.float32):
        found = estimate(estimator, plane(600, dimension, dtype=dtype))
        assert found.dtype == dtype
        assert abs(float(found.mean()) - dimension) < tolerance


@pytest.mark.parametrize("estimator", [ALL[0], ALL[1], ALL[3], ALL[4]], ids=[NAMES[i] for i in (0, 1, 3, 4)])
def test_a_sphere_has_the_dimension_of_its_surface(estimator) -> None:
    assert abs(float(estimate(estimator, sphere(800, 2)).mean()) - 2) < 0.25


def test_the_largest_gap_counts_curvature_but_not_rounding() -> None:
    assert estimate(LocalPcaDimensionEstimator(), sphere(400, 2)).unique().tolist() == [3.0]
    for dtype in (torch.float32, torch.float64):
        padded = torch.nn.functional.pad(torch.rand(100, 2, dtype=dtype), (0, 8))
        assert estimate(LocalPcaDimensionEstimator(), padded).unique().tolist() == [2.0]


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_rotation_scale_and_offset_do_not_matter(estimator) -> None:
    points = torch.randn(80, 5, dtype=torch.float64)
    expected = estimate(estimator, points)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    torch.testing.assert_close(estimate(estimator, 7 * points @ turn - 2), expected)
    order = torch.randperm(80)
    torch.testing.assert_close(estimate(estimator, points[order]), expected[order] if expected.ndim else expected)
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(estimate(estimator, points.float() * scale), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_batched_is_looped(estimator) -> None:
    points = torch.stack([plane(40, 1 + i % 3, 6) for i in range(6)]).reshape(2, 3, 40, 6)
    found = estimator(TensorDict({"data": points}, batch_size=[2, 3]))["dimension"]
    looped = torch.stack([estimate(estimator, cloud) for cloud in points.flatten(0, 1)])
    torch.testing.assert_close(found, looped.reshape(2, 3, *looped.shape[1:]))
    assert looped.unique().numel() > 1


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_the_input_is_left_alone(estimator) -> None:
    points = plane(30, 2)
    data = TensorDict({"data": points.clone()}).lock_()
    found = estimator(data)
    assert found["dimension"].shape == (estimator.__class__ is not TwoNnDimensionEstimator) * (30,)
    assert list(data.keys()) == ["data"]
    assert torch.equal(data["data"], points)
    assert estimator(unlocked := TensorDict({"data": points})) is unlocked
    torch.testing.assert_close(estimator(data=points), found["dimension"])


def test_nested_keys_and_half_precision() -> None:
    points = plane(100, 2)
    two_nn = TwoNnDimensionEstimator(in_key=("cache", "0.1"), out_key=("id", "0.1"), return_xy=True)
    found = two_nn(TensorDict({"cache": {"0.1": points.bfloat16()}}))
    assert found["id", "0.1"].dtype == torch.float32
    assert found["id", "0.1_x"].shape == found["id", "0.1_y"].shape == (90,)
    torch.testing.assert_close(found["id", "0.1"], estimate(TwoNnDimensionEstimator(), points.bfloat16().float()))


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_unusable_points_are_refused(estimator) -> None:
    points = plane(30, 3)
    broken = points.clone()
    broken[4, 2] = float("nan")
    for bad, message in (
        (points[:2], "has 2 points .* at least"),
        (points[0], r"expected \(\.\.\., N, D\)"),
        (points[:, :0], "D >= 1 features"),
        (points.long(), "convert with .float"),
        (broken, "1 points of 'data' have NaN"),
        (points[:1].expand(30, -1), "coincide"),
    ):
        with pytest.raises(InputError, match=message):
            estimate(estimator, bad)
    with pytest.raises(MissingKeyError, match="nearest: 'dota'"):
        estimator(TensorDict({"dota": points}))
    if estimator is not ALL[0]:
        with pytest.raises(InputError, match=r"k=12 .* at most 1[01]"):
            estimate(estimator, points[:12])


def test_duplicates_and_grids() -> None:
    points = plane(40, 2)
    points[7] = points[30]
    for estimator in ALL[:2]:
        with pytest.raises(InputError, match="2 of 40 points of 'data' coincide with another point"):
            estimate(estimator, points)
    assert estimate(LocalPcaDimensionEstimator(), points).unique().tolist() == [2.0]
    points[7] += 1e-9
    assert float(estimate(TwoNnDimensionEstimator(), points)) > 0
    with pytest.raises(InputError, match="2 of 40 points"):
        estimate(TwoNnDimensionEstimator(eps=1e-6), points)
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
    with pytest.raises(InputError, match="as on a grid"):
        estimate(TwoNnDimensionEstimator(), grid)
    with pytest.raises(InputError, match=r"16 points .* larger k"):
        estimate(LocalKnnDimensionEstimator(k=4), grid)


def test_a_batch_size_that_counts_the_points_is_explained() -> None:
    data = TensorDict({"data": plane(60, 2).reshape(3, 20, 10)}, batch_size=[3, 20])
    with pytest.raises(InputError, match=r"batch_size=\[3\]"):
        TwoNnDimensionEstimator()(data)
    assert LocalPcaDimensionEstimator()(data)["dimension"].shape == (3, 20)


def test_bad_settings_are_refused() -> None:
    for make, message in (
        (lambda: LocalKnnDimensionEstimator(k=2), "at least 3, got 2"),
        (lambda: CaPcaDimensionEstimator(k=True), "got True"),
        (lambda: LocalPcaDimensionEstimator(criterion="elbow"), "'elbow'"),
        (lambda: LocalPcaDimensionEstimator(alpha=1.0), "between 0 and 1"),
        (lambda: TwoNnDimensionEstimator(discard=1.0), r"\[0, 1\)"),
        (lambda: TwoNnDimensionEstimator(eps=-1.0), "at least 0"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    with pytest.raises(KeyCollisionError, match="another out_key"):
        TwoNnDimensionEstimator(out_key="data")

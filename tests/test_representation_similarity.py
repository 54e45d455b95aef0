"""CKA and information imbalance: explicit oracles, invariances, bias, degenerate input, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook_rl.errors import InputError, KeyCollisionError, MissingKeyError
from tdhook_rl.latent.representation_similarity import CkaEstimator, InformationImbalanceEstimator

KINDS = [(kernel, debiased) for kernel in ("linear", "rbf") for debiased in (False, True)]


def pair(rows: int = 30, a: int = 5, b: int = 7) -> tuple[Tensor, Tensor]:
    """Two related representations, off their origins."""
    x = torch.randn(rows, a, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(a, b, dtype=torch.float64)) + 0.3 * torch.randn(rows, b, dtype=torch.float64)
    return x + 2, 5 * y - 1


def cka(a: Tensor, b: Tensor, **settings) -> Tensor:
    return CkaEstimator(**settings)(TensorDict({"data_a": a, "data_b": b}))["cka"]


def imbalance(a: Tensor, b: Tensor, **settings) -> tuple[Tensor, Tensor]:
    found = InformationImbalanceEstimator(**settings)(TensorDict({"data_a": a, "data_b": b}))
    return found["information_imbalance_a_to_b"], found["information_imbalance_b_to_a"]


def gram(points: np.ndarray, kernel: str, bandwidth: float = 1.0) -> np.ndarray:
    if kernel == "linear":
        return np.array([[x @ y for y in points] for x in points])
    apart = np.array([[np.linalg.norm(x - y) for y in points] for x in points])
    pairs = sorted(apart[i, j] for i in range(len(points)) for j in range(i))
    return np.exp(-(apart**2) / (2 * (bandwidth * pairs[(len(pairs) - 1) // 2]) ** 2))


def hsic(k: np.ndarray, m: np.ndarray, debiased: bool) -> float:
    """trace(K H L H), or the unbiased estimator in the form of Song et al. 2012, equation 5."""
    n = len(k)
    if not debiased:
        h = np.eye(n) - 1 / n
        return np.trace(k @ h @ m @ h)
    k, m, one = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
    return (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


@pytest.mark.parametrize(("kernel", "debiased"), KINDS)
@pytest.mark.parametrize("widths", [(5, 7), (40, 60)], ids=["narrow", "wide"])
def test_cka_equals_explicit_gram_matrices(kernel: str, debiased: bool, widths: tuple[int, int]) -> None:
    a, b = pair(30, *widths)
    k, m = gram(a.numpy(), kernel, 0.7), gram(b.numpy(), kernel, 0.7)
    expected = hsic(k, m, debiased) / np.sqrt(hsic(k, k, debiased) * hsic(m, m, debiased))
    assert 0.02 < abs(expected) < 0.98
    found = cka(a, b, kernel=kernel, debiased=debiased, bandwidth=0.7)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-9)
    np.testing.assert_allclose(cka(b, a, kernel=kernel, debiased=debiased, bandwidth=0.7).item(), expected, rtol=1e-9)
    single = cka(a.float(), b.float(), kernel=kernel, debiased=debiased, bandwidth=0.7)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.item(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kernel", "debiased"), KINDS)
def test_cka_sees_neither_rotation_nor_scale_nor_offset(kernel: str, debiased: bool) -> None:
    a, b = pair()
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    same = 4 * a @ turn + 10
    settings = {"kernel": kernel, "debiased": debiased}
    for other in (a, same):
        torch.testing.assert_close(cka(a, other, **settings), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(cka(same, b, **settings), cka(a, b, **settings))
    stretched = a * torch.tensor([1, 1, 1, 1, 30.0], dtype=torch.float64)
    assert float(cka(a, stretched, **settings)) < 0.9
    for scale in (1e-30, 1e30):
        found = cka(a.float() * scale, b.float(), **settings)
        torch.testing.assert_close(found, cka(a, b, **settings).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_only_the_debiased_cka_of_independent_data_is_about_zero(kernel: str) -> None:
    a, b = torch.randn(20, 40, 300), torch.randn(20, 40, 200)
    biased = cka(a, b, kernel=kernel)
    unbiased = cka(a, b, kernel=kernel, debiased=True)
    assert float(biased.min()) > 0.7
    assert abs(float(unbiased.mean())) < 0.03
    assert float(unbiased.min()) < 0 < float(unbiased.max())


def test_a_constant_representation_has_no_similarity() -> None:
    a, b = torch.randn(3, 20, 4), torch.randn(3, 20, 30)
    a[1] = torch.tensor([0.1, 1000.3, -7.7, 0.0])
    for kernel, debiased in KINDS:
        settings = {"kernel": kernel, "debiased": debiased}
        for found in (cka(a, b, **settings), cka(a, a, **settings), cka(b, a, **settings)):
            assert found.isnan().tolist() == [False, True, False]
    # One point apart from the others: their unbiased HSIC is a difference of equal terms.
    a[1, 3] += 1
    assert float(cka(a, a)[1]) == pytest.approx(1, abs=1e-4)
    for other in (a, b):
        assert cka(a, other, debiased=True).isnan().tolist() == [False, True, False]


def test_cka_has_a_gradient() -> None:
    a, b = pair(6, 2, 3)
    for kernel, debiased in KINDS:
        assert torch.autograd.gradcheck(
            lambda x, kernel=kernel, debiased=debiased: cka(x, b, kernel=kernel, debiased=debiased),
            a.clone().requires_grad_(),
        )


def brute_imbalance(a: np.ndarray, b: np.ndarray, p: float) -> float:
    """Facing each point: every nearest neighbour in a, its rank in b counted by hand, ties at their middle."""
    n, total = len(a), 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i]
        from_a = {j: np.linalg.norm(a[i] - a[j], ord=p) for j in others}
        from_b = {j: np.linalg.norm(b[i] - b[j], ord=p) for j in others}
        nearest = [j for j in others if from_a[j] == min(from_a.values())]
        ranks = []
        for j in nearest:
            below = sum(from_b[other] < from_b[j] for other in others)
            level = sum(from_b[other] == from_b[j] for other in others)
            ranks.append(below + (level + 1) / 2)
        total += sum(ranks) / len(ranks)
    return 2 * total / n**2


@pytest.mark.parametrize("p", [1, 2, float("inf")])
def test_information_imbalance_equals_counting(p: float) -> None:
    a, b = pair(25, 3, 2)
    tied = torch.randint(0, 3, (25, 2)).double()
    for x, y in ((a, b), (a, tied), (tied, b)):
        expected = brute_imbalance(x.numpy(), y.numpy(), p), brute_imbalance(y.numpy(), x.numpy(), p)
        np.testing.assert_allclose([v.item() for v in imbalance(x, y, p=p)], expected, rtol=1e-12)


def test_information_imbalance_of_known_pairs() -> None:
    a = torch.rand(400, 2)
    turn = torch.linalg.qr(torch.randn(2, 2)).Q
    for other in (a, 3 * a @ turn + 1):
        for value in imbalance(a, other):
            assert float(value) == pytest.approx(2 / 400, rel=0.01)
    for value in imbalance(a, torch.rand(400, 2)):
        assert 0.9 < float(value) < 1.1
    down, up = imbalance(a, a[:, :1])
    assert float(down) < 0.1
    assert float(up) > 0.3
    for value in imbalance(a, torch.full((400, 3), 0.3)):
        assert float(value) == pytest.approx(1)


def test_batched_is_looped() -> None:
    pairs = [pair(20, 4, 3) for _ in range(6)]
    a, b = (torch.stack(side).reshape(2, 3, 20, -1) for side in zip(*pairs, strict=True))
    estimators = [CkaEstimator(kernel=kernel, debiased=debiased) for kernel, debiased in KINDS]
    for estimator in (*estimators, InformationImbalanceEstimator()):
        found = estimator(TensorDict({"data_a": a, "data_b": b}, batch_size=[2, 3]))
        for key in estimator.out_keys:
            looped = torch.stack([estimator(TensorDict({"data_a": x, "data_b": y}))[key] for x, y in pairs])
            assert looped.unique().numel() == 6
            torch.testing.assert_close(found[key], looped.reshape(2, 3))


@pytest.mark.parametrize("estimator", [CkaEstimator(), InformationImbalanceEstimator()], ids=["cka", "imbalance"])
def test_the_input_is_left_alone_and_bad_input_refused(estimator) -> None:
    a, b = pair()
    data = TensorDict({"data_a": a.clone(), "data_b": b.clone()}).lock_()
    found = estimator(data)
    assert set(found.keys()) == {"data_a", "data_b", *estimator.out_keys}
    assert set(data.keys()) == {"data_a", "data_b"}
    assert torch.equal(data["data_a"], a)
    broken = b.clone()
    broken[3, 1] = float("inf")
    for other, message in (
        (b[:-1], r"\(30, 5\) and 'data_b' \(29, 7\)"),
        (b.expand(2, -1, -1), "the same points"),
        (broken, "1 points of 'data_b' have NaN or infinite"),
        (b.int(), "convert with .float"),
        (b[0], r"expected \(\.\.\., N, D\)"),
        (b[:1], "has 1 points"),
    ):
        with pytest.raises(InputError, match=message):
            estimator(TensorDict({"data_a": a, "data_b": other}))
    with pytest.raises(MissingKeyError, match=r"reads 'data_b', .*nearest: 'data_a'"):
        estimator(TensorDict({"data_a": a}))
    with pytest.raises(InputError, match="batch size"):
        estimator(TensorDict({"data_a": a, "data_b": b}, batch_size=[30]))


def test_mixed_precision_takes_the_higher() -> None:
    a, b = pair()
    assert cka(a.half(), b).dtype == torch.float64
    torch.testing.assert_close(cka(a, b.half()), cka(a, b.half().double()))


def test_bad_settings_are_refused() -> None:
    a, b = pair()
    with pytest.raises(InputError, match="'linear' or 'rbf', got 'cosine'"):
        CkaEstimator(kernel="cosine")
    with pytest.raises(InputError, match="bandwidth"):
        CkaEstimator(bandwidth=0.0)
    with pytest.raises(InputError, match="norm, at least 1"):
        InformationImbalanceEstimator(p=0.5)
    for make in (
        lambda: CkaEstimator(out_key="data_b"),
        lambda: InformationImbalanceEstimator(out_key_a_to_b="data_a"),
    ):
        with pytest.raises(KeyCollisionError, match="another out_key"):
            make()
    with pytest.raises(InputError, match=r"3 points .* at least 4"):
        cka(a[:3], b[:3], debiased=True)
    crowded = a.clone()
    crowded[:25] = 0
    with pytest.raises(InputError, match="half of the pairs of points of 'data_b' coincide"):
        cka(a, crowded, kernel="rbf")

"""Many numbers of one site at once: ridge regression from sums, as :mod:`tdhook_rl.latent.probing.bank` has classes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.class_statistics import usual_penalty
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.moments import Moments, blocks_about, raw_bias, solve_symmetric, spread_of
from tdhook_rl.latent.probing.penalties import PENALTIES


class ValueProbes:
    """The probes of all numbers of a bank.

    Attributes:
        weight: ``(numbers, features)``, float32.
        bias: ``(numbers,)``, float64.
        penalty: ``(numbers,)``, what each was fitted with.
    """

    def __init__(self, weight: Tensor, bias: Tensor, penalty: Tensor) -> None:
        self.weight, self.bias, self.penalty = weight, bias, penalty

    def predict(self, features: Tensor) -> Tensor:
        """``(rows, numbers)`` of rows, in float64."""
        return torch.addmm(self.bias, features.double(), self.weight.double().T)

    def one(self, numbers: slice, path: str, facts: dict[str, float]) -> LinearProbe:
        """The probe of some of the numbers, to read out, to push and to save."""
        return LinearProbe(
            weight=self.weight[numbers].clone(), bias=self.bias[numbers].clone(), kind="ridge", concept="values",
            path=path, facts={**facts, "penalty": float(self.penalty[numbers].max())},
        )  # fmt: skip


class ValueBank(Moments):
    """Ridge regressions (Hoerl & Kennard 1970) of several numbers, on features that are scaled to variance 1.

    Args:
        features: the length of a feature vector.
        numbers: how many numbers a row has.

    Attributes:
        shift, target_shift: the means of the first rows; everything is kept about them, in float64.
        rows: ``(2,)``, of each half of the training groups.
        moment: ``(2, features, features)``.
        total: ``(2, features)``.
        of_targets, squares: ``(2, numbers)``.
        cross: ``(2, numbers, features)``.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> bank = ValueBank(features=3, numbers=1)
        >>> bank.add(x, 2 * x[:, :1] + 5, torch.arange(200) % 2)
        >>> probes = bank.solve()
        >>> probes.weight.round(decimals=2).tolist(), round(probes.bias.item(), 2)
        ([[2.0, 0.0, 0.0]], 5.0)
    """

    _sums = ("rows", "moment", "total", "of_targets", "squares", "cross")

    @torch.inference_mode(False)
    def __init__(self, *, features: int, numbers: int) -> None:
        if numbers < 1:
            raise InputError(f"a bank is of at least 1 number, got {numbers}")
        super().__init__(features=features, parts=(2,))
        self.target_shift = torch.zeros(numbers).double()
        self.rows = torch.zeros(2).double()
        self.total = torch.zeros(2, features).double()
        self.of_targets, self.squares = torch.zeros(2, numbers).double(), torch.zeros(2, numbers).double()
        self.cross = torch.zeros(2, numbers, features).double()

    @torch.inference_mode(False)
    def add(self, features: Tensor, values: Tensor, halves: Tensor | None) -> None:
        """Add training rows.

        Args:
            features: ``(rows, features)``, finite.
            values: ``(rows, numbers)``, finite.
            halves: ``(rows,)``, 0 or 1; ``None`` puts all into the first.
        """
        if not len(features):
            return
        if self._begin(features):
            self.target_shift = values.double().mean(0)
        for half in (0,) if halves is None else (0, 1):
            rows, of_rows = (one if halves is None else one[halves == half] for one in (features, values))
            self.rows[half] += len(rows)
            for part, block in blocks_about(self.shift, rows):
                wanted = of_rows[part].double() - self.target_shift
                self.moment[half].addmm_(block.T, block)
                self.total[half] += block.sum(0)
                self.of_targets[half] += wanted.sum(0)
                self.squares[half] += wanted.square().sum(0)
                self.cross[half].addmm_(wanted.T, block)

    @torch.inference_mode(False)
    def __add__(self, other: ValueBank) -> ValueBank:
        if self.cross.shape != other.cross.shape:
            raise InputError(
                f"sums of {tuple(self.cross.shape[1:])} and {tuple(other.cross.shape[1:])} (numbers, features) do not "
                "add"
            )
        if not (self._begun and other._begun):
            return copy.deepcopy(self if self._begun else other)
        merged, away, apart = copy.deepcopy(self), other.shift - self.shift, other.target_shift - self.target_shift
        rows = other.rows[:, None]
        crossed = other.total[:, :, None] * away
        merged.moment += other.moment + crossed + crossed.transpose(1, 2) + rows[..., None] * torch.outer(away, away)
        total = other.total + rows * away
        merged.cross += other.cross + other.of_targets[..., None] * away + apart[:, None] * total[:, None]
        merged.squares += other.squares + 2 * apart * other.of_targets + rows * apart.square()
        merged.rows += other.rows
        merged.total += total
        merged.of_targets += other.of_targets + rows * apart
        merged.resolution = max(self.resolution, other.resolution)
        return merged

    def solve(self, penalty: Tensor | None = None) -> ValueProbes:
        """The probes of all numbers.

        Args:
            penalty: ``(numbers,)``, added to the diagonal of the covariance of scaled features.
        """
        return self._sums_of((0, 1)).solve(penalty)

    def choose(self) -> Tensor:
        """The penalty of each number that errs least across the two halves, ``(numbers,)``."""
        halves = [self._sums_of((half,)) for half in (0, 1)]
        usual = usual_penalty(self.width, float(self.rows.sum()))
        chosen = torch.full_like(self.target_shift, usual)
        if any(one.count <= 1 for one in halves):
            return chosen
        found = torch.zeros(len(PENALTIES), len(chosen)).double()
        for fitted, judging in (halves, halves[::-1]):
            for place, penalty in enumerate(PENALTIES):
                found[place] += judging.error(fitted.solve(torch.full_like(chosen, penalty)))
        good = found <= found.amin(0) * (1 + 1e-4)
        largest = len(PENALTIES) - 1 - good.flip(0).long().argmax(0)
        known = torch.isfinite(found).all(0)
        return torch.where(known, torch.tensor(PENALTIES, dtype=torch.float64)[largest], chosen)

    def _sums_of(self, halves: tuple[int, ...]) -> _Sums:
        return _Sums(self, [getattr(self, name)[list(halves)].sum(0) for name in self._sums])


class _Sums:
    """Sums of some of the rows, as means and covariances of scaled features."""

    def __init__(self, bank: ValueBank, sums: list[Tensor]) -> None:
        rows, moment, total, of_targets, squares, cross = sums
        self.bank, self.count = bank, float(rows)
        safe = rows.clamp_min(1e-300)
        self.mean, self.target_mean = total / safe, of_targets / safe
        self.covariance = moment / safe - torch.outer(self.mean, self.mean)
        self.cross = cross / safe - torch.outer(self.target_mean, self.mean)
        self.variance = squares / safe - self.target_mean.square()
        spread = spread_of(self.mean, self.covariance.diagonal(), bank.shift, bank.resolution)
        self.live = torch.isfinite(spread).nonzero().squeeze(-1)
        self.spread = spread[self.live]
        self.scaled = self.covariance[self.live][:, self.live] / torch.outer(self.spread, self.spread)

    def solve(self, penalty: Tensor | None) -> ValueProbes:
        numbers, width = self.cross.shape
        if penalty is None:
            penalty = torch.full((numbers,), usual_penalty(len(self.live), self.count), dtype=torch.float64)
        weight = torch.zeros(numbers, width, dtype=torch.float64)
        for value in penalty.unique().tolist():
            chosen = (penalty == value).nonzero().squeeze(-1)
            matrix = self.scaled.clone()
            matrix.diagonal().add_(value)
            right = (self.cross[chosen][:, self.live] / self.spread).T
            weight[chosen[:, None], self.live] = solve_symmetric(matrix, right, floor=1e-9).T / self.spread
        stored, bias = raw_bias(weight, self.mean + self.bank.shift, self.target_mean + self.bank.target_shift)
        return ValueProbes(stored, bias, penalty)

    def error(self, probes: ValueProbes) -> Tensor:
        """The mean squared error of the probes of others in these rows, ``(numbers,)``."""
        weight = probes.weight.double()
        at_mean = weight @ (self.mean + self.bank.shift) + probes.bias
        away = at_mean - self.target_mean - self.bank.target_shift
        explained = (weight @ self.covariance * weight).sum(1) - 2 * (weight * self.cross).sum(1)
        return self.variance + explained + away.square()

"""Many numbers of several sources at once: ridge regression from sums, as the bank of classes has discriminants."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.class_statistics import usual_penalty
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.moments import raw_bias
from tdhook_rl.latent.probing.penalties import PENALTIES
from tdhook_rl.latent.probing.stacked import Scaled, StackedMoments, of_halves


class ValueProbes:
    """The probes of all sources and numbers of a bank.

    Attributes:
        weight: ``(sources, numbers, features)``, float32.
        bias: ``(sources, numbers)``, float64.
        penalty: ``(sources, numbers)``, what each was fitted with.
    """

    def __init__(self, weight: Tensor, bias: Tensor, penalty: Tensor) -> None:
        self.weight, self.bias, self.penalty = weight, bias, penalty

    def predict(self, features: Sequence[Tensor]) -> Tensor:
        """``(rows, sources, numbers)`` of the rows of each source, in float64."""
        each = zip(self.bias, features, self.weight.double(), strict=True)
        return torch.stack([torch.addmm(bias, rows.double(), weight.T) for bias, rows, weight in each], 1)

    def one(self, source: int, number: int, path: str, facts: dict[str, float]) -> LinearProbe:
        """The probe of one number, to read out, to push and to save."""
        return LinearProbe(
            weight=self.weight[source, number, None].clone(), bias=self.bias[source, number, None].clone(),
            kind="ridge", concept="values", path=path,
            facts={**facts, "penalty": float(self.penalty[source, number])},
        )  # fmt: skip


class ValueBank(StackedMoments):
    """Ridge regressions (Hoerl & Kennard 1970) of several numbers, on features that are scaled to variance 1.

    Args:
        sources, features: as of :class:`StackedMoments`.
        numbers: how many numbers a row has.

    Attributes:
        shift, moment: as of :class:`StackedMoments`.
        target_shift: ``(numbers,)``, the means of the first rows; the numbers are kept about them, in float64.
        rows: ``(sources, 2)``, of each half of the training groups.
        total: ``(sources, 2, features)``.
        of_targets, squares: ``(sources, 2, numbers)``.
        cross: ``(sources, 2, numbers, features)``.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> bank = ValueBank(sources=1, features=3, numbers=1)
        >>> bank.add([x], 2 * x[:, :1] + 5, torch.arange(200).chunk(2))
        >>> probes = bank.solve()
        >>> probes.weight[0].round(decimals=2).tolist(), round(probes.bias.item(), 2)
        ([[2.0, 0.0, 0.0]], 5.0)
    """

    _sums = ("rows", "moment", "total", "of_targets", "squares", "cross")

    @torch.inference_mode(False)
    def __init__(self, *, sources: int, features: int, numbers: int) -> None:
        if numbers < 1:
            raise InputError(f"a bank is of at least 1 number, got {numbers}")
        super().__init__(sources=sources, features=features)
        self.target_shift = torch.zeros(numbers).double()
        self.rows = torch.zeros(sources, 2).double()
        self.total = torch.zeros(sources, 2, features).double()
        self.of_targets, self.squares = (torch.zeros(sources, 2, numbers).double() for _ in range(2))
        self.cross = torch.zeros(sources, 2, numbers, features).double()

    @torch.inference_mode(False)
    def add(
        self, features: Sequence[Tensor], values: Tensor, halves: Sequence[Tensor], usable: Tensor | None = None
    ) -> None:
        """Add training rows.

        Args:
            features, halves, usable: as of :meth:`ClassBank.add`.
            values: ``(rows, numbers)``, finite where rows are usable.
        """
        if not sum(map(len, halves)):
            return
        if self._start(features, halves, usable):
            known = values[torch.cat(list(halves))].double()
            known = known[torch.isfinite(known).all(1)]
            self.target_shift = known.mean(0) if len(known) else self.target_shift
        for half, part, sources in self._halves(features, halves, usable):
            about = values[part].double() - self.target_shift
            for source, block, counts in sources:
                wanted = about if counts is None else about.masked_fill(~counts[:, None], 0)
                self.rows[source, half] += len(part) if counts is None else counts.sum()
                self.total[source, half] += block.sum(0)
                self.of_targets[source, half] += wanted.sum(0)
                self.squares[source, half] += wanted.square().sum(0)
                self.cross[source, half].addmm_(wanted.T, block)

    @torch.inference_mode(False)
    def __add__(self, other: ValueBank) -> ValueBank:
        if self.cross.shape != other.cross.shape:
            own, its = (tuple(one.cross[:, 0].shape) for one in (self, other))
            raise InputError(f"sums of {own} and {its} (sources, numbers, features) do not add")
        if not (self._begun and other._begun):
            return copy.deepcopy(self if self._begun else other)
        merged, apart = copy.deepcopy(self), other.target_shift - self.target_shift
        away = (other.shift - self.shift)[:, None]  # (sources, 1, features)
        rows = other.rows[..., None]
        crossed = other.total[..., None] * away[:, :, None]
        merged.moment += other.moment + crossed + crossed.mT + rows[..., None] * (away.mT * away)[:, None]
        total = other.total + rows * away
        merged.cross += (
            other.cross + other.of_targets[..., None] * away[:, :, None] + apart[:, None] * total[:, :, None]
        )
        merged.squares += other.squares + 2 * apart * other.of_targets + rows * apart.square()
        merged.rows += other.rows
        merged.total += total
        merged.of_targets += other.of_targets + rows * apart
        merged.resolution = max(self.resolution, other.resolution)
        return merged

    def solve(self, penalty: Tensor | None = None) -> ValueProbes:
        """The probes of all numbers.

        Args:
            penalty: ``(sources, numbers)``, added to the diagonal of the covariance of scaled features.
        """
        return self._of((0, 1)).probes(penalty)

    def choose(self) -> Tensor:
        """The penalty of each number that errs least across the two halves, ``(sources, numbers)``."""
        halves = [self._of((half,)) for half in (0, 1)]
        usual = [usual_penalty(self.width, max(rows, 1.0)) for rows in self.rows.sum(1).tolist()]
        chosen = torch.tensor(usual, dtype=torch.float64)[:, None].expand(len(usual), len(self.target_shift))
        enough = torch.stack([one.rows > 1 for one in halves]).all(0)
        if not bool(enough.any()):
            return chosen
        tried = torch.tensor(PENALTIES, dtype=torch.float64)
        first, second = halves
        found = first.error(second, tried) + second.error(first, tried)  # (penalties, sources, numbers)
        # What errs by rounding alone does as well as any: the least error may come out below 0.
        rounding = 1e-12 * (first.variance + second.variance)
        good = found <= found.amin(0).clamp_min(0) * (1 + 1e-4) + rounding
        largest = len(tried) - 1 - good.flip(0).long().argmax(0)
        return torch.where(torch.isfinite(found).all(0) & enough[:, None], tried[largest], chosen)

    def _of(self, halves: tuple[int, ...]) -> _Sums:
        return _Sums(self, [of_halves(getattr(self, name), halves) for name in self._sums])


class _Sums(Scaled):
    """What is solved: sums of some of the rows."""

    def __init__(self, bank: ValueBank, sums: list[Tensor]) -> None:
        rows, moment, total, of_targets, squares, cross = sums
        super().__init__(moment, total, rows, bank.shift, bank.resolution)
        safe = rows.clamp_min(1e-300)[:, None]
        about = of_targets / safe
        self.target_mean = about + bank.target_shift
        self.cross = cross / safe[..., None] - about[..., None] * self.mean[:, None]
        self.variance = squares / safe - about.square()

    def probes(self, penalty: Tensor | None) -> ValueProbes:
        if penalty is None:
            usual = map(usual_penalty, self.live.sum(1).tolist(), self.rows.clamp_min(1).tolist())
            penalty = torch.tensor(list(usual), dtype=torch.float64)[:, None].expand(self.cross.shape[:2])
        weight = self.solved(self._right, penalty)[:, :, 0] / self.spread[:, None]
        return ValueProbes(*raw_bias(weight, self.mean + self.shift, self.target_mean), penalty)

    def error(self, other: _Sums, penalties: Tensor) -> Tensor:
        """The mean squared error that the probes of others, with each penalty, have in these rows.

        Returns:
            ``(penalties, sources, numbers)``.
        """
        weight = other.with_each(penalties, other._right)[:, :, :, 0] / other.spread[:, None]
        at_mean = other.target_mean + (weight @ (self.mean - other.mean)[..., None]).squeeze(-1)
        scaled = weight * self.finite[:, None]
        explained = (scaled @ self.covariance * scaled).sum(-1) - 2 * (weight * self.cross).sum(-1)
        return self.variance + explained + (at_mean - self.target_mean).square()

    @property
    def _right(self) -> Tensor:
        """``(sources, numbers, 1, features)``, the products of numbers and scaled features."""
        return (self.cross / self.spread[:, None])[:, :, None]

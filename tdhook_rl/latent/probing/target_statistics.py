"""Sufficient statistics of a probe of numbers, or of several yes-or-no labels at once."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.class_statistics import NEVER, RIDGE, check_solve, usual_penalty
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.moments import Moments, raw_bias, require_size, ridge_weights, solve_symmetric


class TargetStatistics(Moments):
    """Sums of features, targets and their products, in float64 about the means of the first rows.

    Args:
        features: the length of a feature vector.
        targets: how many numbers, or labels, a row has.
        labels: the targets are yes-or-no labels (0 and 1), each a concept of its own; otherwise numbers.

    Attributes:
        rows: how many.
        total: ``(features,)``, the sum of ``x - shift``.
        of_targets: ``(targets,)``, the sum of the targets (about ``target_shift``).
        cross: ``(targets, features)``, the sum of their products.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> stats = TargetStatistics(features=3, targets=1)
        >>> stats.add(x, 2 * x[:, :1] + 5)
        >>> probe = stats.solve(kind="ridge", penalty=0.0)
        >>> probe.weight.round(decimals=3).tolist(), round(probe.bias.item(), 3)
        ([[2.0, 0.0, 0.0]], 5.0)
    """

    _sums = ("rows", "total", "of_targets", "cross", "moment")

    @checked
    @torch.inference_mode(False)
    def __init__(self, *, features: int, targets: int, labels: bool = False) -> None:
        super().__init__(features=features)
        if targets < 1:
            raise InputError(f"a probe has at least 1 target, got {targets}")
        self.labels = labels
        self.rows = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(features, dtype=torch.float64)
        self.of_targets = torch.zeros(targets, dtype=torch.float64)
        self.cross = torch.zeros(targets, features, dtype=torch.float64)
        self.target_shift = torch.zeros(targets, dtype=torch.float64)

    @torch.inference_mode(False)
    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows.

        Args:
            features: ``(rows, features)``.
            targets: ``(rows, targets)``.

        Raises:
            InputError: for shapes that do not fit, labels other than 0 and 1, NaN.
        """
        values = self.checked_targets(targets)
        rows = self._checked(features, len(values))
        if len(values) and not self._begun and not self.labels:
            self.target_shift = values.mean(0)
        values = values - self.target_shift
        for part, block in self._blocks(rows):
            self.total += block.sum(0)
            self.cross += values[part].T @ block
        self.rows += len(values)
        self.of_targets += values.sum(0)

    def checked_targets(self, targets: Tensor) -> Tensor:
        """The targets, ``(rows, targets)``, float64 on the CPU.

        Raises:
            InputError: for another shape, labels other than 0 and 1, NaN, or targets that are too large.
        """
        if targets.ndim != 2 or targets.shape[1] != len(self.of_targets):
            raise InputError(f"targets are (rows, {len(self.of_targets)}), got {tuple(targets.shape)}")
        values = targets.detach().cpu().double()
        if not bool(torch.isfinite(values).all()):
            raise InputError("targets hold NaN or infinite values; drop those rows first")
        require_size(values, "targets")
        if self.labels and not bool(((values == 0) | (values == 1)).all()):
            raise InputError(f"labels are 0 or 1 in each column, got {values.min():g} to {values.max():g}")
        return values

    @property
    def positives(self) -> Tensor:
        """``(targets,)``: how many rows have each label."""
        return self.of_targets

    @torch.inference_mode(False)
    def __add__(self, other: TargetStatistics) -> TargetStatistics:
        if self.cross.shape != other.cross.shape or self.labels != other.labels:
            raise InputError(
                f"statistics of {tuple(self.cross.shape)} and {tuple(other.cross.shape)} (targets, features), or of "
                "labels and numbers, do not add"
            )
        if not (self._begun and other._begun):
            return copy.deepcopy(self if self._begun else other)
        merged, away = self._merged(other, other.total, other.rows)
        apart = other.target_shift - self.target_shift
        merged.rows += other.rows
        merged.total = self.total + other.total + other.rows * away
        merged.of_targets = self.of_targets + other.of_targets + other.rows * apart
        moved = torch.outer(other.of_targets, away) + torch.outer(apart, other.total + other.rows * away)
        merged.cross = self.cross + other.cross + moved
        return merged

    def solve(
        self,
        *,
        kind: Literal["lda", "ridge"] = "ridge",
        penalty: float | None = None,
        path: str = "",
        priors: Literal["rows", "equal"] = "rows",
    ) -> LinearProbe:
        """The probe that these rows determine: all targets from one factorisation.

        Args:
            kind, penalty, path, priors: as of :meth:`ClassStatistics.solve`; numbers take ``"ridge"``.

        Raises:
            InputError: without rows; for a discriminant of numbers.
        """
        check_solve(kind, penalty, priors)
        if self.rows <= 0:
            raise InputError("cannot fit a probe: there is no row")
        if kind == "lda" and not self.labels:
            raise InputError("a discriminant tells classes apart: for numbers use kind='ridge'")
        mean = self.total / self.rows
        covariance = self.moment / self.rows - torch.outer(mean, mean)
        cross = self.cross / self.rows - torch.outer(self.of_targets / self.rows, mean)
        if kind == "ridge":
            spread = self._scale(mean, covariance.diagonal()) if penalty is None else None
            weight = ridge_weights(covariance, cross, (RIDGE if penalty is None else penalty) / self.rows, spread)
            at_mean = self.of_targets / self.rows + self.target_shift
            stored, bias = raw_bias(weight, mean + self.shift, at_mean)
        else:
            stored, bias = self._discriminants(mean, covariance, cross, penalty, priors)
        return LinearProbe(
            weight=stored, bias=bias, kind=kind, path=path, concept="labels" if self.labels else "values",
            facts={"rows": float(self.rows)},
        )  # fmt: skip

    def apart(self, direction: Tensor, label: int) -> float:
        """How far the means of the two classes of a label lie from each other along a direction, ``(features,)``."""
        share = (self.of_targets[label] / self.rows).clamp(1e-12, 1 - 1e-12)
        between = (self.cross[label] / self.rows - share * self.total / self.rows) / (share * (1 - share))
        along = direction.double().cpu()
        return float(between @ along / along.norm().clamp_min(1e-300))

    def margins(self, probe: LinearProbe) -> tuple[Tensor, Tensor]:
        """For each label the score halfway between the means of its two classes, and its spread within them."""
        share = (self.of_targets / self.rows).clamp(1e-12, 1 - 1e-12)
        mean = self.total / self.rows
        covariance = self.moment / self.rows - torch.outer(mean, mean)
        apart = (self.cross / self.rows - torch.outer(share, mean)) / (share * (1 - share))[:, None]
        weight = probe.weight.double()
        centre = mean + (0.5 - share)[:, None] * apart
        middle = (weight * (centre + self.shift)).sum(1) + probe.bias.double()
        between = share * (1 - share) * (weight * apart).sum(1).square()
        return middle, ((weight @ covariance * weight).sum(1) - between).clamp_min(0).sqrt()

    def _discriminants(
        self, mean: Tensor, covariance: Tensor, cross: Tensor, penalty: float | None, priors: str
    ) -> tuple[Tensor, Tensor]:
        share = self.of_targets / self.rows
        both = (share > 1e-9) & (share < 1 - 1e-9)
        spread = self._scale(mean, covariance.diagonal())
        live = torch.isfinite(spread)
        spread = spread[live]
        between = (share * (1 - share)).clamp_min(1e-300)
        apart = cross[:, live] / between[:, None] / spread  # of the means of the two classes, scaled
        inner = covariance[live][:, live] / torch.outer(spread, spread)
        inner.diagonal().add_(usual_penalty(len(spread), float(self.rows)) if penalty is None else penalty)
        found = solve_symmetric(inner, apart.T, floor=1e-9).T
        # The covariance within classes is that of all less one product, so one factorisation serves all labels
        # (Sherman & Morrison 1950); what is left of it is the penalty at least.
        left = 1 - between * (found * apart).sum(1)
        found = found / left.clamp_min(1e-9)[:, None]
        weight = torch.zeros_like(self.cross)
        weight[:, live] = torch.where(both[:, None], found / spread, 0.0)
        odds = torch.zeros_like(share) if priors == "equal" else torch.logit(share.clamp(1e-300, 1 - 1e-16))
        stored, bias = raw_bias(weight, mean + self.shift, torch.zeros_like(share))
        bias = bias + odds - (0.5 - share) * (found * apart).sum(1)
        return stored, torch.where(both, bias, torch.where(share > 0.5, -NEVER, NEVER))

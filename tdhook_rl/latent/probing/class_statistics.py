"""Sufficient statistics of a classifying probe: sums that stream, decay and merge by addition.

Ridge regression and linear discriminant analysis are exact functions of them, so a probe can be solved at
any time, for any penalty, without a stored activation; workers' statistics add up to the statistics of all.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.linear_probe import LinearProbe, check_kind
from tdhook_rl.latent.probing.moments import Moments, raw_bias, ridge_weights, solve_symmetric

#: The score of a class without rows: it is never chosen, and its probability is zero in every float format.
NEVER = -1e4
#: The penalty of ridge on features that are scaled to variance 1, where none is named.
RIDGE = 1e-3
#: Below this share of all rows, a class that decays is forgotten.
_FORGOTTEN = 1e-9


class ClassStatistics(Moments):
    """Per-class counts and sums, and the second moments of all rows, in float64 about the mean of the first rows.

    Args:
        features: the length of a feature vector.
        classes: how many classes the labels have (0 to ``classes`` - 1).

    Attributes:
        count: ``(classes,)``, rows.
        total: ``(classes, features)``, the sums of ``x - shift``.

    Example:
        >>> stats = ClassStatistics(features=2, classes=2)
        >>> stats.add(torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 1.5]]), torch.tensor([0, 1, 0]))
        >>> stats.count.tolist()
        [2.0, 1.0]
    """

    _sums = ("count", "total", "moment")

    @checked
    @torch.inference_mode(False)
    def __init__(self, *, features: int, classes: int) -> None:
        if features < 1 or classes < 2:
            raise InputError(f"a probe needs at least 1 feature and 2 classes, got {features} and {classes}")
        super().__init__(features=features)
        self.count = torch.zeros(classes, dtype=torch.float64)
        self.total = torch.zeros(classes, features, dtype=torch.float64)

    @property
    def there(self) -> Tensor:
        """Which classes have rows, ``(classes,)``, bool."""
        return self.count > _FORGOTTEN * self.count.sum()

    @torch.inference_mode(False)
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            features: ``(..., features)``, or more feature dimensions, which are flattened.
            labels: ``(...)``, integers or booleans.

        Raises:
            InputError: for shapes that do not fit, labels out of range, NaN.
        """
        rows = self._checked(features, labels.numel())
        numbers = self.checked_labels(labels)
        one_hot = torch.nn.functional.one_hot(numbers, len(self.count)).to(torch.float64)
        for part, block in self._blocks(rows):
            self.total += one_hot[part].T @ block
        self.count += one_hot.sum(0)

    def checked_labels(self, labels: Tensor) -> Tensor:
        """The class numbers, ``(rows,)``, on the CPU.

        Raises:
            InputError: for labels that are no class numbers of these classes.
        """
        if labels.is_floating_point() or labels.is_complex():
            raise InputError(f"labels are class numbers, got {labels.dtype}")
        numbers = labels.detach().reshape(-1).to("cpu", torch.long)
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self.count):
            low, high = int(numbers.min()), int(numbers.max())
            do = f"classes={high + 1} has room for them" if low >= 0 else f"number the classes from 0 (labels + {-low})"
            raise InputError(f"labels go from {low} to {high}, expected 0 to {len(self.count) - 1}: {do}")
        return numbers

    @torch.inference_mode(False)
    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        if self.total.shape != other.total.shape:
            raise InputError(
                f"statistics of {tuple(self.total.shape)} and {tuple(other.total.shape)} (classes, features) do not add"
            )
        if not (self._begun and other._begun):
            return copy.deepcopy(self if self._begun else other)
        merged, away = self._merged(other, other.total.sum(0), other.count.sum())
        merged.count += other.count
        merged.total = self.total + other.total + other.count[:, None] * away
        return merged

    def solve(
        self,
        *,
        kind: Literal["lda", "ridge"] = "lda",
        penalty: float | None = None,
        path: str = "",
        priors: Literal["rows", "equal"] = "rows",
        absent: Literal["raise", "never"] = "raise",
    ) -> LinearProbe:
        """The probe that these rows determine.

        Args:
            kind: ``"lda"``: Gaussian classes with one covariance (Fisher 1936); ``"ridge"``: least squares on
                one-hot labels (Hoerl & Kennard 1970), intercept unpenalised.
            penalty: for ``"lda"`` what is added to the diagonal of the within-class covariance of features that are
                scaled to variance 1, so that it means the same at every scale; for ``"ridge"`` the penalty on the
                weights of the features as they are, as scikit-learn's ``alpha``. Unless given, it is 1e-3 for ridge, of
                features that are scaled to variance 1; for a discriminant 1e-2 times the cube of features per row, at
                most 1e-2: with few rows it keeps the covariance in check, with many it leaves a concept that lies in a
                small difference of features as it is.
            path: the module path that the features come from.
            priors: of the classes of a discriminant: ``"rows"``: the share of their rows; ``"equal"``: all alike, which
                is what balanced accuracy asks of a rare class.
            absent: what to do about a class without a row: ``"raise"``, or ``"never"``: the probe never chooses it.

        Raises:
            InputError: if fewer than two classes have rows, or, with ``absent="raise"``, any has none.
        """
        check_solve(kind, penalty, priors)
        there = self.there
        if (absent == "raise" and not bool(there.all())) or int(there.sum()) < 2:
            empty = int((~there).nonzero()[0])
            raise InputError(f"cannot fit a probe: class {empty} has no row (rows per class: {self.count.tolist()})")
        if kind == "ridge":
            stored, bias = self._ridge(penalty)
        else:
            stored, bias = self._discriminant(penalty, priors, there)
        facts = {"rows": float(self.count.sum())}
        if len(self.count) == 2:
            facts["means_apart"] = self.apart(stored[1] - stored[0], 1, 0)
        return LinearProbe(weight=stored, bias=bias, kind=kind, path=path, facts=facts)

    def apart(self, direction: Tensor, positive: int, negative: int) -> float:
        """How far the means of two classes lie from each other along a direction, ``(features,)``; 0 along none."""
        centres, _ = self._within()
        along = direction.double().cpu()
        return float((centres[positive] - centres[negative]) @ along / along.norm().clamp_min(1e-300))

    def margin(self, probe: LinearProbe) -> tuple[float, float]:
        """Of two classes, the difference of scores halfway between their means, and its spread within classes."""
        centres, within = self._within()
        weight = (probe.weight[1] - probe.weight[0]).double()
        bias = probe.bias[1].double() - probe.bias[0].double()
        middle = float(weight @ (centres.mean(0) + self.shift) + bias)
        return middle, float((weight @ within @ weight).clamp_min(0).sqrt())

    def _within(self) -> tuple[Tensor, Tensor]:
        """The centres of the classes about the shift (zero for absent ones), and the covariance within classes."""
        centres = self.total / self.count.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        return centres, (self.moment - centres.T @ (self.count[:, None] * centres)) / self.count.sum()

    def _ridge(self, penalty: float | None) -> tuple[Tensor, Tensor]:
        rows = self.count.sum()
        mean = self.total.sum(0) / rows
        covariance = self.moment / rows - torch.outer(mean, mean)
        # one-hot labels, centred: the mean over rows of (y - share) (x - mean)^T
        cross = (self.total - self.count[:, None] * mean) / rows
        spread = self._scale(mean, covariance.diagonal()) if penalty is None else None
        weight = ridge_weights(covariance, cross, float((RIDGE if penalty is None else penalty) / rows), spread)
        return raw_bias(weight, mean + self.shift, self.count / rows)

    def _discriminant(self, penalty: float | None, priors: str, there: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.count.sum()
        mean = self.total.sum(0) / rows
        centres, within = self._within()
        scale = self._scale(mean, self.moment.diagonal() / rows - mean.square())
        live = torch.isfinite(scale)
        spread = scale[live]
        offsets = (centres - mean)[there][:, live] / spread
        inner = within[live][:, live] / torch.outer(spread, spread)
        inner.diagonal().add_(usual_penalty(len(spread), float(rows)) if penalty is None else penalty)
        found = solve_symmetric(inner, offsets.T, floor=1e-9).T
        share = torch.full_like(self.count[there], 1.0) if priors == "equal" else self.count[there] / rows
        at_mean = share.log() - 0.5 * (found * offsets).sum(1)
        # What all classes have in common decides nothing; without it, scores stay small far from the mean.
        weight = torch.zeros_like(self.total)
        weight[there.nonzero(), live.nonzero().T] = (found - found.mean(0)) / spread
        stored, bias = raw_bias(weight, mean + self.shift, torch.zeros_like(self.count))
        bias[there] += at_mean - at_mean.mean()
        bias[~there] = NEVER
        return stored, bias


def usual_penalty(features: int, rows: float) -> float:
    """What a discriminant's covariance of scaled features is given, where no penalty was named.

    Features that nearly agree (a common mode, a spectrum that falls) tell classes apart by small differences. A fixed
    penalty drowns these however many rows there are; without any, a covariance of hardly more rows than features is
    inverted in directions that it does not know.
    """
    return 1e-2 * min(1.0, features / rows) ** 3


def check_solve(kind: str, penalty: float | None, priors: str) -> None:
    """Raise an ``InputError`` for an unknown kind or prior, or a penalty that is none."""
    check_kind(kind)
    if penalty is not None and not 0 <= penalty < float("inf"):
        raise InputError(f"a penalty is a number that is not negative, got {penalty}")
    if priors not in ("rows", "equal"):
        raise InputError(f"priors are 'rows' (the share of their rows) or 'equal', got {priors!r}")

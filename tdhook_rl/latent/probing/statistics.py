"""Sufficient statistics of a linear probe: sums that stream, decay and merge by addition.

Ridge regression and linear discriminant analysis are exact functions of them, so a probe can be solved at
any time, for any penalty, without a stored activation; workers' statistics add up to the statistics of all.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.linear_probe import LinearProbe

__all__ = ["ClassStatistics"]


class ClassStatistics:
    """Per-class counts and sums, and the second moments of all rows, in float64.

    Args:
        features: the length of a feature vector.
        classes: how many classes the labels have (0 to ``classes`` - 1).

    Example:
        >>> stats = ClassStatistics(features=2, classes=2)
        >>> stats.add(torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 1.5]]), torch.tensor([0, 1, 0]))
        >>> stats.count.tolist()
        [2.0, 1.0]
    """

    def __init__(self, *, features: int, classes: int) -> None:
        if features < 1 or classes < 2:
            raise InputError(f"a probe needs at least 1 feature and 2 classes, got {features} and {classes}")
        self.count = torch.zeros(classes, dtype=torch.float64)
        self.total = torch.zeros(classes, features, dtype=torch.float64)
        self.moment = torch.zeros(features, features, dtype=torch.float64)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            features: ``(..., features)``, or more feature dimensions, which are flattened.
            labels: ``(...)``, integers or booleans.

        Raises:
            InputError: for shapes that do not fit, labels out of range, NaN.
        """
        labels = labels.reshape(-1)
        classes, width = self.total.shape
        if features.numel() != labels.numel() * width:
            raise InputError(
                f"features of shape {tuple(features.shape)} are not {labels.numel()} rows of {width}: "
                "labels have the batch shape of the features"
            )
        if labels.is_floating_point():
            raise InputError(f"labels are class numbers, got {labels.dtype}")
        rows = features.detach().reshape(-1, width).to("cpu", torch.float64)
        labels = labels.to("cpu", torch.long)
        if not bool(torch.isfinite(rows).all()):
            raise InputError("features hold NaN or infinite values; drop those rows first")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise InputError(f"labels go from {int(labels.min())} to {int(labels.max())}, expected 0 to {classes - 1}")
        one_hot = torch.nn.functional.one_hot(labels, classes).to(torch.float64)
        self.count += one_hot.sum(0)
        self.total += one_hot.T @ rows
        self.moment += rows.T @ rows

    def decay(self, factor: float) -> None:
        """Forget: multiply every sum by a factor between 0 and 1, for features that drift in training."""
        if not 0 <= factor <= 1:
            raise InputError(f"a decay factor lies between 0 and 1, got {factor}")
        for tensor in (self.count, self.total, self.moment):
            tensor.mul_(factor)

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        if self.total.shape != other.total.shape:
            raise InputError(
                f"statistics of {tuple(self.total.shape)} and {tuple(other.total.shape)} (classes, features) do not add"
            )
        classes, features = self.total.shape
        merged = ClassStatistics(features=features, classes=classes)
        for name in ("count", "total", "moment"):
            getattr(merged, name).copy_(getattr(self, name) + getattr(other, name))
        return merged

    def solve(self, *, kind: Literal["lda", "ridge"] = "lda", penalty: float = 1e-3, path: str = "") -> LinearProbe:
        """The probe that these rows determine.

        Args:
            kind: ``"lda"``: Gaussian classes with one covariance (Fisher 1936); ``"ridge"``: least squares on
                one-hot labels (Hoerl & Kennard 1970), intercept unpenalised.
            penalty: for ``"lda"`` the share of the mean variance added to the diagonal of the covariance; for
                ``"ridge"`` the penalty on the weights, as scikit-learn's ``alpha``.
            path: the module path that the features come from.

        Raises:
            InputError: if a class has no row yet.
        """
        if bool((self.count <= 0).any()):
            empty = [index for index, count in enumerate(self.count.tolist()) if count <= 0]
            raise InputError(f"cannot fit a probe: class {empty[0]} has no row (rows per class: {self.count.tolist()})")
        rows = self.count.sum()
        mean = self.total.sum(0) / rows
        features = self.moment.shape[0]
        identity = torch.eye(features, dtype=torch.float64)
        if kind == "ridge":
            centred = self.moment - rows * torch.outer(mean, mean)
            # one-hot labels, centred: sum over rows of (x - mean) (y - share)^T
            cross = (self.total - self.count[:, None] * mean).T
            weight = torch.linalg.solve(centred + penalty * identity, cross).T
            bias = self.count / rows - weight @ mean
        elif kind == "lda":
            centres = self.total / self.count[:, None]
            within = (self.moment - centres.T @ (self.count[:, None] * centres)) / rows
            scale = within.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
            weight = torch.linalg.solve(within + penalty * scale * identity, centres.T).T
            bias = (self.count / rows).log() - 0.5 * (weight * centres).sum(1)
        else:
            raise InputError(f"a probe is 'lda' or 'ridge', got {kind!r}")
        return LinearProbe(weight=weight.float(), bias=bias.float(), kind=kind, path=path, facts={"rows": float(rows)})

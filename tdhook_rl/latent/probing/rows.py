"""The rows that probes are fitted on and scored on, as the sums of several sources take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.latent.probing.held_out import Grouped
from tdhook_rl.latent.probing.moments import require_size


@dataclass(frozen=True)
class Parts:
    """Which rows train and which are held out; what follows is worked out once for all that read them.

    Attributes:
        codes: for each grouping ``(rows,)``, the number of the group of each row.
        train, held: ``(rows,)``: which the probes are fitted on, and which they are scored on.
    """

    codes: Sequence[Tensor]
    train: Tensor
    held: Tensor

    @cached_property
    def trained(self) -> Tensor:
        """The numbers of the training rows."""
        return self.train.nonzero().squeeze(-1)

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor]:
        """The numbers of the training rows of each half of the groups, by the number of their first group."""
        code = self.codes[0].index_select(0, self.trained)
        second = (((code ^ (code >> 17)) >> 5) & 1).bool()
        return self.trained[~second], self.trained[second]

    @cached_property
    def judged(self) -> Tensor:
        """The numbers of the held-out rows."""
        return self.held.nonzero().squeeze(-1)

    @cached_property
    def groups(self) -> list[Grouped]:
        """For each grouping the groups of the held-out rows."""
        return [Grouped.of(code.index_select(0, self.judged)) for code in self.codes]


@dataclass(frozen=True)
class Rows:
    """Rows whose labels are known, of several sources.

    Attributes:
        features: for each source ``(rows, features)``.
        labels: ``(rows, concepts)``.
        parts: which of them are for what.
        usable: ``(sources, rows)``, which are finite; ``None`` for all.
    """

    features: Sequence[Tensor]
    labels: Tensor
    parts: Parts
    usable: Tensor | None = None

    @property
    def held(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Features, labels and what is usable of the held-out rows."""
        chosen = self.parts.judged
        if len(chosen) == len(self.labels):
            return list(self.features), self.labels, self.usable
        return (
            [one.index_select(0, chosen) for one in self.features],
            self.labels.index_select(0, chosen),
            None if self.usable is None else self.usable[:, chosen],
        )


def usable_rows(features: Sequence[Tensor], labels: Tensor) -> Tensor | None:
    """Which rows of each source are finite, and their labels: ``(sources, rows)``; ``None`` if all are.

    Raises:
        InputError: for features or labels that are too large.
    """
    for one in features:
        require_size(one, "features")
    require_size(labels, "labels")
    finite = [_finite_rows(one) for one in features]
    of_labels = _finite_rows(labels)
    if all(one is None for one in (*finite, of_labels)):
        return None
    every = torch.ones(len(labels), dtype=torch.bool) if of_labels is None else of_labels
    return torch.stack([every if one is None else every & one for one in finite])


def _finite_rows(values: Tensor) -> Tensor | None:
    if not values.is_floating_point() or surely_finite(values):
        return None
    return torch.isfinite(values).all(-1)

"""A probe that is fitted while the agent trains: one batch of the collector at a time."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.controls import Controls
from tdhook_rl.errors import InputError, MissingKeyError, nearest
from tdhook_rl.latent.probing import ClassStatistics, LinearProbe
from tdhook_rl.rollout.splits import GroupSplit

__all__ = ["OnlineProbe"]


class OnlineProbe:
    """Fits a linear probe to cached activations, batch by batch, and scores it on held-out groups.

    Args:
        features: the key of the activation, such as ``("cache", path)``.
        label: the key of the concept: integers from 0, batch-shaped.
        classes: how many values the concept takes.
        split: which rows train and which are held out; by episode unless told otherwise.
        kind: ``"lda"`` or ``"ridge"``.
        penalty: see :meth:`ClassStatistics.solve`.
        decay: what the sums are multiplied by before each batch; below 1 where the network is learning.

    Example:
        >>> from tensordict import TensorDict
        >>> x = torch.randn(512, 3)
        >>> batch = TensorDict({"cache": {"1": x}, "door": (x[:, 0] > 0).long(), "episode": torch.arange(512)}, 512)
        >>> probe = OnlineProbe(features=("cache", "1"), label="door", split=GroupSplit("episode"))
        >>> probe.update(batch)["accuracy"] > 0.9
        True
    """

    def __init__(
        self,
        *,
        features: NestedKey,
        label: NestedKey,
        classes: int = 2,
        split: GroupSplit | None = None,
        kind: Literal["lda", "ridge"] = "lda",
        penalty: float = 1e-2,
        decay: float = 1.0,
    ) -> None:
        self.features = unravel_key(features)
        self.label = unravel_key(label)
        self.classes = classes
        self.split = split or GroupSplit()
        self.kind = kind
        self.penalty = penalty
        self.decay = decay
        self.statistics: ClassStatistics | None = None
        self.probe: LinearProbe | None = None

    def update(self, data: TensorDictBase) -> dict[str, float]:
        """Learn from the training rows of a batch and score the probe on its held-out rows.

        Returns:
            ``accuracy`` (balanced, held-out rows; NaN while it cannot be had), ``train_accuracy``,
            ``train_rows``, ``held_out_rows`` and ``dropped_rows`` (not computed, or not finite).

        Raises:
            MissingKeyError: if the activation or the label is absent.
        """
        features, labels = self._entry(data, self.features), self._entry(data, self.label)
        batch = data.batch_size
        if labels.shape != batch:
            if labels.shape != (*batch, 1):
                raise InputError(f"label {self.label!r} has shape {tuple(labels.shape)}, expected {tuple(batch)}")
            labels = labels.squeeze(-1)
        features = features.reshape(*batch, -1)
        usable = torch.isfinite(features).all(-1)
        mask = data.get(("computed", self.features[0]), None) if isinstance(self.features, tuple) else None
        usable = usable if mask is None else usable & mask
        train, held = (rows & usable for rows in self.split(data))
        if self.statistics is None:
            self.statistics = ClassStatistics(features=features.shape[-1], classes=self.classes)
        self.statistics.decay(self.decay)
        self.statistics.add(features[train], labels[train])
        scores = {"accuracy": float("nan"), "train_accuracy": float("nan")}
        if bool((self.statistics.count > 0).all()):
            path = self.features[-1] if isinstance(self.features, tuple) else self.features
            self.probe = self.statistics.solve(kind=self.kind, penalty=self.penalty, path=path)
            for name, rows in (("accuracy", held), ("train_accuracy", train)):
                if bool(rows.any()):
                    scores[name] = self.probe.accuracy(features[rows], labels[rows])
        counts = {"train_rows": train, "held_out_rows": held, "dropped_rows": ~usable}
        return scores | {name: float(rows.sum()) for name, rows in counts.items()}

    def push(self, controls: Controls, name: str) -> None:
        """Write the probe into the controls of a :class:`ProbeReadout`; running workers read it at once.

        Args:
            controls: ``hooked.controls``.
            name: the prefix, ``"probe.<name of the probe>"``.
        """
        if self.probe is not None:
            controls.update_({f"{name}.weight": self.probe.weight, f"{name}.bias": self.probe.bias})

    def _entry(self, data: TensorDictBase, key: NestedKey) -> Tensor:
        value = data.get(key, None)
        if value is None:
            raise MissingKeyError(
                f"the online probe reads {key!r}, which the batch lacks; "
                f"{nearest(str(key), map(str, data.keys(True, True)))}"
            )
        return value

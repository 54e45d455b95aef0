"""A probe that is fitted while the agent trains: one batch of the collector at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.keys import required
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import InputError, warn
from tdhook_rl.latent.probing.class_statistics import check_solve
from tdhook_rl.latent.probing.concepts import Concept, ProbeOptions, concept_of
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.moments import MOST, require_size
from tdhook_rl.probes.splits import GroupSplit
from tdhook_rl.sites.controls import Controls
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.interval import check_confidence


class OnlineProbe:
    """Fits a linear probe to cached activations, batch by batch, and scores it on held-out groups.

    The score is pooled over the held-out rows of all batches, each scored by the probe of its time, with the decay of
    the fit: one batch may hold out few groups and a rare class none. Beside it stand its interval by group, and how
    many groups, rows and classes it rests on. A score that cannot be had is NaN, and a warning says why, once.

    Args:
        features: the key of the activation, such as ``("cache", path)``, or of any other entry.
        label: the key of the concept, or a function of the batch that returns it. Batch-shaped integers from 0: one
            class of several. Integers 0 and 1 (or booleans) with one dimension more: several labels, each a concept of
            its own. Floats, with ``kind="ridge"``: numbers.
        classes: how many values a class may take; those that do not occur are left out. Areas under the curve are of
            two classes; for that of each of several, give the label one-hot, as several labels.
        split: which rows train and which are held out; by episode unless told otherwise.
        kind: ``"lda"`` or ``"ridge"``.
        penalty: see :meth:`tdhook_rl.latent.probing.ClassStatistics.solve`.
        decay: what all sums are multiplied by before each batch; below 1 where the network is learning.
        priors: ``"equal"``: a discriminant takes a rare class for as likely as a frequent one, as balanced accuracy
            does; ``"rows"``: as frequent as its rows.
        min_rows: a class with fewer held-out rows (with the decay) is not scored.
        confidence: of the intervals.

    Attributes:
        probe: the fitted :class:`LinearProbe`; ``None`` before there is one.
        scores: the held-out scores by name, as :class:`tdhook_rl.statistics.Interval`: ``"accuracy"`` (balanced) and,
            with two classes, ``"auc"``; for several labels these of each (``"accuracy.0"``); for numbers ``"r2"``.
        words: what has to be said about them: why one cannot be had, which classes were left out, how few groups.

    Raises:
        InputError: for arguments that mean nothing.

    Example:
        >>> from tensordict import TensorDict
        >>> x = torch.randn(512, 3)
        >>> batch = TensorDict({"cache": {"1": x}, "door": (x[:, 0] > 0).long(), "episode": torch.arange(512)}, 512)
        >>> probe = OnlineProbe(features=("cache", "1"), label="door", split=GroupSplit("episode"))
        >>> found = probe.update(batch)
        >>> found["accuracy"] > 0.9, found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
        (True, True)
        >>> probe.scores["accuracy"].groups == found["groups"] == found["held_out_rows"]
        True
    """

    @checked
    def __init__(
        self,
        *,
        features: NestedKey,
        label: NestedKey | Callable[[TensorDictBase], Tensor],
        classes: int = 2,
        split: GroupSplit | None = None,
        kind: Literal["lda", "ridge"] = "lda",
        penalty: float | None = None,
        decay: float = 1.0,
        priors: Literal["rows", "equal"] = "equal",
        min_rows: float = 10,
        confidence: float = 0.95,
    ) -> None:
        check_solve(kind, penalty, priors)
        check_confidence(confidence)
        if not 0 <= decay <= 1:
            raise InputError(f"a decay factor lies between 0 and 1, got {decay}")
        if classes < 2:
            raise InputError(f"a probe tells at least 2 classes apart, got classes={classes}")
        self.features = unravel_key(features)
        self.label = label if callable(label) else unravel_key(label)
        self.classes = classes
        self.split = split or GroupSplit()
        self.kind = kind
        self.penalty = penalty
        self.decay = decay
        self.options = ProbeOptions(
            kind=kind, penalty=penalty, priors=priors, min_rows=max(min_rows, 1e-3), confidence=confidence
        )
        self.probe: LinearProbe | None = None
        self.scores: dict[str, Interval] = {}
        self.words = ""
        self._concept: Concept | None = None
        self._widths: tuple[int, int] | None = None
        self._said: set[str] = set()

    @property
    def statistics(self) -> Any:
        """The sums of the training rows (:class:`ClassStatistics`, say); ``None`` before the first batch."""
        return None if self._concept is None else self._concept.statistics

    @checked
    def update(self, data: TensorDictBase) -> dict[str, float]:
        """Learn from the training rows of a batch, and score its held-out rows with the probe that results.

        Returns:
            each of :attr:`scores` with its limits (``"accuracy"``, ``"accuracy_low"``, ``"accuracy_high"``; NaN where
            they cannot be had), and ``groups``, ``rows`` and ``classes``, what the first of them rests on, pooled over
            batches; ``train_accuracy`` (or ``train_r2``), of this batch's training rows, and of this batch
            ``train_rows``, ``held_out_rows`` and ``dropped_rows`` (not computed, or not finite; padding is no row).

        Raises:
            MissingKeyError: if the activation, the label or a group is absent.
            InputError: for labels or activations of another shape or type than before, classes out of range, numbers
                that are too large for a probe, or more features than one can hold.
        """
        # Sums that were made in inference mode could not be added to outside it.
        with torch.inference_mode(False), torch.no_grad():
            return self._update(data)

    def _update(self, data: TensorDictBase) -> dict[str, float]:
        batch = data.batch_size
        features, labels, usable = self._entries(data)
        if self._concept is None:
            self._concept = concept_of(
                labels, batch, self.options, features=features.shape[-1], classes=self.classes,
                groupings=len(self.split.groupings),
            )  # fmt: skip
        concept = self._concept
        labels = labels.reshape(batch.numel(), math.prod(labels.shape[len(batch) :]))
        widths = features.shape[-1], labels.shape[1]
        self._widths = self._widths or widths
        if widths != self._widths:
            raise InputError(
                f"a row had {self._widths[0]} features and {self._widths[1]} labels before, and has {widths[0]} and "
                f"{widths[1]} in this batch: another module or concept takes a probe of its own"
            )
        labels = labels if concept.main == "r2" or labels.shape[1] > 1 else labels[:, 0]
        codes = [code.reshape(-1).cpu() for code in self.split.groups(data)]
        train, held = ((mask.cpu() & usable).reshape(-1) for mask in self.split(data))
        features = features.reshape(batch.numel(), features.shape[-1])
        # Both are looked at before anything is learnt, so that an error leaves the sums as they were.
        of_train, of_held = concept.checked(labels[train]), concept.checked(labels[held])
        concept.decay(self.decay)
        concept.learn(features[train], of_train)
        self.probe = concept.solve(self.features[-1] if isinstance(self.features, tuple) else self.features)
        trained = math.nan
        if self.probe is not None:
            if bool(held.any()):
                concept.judge(self.probe, features[held], of_held, [code[held] for code in codes])
            if bool(train.any()):
                trained = concept.train_score(self.probe, features[train], of_train)
        self._find(concept, any_training=bool(train.any()))
        main = self.scores[concept.main]
        real = real_rows(data)
        dropped = ~usable if real is None else ~usable & real.cpu()
        counts = {"train_rows": train, "held_out_rows": held, "dropped_rows": dropped}
        found = {
            key: value
            for name, one in self.scores.items()
            for key, value in ((name, one.estimate), (f"{name}_low", one.low), (f"{name}_high", one.high))
        }
        found |= {"groups": float(main.groups), "rows": main.rows, "classes": concept.classes}
        found[f"train_{concept.main}"] = trained
        return found | {name: float(rows.sum()) for name, rows in counts.items()}

    def push(self, controls: Controls, name: str) -> bool:
        """Write the probe, its kind included, into the controls of a :class:`ProbeReadout`; running workers read it at
        once.

        Args:
            controls: ``hooked.controls``.
            name: the prefix, ``"probe.<name of the probe>"``.

        Returns:
            whether there was a probe to write.

        Raises:
            MissingKeyError: if no readout of that name was prepared.
            InputError: if it reads another module, or another number of features or classes.
        """
        if self.probe is None:
            return False
        controls.require_place(name, self.probe.path)
        controls.update_(self.probe.controls(name))
        return True

    def _find(self, concept: Concept, any_training: bool) -> None:
        """The scores as they are now, and words about them; a score that cannot be had is told once."""
        self.scores = concept.found()
        main = self.scores[concept.main]
        words = list(concept.words)
        if self.probe is None and not any_training:
            words = [
                "there is no probe yet, as there was no training row: every group of them was held out or left out"
            ]
        if main.words and not math.isnan(main.estimate):
            words.append(main.words)
        self.words = "; ".join(words)
        unseen = next((text for text in concept.words if "count as wrong" in text), None)
        for reason, text in (("nan", self.words if math.isnan(main.estimate) else None), ("unseen", unseen)):
            if text and reason not in self._said:
                self._said.add(reason)
                warn(f"the held-out {concept.main} of a probe of {self._name()}: {text}")

    def _name(self) -> str:
        if callable(self.label):
            return getattr(self.label, "__name__", type(self.label).__name__)
        return repr(self.label)

    def _entries(self, data: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Features ``(*batch, features)``, labels, and which rows are usable, on the CPU."""
        batch = data.batch_size
        features = self._entry(data, self.features)
        if callable(self.label):
            labels = asked(self.label, data, what=f"label= ({self._name()})", reads_only=True)
        else:
            labels = self._entry(data, self.label)
        if not isinstance(labels, Tensor) or labels.shape[: len(batch)] != batch:
            found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise InputError(f"label {self._name()} gives {found}, expected a tensor of the batch {tuple(batch)}")
        if features.is_complex() or features.shape[: len(batch)] != batch:
            raise InputError(
                f"features {self.features!r} are {tuple(features.shape)} ({features.dtype}), expected real numbers for "
                f"the batch {tuple(batch)}"
            )
        features = features.detach()
        require_size(features, f"features {self.features!r}")
        features = features.flatten(len(batch)) if features.ndim > len(batch) else features[..., None]
        if features.shape[-1] > MOST:
            raise InputError(
                f"{self.features!r} has {features.shape[-1]} features a row, and a probe keeps their square: up to "
                f"{MOST}; read a smaller activation, or write means over squares or channels and read those"
            )
        labels = labels.detach()
        usable = torch.isfinite(features).all(-1).cpu()
        if labels.is_floating_point():
            known = torch.isfinite(labels)
            usable &= (known.flatten(len(batch)).all(-1) if labels.ndim > len(batch) else known).cpu()
        real = real_rows(data, *(key for key in (self.features, self.label) if isinstance(key, tuple)))
        return features, labels, usable if real is None else usable & real.cpu()

    def _entry(self, data: TensorDictBase, key: NestedKey) -> Tensor:
        value = required(data, key, "the online probe reads")
        if not isinstance(value, Tensor):
            raise InputError(f"the online probe reads {key!r}, which is a {type(value).__name__}, not a tensor")
        return value

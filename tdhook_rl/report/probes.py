"""Probes that learn while the agent does, each beside the controls without which its score means nothing."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import warn
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.moments import MOST
from tdhook_rl.probes.probe_table import ProbeCell
from tdhook_rl.report.media import DataTable
from tdhook_rl.rollout.online_probe import OnlineProbe
from tdhook_rl.rollout.probe_suite import ProbeSuite
from tdhook_rl.statistics import Interval

__all__ = ["WatchedProbe", "WatchedSuite", "table_of_probes"]


#: Where all inputs of a policy stand together, in a copy of the batch.
_TOGETHER = "all inputs"


class WatchedProbe:
    """A probe, the same of the raw input, of shuffled labels, and of the untrained network.

    What the input shows already was not computed by the network; what can be read of labels that were dealt out anew to
    whole groups is how far groups leak; and untrained networks let much be read of them.

    Args:
        probe: fitted batch by batch.
        inputs: what the policy observes, for the first control; without any it is left out.
        untrained: a hooked policy of the network before training, which writes the same activation.
    """

    def __init__(self, probe: OnlineProbe, inputs: Sequence[NestedKey], untrained: Any | None) -> None:
        self.probe = probe
        self._untrained = untrained
        self._controls: dict[str, OnlineProbe] = {}
        self._inputs = list(inputs)
        if self._inputs and self._inputs != [probe.features]:
            several = len(self._inputs) > 1
            self._controls["input"] = _like(probe, features=_TOGETHER if several else self._inputs[0])
        if probe.kind == "lda":
            self._controls["shuffled"] = _like(probe, label=partial(_shuffled, probe))
        if untrained is not None:
            self._controls["untrained"] = _like(probe)

    def update(self, data: TensorDictBase) -> dict[str, float]:
        """Learn from a batch; the scores of the probe, with limits and counts, and those of each control."""
        scores = self.probe.update(data)
        main = next(iter(self.probe.scores), "accuracy")
        kept = [name for name in scores if not name.startswith("train_") or name == f"train_{main}"]
        found = {name: scores[name] for name in kept}
        whole = self._together(data)
        self._leave_out_large(whole)
        for name, control in self._controls.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the probe itself says what is to be said of these rows
                seen = self._of_untrained(data) if name == "untrained" else whole
                scored = control.update(seen)
            found[f"{main}.{name}"] = scored.get(main, float("nan"))
        return found

    def _together(self, data: TensorDictBase) -> TensorDictBase:
        """The batch with all inputs in one entry, where there are several."""
        if len(self._inputs) < 2 or "input" not in self._controls:
            return data
        there = [data.get(key, None) for key in self._inputs]
        values = [one.reshape(*data.batch_size, -1) for one in there if isinstance(one, Tensor)]
        return data.copy().set(_TOGETHER, torch.cat(values, -1)) if values else data

    def _leave_out_large(self, data: TensorDictBase) -> None:
        """Leave out a raw input that a probe could not hold, such as frames."""
        control = self._controls.get("input")
        value = None if control is None else data.get(control.features, None)
        if isinstance(value, Tensor) and (width := value.shape[data.ndim :].numel()) > MOST:
            del self._controls["input"]
            warn(
                f"the raw input {', '.join(map(repr, self._inputs))} has {width} features, more than the {MOST} that "
                "a probe of it could keep: this control is left out"
            )

    def record(self, name: str) -> dict[str, Any]:
        """A row of the table of probes: site, concept, score and interval, controls, and what they rest on."""
        probe, main = self.probe, next(iter(self.probe.scores))
        key, label = probe.features, probe.label
        said = label.__name__ if callable(label) and hasattr(label, "__name__") else label
        found: dict[str, Any] = {
            "probe": name,
            "site": key if isinstance(key, str) else ".".join(key[1:]),
            "concept": str(said) if isinstance(said, str) or callable(said) else ".".join(said),
            "score": main,
            **_limits("trained", probe.scores[main]),
        }
        for control, one in self._controls.items():
            if main in one.scores:
                found |= _limits(control, one.scores[main])
        return found | {"groups": probe.scores[main].groups, "rows": probe.scores[main].rows, "words": probe.words}

    def fitted(self, name: str) -> dict[str, tuple[LinearProbe, dict[str, Any]]]:
        """The probe, if there is one, under its name, with its scores."""
        if self.probe.probe is None:
            return {}
        return {name: (self.probe.probe, {score: one.estimate for score, one in self.probe.scores.items()})}

    def _of_untrained(self, data: TensorDictBase) -> TensorDictBase:
        assert self._untrained is not None
        results = {key[0] if isinstance(key, tuple) else key for key in self._untrained.result_keys}
        return self._untrained.annotate(data.exclude(*results), on_mismatch="ignore")


class WatchedSuite:
    """A :class:`ProbeSuite` that is shown every batch, and whose table is read from time to time.

    Args:
        suite: of sites by concepts.
    """

    def __init__(self, suite: ProbeSuite) -> None:
        self.suite = suite
        self._cells: list[ProbeCell] = []

    def numbers(self) -> dict[str, float]:
        """The scores of all cells with limits and controls, read anew."""
        self._cells = list(self.suite.table())
        found: dict[str, float] = {}
        for cell in self._cells:
            name = f"{cell.concept}.{cell.site}.{cell.score}"
            found |= {name: cell.trained.estimate, f"{name}_low": cell.trained.low, f"{name}_high": cell.trained.high}
            for control in ("untrained", "input", "shuffled"):
                one = getattr(cell, control)
                if one is not None:
                    found[f"{name}.{control}"] = one.estimate
        return found

    def records(self) -> list[dict[str, Any]]:
        """A row of the table of probes for each cell, as it was read last."""
        return [cell.numbers() for cell in self._cells]

    def fitted(self) -> dict[str, tuple[LinearProbe, dict[str, Any]]]:
        """The probes that there are, under concept and site, with their scores."""
        found = {}
        for cell in self._cells:
            probe = self.suite.probe(cell.site, cell.concept)
            if probe is not None:
                found[f"{cell.concept}.{cell.site}"] = (probe, {cell.score: cell.trained.estimate})
        return found


def table_of_probes(records: Sequence[Mapping[str, Any]], step: int) -> DataTable | None:
    """One table of all probes, a row each; columns that a row lacks are empty in it."""
    if not records:
        return None
    columns = list(dict.fromkeys(name for row in records for name in row))
    return DataTable(["frames", *columns], [[step, *(row.get(name) for name in columns)] for row in records])


def _limits(name: str, found: Interval) -> dict[str, float]:
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


def _like(
    probe: OnlineProbe,
    features: NestedKey | None = None,
    label: Callable[[TensorDictBase], Tensor] | None = None,
) -> OnlineProbe:
    """A probe with the same options."""
    return OnlineProbe(
        features=probe.features if features is None else features,
        label=probe.label if label is None else label,
        classes=probe.classes,
        split=probe.split,
        kind=probe.options.kind,
        penalty=probe.penalty,
        decay=probe.decay,
        priors=probe.options.priors,
        min_rows=probe.options.min_rows,
        confidence=probe.options.confidence,
    )


def _shuffled(probe: OnlineProbe, data: TensorDictBase) -> Tensor:
    """Labels dealt out anew to whole groups of the split, as often each as before; no generator is moved."""
    label = probe.label(data) if callable(probe.label) else data.get(probe.label)
    code = probe.split.groups(data)[-1].reshape(-1)
    real = real_rows(data)
    usable = torch.ones_like(code, dtype=torch.bool) if real is None else real.reshape(-1)
    flat = label.reshape(code.numel(), -1)
    groups, of_row = code[usable].unique(return_inverse=True)
    drawn = torch.tensor([zlib.crc32(repr(one).encode()) for one in groups.tolist()], device=code.device)
    # Rows sorted by a number that depends on their group alone take the labels in the order in which they stand.
    order = drawn[of_row].argsort(stable=True)
    dealt = flat.clone()
    places = usable.nonzero().squeeze(-1)
    dealt[places[order]] = flat[places]
    return dealt.reshape(label.shape)

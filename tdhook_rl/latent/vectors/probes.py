"""A direction from a fitted probe, in the units of the activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.class_statistics import ClassStatistics
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.latent.probing.target_statistics import TargetStatistics
from tdhook_rl.latent.vectors.extracted import Extracted

#: Scores of a probe, the first that there is.
_SCORES = {"accuracy": "balanced accuracy", "auc": "area under the curve", "r2": "share of variance explained"}
_SCALES = {
    "unit": "the norm is 1",
    "means": "1 is as far along the direction as the means of the two classes lie apart",
}


def probe_direction(
    given: Any, positive: int | None, negative: int | None, scale: Literal["unit", "means"], shape: Sequence[int] | None
) -> tuple[Extracted, str]:
    """What raises the score of one class against another, and the module that the probe reads; see
    ``SteeringVector.from_probe``."""
    probe = given if isinstance(given, LinearProbe) else getattr(given, "probe", None)
    if not isinstance(probe, LinearProbe):
        if (probe is None and hasattr(given, "probe")) or given is None:
            raise InputError("there is no probe yet: it was not given rows of two classes to be fitted on")
        raise InputError(
            "probe= is a LinearProbe or an OnlineProbe (of a ProbeSuite: suite.probe(site, concept)), got "
            f"{given!r:.80}"
        )
    if scale not in _SCALES:
        raise InputError(f"scale= is 'unit' or 'means', got {scale!r:.80}")
    positive, negative = _classes(probe, positive, negative)
    weight = probe.weight.double()
    direction = weight[positive] - (0 if negative is None else weight[negative])
    norm = float(direction.norm())
    if not math.isfinite(norm) or norm == 0:
        raise InputError(
            f"the probe of {probe.path!r} does not tell class {positive} from {negative}: its weights there are "
            f"{'the same' if norm == 0 else 'not finite'}"
        )
    length = 1.0 if scale == "unit" else _apart(given, probe, positive, negative)
    vector = (direction / norm * length).to(torch.promote_types(probe.weight.dtype, torch.float32))
    if shape is not None:
        if math.prod(shape) != vector.numel():
            raise InputError(f"shape={tuple(shape)} has {math.prod(shape)} features, and the probe reads {len(vector)}")
        vector = vector.reshape(*shape)
    facts = {
        "source": "probe", "probe_kind": probe.kind, "probe_concept": probe.concept, "positive": positive,
        "negative": negative, "scale": _SCALES[scale], "probe": dict(probe.facts), **_score(given, probe),
    }  # fmt: skip
    return Extracted(vector, None, facts), probe.path


def _classes(probe: LinearProbe, positive: int | None, negative: int | None) -> tuple[int, int | None]:
    """The row of the weight that is raised, and that which it is raised against."""
    several = probe.concept == "classes"
    if not several and negative is not None:
        raise InputError(f"a probe of {probe.concept} has a direction for each: give positive= alone")
    positive = (1 if several else 0) if positive is None else positive
    negative = (0 if negative is None else negative) if several else None
    for name, one in (("positive", positive), ("negative", negative)):
        if one is not None and (isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < len(probe.weight)):
            raise InputError(f"{name}={one!r:.80} is none of the {len(probe.weight)} {probe.concept} of the probe")
    if positive == negative:
        raise InputError(f"positive= and negative= are both class {positive}: a direction leads from one to another")
    return positive, negative


def _apart(given: Any, probe: LinearProbe, positive: int, negative: int | None) -> float:
    """How far the two classes lie apart along the direction."""
    statistics = getattr(given, "statistics", None)
    weight = probe.weight.double()
    found = None
    if probe.concept == "classes":
        assert negative is not None
        if isinstance(statistics, ClassStatistics):
            found = statistics.apart(weight[positive] - weight[negative], positive, negative)
        elif isinstance(probe.facts.get("means_apart"), float) and len(weight) == 2:
            found = probe.facts["means_apart"]
    elif probe.concept == "labels" and isinstance(statistics, TargetStatistics):
        found = statistics.apart(weight[positive], positive)
    if found is None or not math.isfinite(found) or found == 0:
        raise InputError(
            "how far the means of the classes lie apart is not known of this probe: give the OnlineProbe that fitted "
            "it, a probe of two classes that was fitted by this version, or scale='unit'"
        )
    return abs(found)


def _score(given: Any, probe: LinearProbe) -> dict[str, Any]:
    """The held-out score, with its interval where there is one."""
    scores = {} if given is probe else getattr(given, "scores", {})  # a method of a LinearProbe
    for name, words in _SCORES.items():
        if name in scores and not math.isnan(scores[name].estimate):
            one = scores[name]
            between = {"score_interval": [one.low, one.high]} if one.known else {}
            return {"score": one.estimate, "score_is": f"{words}, of held-out rows", **between}
        if isinstance(probe.facts.get(name), float):
            return {"score": probe.facts[name], "score_is": f"{words}, of held-out rows"}
    return {"score": None}

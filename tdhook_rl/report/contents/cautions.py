"""What a reader has to know before believing a run: what is missing, was dropped, was not computed, is not finite."""

from __future__ import annotations

import math

from tdhook_rl.report.contents.names import LARGEST, probes_of
from tdhook_rl.report.page.numbers import number
from tdhook_rl.report.runs import Run
from tdhook_rl.report.sweep_pages import chosen_outcomes, sweep_cautions

#: Lines of one kind that are shown.
MOST = 6


def cautions_of(run: Run) -> list[str]:
    """One line each, the gravest first."""
    found = []
    if run.ended is False:
        step = run.last_step
        where = "nothing was logged" if step is None else f"the last {run.axis[:-1]} that is there is {step:,}"
        found.append(f"The run did not come to its end, or goes on: {where}.")
    found += [_sentence(one) for one in run.warnings]
    found += [] if run.sweep is None else sweep_cautions(run.sweep, chosen_outcomes(run.sweep)[0])
    found += _computed(run) + _probes(run) + _unfinished(run)
    return list(dict.fromkeys(found))


def _computed(run: Run) -> list[str]:
    found = []
    for name, curve in run.series.items():
        known = [value for _, value in curve if math.isfinite(value)]
        if name.startswith("computed.") and known and min(known) < 1:
            root = name.removeprefix("computed.")
            least, mean = min(known), sum(known) / len(known)
            found.append(
                f"Results of {root!r} were computed for {mean:.0%} of the rows (at least {least:.0%} of a batch): "
                "figures are of these."
            )
        elif name.startswith("nonfinite.") and known and max(known) > 0:
            found.append(
                f"Of {name.removeprefix('nonfinite.')!r} up to {max(known):.1%} of the rows of a batch were not finite "
                f"(in {len(known)} batches), and are left out."
            )
    return _few(found, "results were not computed, or not finite")


def _probes(run: Run) -> list[str]:
    found = []
    for name, probe in probes_of(run.series).items():
        value = probe.last
        if value is None:
            found.append(f"The probe of {name!r} has no score: too few rows, or one class only.")
            continue
        if not value.known:
            found.append(f"The probe of {name!r} has no interval: {value.words}.")
        dropped = sum(count for _, count in probe.counts.get("dropped_rows", ()) if math.isfinite(count))
        if dropped:
            found.append(f"The probe of {name!r} left out {dropped:,.0f} rows that were not computed or not finite.")
        if probe.low and not probe.controls:
            found.append(f"The probe of {name!r} has no control beside it.")
    return _few(found, "probes have no interval or no control")


def _unfinished(run: Run) -> list[str]:
    odd = {
        # What compares a batch with the one before it has nothing to say of the first.
        name: sum(not abs(value) < LARGEST for _, value in (curve if len(curve) == 1 else curve[1:]))
        for name, curve in run.series.items()
        if not name.endswith(("_low", "_high"))
    }
    odd = {name: count for name, count in odd.items() if count}
    if not odd:
        return []
    ranked = sorted(odd, key=lambda name: -odd[name])
    listed = ", ".join(f"{name!r} ({odd[name]:,} of {len(run.series[name]):,})" for name in ranked[:4])
    more = f" and {len(odd) - 4:,} more" if len(odd) > 4 else ""
    return [f"Values that are not finite, or larger than any axis, are left out of figures: {listed}{more}."]


def _few(found: list[str], what: str) -> list[str]:
    if len(found) <= MOST:
        return found
    return [*found[:MOST], f"{number(len(found) - MOST)} more {what}."]


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else f"{text}."

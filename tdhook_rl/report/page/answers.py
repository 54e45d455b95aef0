"""What a page opens with: the answers, drawn beside what they are held against, and what to be careful of."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from tdhook_rl.report.page.numbers import is_number, shown
from tdhook_rl.report.page.parts import Cautions, Finding, Findings
from tdhook_rl.report.page.place import Place
from tdhook_rl.report.page.saved import as_csv, data_link
from tdhook_rl.statistics import Interval

_COLUMNS = ("question", "measured", "found", "beside", "note", "as expected")


def findings(part: Findings, place: Place) -> str:
    """One row for each answer; on a phone its parts stand below each other."""
    heading = place.heading(part.heading)
    text = f'<p class="text">{html.escape(part.text)}</p>\n' if part.text else ""
    rows = [
        [one.question, one.measured, one.value, _beside(one, "; "), one.words, one.met] for one in part.found
    ]  # fmt: skip
    link = data_link(part.heading or "findings", as_csv(_COLUMNS, rows), "csv")
    judged = " judged" if any(one.met is not None for one in part.found) else ""
    before = ["", *(one.question for one in part.found)]
    body = "\n".join(
        _answer(one, "" if one.question == earlier else one.question)
        for one, earlier in zip(part.found, before, strict=False)
    )
    scaled = any(_scale(one.value, one.beside) for one in part.found)
    legend = "Dot: what was found; bar: its interval; rings: what it is held against, from 0 to 1." if scaled else ""
    said = f'<p class="soft">{legend}</p>\n' if legend else ""
    return f'{heading}{text}<ul class="answers{judged}">\n{body}</ul>\n{said}<p class="beside">Data: {link}</p>\n'


def _answer(one: Finding, question: str) -> str:
    met = (
        ""
        if one.met is None
        else ('<div class="met yes">as expected</div>' if one.met else '<div class="met no">not as expected</div>')
    )
    asked = f'<div class="question">{html.escape(question)}</div>' if question else ""
    beside, words = _beside(one, " · "), html.escape(one.words)
    held = f"<div>{html.escape(beside)}</div>" if beside else ""
    held += f'<div class="note">{words}</div>' if words else ""
    return (
        f"<li><div>{asked}{html.escape(one.measured)}</div>"
        f'<div>{_value(one.value)}{_scale(one.value, one.beside)}</div><div class="held">{held}</div>{met}</li>\n'
    )


def _value(value: Any) -> str:
    if not isinstance(value, Interval):
        return f"<strong>{html.escape(shown(value))}</strong>"
    figure, _, limits = shown(value).partition(" (")
    return f'<strong>{figure}</strong> <span class="limits">{html.escape(limits.removesuffix(")"))}</span>'


def _beside(one: Finding, joint: str) -> str:
    return joint.join(f"{name} {shown(value)}" for name, value in one.beside.items())


def _scale(value: Any, beside: Mapping[str, Any]) -> str:
    """A line from 0 to 1 with the value, its limits, and its controls; empty where they are no shares."""
    figure = value.estimate if isinstance(value, Interval) else value
    controls = {name: float(one) for name, one in beside.items() if is_number(one) or isinstance(one, Interval)}
    if not is_number(figure) or not all(0 <= one <= 1 for one in (figure, *controls.values())):
        return ""
    if not controls and not (isinstance(value, Interval) and value.known):
        return ""
    limits = ""
    if isinstance(value, Interval) and value.known:
        low, high = (min(max(one, 0.0), 1.0) for one in (value.low, value.high))
        limits = f'<line class="limits" x1="{100 * low:.1f}" x2="{100 * high:.1f}" y1="10" y2="10"/>'
    rings = "".join(
        f'<circle class="control" cx="{100 * one:.1f}" cy="10" r="3.5"><title>{html.escape(name)} {one:.3f}</title>'
        "</circle>"
        for name, one in controls.items()
    )
    ends = "".join(f'<line class="axis" x1="{x}" x2="{x}" y1="5" y2="15"/>' for x in (0, 50, 100))
    return (
        '<svg class="scale" viewBox="-5 0 110 20" preserveAspectRatio="xMinYMid" aria-hidden="true">'
        f'<line class="axis" x1="0" x2="100" y1="10" y2="10"/>{ends}{rings}'
        f'{limits}<circle class="value" cx="{100 * figure:.1f}" cy="10" r="4"/></svg>'
    )


def cautions(part: Cautions, place: Place) -> str:
    """A box with a line for each."""
    if not part.lines:
        return ""
    lines = "".join(f"<li>{html.escape(line)}</li>\n" for line in part.lines)
    return f'<section class="cautions">{place.heading(part.heading)}<ul>{lines}</ul></section>\n'

"""Findings beside a report: ``findings.json``, from which another report can be made."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tdhook_rl.errors import ArtifactError
from tdhook_rl.files.durable import parse_json, put
from tdhook_rl.report.page.numbers import is_number
from tdhook_rl.report.page.parts import Finding
from tdhook_rl.report.page.saved import as_json
from tdhook_rl.statistics import Interval

FINDINGS = "findings.json"
_LIMITS = {one.name for one in fields(Interval)}


def save_findings(folder: str | Path, found: Sequence[Finding]) -> Path:
    """Write what was found into the folder of a run, for ``tdhook-rl report``.

    Raises:
        ArtifactError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> path = save_findings(folder, [Finding(question="Is it?", measured="share", value=0.5, met=True)])
        >>> load_findings(path)[0].value
        0.5
    """
    rows = [{**asdict(one), "value": _plain(one.value), "beside": _named(one)} for one in found]
    return put(Path(folder) / FINDINGS, json.dumps(json.loads(as_json(rows)), indent=1) + "\n")


def load_findings(path: str | Path) -> list[Finding]:
    """What was found.

    Raises:
        ArtifactError: if the file cannot be read, or holds something else.
    """
    try:
        rows = parse_json(Path(path).read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError("it is no list")
        return [
            Finding(
                question=str(row["question"]),
                measured=str(row["measured"]),
                value=_value(row["value"]),
                beside={str(name): _value(value) for name, value in row["beside"].items()},
                words=str(row["words"]),
                met=row["met"] if isinstance(row["met"], bool) else None,
            )
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} holds no findings that can be read ({type(error).__name__})") from error


def _named(one: Finding) -> dict[str, Any]:
    return {name: _plain(value) for name, value in one.beside.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return asdict(value)
    return value if value is None or is_number(value) or isinstance(value, bool) else str(value)


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        known = {name: math.nan if value[name] is None else value[name] for name in _LIMITS}
        return Interval(**known)
    return value

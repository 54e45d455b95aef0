"""Circuits in files: what was found, in numbers and words, and nothing that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.files.stored import module_path
from tdhook_rl.statistics import Interval

KIND = "circuit"
_INTERVALS = ("faithfulness", "random", "without", "nothing")
_WORDS = {one.name for one in fields(Interval) if one.type == "str"}


def write_circuit(
    path: str | Path, found: Mapping[str, Any], curve: list[tuple[int, Interval, Interval | None]]
) -> Path:
    """Write the fields of a circuit, whose curve is given as sizes and intervals."""
    facts = {
        **{name: found[name] for name in ("size", "of", "metric", "words")},
        **{name: _told(found[name]) for name in _INTERVALS},
        "units": {site: list(numbers) for site, numbers in found["units"].items()},
        "widths": dict(found["widths"]),
        "beyond": str(found["beyond"]),
        "curve": [[size, _told(one), _told(other)] for size, one, other in curve],
        "origin": dict(found["facts"]),
    }
    return save_artifact(path, KIND, {f"importance/{site}": one for site, one in found["importance"].items()}, facts)


def read_circuit(path: str | Path) -> tuple[dict[str, Any], list[tuple[int, Interval, Interval | None]]]:
    """The fields of a saved circuit, and its curve.

    Raises:
        ArtifactError: if the file is absent, damaged, or holds no circuit.
    """
    tensors, facts = load_artifact(path, KIND)
    importance = {name.removeprefix("importance/"): one for name, one in tensors.items()}
    try:
        found: dict[str, Any] = {name: _text(facts[name]) for name in ("metric", "words")}
        found |= {name: (_perhaps if name == "random" else _interval)(facts[name]) for name in _INTERVALS}
        found |= {name: _whole(facts[name]) for name in ("size", "of")}
        found["beyond"] = float(_text(facts["beyond"]))
        found["widths"] = {str(site): _whole(one) for site, one in facts["widths"].items()}
        found["units"] = {str(site): [_whole(one) for one in some] for site, some in facts["units"].items()}
        curve = [(_whole(size), _interval(one), _perhaps(other)) for size, one, other in facts["curve"]]
        found["facts"] = dict(facts["origin"])
        _require_whole(found, importance)
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise ArtifactError(
            f"{path} holds no circuit as it is saved: {type(error).__name__} ({error!s:.200})"
        ) from None
    for site in importance:
        module_path(path, {"module_path": site})
    return {**found, "importance": importance}, curve


def _require_whole(found: Mapping[str, Any], importance: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` where numbers do not belong together."""
    if not importance or any(one.ndim != 1 or not one.is_floating_point() for one in importance.values()):
        raise ValueError("the importance of components is missing")
    sizes = {site: len(one) for site, one in importance.items()}
    if found["widths"].keys() != sizes.keys() or sum(sizes.values()) != found["of"]:
        raise ValueError("its sites or components are not those that it says")
    inside = all(site in sizes and set(some) <= set(range(sizes[site])) for site, some in found["units"].items())
    if not inside or sum(map(len, found["units"].values())) != found["size"]:
        raise ValueError("its units are not those of its sites")


def _told(one: Interval | None) -> dict[str, Any] | None:
    # JSON has no NaN and no infinity.
    return None if one is None else {name: str(value) for name, value in asdict(one).items()}


def _perhaps(told: Any) -> Interval | None:
    return None if told is None else _interval(told)


def _interval(told: Any) -> Interval:
    if not isinstance(told, dict):
        raise TypeError(f"{told!r:.40} is no interval")
    return Interval(**{name: _number(name, _text(value)) for name, value in told.items()})


def _number(name: str, value: str) -> Any:
    if name in _WORDS:
        return value
    return int(value) if name == "groups" else float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r:.40} is no count")
    return value

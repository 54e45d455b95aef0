"""Facts of sums and multiples of directions: a list of what they are made of, however they were put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: A direction of more parts is too long a story for a file.
MOST = 1000


def terms_of(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a direction is made of: multiples of directions that were extracted.

    Example:
        >>> terms_of({"source": "pairs"})
        [{'times': 1.0, 'of': {'source': 'pairs'}}]
    """
    terms = facts.get("terms") if facts.get("source") == "sum" else None
    if not isinstance(terms, list) or not all(map(_is_term, terms)):  # facts may come from anybody's file
        return [{"times": 1.0, "of": dict(facts)}]
    return [dict(one) for one in terms]


def _is_term(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("times"), float) and isinstance(one.get("of"), dict)


def combined(parts: Sequence[tuple[float, Mapping[str, Any]]]) -> dict[str, Any]:
    """The facts of a sum of multiples.

    Example:
        >>> half = combined([(0.5, {"source": "pairs", "seed": 0})])
        >>> combined([(1.0, half), (-1.0, {"source": "probe"})])["terms"]
        [{'times': 0.5, 'of': {'source': 'pairs', 'seed': 0}}, {'times': -1.0, 'of': {'source': 'probe'}}]
    """
    terms = [{**one, "times": one["times"] * factor} for factor, facts in parts for one in terms_of(facts)]
    weights = {str(one["of"].get("weights")) for one in terms}
    found: dict[str, Any] = {"source": "sum", "terms": terms[:MOST]}
    if len(terms) > MOST:
        found["terms_left_out"] = len(terms) - MOST
    if len(weights) == 1 and "None" not in weights:
        found["weights"] = weights.pop()
    return found

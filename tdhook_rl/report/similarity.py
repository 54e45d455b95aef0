"""How alike what checkpoints make of the same states is, as figures and as numbers for a file."""

from __future__ import annotations

import math
from typing import Any

import torch

from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import value_grid
from tdhook_rl.rollout import CkaMatrix


def similarity_grids(found: CkaMatrix, *, untrained: str = "") -> list[Drawing]:
    """For each site checkpoints by checkpoints, coloured by their similarity.

    Args:
        found: of :func:`tdhook_rl.rollout.cka_matrix`.
        untrained: the name of the checkpoint that was never trained, if there is one, for the caption.

    Example:
        >>> import torch
        >>> values = torch.tensor([[1.0, 0.25], [0.25, 1.0]]).reshape(2, 1, 2, 1)
        >>> two = CkaMatrix(["early", "late"], ["fc2"], values, 512)
        >>> similarity_grids(two)[0].caption[:81]
        'Debiased linear CKA in 512 states: 1 is equal but for rotation, scale and offset,'
    """
    caption = (
        f"Debiased linear CKA in {found.states:,} states: 1 is equal but for rotation, scale and offset, 0 is nothing "
        "in common."
    )
    caption += f" {_reach(found)}"
    if untrained:
        caption += f" Beside {untrained}: what these layers have in common with ones that were never trained."
    drawings = []
    for site in found.sites:
        cells = {
            name: {other: found.interval((name, site), (other, site)) for other in found.checkpoints}
            for name in found.checkpoints
        }
        title = f"How alike checkpoints are at {site}"
        drawings.append(value_grid(cells, unit=f"similarity (CKA) at {site}", scale=1.0, title=title, caption=caption))
    return drawings


def _reach(found: CkaMatrix) -> str:
    """How sure the numbers are, in a sentence."""
    if found.low is None or found.high is None or not bool(torch.isfinite(found.high - found.low).any()):
        return f"There are no intervals: {found.words or 'none were found'}."
    widest = float((found.high - found.low).nan_to_num(0.0).max())
    between = " Only states of different groups are compared." if found.groups < found.states else ""
    return (
        f"95% intervals by group ({found.groups:,} groups: episodes, where these are known) are in the data; the "
        f"widest spans {widest:.2f}.{between}"
    )


def similarity_document(found: CkaMatrix) -> dict[str, Any]:
    """The same for JSON: by site checkpoints by checkpoints; ``None`` where an activation is constant or not finite.

    Beside the values are the limits of their 95% intervals, ``None`` where there are none.
    """
    document: dict[str, Any] = {
        "measure": "debiased linear CKA", "states": found.states, "groups": found.groups, "confidence": 0.95,
        "checkpoints": found.checkpoints,
    }  # fmt: skip
    for name, part in (("sites", found.values), ("low", found.low), ("high", found.high)):
        if part is not None:
            document[name] = {
                site: [
                    [value if math.isfinite(value) else None for value in line] for line in part[:, at, :, at].tolist()
                ]
                for at, site in enumerate(found.sites)
            }
    return document | ({"words": found.words} if found.words else {})

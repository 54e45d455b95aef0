"""How alike what checkpoints make of the same states is, as figures and as numbers for a file."""

from __future__ import annotations

import math
from typing import Any

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
        >>> similarity_grids(two)[0].caption
        'Debiased linear CKA in 512 states: 1 is equal but for rotation, scale and offset, 0 is nothing in common.'
    """
    caption = (
        f"Debiased linear CKA in {found.states:,} states: 1 is equal but for rotation, scale and offset, 0 is nothing "
        "in common."
    )
    if untrained:
        caption += f" Beside {untrained}: what these layers have in common with ones that were never trained."
    drawings = []
    for site in found.sites:
        values = found.at(site).tolist()
        cells = {
            name: dict(zip(found.checkpoints, line, strict=True))
            for name, line in zip(found.checkpoints, values, strict=True)
        }
        title = f"How alike checkpoints are at {site}"
        drawings.append(value_grid(cells, unit=f"similarity (CKA) at {site}", scale=1.0, title=title, caption=caption))
    return drawings


def similarity_document(found: CkaMatrix) -> dict[str, Any]:
    """The same for JSON: by site checkpoints by checkpoints; ``None`` where an activation is constant or not finite."""
    sites = {
        site: [[value if math.isfinite(value) else None for value in line] for line in found.at(site).tolist()]
        for site in found.sites
    }
    return {"measure": "debiased linear CKA", "states": found.states, "checkpoints": found.checkpoints, "sites": sites}

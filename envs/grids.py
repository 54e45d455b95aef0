"""Moving in a grid whose cells are numbered row by row, and what reaching a goal is worth."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MOVES", "between", "manhattan", "moved", "one_hot", "worth"]

MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])


def moved(cell: Tensor, action: Tensor, side: int) -> Tensor:
    """The cell after a move in a square grid; the border holds the agent back."""
    step = MOVES.to(cell.device)[action]
    row = (cell // side + step[..., 0]).clamp(0, side - 1)
    column = (cell % side + step[..., 1]).clamp(0, side - 1)
    return row * side + column


def manhattan(first: Tensor, second: Tensor, side: int) -> Tensor:
    """Steps between two cells of an empty grid."""
    return (first // side - second // side).abs() + (first % side - second % side).abs()


def between(cell: Tensor, first: Tensor, second: Tensor, side: int) -> Tensor:
    """Whether a cell lies on the straight line from one cell to another, its ends left out."""
    rows, columns = (torch.stack([part(cell), part(first), part(second)]) for part in (_row(side), _column(side)))
    same_row, same_column = (rows == rows[0]).all(0), (columns == columns[0]).all(0)
    inside = manhattan(first, cell, side) + manhattan(cell, second, side) == manhattan(first, second, side)
    return inside & (same_row | same_column) & (cell != first) & (cell != second)


def one_hot(cell: Tensor, cells: int) -> Tensor:
    """Float planes ``batch + (cells,)`` with a 1 at the cell."""
    return torch.zeros(*cell.shape, cells, device=cell.device).scatter_(-1, cell.unsqueeze(-1), 1.0)


def worth(steps: Tensor, gamma: float, cost: float) -> Tensor:
    """The discounted return of being paid 1 on the last of some steps, at a cost for each."""
    discounts = steps.float() if gamma == 1 else (1 - gamma ** steps.float()) / (1 - gamma)
    return gamma ** (steps.float() - 1) - cost * discounts


def _row(side: int):
    return lambda cell: cell // side


def _column(side: int):
    return lambda cell: cell % side

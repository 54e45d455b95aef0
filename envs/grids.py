"""Moving in a grid whose cells are numbered row by row, what reaching a goal is worth, and random mazes."""

from __future__ import annotations

import random

import torch
from torch import Tensor

MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
WAYS = ("up", "down", "left", "right")


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


def random_mazes(count: int, side: int, seed: int) -> Tensor:
    """Walls of mazes with exactly one path between any two free cells: booleans ``(count, side * side)``.

    The cells with even row and column are free in every maze (depth-first search between them).

    Args:
        count: how many.
        side: an odd number of cells.
        seed: of the mazes.

    Example:
        >>> random_mazes(1, 3, seed=0).reshape(3, 3).sum()  # 4 rooms and 3 doors are free
        tensor(2)
    """
    generator = random.Random(seed)
    walls = torch.ones(count, side, side, dtype=torch.bool)
    for maze in walls:
        path = [(0, 0)]
        maze[0, 0] = False
        while path:
            row, column = path[-1]
            around = [(row + 2 * y, column + 2 * x) for y, x in ((-1, 0), (1, 0), (0, -1), (0, 1))]
            closed = [(y, x) for y, x in around if 0 <= y < side and 0 <= x < side and maze[y, x]]
            if not closed:
                path.pop()
                continue
            y, x = generator.choice(closed)
            maze[y, x] = maze[(row + y) // 2, (column + x) // 2] = False
            path.append((y, x))
    return walls.reshape(count, side * side)


def distances(walls: Tensor, side: int) -> Tensor:
    """Steps of the shortest path between every two cells: integers ``(count, cells, cells)``.

    Unreachable cells, and walls, are at distance ``side * side``, which no path has.

    Args:
        walls: booleans ``(count, cells)``.
        side: of the grid.
    """
    count, cells = walls.shape
    far = side * side
    free = ~walls.reshape(count, 1, side, side)
    reached = torch.eye(cells, dtype=torch.bool).expand(count, -1, -1).reshape(count, cells, side, side) & free
    steps = torch.where(reached, 0, far)
    for step in range(1, far):
        grown = reached.clone()
        grown[..., 1:, :] |= reached[..., :-1, :]
        grown[..., :-1, :] |= reached[..., 1:, :]
        grown[..., 1:] |= reached[..., :-1]
        grown[..., :-1] |= reached[..., 1:]
        grown &= free
        if torch.equal(grown, reached):
            break
        steps[grown & ~reached] = step
        reached = grown
    return steps.reshape(count, cells, cells)

"""Random mazes on a square grid, and the steps between all pairs of their cells."""

from __future__ import annotations

import random

import torch
from torch import Tensor

__all__ = ["distances", "random_mazes"]


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

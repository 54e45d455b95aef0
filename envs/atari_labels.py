"""Atari in TorchRL, with concepts read from the console's memory (Anand et al. 2019, AtariARI).

An Atari console has 128 bytes of memory; some of them are the positions and scores that are seen on the
screen. The addresses below were checked against the sprites on the screen (see the tests); positions are in
the console's coordinates, and differ from the screen's rows and columns by the constants in the meanings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
from torchrl.envs import EnvBase

from tdhook_rl.envs.concepts import Concept, Role
from tdhook_rl.envs.info_labels import add_computed_labels
from tdhook_rl.errors import InputError, nearest

#: By game: name, address, role and meaning of each label.
ATARI_RAM: dict[str, dict[str, tuple[int, Role, str]]] = {
    "Pong": {
        "ball_x": (49, "needed", "screen column + 49; 0 while there is no ball"),
        "ball_y": (54, "needed", "screen row + 14, to a row; 0 while there is no ball"),
        "player_y": (51, "needed", "top of the right paddle: screen row + 13, to a few rows"),
        "enemy_y": (50, "needed", "top of the left paddle: screen row + 15"),
        "player_score": (14, "unneeded", "points of the right player"),
        "enemy_score": (13, "unneeded", "points of the left player"),
    },
    "Breakout": {
        "ball_x": (99, "needed", "screen column + 49; 0 before the ball is served"),
        "ball_y": (101, "needed", "screen row - 9"),
        "player_x": (72, "needed", "left end of the paddle: screen column + 47"),
        "lives": (57, "unneeded", "balls left"),
        "blocks_hit": (77, "unneeded", "bricks taken out"),
    },
}


def atari_concepts(game: str) -> dict[str, Concept]:
    """The declarations of a game's labels: bytes, 0 to 255.

    Raises:
        InputError: for a game without a table.

    Example:
        >>> list(atari_concepts("Pong"))
        ['ball_x', 'ball_y', 'player_y', 'enemy_y', 'player_score', 'enemy_score']
    """
    if game not in ATARI_RAM:
        raise InputError(f"there is no table of memory addresses for {game!r}; {nearest(game, ATARI_RAM)}")
    return {name: Concept(role, meaning, classes=256) for name, (_, role, meaning) in ATARI_RAM[game].items()}


def make_atari(name: str = "ALE/Pong-v5", **options: Any) -> EnvBase:
    """An Atari environment for TorchRL, one copy, with the labels of :data:`ATARI_RAM`.

    Args:
        name: as ``gymnasium.make`` knows it, such as ``"ALE/Pong-v5"``.
        options: of ``gymnasium.make``, such as ``frameskip``.

    Raises:
        ImportError: without the extra ``atari``.
        InputError: for a game without a table.
    """
    concepts = atari_concepts(name.removeprefix("ALE/").split("-")[0])
    try:
        import ale_py
    except ImportError:
        raise ImportError("the Arcade Learning Environment is not installed: pip install 'tdhook_rl[atari]'") from None
    gymnasium.register_envs(ale_py)
    table = ATARI_RAM[name.removeprefix("ALE/").split("-")[0]]
    functions: dict[str, Callable[[Any], int]] = {
        label: partial(_byte, address=address) for label, (address, _, _) in table.items()
    }
    return add_computed_labels(gymnasium.make(name, **options), functions, concepts)


def _byte(console: Any, *, address: int) -> int:
    return int(console.ale.getRAM()[address])

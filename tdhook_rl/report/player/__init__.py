"""The episode player: rollouts with results as one page on which a timeline drives everything that is known of a step.

Knows rollouts and where results lie in them; draws in the browser, with the code in ``player.js`` and ``player.css``.
"""

from tdhook_rl.report.player.players import Player, player

__all__ = ["Player", "player"]

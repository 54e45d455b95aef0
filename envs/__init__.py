"""Environments whose answers are known: what matters for value and policy, and what does not."""

from tdhook_rl.envs.cue_corners import CueCorners

__all__ = ["CueCorners"]

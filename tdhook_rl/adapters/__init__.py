"""Policies that come from elsewhere, as TorchRL policies over their own tensors.

Everything of this library then works on them. The other libraries are imported when their agents are handed in, and
nothing below this room knows of them.
"""

from tdhook_rl.adapters.sb3 import from_sb3

__all__ = ["from_sb3"]

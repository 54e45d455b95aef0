"""The command line: a file for each command, with ``add(commands)``.

Knows everything below; nothing knows it. What a command does is in the package, so that it can be done from Python too.
"""

from tdhook_rl.cli.program import main

__all__ = ["main"]

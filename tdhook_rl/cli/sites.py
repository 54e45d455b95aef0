"""``tdhook-rl sites``: what methods can name in a policy."""

from __future__ import annotations

import argparse
from typing import Any

from tdhook_rl.cli.setups import EXAMPLE, hooked, made, one_environment

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    sites = commands.add_parser(
        "sites",
        help="list the modules of a policy: paths, shapes, and how often each runs",
        description="Call a copy of the policy once and list what methods can name.",
    )
    sites.add_argument(
        "target",
        nargs="?",
        default=EXAMPLE,
        metavar="MODULE:FUNCTION",
        help="returns a policy, or (policy, environment or TensorDict), and takes no argument",
    )
    sites.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    import torchrl
    from tensordict import TensorDictBase

    torchrl.logger.setLevel("ERROR")
    found = made(options.target)
    policy, given = (*found, None)[:2] if isinstance(found, tuple) else (found, None)
    if given is not None and not isinstance(given, TensorDictBase):
        given = one_environment(given).reset()
    print(hooked(policy).sites(given))
    return 0

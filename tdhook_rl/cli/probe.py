"""``tdhook-rl probe``: what can be read of the layers of a policy, on stored data."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdhook_rl.cli.options import named, named_file
from tdhook_rl.cli.setups import EXAMPLE, hooked, made
from tdhook_rl.cli.showing import print_table, progress_bar, seed, terminal

#: States in which checkpoints are compared, and what the network that was never trained is called beside them.
STATES, UNTRAINED = 512, "untrained"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    probe = commands.add_parser(
        "probe",
        help="probe every site for every concept, beside an untrained network and other controls",
        description="Fit linear probes of concepts at sites on a stored buffer, score them on held-out groups beside "
        "their controls, and write a table and a report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    probe.add_argument("data", type=Path, metavar="BUFFER", help="a folder: of buffer.dumps, or of memory-mapped rows")
    probe.add_argument("--policy", default=EXAMPLE, metavar="MODULE:FUNCTION", help="returns the policy")
    probe.add_argument("--sites", nargs="+", required=True, metavar="PATH", help="modules, or patterns of them")
    probe.add_argument(
        "--concepts", nargs="+", required=True, metavar="NAME=KEY",
        help="what to read: a key such as concept/xor, or MODULE:FUNCTION of a TensorDict; NAME= may be left out",
    )  # fmt: skip
    probe.add_argument(
        "--checkpoints", nargs="+", default=[], metavar="NAME=FILE", help="weights to look at, in this order"
    )
    probe.add_argument(
        "--split", nargs="+", default=["collector/traj_ids"], metavar="KEY", help="what is held out together"
    )
    probe.add_argument("--held-out", type=float, default=0.25, help="the share of groups that is held out")
    probe.add_argument("--seed", type=seed, default=0, help="of the split and of the untrained network")
    probe.add_argument("--batch-size", type=int, default=4096, help="rows read at once")
    probe.add_argument("--out", type=Path, default=None, help="a new folder for the output (runs/probe-TIME)")
    probe.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    import torch
    import torchrl

    from tdhook_rl.files.durable import tidied
    from tdhook_rl.probes import GroupSplit
    from tdhook_rl.report import new_folder

    torchrl.logger.setLevel("ERROR")
    torch.manual_seed(options.seed)
    found = made(options.policy)
    policy = found[0] if isinstance(found, tuple) else found
    keys = _keys(options.data)
    concepts = {name: _concept(text, keys) for name, text in _named("concepts", options.concepts).items()}
    checkpoints = {name: Path(text) for name, text in _named("checkpoints", options.checkpoints).items()} or None
    split = GroupSplit(*(_key(one, keys) for one in options.split), held_out=options.held_out, seed=options.seed)
    place = options.out or Path("runs") / time.strftime("probe-%Y%m%d-%H%M%S")
    with tidied(place):
        return _probed(policy, concepts, checkpoints, split, new_folder(place), options)


def _probed(policy: Any, concepts: Any, checkpoints: Any, split: Any, folder: Path, options: argparse.Namespace) -> int:
    from tdhook_rl.files.durable import put
    from tdhook_rl.replay import probe_grid
    from tdhook_rl.replay.manifest import facts_of
    from tdhook_rl.report.probe_grids import probe_page
    from tdhook_rl.report.similarity import similarity_document, similarity_grids

    console = terminal()
    with progress_bar(console, "rows", left=True) as bar:
        task = bar.add_task("reading", total=None, visible=False)
        table = probe_grid(
            policy, options.data, sites=options.sites, concepts=concepts, checkpoints=checkpoints, split=split,
            batch_size=options.batch_size, seed=options.seed,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total, visible=True
            ),
        )  # fmt: skip
    document = {"command": options.written, **facts_of(hooked(policy)), "cells": json.loads(table.json())}
    alike: list[Any] = []
    if len(checkpoints or {}) > 1:
        with console.status("comparing checkpoints"):
            compared = _compared(policy, checkpoints, options)
        document["similarity"] = similarity_document(compared)
        alike = similarity_grids(compared, untrained=UNTRAINED)
    put(folder / "probes.json", json.dumps(document, indent=1) + "\n")
    heads, rows = table.columns()
    print_table(console, "Probes on held-out groups", heads, rows)
    page = probe_page(table, command=options.written, beside=alike).save(folder / "report.html")
    console.print(f"  {folder / 'probes.json'}  every cell", highlight=False, soft_wrap=True)
    console.print(f"  {page}  the report: open it in a browser", highlight=False, soft_wrap=True)
    return 0


def _compared(policy: Any, checkpoints: Any, options: argparse.Namespace) -> Any:
    """The similarity of checkpoints, and of an untrained network, in states from all of the buffer."""
    import torch

    from tdhook_rl.hooking.hooked import HookedMixin
    from tdhook_rl.metrics import untrained_copy
    from tdhook_rl.reading.reader import Reader
    from tdhook_rl.rollout import cka_matrix

    if isinstance(policy, HookedMixin):
        with policy.disable_context() as original:
            policy = original
    reader = Reader(options.data)
    entries = torch.linspace(0, reader.size - 1, min(reader.size, max(4, STATES // reader.rows))).long().unique()
    states = reader.read(entries)
    compared = {UNTRAINED: untrained_copy(policy, seed=options.seed)} | checkpoints
    return cka_matrix(policy, compared, options.sites, states, rows=STATES)


def _named(what: str, texts: Sequence[str]) -> dict[str, str]:
    """By name what was given as ``NAME=TEXT``, or as its own name.

    Raises:
        InputError: for a name that is given twice, or none.
    """
    from tdhook_rl.errors import InputError

    found: dict[str, str] = {}
    for text in texts:
        name, rest = named_file(text) if what == "checkpoints" else named(text)
        name = name or text
        if not rest or text.startswith("="):
            raise InputError(f"--{what} are named NAME=VALUE, or by their value; got {text!r}")
        if name in found:
            raise InputError(f"two {what} are called {name!r}: name them, --{what} NAME=VALUE")
        found[name] = rest
    return found


def _keys(data: Path) -> dict[str, Any]:
    """The keys of a buffer as they are written: a key may hold a slash itself."""
    import torch

    from tdhook_rl.arguments.keys import key_parts
    from tdhook_rl.errors import TdhookError
    from tdhook_rl.reading.reader import Reader

    try:
        reader = Reader(data)
        first = reader.read(torch.tensor([0])) if reader.size else None
    except TdhookError:
        return {}  # whoever reads it will say so
    return {} if first is None else {"/".join(key_parts(key)): key for key in first.keys(True, True)}


def _key(text: str, known: Mapping[str, Any]) -> Any:
    parts = tuple(text.split("/"))
    return known.get(text, parts if len(parts) > 1 else text)


def _concept(text: str, known: Mapping[str, Any]) -> Any:
    """A key, or a function of a TensorDict."""
    from tdhook_rl.cli.setups import named_function

    return _key(text, known) if text in known or ":" not in text else named_function(text)

"""``tdhook-rl analyze``: a stored buffer and a policy in, results beside it and a report out."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tdhook_rl.cli.options import chosen_options, printed_warnings
from tdhook_rl.cli.setups import EXAMPLE, made, named_function
from tdhook_rl.cli.showing import seed
from tdhook_rl.errors import InputError, nearest

#: Inputs of more features are not drawn one by one.
FEATURES = 256
#: What a config file may say, and what holds where nobody says anything.
DEFAULTS: dict[str, Any] = {
    "policy": EXAMPLE, "method": None, "target": None, "sites": None, "out": None, "batch_size": None, "rows": None,
    "where": None, "fraction": None, "seed": 0, "time_budget": None, "on_mismatch": "warn", "engine": "local",
    "workers": 2,
}  # fmt: skip


def add(commands: Any) -> None:
    """Add the command to the parser."""
    analyze = commands.add_parser(
        "analyze",
        help="annotate a stored buffer, row by row, and write a report",
        description="Compute attributions or activations of every row of a stored buffer. Results lie in a folder of "
        "their own; the same command goes on where it was stopped.",
    )
    analyze.add_argument(
        "buffer",
        metavar="BUFFER",
        help="a folder (of buffer.dumps, of memory-mapped rows, of Parquet files), a Parquet file, or MODULE:FUNCTION",
    )
    analyze.add_argument(
        "--policy", metavar="MODULE:FUNCTION", help=f"returns the policy, plain or hooked (default: {EXAMPLE})"
    )
    analyze.add_argument(
        "--method", nargs="+", metavar="NAME", help="saliency, integrated_gradients, activation_caching, ...; of a "
        "policy that is hooked already, its own",
    )  # fmt: skip
    analyze.add_argument("--target", metavar="NAME", help="what is explained: chosen_logit, entropy, margin, ...")
    analyze.add_argument("--sites", nargs="+", metavar="PATH", help="of activations: modules, or patterns of them")
    analyze.add_argument("--out", type=Path, metavar="FOLDER", help="for the results (default: runs/analyze-BUFFER)")
    analyze.add_argument("--batch-size", type=int, help="rows read at once (default: what takes 16 MB)")
    analyze.add_argument("--rows", metavar="START:STOP:STEP", help="these entries only")
    analyze.add_argument("--where", metavar="MODULE:FUNCTION", help="entries for which this is true, given a batch")
    analyze.add_argument("--fraction", type=float, help="such a share of the entries, drawn by --seed")
    analyze.add_argument("--seed", type=seed, help="of --fraction (default: 0)")
    analyze.add_argument("--time-budget", type=float, metavar="SECONDS", help="stop after so long; call again to go on")
    analyze.add_argument(
        "--on-mismatch", choices=("warn", "raise", "ignore"), help="where stored outputs are not the policy's"
    )
    analyze.add_argument("--engine", choices=("local", "ray"), help="ray computes in several processes")
    analyze.add_argument("--workers", type=int, help="of the engine (default: 2)")
    analyze.add_argument("--config", type=Path, metavar="FILE", help="the same options in YAML or JSON; flags go first")
    analyze.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    import torchrl

    from tdhook_rl.replay import analyze

    torchrl.logger.setLevel("ERROR")
    chosen = chosen_options(
        options, DEFAULTS, {"batch_size": int, "workers": int, "seed": int, "fraction": float, "time_budget": float}
    )
    source: Any = made(options.buffer) if _is_function(options.buffer) else Path(options.buffer)
    folder = Path(chosen["out"] or Path("runs") / f"analyze-{_name(options.buffer)}")
    context = _prepared(chosen)
    again = f"the same command goes on: {options.written}"
    try:
        with context as policy, printed_warnings():
            found = analyze(
                policy, source, folder, batch_size=chosen["batch_size"], rows=_slice(chosen["rows"]),
                where=None if chosen["where"] is None else named_function(chosen["where"]),
                fraction=chosen["fraction"], seed=chosen["seed"], time_budget=chosen["time_budget"],
                on_mismatch=chosen["on_mismatch"], engine=chosen["engine"], workers=chosen["workers"],
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"tdhook-rl: stopped; {_reached(folder)}; {again}")
        return 130
    print(f"  {folder}  the results of {len(found):,} entries (tdhook_rl.replay.load_results)")
    print(f"  {_report(folder, source, found, options.written)}  the report: open it in a browser")
    return 0


# ---------------------------------------------------------------------- options


def _is_function(text: str) -> bool:
    return ":" in text and not Path(text).exists()


def _name(text: str) -> str:
    name = text.replace(":", "-") if _is_function(text) else Path(text).resolve().name
    return re.sub(r"[^\w.-]+", "-", name)


def _slice(text: Any) -> slice | None:
    if text is None:
        return None
    try:
        parts = [int(one) if one else None for one in str(text).split(":")]
    except ValueError:
        parts = []
    if not 2 <= len(parts) <= 3:
        raise InputError(f"rows are START:STOP or START:STOP:STEP, each a number or nothing; got {text!r}")
    return slice(*parts)


# ---------------------------------------------------------------------- the policy and its methods


def _prepared(chosen: Mapping[str, Any]) -> Any:
    """A context that gives the hooked policy."""
    import contextlib

    from tdhook_rl import Compose
    from tdhook_rl.hooking.hooked import HookedMixin
    from tdhook_rl.method import HookingContext

    found = made(chosen["policy"])
    policy = found[0] if isinstance(found, tuple) else found
    if isinstance(policy, HookedMixin | HookingContext):
        for name in ("method", "target", "sites"):
            if chosen[name] is not None:
                raise InputError(f"{chosen['policy']} returns a hooked policy, which has its methods: leave out {name}")
        return policy if isinstance(policy, HookingContext) else contextlib.nullcontext(policy)
    methods = _methods(chosen)
    return (methods[0] if len(methods) == 1 else Compose(*methods)).prepare(policy)


def _methods(chosen: Mapping[str, Any]) -> list[Any]:
    import tdhook_rl
    from tdhook_rl import ActivationCaching, Compose, attribution, latent, targets
    from tdhook_rl.method import Method

    public = [getattr(room, name) for room in (tdhook_rl, attribution, latent) for name in room.__all__]
    kinds: dict[str, Any] = {
        _snake(one.__name__): one for one in public if isinstance(one, type) and issubclass(one, Method)
    }
    for other in (Method, Compose):  # what all of them are, and what several are
        del kinds[_snake(other.__name__)]
    asked = chosen["method"]
    if asked is None:
        raise InputError(f"{chosen['policy']} returns a plain policy: name what to compute by --method, {_some(kinds)}")
    listed = (
        asked if isinstance(asked, Mapping) else {one: {} for one in ([asked] if isinstance(asked, str) else asked)}
    )
    explains = chosen["target"]
    if explains is not None and explains not in targets.__all__:
        raise InputError(f"there is no target {explains!r}; {nearest(str(explains), targets.__all__)}")
    found = []
    for name, given in listed.items():
        kind = kinds.get(str(name))
        if kind is None:
            raise InputError(f"there is no method {name!r}; {nearest(str(name), kinds)}; there are {_some(kinds)}")
        arguments = dict(given or {})
        if kind is ActivationCaching:
            if chosen["sites"] is None and not arguments:
                raise InputError("activation_caching keeps what modules return: name them by --sites")
            found.append(kind(chosen["sites"], **arguments) if chosen["sites"] is not None else kind(**arguments))
            continue
        if explains is not None:
            arguments.setdefault("target", getattr(targets, explains)())
        found.append(kind(**arguments))
    return found


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _some(kinds: Mapping[str, Callable[..., Any]] | Sequence[str]) -> str:
    return ", ".join(sorted(kinds))


# ---------------------------------------------------------------------- the end


def _reached(folder: Path) -> str:
    from tdhook_rl.errors import TdhookError
    from tdhook_rl.replay.results import Results

    try:
        results = Results.find(folder) if folder.exists() else None
    except TdhookError:
        results = None
    if results is None:
        return "nothing is done yet"
    return f"{results.manifest.done:,} of {results.manifest.entries:,} entries are done"


def _report(folder: Path, source: Any, found: Any, command: str) -> Path:
    """The page of the results, with what the buffer says of its episodes."""
    from dataclasses import replace

    from tdhook_rl.report import page_of
    from tdhook_rl.report.runs import read_run

    page = page_of([read_run(folder)], command=command)
    first, *others = page.parts
    return replace(page, parts=[first, *_by_episode(source, found), *others]).save(folder / "report.html")


def _by_episode(source: Any, found: Any) -> list[Any]:
    """Attributions by feature with intervals over episodes, and the returns; or why there are none."""
    from tdhook_rl.errors import MissingKeyError
    from tdhook_rl.replay import by_feature, returns
    from tdhook_rl.report.figures import grouped_bars

    parts: list[Any] = []
    try:
        for key, value in found.items(True, True):
            if key[0] == "attr" and value.shape[found.ndim :].numel() <= FEATURES:
                name = ".".join(key)
                means = by_feature(found, source, key=key)
                parts.append(grouped_bars(means, unit=f"mean |{name}|", title=f"By feature of {name}", of="episodes"))
        whole = returns(source)
        parts.append(f"Return of the episodes that are whole in the buffer: {whole.mean()}.")
    except (InputError, MissingKeyError) as error:
        parts.append(f"Nothing is said by episode: {error}.")
    return parts

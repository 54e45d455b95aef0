r"""Naming a submodule: ``"layers[-1].mlp"``, ``"layers.5.mlp"``, or a regular expression.

**Paths and patterns.** A pattern is tried as a literal path first and as a regular expression second, with
``re.match`` on the canonical path of each module: it must match from the start of a path, and need not reach its end.
``r"layers\.1"`` therefore catches ``layers.10`` and ``layers.1.mlp`` too, and ``r"layers\.1$"`` does not. What only
observes may catch as much as it likes; an intervention whose pattern catches a module together with one inside it,
or ``layers.10`` where it names ``layers.1``, is refused with the list.

Paths are parsed, never evaluated. A name that a wrapper lacks is looked up in the module it wraps, so that ``"1"``
names layer 1 of ``TensorDictModule(nn.Sequential(...))``.

**Runs.** A module may run several times in one forward: a shared activation, a recurrent cell, the trunk of an actor
and a critic. ``"act@0"`` is its first run in a call, ``"act@-1"`` the last, ``"act@all"`` every run by itself (in a
dimension of its own, after the batch). Without it caching shows the last run, interventions that compute from the
activation (steering, ablation) act in every run, and what would have to choose one (explanations, patching) raises
where there are several. Two paths of one module are the same module, whose runs are counted together; a pattern
catches it by either, once.

Grammar::

    site  := path ["@" (integer | "all")]
    path  := step ("." step | index)*
    step  := name | number | "<" any text without ">" ">"
    index := "[" integer | slice | quoted name "]"

A module whose own name ends like a run is written ``"<act@0>"``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tdhook_rl.errors import SiteError, listed, nearest
from tdhook_rl.sites.known import own_class

#: Which run of a module in one call: its number (negative ones count from the last), all, or not said.
Run = int | Literal["all"] | None

_STEP = re.compile(
    r"""
    \[ \s* (?: (?P<slice>-?\d*\s*:\s*-?\d*(?:\s*:\s*-?\d*)?)
             | (?P<index>-?\d+)
             | (?P<quote>['"]) (?P<key>[^'"]*) (?P=quote) ) \s* \]
  | < (?P<escaped>[^>]+) >
  | (?P<name>[^.\[\]<>]+)
    """,
    re.VERBOSE,
)
_RUN = re.compile(r"(?P<path>.+)@(?P<run>-?\d+|all)", re.DOTALL)


@dataclass(frozen=True)
class Site:
    """One submodule: the name results are filed under, its canonical path, the module, and which run of it."""

    name: str
    path: str
    module: nn.Module
    explicit: bool  # named literally: it must run; a pattern only needs one of its sites to run
    run: Run = None


def resolve(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The submodules that a literal path names, with their canonical dotted paths.

    Args:
        root: the module that paths start from.
        path: a path of the grammar above; a slice names several submodules.

    Returns:
        ``(canonical path, module)`` pairs, in the order of the slice.

    Raises:
        SiteError: if the path does not parse or a step names nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> [name for name, _ in resolve(net, "[-1]")]
        ['1']
    """
    found = [("", root)]
    for step in _parse(path):
        found = [_child for prefix, module in found for _child in _descend(prefix, module, step, path)]
    return found


def find_sites(root: nn.Module, pattern: str | Sequence[str], *, runs: bool = False) -> list[Site]:
    """The sites that a pattern, or each of several patterns, names.

    Args:
        root: the module that paths start from.
        pattern: one pattern or a sequence of patterns.
        runs: a pattern may name single runs of modules (``"act@0"``).

    Raises:
        SiteError: if a pattern matches nothing, a literal path names a container that never runs, or a run is named
            where the module as such is meant.
    """
    owner = own_class(root).__name__
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise SiteError(f"no module of {owner} was named: give at least one path or pattern")
    sites: dict[str, Site] = {}
    for one in patterns:
        for site in _find(root, one, owner):
            sites.setdefault(site.name, site)
    if not runs:
        for site in sites.values():
            if site.run is not None:
                raise SiteError(
                    f"{site.name!r} names a run of a module of {owner}, but the module itself is meant here, whatever "
                    f"its runs: leave '@{site.run}' out"
                )
    return list(sites.values())


def require_apart(root: nn.Module, pattern: str, sites: Sequence[Site], *, nested: bool = False) -> None:
    """Check that the pattern of an intervention catches each place once, and no name that only begins alike.

    With ``nested``, modules inside of others may be caught with them.

    Raises:
        SiteError: with the list of what was caught.
    """
    found = {site.path: site for site in sites if not site.explicit}
    expression = re.compile(_split_run(pattern)[0]) if found else None
    names = set(_names(root)) if found else set()
    holders: dict[str, str] = {}  # what is caught too much, and the module that was meant
    for path in found:
        inside = [outer for outer in found if path.startswith(f"{outer}.")]
        match = None if expression.fullmatch(path) else expression.match(path)  # type: ignore[union-attr]
        begun = path[: match.end()] if match else path
        if begun in names and begun != path and not path.startswith(f"{begun}."):
            holders[path] = begun
        elif inside and not nested:
            holders[path] = inside[0]
    if not holders:
        return
    meant = next(iter(holders.values()))
    raise SiteError(
        f"the pattern {pattern!r} of an intervention catches {len(found)} modules of {own_class(root).__name__}, among "
        f"them {next(iter(holders))!r} along with {meant!r}, so that what is done would be done there more than once "
        f"or elsewhere than meant: {listed(map(repr, found), 40)}. A pattern is matched from the start of a path "
        f"(re.match): write {re.escape(meant) + '$'!r}, or the path {meant!r}, for that module alone"
    )


def require_counted(sites: Sequence[Site]) -> None:
    """Check that it is known while a policy runs whether a run is the one that is meant.

    Raises:
        SiteError: for one that is counted from the last.
    """
    for site in sites:
        if isinstance(site.run, int) and site.run < 0:
            raise SiteError(
                f"{site.name!r} names a run counted from the last, but while the policy runs it is not known which "
                "run will be the last: count from the first, as in 'act@0', or name all with 'act@all'"
            )


def _split_run(pattern: str) -> tuple[str, Run]:
    match = _RUN.fullmatch(pattern)
    if match is None:
        return pattern, None
    return match["path"], "all" if match["run"] == "all" else int(match["run"])


def _literal(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    try:
        return resolve(root, path)
    except SiteError:
        return []


def _find(root: nn.Module, pattern: str, owner: str) -> list[Site]:
    if not isinstance(pattern, str):
        raise SiteError(f"a module of {owner} is named by a string, not by {pattern!r}")
    asked, (pattern, run) = pattern, _split_run(pattern)
    literal = _literal(root, pattern)
    if run is not None and not literal and (whole := _literal(root, asked)):
        pattern, run, literal = asked, None, whole
    suffix = "" if run is None else f"@{run}"
    if literal:
        for path, module in literal:
            if not runs_by_itself(module):
                inner = [name for name in _names(root) if name.startswith(f"{path}.")]
                raise SiteError(
                    f"{pattern!r} names a {type(module).__name__} of {owner}, a container that never runs; "
                    f"{nearest(pattern, inner)}"
                )
        if len(literal) == 1:
            return [Site(asked, literal[0][0], literal[0][1], True, run)]
        return [Site(f"{path}{suffix}", path, module, True, run) for path, module in literal]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise SiteError(
            f"{pattern!r} is neither a path of {owner} nor a regular expression ({error}); "
            f"{nearest(pattern, _names(root))}"
        ) from None
    matched: dict[int, Site] = {}  # once where two paths reach it: a second hook would fire twice
    for path, module in root.named_modules(remove_duplicate=False):
        if path and expression.match(path) and runs_by_itself(module):
            matched.setdefault(id(module), Site(f"{path}{suffix}", path, module, False, run))
    matches = list(matched.values())
    if not matches:
        runs = " (a run is written '@' and a number, or '@all')" if "@" in pattern else ""
        raise SiteError(f"no submodule of {owner} matches {pattern!r}{runs}; {nearest(pattern, _names(root))}")
    return matches


def _parse(path: str) -> list[tuple[str, str]]:
    steps, position = [], 0
    while position < len(path):
        if path[position] == ".":
            position += 1
            continue
        match = _STEP.match(path, position)
        if match is None:
            raise SiteError(f"{path!r} is not a module path: cannot read {path[position:]!r}")
        kind, text = next(
            (kind, match[kind]) for kind in ("slice", "index", "key", "escaped", "name") if match[kind] is not None
        )
        steps.append((kind, text.strip()))
        position = match.end()
    if not steps:
        raise SiteError(f"{path!r} is not a module path: it has no step")
    return steps


def _descend(prefix: str, module: nn.Module, step: tuple[str, str], path: str) -> list[tuple[str, nn.Module]]:
    kind, text = step
    children = module._modules
    if kind in ("index", "slice"):
        holder, names = prefix, list(children)
        if "module" in children and not isinstance(module, (nn.Sequential, nn.ModuleList)):
            return _descend(_join(prefix, "module"), children["module"], step, path)
        try:
            chosen = names[int(text)] if kind == "index" else names[_slice(text)]
        except (IndexError, ValueError):  # a slice may have a step of zero
            raise SiteError(
                f"{path!r}: index {text} of {type(module).__name__} {holder!r}, which has {len(names)} children"
            ) from None
        chosen = [chosen] if isinstance(chosen, str) else chosen
        return [(_join(prefix, name), children[name]) for name in chosen if children[name] is not None]
    child, wrapped = children.get(text), children.get("module")
    if child is not None:
        return [(_join(prefix, text), child)]
    if wrapped is not None:
        return _descend(_join(prefix, "module"), wrapped, step, path)
    raise SiteError(f"{path!r}: {type(module).__name__} {prefix!r} has no child {text!r}; {nearest(text, children)}")


def _slice(text: str) -> slice:
    return slice(*(int(part) if part.strip() else None for part in text.split(":")))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _names(root: nn.Module) -> list[str]:
    return [name for name, _ in root.named_modules(remove_duplicate=False) if name]


def runs_by_itself(module: nn.Module) -> bool:
    """Whether a module has a forward; a list or dictionary of modules has none."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict))

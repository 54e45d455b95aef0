"""Naming a submodule: ``"layers[-1].mlp"``, ``"layers.5.mlp"``, or a regular expression.

A pattern is tried as a literal path first and as a regular expression (``re.match``) second. Paths are
parsed, never evaluated. A name that a wrapper lacks is looked up in the module it wraps, so that ``"1"``
names layer 1 of ``TensorDictModule(nn.Sequential(...))``.

Grammar::

    path  := step ("." step | index)*
    step  := name | number | "<" any text without ">" ">"
    index := "[" integer | slice | quoted name "]"
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from tdhook_rl.errors import SiteError, nearest

__all__ = ["Site", "find_sites", "resolve"]

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


@dataclass(frozen=True)
class Site:
    """One submodule: the name results are filed under, its canonical path, and the module."""

    name: str
    path: str
    module: nn.Module
    explicit: bool  # named literally: it must run; a pattern only needs one of its sites to run


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


def find_sites(root: nn.Module, pattern: str | Sequence[str], owner: str | None = None) -> list[Site]:
    """The sites that a pattern, or each of several patterns, names.

    Args:
        root: the module that paths start from.
        pattern: one pattern or a sequence of patterns.
        owner: how error messages call the root; its class name by default.

    Raises:
        SiteError: if a pattern matches nothing, or a literal path names a container that never runs.
    """
    owner = owner or type(root).__name__
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise SiteError(f"no module of {owner} was named: give at least one path or pattern")
    sites: dict[str, Site] = {}
    for one in patterns:
        for site in _find(root, one, owner):
            sites.setdefault(site.name, site)
    return list(sites.values())


def _find(root: nn.Module, pattern: str, owner: str) -> list[Site]:
    if not isinstance(pattern, str):
        raise SiteError(f"a module of {owner} is named by a string, not by {pattern!r}")
    try:
        literal = resolve(root, pattern)
    except SiteError:
        literal = []
    if literal:
        for path, module in literal:
            if not _runs(module):
                inner = [name for name, _ in _named_modules(root) if name.startswith(f"{path}.")]
                raise SiteError(
                    f"{pattern!r} names a {type(module).__name__} of {owner}, a container that never runs; "
                    f"{nearest(pattern, inner)}"
                )
        if len(literal) == 1:
            return [Site(pattern, literal[0][0], literal[0][1], True)]
        return [Site(path, path, module, True) for path, module in literal]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise SiteError(
            f"{pattern!r} is neither a path of {owner} nor a regular expression ({error}); "
            f"{nearest(pattern, _names(root))}"
        ) from None
    matches = [
        Site(path, path, module, False)
        for path, module in _named_modules(root)
        if path and expression.match(path) and _runs(module)
    ]
    if not matches:
        raise SiteError(f"no submodule of {owner} matches {pattern!r}; {nearest(pattern, _names(root))}")
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


def _named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # A module reached by two paths is listed once, as torch does: a second hook would fire twice.
    yield from root.named_modules()


def _names(root: nn.Module) -> list[str]:
    return [name for name, _ in _named_modules(root) if name]


def _runs(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict))

"""The modules of a policy by path: their classes, the shapes of their features, and how often each runs in a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.errors import InputError, SiteError, TdhookError, nearest
from tdhook_rl.policies.rebinding import deep_copy
from tdhook_rl.replaying.batching import GeneratorState
from tdhook_rl.sites.known import own_class
from tdhook_rl.sites.paths import runs_by_itself
from tdhook_rl.sites.rows import rows_of, with_batch
from tdhook_rl.sites.runtime import Runtime


@dataclass(frozen=True)
class SiteRow:
    """One module.

    Attributes:
        path: how methods name it.
        kind: its class.
        features: the shape of what it gives for a row of the batch; None where it gives no tensor with rows, or did
            not run.
        runs: how often it runs in one call; None where no call was looked at.
        same_as: the first path of the same module, if this is another one.
    """

    path: str
    kind: str
    features: tuple[int, ...] | None = None
    runs: int | None = None
    same_as: str | None = None


@dataclass(frozen=True)
class SiteTable:
    """The modules of a policy; ``str()`` is a plain table.

    Example:
        >>> table = SiteTable((SiteRow("0", "Linear", (8,), 1), SiteRow("1", "Tanh", (8,), 2)))
        >>> print(table)
        path  class   features  runs
        0     Linear  8         1
        1     Tanh    8         2: '1@0', '1@1', '1@all'
        >>> table["1"].runs
        2
    """

    rows: tuple[SiteRow, ...]

    def __iter__(self) -> Iterator[SiteRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> SiteRow:
        """The row of a path.

        Raises:
            SiteError: if there is none.
        """
        for row in self.rows:
            if row.path == path:
                return row
        raise SiteError(f"no module has the path {path!r}; {nearest(path, [row.path for row in self.rows])}")

    def head(self, count: int = 8) -> SiteTable:
        """The first rows."""
        return SiteTable(self.rows[:count])

    def __str__(self) -> str:
        lines = [("path", "class", "features", "runs"), *((one.path, one.kind, *_cells(one)) for one in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in lines
        )


def _cells(row: SiteRow) -> tuple[str, str]:
    features = "" if row.features is None else " x ".join(map(str, row.features)) or "a number"
    runs = "" if row.runs is None else str(row.runs)
    if row.runs is not None and row.runs > 1:
        between = "" if row.runs == 2 else " to"
        runs += f": '{row.path}@0'{between or ','} '{row.path}@{row.runs - 1}', '{row.path}@all'"
    if row.same_as is not None:
        runs += f"{'; ' if runs else ''}the module of {row.same_as!r}"
    return features, runs


def site_table(hooked: HookedPolicy, data: TensorDictBase | None = None) -> SiteTable:
    """The modules of a hooked policy, with what a call on ``data`` shows of them.

    The call is made on a copy with tensors of its own and without the observing methods: state that the policy writes,
    the data and torch's generators stay as they are.

    Args:
        hooked: the hooked policy.
        data: a TensorDict that the policy can be called on; without one only paths and classes are known.

    Raises:
        InputError: if the data is no TensorDict.

    Example:
        >>> from tensordict import TensorDict
        >>> from tdhook_rl import HookedModule
        >>> act = nn.Tanh()
        >>> hooked = HookedModule.from_module(nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 8), act))
        >>> print(hooked.sites(TensorDict({"input": torch.zeros(5, 4)}, batch_size=5)))
        path  class   features  runs
        0     Linear  8         1
        1     Tanh    8         2: '1@0', '1@1', '1@all'
        2     Linear  8         1
        3     Tanh    8         2: '3@0', '3@1', '3@all'; the module of '1'
    """
    if data is not None and not isinstance(data, TensorDictBase):
        raise InputError(f"sites() takes a TensorDict that the policy can be called on, got a {type(data).__name__}")
    names: dict[int, str] = {}
    rows = []
    for path, module in hooked.hooked_root.named_modules(remove_duplicate=False):
        if path and runs_by_itself(module):
            first = names.setdefault(id(module), path)
            kind = own_class(module).__name__
            rows.append(SiteRow(path, kind, same_as=None if first == path else first))
    if data is None:
        return SiteTable(tuple(rows))
    seen = _seen(hooked, data)
    found = ((row, seen.get(row.same_as or row.path, (0, None))) for row in rows)
    return SiteTable(tuple(dataclasses.replace(row, runs=runs, features=shape) for row, (runs, shape) in found))


def _seen(hooked: HookedPolicy, data: TensorDictBase) -> dict[str, tuple[int, tuple[int, ...] | None]]:
    """How often each module runs, and the shape of its features, by its first path."""
    trial = deep_copy(hooked)
    trial._hooked.steps = []
    seen: dict[str, tuple[int, tuple[int, ...] | None]] = {}
    for path, module in trial.hooked_root.named_modules():
        if path:
            module.register_forward_hook(_Look(trial._hooked.runtime, path, seen))
    state = GeneratorState(data.device)
    try:
        with torch.no_grad():
            trial(data.clone())
    finally:
        state.restore()
    return seen


class _Look:
    """Forward hook that notes that its module runs, and what it gives."""

    def __init__(self, runtime: Runtime, path: str, seen: dict[str, Any]) -> None:
        self.runtime = runtime
        self.path = path
        self.seen = seen

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        batch = self.runtime.batch or torch.Size(())
        try:
            rows, _ = rows_of(output, module, self.path, self.runtime, exact=False)
            shape = tuple(with_batch(rows, batch, self.path).shape[len(batch) :])
        except TdhookError:
            shape = None
        self.seen[self.path] = self.seen.get(self.path, (0, None))[0] + 1, shape

"""Hooks from functions: what a function makes of an output is kept, or put in its place."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.sites.hooks import CaptureHook, Portable
from tdhook_rl.sites.paths import Run
from tdhook_rl.sites.rows import rows_of, with_rows
from tdhook_rl.sites.runtime import Runtime

__all__ = ["ChangeHook", "ReadHook", "portable"]


def portable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as it travels to workers: lambdas and local ones by cloudpickle, objects as they pickle themselves."""
    return Portable(function) if isinstance(function, types.FunctionType) else function


class ReadHook(CaptureHook):
    """Forward hook that keeps what a function reads from an output, a tensor with a row for each row."""

    def __init__(self, runtime: Runtime, slot: str, read: Callable[[Any], Tensor], run: Run = None) -> None:
        super().__init__(runtime, slot, run)
        self.read = portable(read)

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if self.runtime.recording or not self.runtime.active:
            super().__call__(module, args, self.read(output))


class ChangeHook:
    """Forward hook that puts in what a function makes of the rows that a site puts out."""

    def __init__(self, runtime: Runtime, site: str, change: Callable[[Tensor], Tensor]) -> None:
        self.runtime = runtime
        self.site = site
        self.change = portable(change)

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        self.runtime.intervene_at(self.site)
        rows, disguise = rows_of(output, module, self.site, self.runtime)
        changed = self.change(rows)
        if not isinstance(changed, Tensor) or changed.shape != rows.shape:
            got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise InputError(
                f"what changes {self.site!r} is given rows of shape {tuple(rows.shape)} and returned {got}"
            )
        return with_rows(output, changed, module, disguise)

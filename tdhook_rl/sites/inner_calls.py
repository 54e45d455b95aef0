"""Modules that a policy calls with a part of its batch: a step at a time, or some of the rows.

``RSSMRollout`` walks through time and calls its networks once a step; other modules hand the rows that are due to a
network. What such a module computes has not the rows of the batch, though its shape may fit by accident.
``RSSMRolloutV3`` takes tensors apart by itself and calls layers: no TensorDict module says that they see one step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictParams, TensorDictSequential
from torch import nn

from tdhook_rl.arguments.keys import is_tensordict
from tdhook_rl.errors import InputError
from tdhook_rl.internals.torchrl_names import walks_through_time
from tdhook_rl.sites.listed import named_modules
from tdhook_rl.sites.runtime import Runtime, vmap_level


class _InnerHook:
    """Pre-hook and hook of a TensorDict module that another one calls in a forward of its own."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        data = args[0] if args else kwargs.get("tensordict")
        known = is_tensordict(data) and vmap_level() == self.runtime.level
        self.runtime.inner = (*self.runtime.inner, data.batch_size if known else None)  # type: ignore[union-attr]

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.runtime.inner = self.runtime.inner[:-1]


def place_inner_hooks(policy: nn.Module, runtime: Runtime) -> None:
    """Watch what TensorDict modules are called with whose caller has a forward of its own."""
    for child in _called_by_others(policy, False):
        hook = _InnerHook(runtime)
        child.register_forward_pre_hook(hook.before, with_kwargs=True)
        child.register_forward_hook(hook.after, always_call=True)
    for path, module in named_modules(policy):
        if walks_through_time(module):
            inside = (name for name, _ in named_modules(module) if name)
            runtime.steps |= {f"{path}.{name}" if path else name for name in inside}


def step_of_batch(runtime: Runtime, site: str) -> bool:
    """Whether the module under way is called with one step of the batch, whose last dimension is time.

    Raises:
        InputError: if it is called with other rows than those of the batch.
    """
    inner = runtime.inner[-1] if runtime.inner else None
    batch = runtime.batch
    if takes_steps(runtime, site):
        return True
    if inner is None or batch is None or inner == batch:
        return False
    if len(batch) and inner == batch[:-1]:
        return True
    if inner.numel() == batch.numel():
        return False  # the same rows in another shape, which is read from what the module computes
    raise InputError(
        f"{site!r} is called with rows of its own ({tuple(inner)}) in a batch {tuple(batch)}, so it is not known which "
        "row each result belongs to: explain the module that calls it, or hook the inner policy by itself"
    )


def require_whole_batch(runtime: Runtime, site: str, partial: bool = False) -> None:
    """Refuse a site that is called with one step at a time where its value for the whole batch is needed.

    With ``partial`` it may be called with other rows.

    Raises:
        InputError: if it is.
    """
    if (runtime.inner or runtime.steps) and not (partial and not _is_step(runtime, site)):
        if not step_of_batch(runtime, site):
            return
        raise InputError(
            f"{site!r} is called with one step of the batch {tuple(runtime.batch or ())} at a time, so it has no value "
            "for a row as a whole: cache it, which shows every step, or hook the module of one step by itself"
        )


def takes_steps(runtime: Runtime, site: str) -> bool:
    """Whether a module around this one hands it tensors of one step of the batch at a time, by itself."""
    if not runtime.steps or not runtime.batch or site.partition("@")[0] not in runtime.steps:
        return False
    return not runtime.inner or runtime.inner[-1] == runtime.batch


def batch_at(runtime: Runtime, site: str) -> torch.Size | None:
    """The batch size of what a site is called with; ``None`` where it is not known."""
    if takes_steps(runtime, site):
        return runtime.batch[:-1]  # type: ignore[index]
    inner = runtime.inner[-1] if runtime.inner else None
    return runtime.batch if inner is None else inner


def _is_step(runtime: Runtime, site: str) -> bool:
    if takes_steps(runtime, site):
        return True
    return bool(runtime.batch) and bool(runtime.inner) and runtime.inner[-1] == runtime.batch[:-1]  # type: ignore[index]


def _called_by_others(module: nn.Module, own: bool) -> Iterator[TensorDictModuleBase]:
    from torchrl.modules import VmapModule

    for child in module.children():
        if isinstance(child, TensorDictParams):
            continue
        inside = own
        if isinstance(module, TensorDictModuleBase):
            inside = not isinstance(module, (TensorDictSequential, VmapModule))
        if inside and isinstance(child, TensorDictModuleBase):
            yield child
        yield from _called_by_others(child, inside)

"""Sites that run in some calls, or on some rows, only: what stands in the rows that have no value.

Experts, chunks of actions, worlds that are imagined now and then. With ``missing="nan"`` such rows are NaN and their
mask is false. Which rows a module was called with is found by its input: each row of it must be a row of the input of
a module around it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.internals.torch_names import held_parameters
from tdhook_rl.sites.inner_calls import require_whole_batch
from tdhook_rl.sites.rows import rows_of, with_batch
from tdhook_rl.sites.runtime import Runtime

Missing = Literal["raise", "nan"]


#: What methods that have ``missing=`` say where a module has no value for a row.
OFFER = (
    "; with missing='nan' rows that it does not run on (of another expert, or of a call without it) are NaN, and their "
    "mask is false"
)


def check_missing(missing: str) -> None:
    """Refuse a ``missing=`` that is neither of the two."""
    if missing not in ("raise", "nan"):
        raise InputError(f"missing= is 'raise' or 'nan', got {missing!r}")


_ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Identity)


class PartialCapture:
    """What one site gave in one call: for each run its rows, and which rows of the batch they are."""

    def __init__(self) -> None:
        self.runs: list[tuple[Tensor, Tensor | None]] = []

    def spread(self, value: Tensor, batch: torch.Size, site: str) -> Tensor:
        """A value for the rows of the last run, in all rows, NaN where there is none."""
        return PartialCapture.of([(value, self.runs[-1][1])]).together(batch, site)[0]

    @classmethod
    def of(cls, runs: list[tuple[Tensor, Tensor | None]]) -> PartialCapture:
        captured = cls()
        captured.runs = runs
        return captured

    def together(self, batch: torch.Size, site: str) -> tuple[Tensor, Tensor]:
        """The values of all rows, NaN where there is none, and the mask of those that have one."""
        value, rows = self.runs[-1]
        if rows is None:
            value = with_batch(value, batch, site)
            return value, torch.ones(batch, dtype=torch.bool, device=value.device)
        total = value.new_full((batch.numel(), *value.shape[1:]), missing_value(value.dtype))
        mask = torch.zeros(batch.numel(), dtype=torch.bool, device=value.device)
        for value, rows in self.runs:
            if rows is None:
                return with_batch(value, batch, site), torch.ones_like(mask).reshape(batch)
            total[rows], mask[rows] = value, True
        return total.reshape((*batch, *value.shape[1:])), mask.reshape(batch)


class RowsHook:
    """Hooks of a site and of the modules around it that find which rows of the batch the site is called with."""

    def __init__(self, runtime: Runtime, slot: str, site: str) -> None:
        self.runtime = runtime
        self.slot = slot
        self.site = site

    def around(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-hook of a module around the site: keeps what it reads for as long as it runs."""
        if self.runtime.recording:
            self.runtime.around.setdefault(self.slot, []).append(_tensors(args, kwargs, module))

    def left(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook of a module around the site."""
        if kept := self.runtime.around.get(self.slot):
            kept.pop()

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Hook of the site."""
        runtime = self.runtime
        runtime.require_open()
        if not runtime.recording or runtime.batch is None:
            return
        require_whole_batch(runtime, self.site, partial=True)
        value, _ = rows_of(output, module, self.site, runtime)
        value = (value.detach() if value.requires_grad else value).clone()
        captured = runtime.slots.get(self.slot) if runtime.run_of(self.slot) else None
        if captured is None:
            captured = runtime.slots[self.slot] = PartialCapture()  # type: ignore[assignment]
        captured.runs.append((value, self._rows(value, _tensors(args, kwargs, module))))  # type: ignore[union-attr]

    def _rows(self, value: Tensor, given: list[Tensor]) -> Tensor | None:
        """The rows of the batch, flattened, that these are; ``None`` for all, in their order."""
        batch = self.runtime.batch
        if batch is None or value.shape[: len(batch)] == batch or value.shape[:1].numel() == batch.numel():
            return None
        count = len(value)
        for level in (*reversed(self.runtime.around.get(self.slot, [])), _of_policy(self.runtime.source)):
            for part in given:
                for one in level:
                    if one.shape[: len(batch)] == batch and one.shape[len(batch) :] == part.shape[1:]:
                        found = _matching(part.detach(), one.detach().reshape(-1, *part.shape[1:]))
                        if found is not None and len(found) == count:
                            return found
            # A module that reads so many rows itself has handed them on as they are.
            given = [one for one in level if one.shape[:1] == (count,)] or given
        raise InputError(
            f"{self.site!r} ran on {len(value)} rows in a batch {tuple(batch)}, and which rows these are cannot be "
            "told from what it is given: no module around it reads the same numbers in rows of the batch"
        )


class Absent:
    """Remembers how the values of sites look, for calls in which a site does not run."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def note(self, site: str, value: Tensor, batch: torch.Size) -> None:
        """A value that a site gave."""
        self._seen[site] = value.shape[len(batch) :], value.dtype

    def value(self, site: str, module: nn.Module | None, batch: torch.Size, device: torch.device | None) -> Tensor:
        """Nothing, in the shape of what a site would give.

        Raises:
            SiteError: if it has not run yet, and its shape is not known from its class.
        """
        features, dtype = self._seen.get(site, (None, torch.get_default_dtype()))
        features = features if features is not None or module is None else _features(module)
        if features is None:
            raise SiteError(
                f"the module {site!r} did not run in this call, and how its output looks is not known, since it has "
                "not run in a call before: begin with data for which it runs"
            )
        return torch.full((*batch, *features), missing_value(dtype), dtype=dtype, device=device)


def place_rows_hook(root: nn.Module, path: str, hook: RowsHook) -> None:
    """Put the hooks at a site, given by its path, and at the modules around it."""
    parts = path.split(".")
    for length in range(len(parts)):
        around = root.get_submodule(".".join(parts[:length]))
        around.register_forward_pre_hook(hook.around, with_kwargs=True)
        around.register_forward_hook(hook.left, always_call=True)
    root.get_submodule(path).register_forward_hook(hook.after, with_kwargs=True)


def _of_policy(source: Any) -> list[Tensor]:
    entries = source.values(True, True) if isinstance(source, TensorDictBase) else ()
    return [one for one in entries if isinstance(one, Tensor)]


def _tensors(args: tuple, kwargs: dict[str, Any], module: nn.Module) -> list[Tensor]:
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, TensorDictBase):
            entries = [value.get(key, None) for key in getattr(module, "in_keys", ())]
            found += [one for one in entries if isinstance(one, Tensor)]
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def _matching(part: Tensor, whole: Tensor) -> Tensor | None:
    """For each row of a part its place in the whole; ``None`` where there is none, or more than one that it may be."""
    if not len(part):
        return torch.zeros(0, dtype=torch.long, device=whole.device)
    same = (part.reshape(len(part), 1, -1) == whole.reshape(1, len(whole), -1)).all(-1)
    if not bool(same.any(1).all()):
        return None
    found = torch.full((len(part),), -1, dtype=torch.long, device=whole.device)
    for row in range(len(part)):
        places = same[row].nonzero().squeeze(-1)
        if len(places) > 1:
            alike = same[:, places[0]].nonzero().squeeze(-1)
            if len(alike) != len(places):
                return None
            found[alike] = places
        else:
            found[row] = places[0]
    return found


def _features(module: nn.Module) -> torch.Size | None:
    if isinstance(module, nn.Linear):
        return torch.Size([module.out_features])
    if isinstance(module, nn.LayerNorm):
        return torch.Size(module.normalized_shape)
    if isinstance(module, nn.Sequential):
        for child in reversed(module):
            if held_parameters(child):
                return _features(child)
            if not isinstance(child, _ELEMENTWISE):
                return None
    return None


def missing_value(dtype: torch.dtype) -> Any:
    """What stands where nothing was computed: NaN, and 0 for integers."""
    return torch.nan if dtype.is_floating_point or dtype.is_complex else 0

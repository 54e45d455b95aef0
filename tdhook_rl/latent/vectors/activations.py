"""What a module computes for states, piece by piece, so that memory is bounded however many states there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.batches.annotating_mixin import annotate_part
from tdhook_rl.calls.real_rows import real_rows, surely_finite
from tdhook_rl.errors import InputError, listed
from tdhook_rl.hooking.hooked import HookedMixin
from tdhook_rl.latent.activation_caching import ActivationCaching
from tdhook_rl.latent.vectors.places import path_and_entry, place_name, written_entry
from tdhook_rl.sites.paths import find_sites
from tdhook_rl.sites.states import state_names, state_of

#: Rows of the first piece, and bytes of activations of each that follows.
_FIRST, _BYTES = 64, 32 << 20
#: Results of methods, which are no part of a state.
_RESULTS = ("cache", "computed", "attr", "probe")


class Activations:
    """Reads one place of a policy.

    Attributes:
        name: the place, for messages.
        in_keys: what the policy reads.
    """

    def __init__(self, hooked: Any, key: tuple[str, ...], name: str) -> None:
        self._hooked, self._key, self.name = hooked, key, name
        self._size = _FIRST
        self.in_keys: list[NestedKey] = list(hooked.policy_in_keys)

    def pieces(self, states: TensorDictBase, chosen: bool = False) -> Iterator[tuple[TensorDictBase, Tensor, Tensor]]:
        """Rows of the states with what the module computes for them.

        Args:
            states: of any batch shape; what it holds of earlier results is not read.
            chosen: whether they are some of the rows of a whole.

        Yields:
            the rows; ``(rows, *features)``, detached; and which of them have a value, which is finite, ``(rows,)``.

        Raises:
            InputError: for complex activations; if the policy reads rows together that are computed apart.
        """
        flat = states.exclude(*_RESULTS)
        flat = flat if flat.ndim == 1 else flat.flatten(0, -1)
        first, laid_out = 0, ""
        if chosen or states.ndim > 1 or len(flat) > self._size:
            laid_out = f"of {len(flat)} states the activations are read some at a time"
        while first < len(flat):
            rows = flat[first : first + self._size]
            first += len(rows)
            seen = annotate_part(self._hooked, rows, laid_out, on_mismatch="ignore")
            values = seen[self._key].detach()
            if values.is_complex():
                raise InputError(f"the activations of {self.name!r} are complex, and directions are real numbers")
            if values.ndim == 1:
                values = values[:, None]
            known = torch.ones(len(values), dtype=torch.bool, device=values.device)
            known = known if surely_finite(values) else torch.isfinite(values.flatten(1)).all(1)
            real = real_rows(seen, self._key)
            yield rows, values, known if real is None else known & real.to(known.device)
            self._size = max(_FIRST, _BYTES // max(values[0].numel() * 8, 1))


@contextmanager
def reading(policy: nn.Module, place: Any) -> Iterator[Activations]:
    """While this is open, the activations of one place of a policy can be read; of a hooked one without its methods.

    Raises:
        SiteError: if there is no such module, or it writes no such entry.
        InputError: if several modules are named.
    """
    path, entry = path_and_entry(place, "path= is")
    policy = unhooked(policy)
    site, *others = find_sites(policy, path, runs=True)
    if others:
        raise InputError(
            f"{path!r} names {1 + len(others)} modules, and a direction is of one: "
            f"{listed((repr(one.name) for one in (site, *others)), 4)}"
        )
    callback = None if entry is None else _EntryOf(site.module, written_entry(site, entry))
    with ActivationCaching(path, callback=callback).prepare(policy) as hooked:
        (key,) = (key for key in hooked.result_keys if key[0] == "cache")
        yield Activations(hooked, key, place_name(path, entry))


def unhooked(policy: nn.Module) -> nn.Module:
    """The user's own policy behind a hooked one; any other as it is."""
    if isinstance(policy, HookedMixin):
        with policy.disable_context() as original:
            return original
    return policy


def root_of(policy: nn.Module) -> nn.Module:
    """The module that paths start from, of a hooked policy too, whether its original is at hand or not."""
    return policy.hooked_root if isinstance(policy, HookedMixin) else policy  # type: ignore[return-value]


class _EntryOf:
    """Takes an entry out of what a module returns, rows first."""

    def __init__(self, module: nn.Module, key: NestedKey) -> None:
        self._key, self._state = key, key in state_names(module)

    def __call__(self, output: Any) -> Tensor:
        if not self._state:
            return output.get(self._key)
        state = state_of(output, self._key)  # type: ignore[arg-type]
        return state.movedim(0, 1) if state.ndim == 3 else state

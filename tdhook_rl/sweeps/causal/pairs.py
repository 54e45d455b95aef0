"""Pairs of states: a clean and a corrupt one of each, which of them can be used, and in which groups they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import required
from tdhook_rl.calls.inputs import require_as_seen, state_keys
from tdhook_rl.calls.real_rows import defined_values, real_rows, surely_finite
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.policies.draws import action_keys
from tdhook_rl.replaying.batching import row_vectors
from tdhook_rl.sweeps.causal.bench import Bench

#: Which run is patched with activations of which: ``"denoising"``: that on corrupt states, with clean activations;
#: ``"noising"``: that on clean states, with corrupt ones.
Way = Literal["denoising", "noising"]
WAYS = ("denoising", "noising")
T = TypeVar("T")


@dataclass(frozen=True)
class Pairs:
    """Pairs of states that can be used.

    Args:
        clean, corrupt: ``(pairs,)``, what the policy reads.
        actions: what was stored as the action of the clean states, if anything.
        usable: of all the pairs that were given, which these are.
        groups: of each of these, ``None`` where each is its own.
    """

    clean: TensorDict
    corrupt: TensorDict
    actions: TensorDict
    usable: Tensor
    groups: Tensor | None

    def __len__(self) -> int:
        return len(self.clean)

    def parts(self, rows: int) -> Iterator[Pairs]:
        """The same in parts of so many pairs."""
        for start in range(0, len(self), rows):
            chosen = slice(start, start + rows)
            yield replace(
                self, clean=self.clean[chosen], corrupt=self.corrupt[chosen], actions=self.actions[chosen]
            )  # fmt: skip

    def some(self, chosen: Tensor) -> Pairs:
        """Those of a boolean mask over these pairs."""
        usable = self.usable.clone()
        usable[self.usable] = chosen
        groups = None if self.groups is None else self.groups[chosen]
        return Pairs(self.clean[chosen], self.corrupt[chosen], self.actions[chosen], usable, groups)

    def among_all(self, values: Tensor) -> Tensor:
        """Values of these pairs, last, among all pairs that were given; NaN for the others."""
        found = values.new_full((*values.shape[:-1], len(self.usable)), torch.nan)
        found[..., self.usable.to(values.device)] = values
        return found


def pairs_of(
    bench: Bench, clean: TensorDictBase, corrupt: TensorDictBase, groups: NestedKey | Tensor | None = None
) -> Pairs:
    """Pair states up.

    Args:
        bench: of the policy that reads them.
        clean, corrupt: of the same batch shape, a pair in each row.
        groups: the key of the group of each pair in the clean states, or the groups themselves; each pair its own
            group unless given.

    Raises:
        InputError: if they do not pair up, there is no pair whose entries are finite, or the policy has written over
            what it reads.
        MissingKeyError: if an entry is absent.
    """
    if clean.batch_size != corrupt.batch_size:
        raise InputError(
            f"clean and corrupt states pair up row by row, but their batch shapes are {tuple(clean.batch_size)} and "
            f"{tuple(corrupt.batch_size)}"
        )
    count = clean.batch_size.numel()
    if not count:
        raise InputError(f"there are no states to compare: the batch shape is {tuple(clean.batch_size)}")
    for states in (clean, corrupt):
        require_as_seen(bench.hooked, states, "give states with what it reads, and nothing it writes", states=True)
    reads = state_keys(bench.hooked, clean, corrupt)
    for key in reads:
        shapes = [tuple(required(one, key, "the policy reads").shape) for one in (clean, corrupt)]
        if shapes[0] != shapes[1]:
            raise InputError(f"clean and corrupt {key!r} have the shapes {shapes[0]} and {shapes[1]}")
    numbers = _groups(clean, groups)
    sides = [flat_states(one, reads) for one in (clean, corrupt)]
    usable = torch.ones(count, dtype=torch.bool)
    for states, side in zip((clean, corrupt), sides, strict=True):
        real = real_rows(states)
        odd = (value for key in reads if not surely_finite(value := side.get(key)))
        finite = defined_values(odd, side.batch_size)
        for mask in (real, finite):
            if mask is not None:
                usable &= mask.reshape(-1).cpu()
    if not bool(usable.any()):
        raise InputError(
            f"none of the {count} pairs of states can be used: they hold NaN or infinite entries, or padding"
        )
    keys = [key for key in action_keys(bench.hooked.policy_out_keys) if clean.get(key, None) is not None]
    stored = flat_states(clean, [key for key in keys if key not in reads])
    pairs = Pairs(sides[0], sides[1], stored, torch.ones_like(usable), numbers)
    return pairs if bool(usable.all()) else pairs.some(usable)


def _groups(clean: TensorDictBase, groups: NestedKey | Tensor | None) -> Tensor | None:
    if groups is None:
        return None
    count = clean.batch_size.numel()
    found = groups if isinstance(groups, Tensor) else required(clean, groups, "intervals are grouped by")
    if found.shape[: clean.ndim] != clean.batch_size:
        raise InputError(
            f"groups= has the shape {tuple(found.shape)}, and the states {tuple(clean.batch_size)}: a group for each"
        )
    columns = row_vectors(found, clean.batch_size).reshape(count, -1)
    return torch.unique(columns, dim=0, return_inverse=True)[1].cpu()


def require_way(way: str) -> None:
    """Raise an ``InputError`` for a way that is none."""
    if way not in WAYS:
        raise InputError(
            f"way= is 'denoising' (clean activations in the run on corrupt states) or 'noising' (corrupt ones in the "
            f"clean run), got {way!r}; {nearest(str(way), WAYS)}"
        )


def base_and_source(way: Way, clean: T, corrupt: T) -> tuple[T, T]:
    """Of two things, that of the run which is patched and that of the run which the activations come from."""
    return (corrupt, clean) if way == "denoising" else (clean, corrupt)


def flat_states(states: TensorDictBase, keys: Sequence[NestedKey]) -> TensorDict:
    """What a policy reads, as one batch dimension, on tensors that autograd may work with."""
    chosen = states.select(*keys)
    chosen = chosen.unsqueeze(0) if chosen.ndim == 0 else chosen.reshape(-1)
    if not any(value.is_inference() for value in chosen.values(True, True)):
        return chosen
    with torch.inference_mode(False):
        return chosen.clone()

"""What a direction was extracted from, in numbers that are saved with it: digests of weights and of data, versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_rl.errors import InputError
from tdhook_rl.files.digests import content_of, digest_of
from tdhook_rl.files.stored import as_stored
from tdhook_rl.files.versions import versions
from tdhook_rl.internals.torch_names import held_parameters

#: The names under which a file says where a direction lives.
TAKEN = ("module_path", "entry")


def weights_of(policy: nn.Module) -> str | None:
    """A digest of the parameters, in their order and whatever they are called; ``None`` where there are none.

    Buffers, such as the counters of exploration, change while a policy acts and are left out.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> weights_of(net) == weights_of(nn.Sequential(net)), weights_of(net) == weights_of(nn.Linear(2, 2))
        (True, False)
    """
    found = [
        (f"{place:09d}", one)
        for place, one in enumerate(held_parameters(policy).values())
        if not one.is_meta and not isinstance(one, nn.parameter.UninitializedParameter)
    ]
    return digest_of(found) if found else None


def origin_of(policy: nn.Module) -> dict[str, Any]:
    """The facts of every direction: the weights, and the versions of what computed it."""
    return {"weights": weights_of(policy), "versions": versions("tdhook_rl", "torch")}


def facts_given(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the caller adds to the facts.

    Raises:
        InputError: for what a file cannot hold, or names of where a direction lives.
    """
    if facts is None:
        return {}
    try:
        odd = next((name for name in facts if not isinstance(name, str) or name in TAKEN), None)
        found = as_stored(facts)
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"facts= is a mapping of what JSON can hold: {error}") from None
    if odd is not None:
        raise InputError(f"facts= has the name {odd!r}, which a file has for where the direction lives, or is no text")
    return found


class DataDigest:
    """A digest of rows, entry by entry: the same in whatever parts they come, on whatever device.

    Example:
        >>> whole, parts = DataDigest(), DataDigest()
        >>> whole.add("x", torch.arange(6))
        >>> parts.add("x", torch.arange(3)), parts.add("x", torch.arange(3, 6))
        (None, None)
        >>> whole.hexdigest() == parts.hexdigest()
        True
    """

    def __init__(self) -> None:
        self._of: dict[str, Any] = {}

    def add(self, name: str, rows: Tensor) -> None:
        """Add rows of an entry, ``(rows, ...)``."""
        named = f"{name} {tuple(rows.shape[1:])} {rows.dtype}"
        summed = self._of.setdefault(named, hashlib.sha256())
        if rows.numel():
            summed.update(content_of(torch.view_as_real(rows) if rows.is_complex() else rows))

    def hexdigest(self) -> str:
        """The digest of what has been added."""
        summed = hashlib.sha256()
        for name, one in sorted(self._of.items()):
            summed.update(name.encode() + one.digest())
        return summed.hexdigest()[:32]

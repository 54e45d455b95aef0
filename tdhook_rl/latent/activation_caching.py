"""Activation caching: the output of named modules, beside the action that they led to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tdhook_rl.errors import SiteError
from tdhook_rl.method import Binder, Method
from tdhook_rl.passes import Call

if TYPE_CHECKING:
    from tdhook_rl.paths import Site

__all__ = ["ActivationCaching"]


@dataclass(frozen=True)
class ActivationCaching(Method):
    """Write the outputs of modules under ``("cache", path)``.

    Args:
        key_pattern: a module path, a regular expression (``re.match`` on module names), or several of them.
        cache_key: the root of the result keys.

    Writes ``(cache_key, path)``, batch + features: a detached copy of what the module returned (the first
    tensor of a tuple) at every forward, and by ``annotate`` on data that lacks it. A module that runs
    several times in one forward shows its last output.
    In nets of many agents that is batch + agents + features, inside ``vmap`` too; the core of a recurrent module
    has one row for each step, in recurrent mode as in collection.

    Raises:
        SiteError: if a pattern matches nothing, or a named module does not run.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with ActivationCaching("(0|1)$").prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        >>> data["cache", "1"].shape
        torch.Size([3, 8])
    """

    key_pattern: str | Sequence[str]
    cache_key: str = "cache"

    def bind(self, binder: Binder) -> _BoundCaching:
        sites = binder.sites(self.key_pattern)
        return _BoundCaching(self.cache_key, sites, [binder.capture(site) for site in sites])


class _BoundCaching:
    when = "step"
    reads_forward = True
    replays = False

    def __init__(self, root: str, sites: list[Site], slots: list[str]) -> None:
        # The sites' modules stay out of here: the clone owns them.
        self._slots = {
            (root, site.name): (slot, site.name, site.explicit) for site, slot in zip(sites, slots, strict=True)
        }
        self._settled = all(site.explicit for site in sites)

    @property
    def result_keys(self) -> tuple[tuple[str, ...], ...]:
        return tuple(self._slots)

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        if not self._settled:
            self._settle(call)
        return {key: call.captured(slot, name) for key, (slot, name, _) in self._slots.items()}

    def _settle(self, call: Call) -> None:
        """After the first forward, stop declaring the matches of a pattern that never run."""
        fired = {key: entry for key, entry in self._slots.items() if entry[2] or entry[0] in call.slots}
        if not fired:
            names = ", ".join(repr(name) for _, name, _ in self._slots.values())
            raise SiteError(f"none of the modules that the pattern matched ran in this call: {names}")
        self._slots = fired
        self._settled = True

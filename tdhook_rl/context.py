"""What a policy was prepared with, seen from the hooked policy."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from torch import nn

from tdhook_rl.errors import PreparationError

if TYPE_CHECKING:
    from tdhook_rl.module import HookedMixin

__all__ = ["ContextView"]


class ContextView:
    """The ``hooking_context`` of a hooked policy; a view, which holds nothing of its own.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdhook_rl.latent import ActivationCaching
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with ActivationCaching("1", cache=TensorDict()).prepare(net) as hooked:
        ...     _ = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        >>> hooked.hooking_context.cache["1"].shape
        torch.Size([3, 8])
    """

    def __init__(self, hooked: HookedMixin) -> None:
        self._hooked = hooked

    @property
    def cache(self) -> TensorDictBase:
        """The cache that the methods fill: the caller's object, or a process's own in a worker or an unpickled copy.

        Raises:
            PreparationError: if no method was given a cache, or two methods were given different ones.
        """
        stores = [one.store for one in self._hooked._hooked_bound if hasattr(one, "store")]
        caches = {id(store.data): store.data for store in stores}
        if not caches:
            raise PreparationError(
                "this policy was prepared without a cache. Activations are in the TensorDict of each call, under "
                '("cache", path); to keep those of the last call here, use ActivationCaching(..., cache=TensorDict())'
            )
        if len(caches) > 1:
            raise PreparationError(
                f"the methods of this policy fill {len(caches)} caches: read the objects that were passed as cache=, "
                "or pass one to all"
            )
        return next(iter(caches.values()))

    def disable_hooks(self) -> AbstractContextManager[Any]:
        """As ``hooked.disable_context_hooks()``."""
        return self._hooked.disable_context_hooks()

    def disable(self) -> AbstractContextManager[nn.Module]:
        """As ``hooked.disable_context()``."""
        return self._hooked.disable_context()

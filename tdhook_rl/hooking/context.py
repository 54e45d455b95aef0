"""What a policy was prepared with, seen from the hooked policy."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from tensordict import TensorDictBase
from torch import nn

from tdhook_rl.errors import ContextError, PreparationError

#: What a context answers where the hooked policy was meant.
_ENTER = (
    "this is a context, not the hooked policy, and it was {}: enter it, with method.prepare(policy) as hooked: ..., or "
    "prepare the policy with return_context=False, which gives the hooked policy itself"
)


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

    def __init__(self, hooked: Any) -> None:
        self._hooked = hooked

    @property
    def cache(self) -> TensorDictBase:
        """The cache that the methods fill: the caller's object, or a process's own in a worker or an unpickled copy.

        Without one, what :class:`~tdhook_rl.latent.ActivationCaching` captured in the last call that was complete (not
        in a compiled policy).

        Raises:
            PreparationError: if no method captures activations, or two methods fill different caches.
        """
        stores = [one.store for one in self._hooked._hooked.bound if one.store is not None]
        if not stores:  # no caller's: what the last call captured
            lasts = (one.last for one in self._hooked._hooked.bound)
            stores = [last.store() for last in lasts if last is not None]
        caches = {id(store.data): store.data for store in stores}
        if not caches:
            raise PreparationError(
                "no method of this policy captures activations: prepare it with ActivationCaching(path) among others"
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


class NotEntered:
    """What a hooking context can be asked for by itself; for the rest it says that it must be entered."""

    _hooked: Any
    _view: ContextView | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ContextError(_ENTER.format("called"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ContextError(_ENTER.format(f"asked for {name!r}"))

    @property
    def cache(self) -> TensorDictBase:
        """The cache that the methods fill, while the policy is hooked and after it."""
        return self._seen().cache

    def disable_hooks(self) -> AbstractContextManager[Any]:
        """As ``hooked.disable_context_hooks()``."""
        return self._entered().disable_context_hooks()

    def disable(self) -> AbstractContextManager[nn.Module]:
        """As ``hooked.disable_context()``."""
        return self._entered().disable_context()

    def _entered(self) -> Any:
        if self._hooked is None:
            raise PreparationError("the policy is not hooked now: enter the context first, with ... as hooked:")
        return self._hooked

    def _seen(self) -> ContextView:
        if self._view is None:
            raise PreparationError("the policy was not hooked yet: enter the context first, with ... as hooked:")
        return self._view

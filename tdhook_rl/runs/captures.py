"""The ways to ask a run for what a module computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase

from tdhook_rl.arguments.checked import checked
from tdhook_rl.runs.requests import CacheProxy

__all__ = ["Captures"]


class Captures:
    """What a run can be asked to capture; the run says how."""

    cache: Any  # a TensorDict, or a dict of the caller's
    _save_cache: Any
    _prefix: str

    def _capture(
        self, key: str, cache: TensorDictBase, cache_key: str | None, prefix: str, **options: Any
    ) -> CacheProxy:
        raise NotImplementedError

    @checked
    def get(
        self,
        key: str,
        *,
        cache_key: str | None = None,
        callback: Callable[..., Any] | None = None,
        direction: str = "fwd",
        prepend: bool = False,
        relative: bool = True,
    ) -> CacheProxy:
        """Capture a module's output; after the block, find what was captured.

        Args:
            key: the module path.
            cache_key: the key in :attr:`cache`; ``f"{key}_{kind}"`` by default.
            callback: returns what is captured instead, a tensor or TensorDict.
            direction: ``"fwd"``, ``"fwd_pre"``, ``"bwd"`` or ``"bwd_pre"``; ``"fwd_kwargs"`` and
                ``"fwd_pre_kwargs"`` are the first two.
            prepend: act before the hooks that are there.
            relative: start the path at the user's module (``True``) or at the wrapping TensorDictModule.
        """
        options = {"callback": callback, "direction": direction, "prepend": prepend, "relative": relative}
        return self._capture(key, self.cache, cache_key, "", **options)

    @checked
    def save(
        self,
        key: str,
        *,
        cache_key: str | None = None,
        callback: Callable[..., Any] | None = None,
        direction: str = "fwd",
        prepend: bool = False,
        relative: bool = True,
    ) -> CacheProxy:
        """As :meth:`get`, into ``cache=`` and under ``f"{run_name}{run_sep}{key}_{kind}"``."""
        cache = self.cache if self._save_cache is None else self._save_cache
        options = {"callback": callback, "direction": direction, "prepend": prepend, "relative": relative}
        return self._capture(key, cache, cache_key, self._prefix, **options)

    def get_input(self, key: str, **options: Any) -> CacheProxy:
        """Capture a module's (first) input."""
        return self.get(key, direction="fwd_pre", **options)

    def save_input(self, key: str, **options: Any) -> CacheProxy:
        """Capture a module's (first) input, as :meth:`save`."""
        return self.save(key, direction="fwd_pre", **options)

    def get_grad(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's (first) input."""
        return self.get(key, direction="bwd", **options)

    def save_grad(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's (first) input, as :meth:`save`."""
        return self.save(key, direction="bwd", **options)

    def get_grad_output(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's output."""
        return self.get(key, direction="bwd_pre", **options)

    def save_grad_output(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's output, as :meth:`save`."""
        return self.save(key, direction="bwd_pre", **options)

"""Methods: small configuration objects that prepare a policy to be seen or changed from inside.

``with method.prepare(policy) as hooked:`` gives the hooked policy; :class:`Compose` prepares one policy
with several methods, applied in the order written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdhook_rl.arguments.checked import Checked
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.errors import InputError, PreparationError
from tdhook_rl.hooking.binder import Binder
from tdhook_rl.hooking.collisions import check_known, listed_keys
from tdhook_rl.hooking.context import ContextView, NotEntered
from tdhook_rl.hooking.hooked import HookedMixin
from tdhook_rl.hooking.preparing import hooked_clone

__all__ = ["Binder", "BoundMethod", "Compose", "HookedModule", "HookingContext", "Method"]

Keys = Sequence[NestedKey] | Mapping[str, NestedKey]


class Method(metaclass=Checked):
    """Base of every method: configuration only; it holds no model and no results.

    Arguments of a constructor are checked against its annotations, in subclasses as well.

    Attributes:
        observes: whether it leaves the policy's outputs as they are, bit for bit.
        by_row: whether what it writes for a row comes from this row alone.
    """

    observes: bool = True
    by_row: bool = True

    @overload
    def prepare(
        self, module: nn.Module, in_keys: Any = ..., out_keys: Any = ..., return_context: Literal[True] = ...
    ) -> HookingContext: ...
    @overload
    def prepare(
        self, module: nn.Module, in_keys: Any = ..., out_keys: Any = ..., *, return_context: Literal[False]
    ) -> Any: ...
    def prepare(
        self,
        module: nn.Module,
        in_keys: Keys | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        return_context: bool = True,
    ) -> Any:
        """Prepare a policy, value network or any module; nothing of it is touched.

        Args:
            module: a ``TensorDictModule`` (any TorchRL policy or value network), or a plain ``nn.Module``,
                which is wrapped in one; paths are relative to the module that is given.
            in_keys: for a plain module, the keys of its inputs, ``["input"]`` by default; or, for inputs that it
                takes by name, ``{argument: key}``, as in ``TensorDictModule``.
            out_keys: for a plain module, the keys of its outputs; ``["output"]`` by default.
            return_context: ``True`` for a context to enter; ``False`` for the hooked policy itself, which
                stays hooked until its ``restore()`` is called.

        Returns:
            a :class:`HookingContext`, or the hooked policy.

        Raises:
            PreparationError: for a module that cannot be hooked (compiled, lazy, scripted).
        """
        context = HookingContext([*self._methods()], module, in_keys, out_keys)
        return context if return_context else context.__enter__()

    def bind(self, binder: Binder) -> BoundMethod | None:
        """Place this method's hooks on a clone; the object that computes its results, if it has any."""
        raise NotImplementedError

    def _methods(self) -> Sequence[Method]:
        return [self]


class Compose(Method):
    """Several methods on one policy, in one forward pass where they can share it.

    Hooks act in the order written: caching before steering shows the activation before it was steered.
    Attributions explain the policy as steered.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torch import nn
        >>> from tdhook_rl.attribution import Saliency
        >>> from tdhook_rl.latent import ActivationCaching
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> with Compose(ActivationCaching("1"), Saliency()).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(5, 4)}, batch_size=5))
        >>> data["cache", "1"].shape, data["attr", "input"].shape
        (torch.Size([5, 8]), torch.Size([5, 4]))
    """

    def __init__(self, *methods: Method) -> None:
        if not methods:
            raise InputError("Compose() needs at least one method")
        for method in methods:
            if not isinstance(method, Method):
                raise InputError(f"Compose() takes methods such as Saliency(), got {method!r}")
        self.methods = methods

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return all(method.observes for method in self.methods)

    @property
    def by_row(self) -> bool:  # type: ignore[override]
        return all(method.by_row for method in self.methods)

    def _methods(self) -> Sequence[Method]:
        return [inner for method in self.methods for inner in method._methods()]

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.methods))})"


class HookingContext(NotEntered):
    """The time during which a policy is hooked. It can be entered again after it was left."""

    def __init__(
        self, methods: list[Method], module: nn.Module, in_keys: Keys | None, out_keys: Sequence[NestedKey] | None
    ) -> None:
        if isinstance(module, HookedMixin):
            raise PreparationError(
                "this policy is hooked already: prepare the user's policy with Compose(first, second)"
            )
        if not isinstance(module, nn.Module):
            raise PreparationError(f"a policy is an nn.Module, got a {type(module).__name__}")
        if any(f"{base.__module__}.{base.__name__}" == "torchrl.envs.common.EnvBase" for base in type(module).__mro__):
            raise PreparationError(
                f"a {type(module).__name__} is an environment: prepare the policy that acts in it, and give the hooked "
                "one to the collector or to env.rollout(steps, hooked)"
            )
        in_keys, out_keys = listed_keys("in_keys", in_keys), listed_keys("out_keys", out_keys)
        self._methods = methods
        self._module = module
        if isinstance(module, TensorDictModuleBase):
            names = [*in_keys.values()] if isinstance(in_keys, Mapping) else in_keys
            check_known("in_keys", names, module.in_keys)
            check_known("out_keys", out_keys, module.out_keys)
        self._in_keys: Any = in_keys or ["input"]
        self._out_keys = out_keys or ["output"]
        self._hooked = None
        self._view = None

    def __enter__(self) -> Any:
        if self._hooked is not None:
            raise PreparationError("this context is entered already: a second prepare() gives another one")
        self._hooked = hooked_clone(self._module, self._methods, self._in_keys, self._out_keys)
        self._view = ContextView(self._hooked)
        return self._hooked

    def __exit__(self, *exception: object) -> None:
        self._hooked.restore()
        self._hooked = None


class HookedModule:
    """A hooked module without any method: for runs over a plain module.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torch import nn
        >>> hooked = HookedModule.from_module(nn.Sequential(nn.Linear(4, 2)))
        >>> with hooked.run(TensorDict({"input": torch.ones(1, 4)}, batch_size=1)) as run:
        ...     proxy = run.save("0")
        >>> proxy.resolve().shape
        torch.Size([1, 2])
    """

    @staticmethod
    def from_module(module: nn.Module, in_keys: Keys | None = None, out_keys: Sequence[NestedKey] | None = None) -> Any:
        """Hook a module; arguments as of :meth:`Method.prepare`. It stays hooked until its ``restore()``."""
        return HookingContext([], module, in_keys, out_keys).__enter__()

"""Methods: small configuration objects that prepare a policy to be seen or changed from inside.

``with method.prepare(policy) as hooked:`` gives the hooked policy; :class:`Compose` prepares one policy
with several methods, applied in the order written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, overload

from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn

from tdhook_rl.arguments import Checked
from tdhook_rl.batching import Traits
from tdhook_rl.binder import Binder
from tdhook_rl.chains import is_chain
from tdhook_rl.chunks import chunked_by
from tdhook_rl.classes import swap_class
from tdhook_rl.collisions import check_collisions, check_known, listed_keys
from tdhook_rl.context import ContextView, NotEntered
from tdhook_rl.draws import Draw, draws, survey_draws
from tdhook_rl.errors import InputError, PreparationError
from tdhook_rl.hooks import Runtime
from tdhook_rl.inner_calls import place_inner_hooks
from tdhook_rl.module import HookedMixin
from tdhook_rl.pooling import quicken_pooling
from tdhook_rl.provenance import Provenance
from tdhook_rl.q_networks import supports, value_actions
from tdhook_rl.replays import DecidedHook, ReplayMixin
from tdhook_rl.rows import survey
from tdhook_rl.shared_pass import can_share
from tdhook_rl.traceable import signs
from tdhook_rl.traits import BoundMethod
from tdhook_rl.tying import Tie, tied_clone
from tdhook_rl.writing import WritingMixin, writes_by_default

__all__ = ["Binder", "BoundMethod", "Compose", "HookedModule", "HookingContext", "Method"]

#: Names that a hooked policy adds to its class; a policy that has one of its own is refused.
_ADDED_NAMES = (
    "annotate", "controls", "disable_context", "disable_context_hooks", "hooked_root", "hooking_context",
    "policy_in_keys", "policy_out_keys", "restore", "result_keys", "run",
)  # fmt: skip

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
        self,
        methods: list[Method],
        module: nn.Module,
        in_keys: Keys | None,
        out_keys: Sequence[NestedKey] | None,
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
        self._wrapped = isinstance(module, TensorDictModuleBase)
        if self._wrapped:
            names = [*in_keys.values()] if isinstance(in_keys, Mapping) else in_keys
            check_known("in_keys", names, module.in_keys)
            check_known("out_keys", out_keys, module.out_keys)
        self._in_keys: Any = ["input"]
        if in_keys is not None:
            self._in_keys = in_keys
        self._out_keys = out_keys or ["output"]
        self._hooked = None
        self._view = None

    def __enter__(self) -> Any:
        if self._hooked is not None:
            raise PreparationError("this context is entered already: a second prepare() gives another one")
        self._hooked = self._build()
        self._view = ContextView(self._hooked)
        return self._hooked

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooked.restore()
        self._hooked = None

    def _build(self) -> Any:
        clone = tied_clone(self._module)
        root = clone
        if not self._wrapped:
            clone = TensorDictModule(clone, in_keys=self._in_keys, out_keys=self._out_keys)
            clone.training = root.training
        taken = [name for name in _ADDED_NAMES if hasattr(clone, name)]
        if taken:
            raise PreparationError(
                f"{type(clone).__name__} has its own attribute {taken[0]!r}, which a hooked policy needs: rename it"
            )
        runtime = Runtime()
        runtime.tie = Tie(self._module, root)
        runtime.methods = tuple(self._methods)
        survey(clone, runtime)
        binder = Binder(clone, root, runtime)
        drawn = survey_draws(clone)
        place_inner_hooks(clone, runtime)
        for child in list(clone.modules()):
            if child is clone:
                continue
            if draws(child):
                swap_class(child, ReplayMixin)
                child.__dict__.update(_hooked_runtime=runtime, _hooked_draw=drawn.get(child, Draw()))
                continue
            if child in drawn:
                child.register_forward_hook(DecidedHook(runtime, drawn[child]))
            if writes_by_default(type(child)):
                swap_class(child, WritingMixin)
        bound = [one for one in (method.bind(binder) for method in self._methods) if one is not None]
        binder.place_row_hooks()
        binder.place_state_hooks()
        quicken_pooling(clone)
        check_collisions(clone, bound, binder.reads)
        steps = [one for one in bound if (one.result_keys or one.consumes) and one.when == "step"]
        traits = Traits.of(clone)
        clone.__dict__.update(
            _hooked_runtime=runtime,
            _hooked_bound=bound,
            _hooked_steps=steps,
            _hooked_traits=traits,
            _hooked_signs=signs(clone) if any(one.replays and one.when == "step" for one in bound) else [],
            _hooked_shares=can_share(clone, traits) and not drawn and chunked_by(clone) is None,
            _hooked_draws=list(drawn.values()),
            _hooked_slots={key: one.slots[key] for one in drawn.values() for key in one.rewriters},
            _hooked_actions=value_actions(clone),
            _hooked_is_chain=is_chain(clone),
            _hooked_alone=[one for one in steps if one.without_forward],
            _hooked_reads=binder.reads,
            _hooked_overwrites=[key for key in clone.in_keys if key in list(clone.out_keys)],
            _hooked_made=binder.made,
            _hooked_noise=binder.noise,
            _hooked_chunks=chunked_by(clone),
            _hooked_routes=binder.routes,
            _hooked_supports=supports(clone),
            _hooked_wraps=not self._wrapped,
        )
        swap_class(clone, HookedMixin)
        clone.__dict__["_hooked_provenance"] = Provenance(clone, bound)
        return clone


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

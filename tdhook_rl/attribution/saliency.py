"""Saliency: the gradient of what the policy decided with respect to what it saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.attribution.gradients import explainable_inputs, gradients
from tdhook_rl.errors import InputError, TargetError
from tdhook_rl.hooks import Portable
from tdhook_rl.method import Binder, Method
from tdhook_rl.passes import Call, Pass, with_batch
from tdhook_rl.targets import Target, default_target, per_row

if TYPE_CHECKING:
    from tensordict.nn import TensorDictModuleBase

__all__ = ["Saliency"]

InitAttrTargets = Callable[[TensorDictBase, TensorDictBase], TensorDictBase]


@dataclass(frozen=True, eq=False, kw_only=True)
class Saliency(Method):
    """Gradient saliency (Simonyan et al. 2014) of inputs and of inner activations.

    Args:
        target: what is explained, from :mod:`tdhook_rl.targets`; by default the log-probability of the
            taken action on policies and the sum of outputs elsewhere.
        init_attr_targets: instead of ``target``, a function ``(outputs, additional) -> TensorDict`` of the
            values to explain; their sum over entries is explained for each row.
        inputs: the input keys to explain; by default every input that is not boolean, and none where
            ``input_modules`` are given.
        input_modules: modules whose output is explained, as ``(attribution_key, path)``.
        absolute: take the absolute value.
        multiply_by_inputs: multiply by the explained value (gradient times input).
        when: ``"step"`` in every forward, as a second pass; ``"batch"`` in ``annotate`` only. By default
            ``"batch"`` on policies explained through ``target`` and ``"step"`` elsewhere.
        attribution_key: the root of the result keys.

    Writes ``(attribution_key, in_key)`` and ``(attribution_key, path)``: batch + the shape of what is
    explained. Per step and per batch give the same numbers.

    Raises:
        TargetError: if no gradient reaches the target.
        InputError: for index inputs (tokens), which have no gradient.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> with Saliency().prepare(nn.Linear(4, 1)) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        >>> data["attr", "input"].shape
        torch.Size([3, 4])
    """

    target: Target | None = None
    init_attr_targets: InitAttrTargets | None = None
    inputs: Sequence[NestedKey] | None = None
    input_modules: Sequence[str] = ()
    absolute: bool = False
    multiply_by_inputs: bool = False
    when: Literal["step", "batch"] | None = None
    attribution_key: str = "attr"

    def __post_init__(self) -> None:
        if self.target is not None and self.init_attr_targets is not None:
            raise TargetError("target= and init_attr_targets= both say what to explain: give one of them")
        if self.when not in (None, "step", "batch"):
            raise InputError(f"when= is 'step' or 'batch', got {self.when!r}")

    def bind(self, binder: Binder) -> _BoundSaliency:
        sites = [site for path in self.input_modules for site in binder.sites(path)]
        inputs: list[NestedKey] | None
        if self.inputs is not None:
            inputs = [unravel_key(key) for key in self.inputs]
        else:
            inputs = [] if sites else None
        leaves = {binder.leaf(site): site.name for site in sites}
        declared = inputs if inputs is not None else list(binder.policy.in_keys)
        keys = {key: (self.attribution_key, *((key,) if isinstance(key, str) else key)) for key in declared}
        return _BoundSaliency(self, keys, inputs, leaves, self.when or self._default_when(binder.policy))

    def _default_when(self, policy: TensorDictModuleBase) -> Literal["step", "batch"]:
        acts = any(isinstance(child, ProbabilisticTensorDictModule) for child in policy.modules()) or any(
            key == "action" or key[-1] == "action" for key in policy.out_keys
        )
        return "batch" if acts and self.init_attr_targets is None else "step"


class _BoundSaliency:
    reads_forward = False
    replays = True

    def __init__(
        self,
        config: Saliency,
        keys: dict[NestedKey, tuple[str, ...]],
        inputs: list[NestedKey] | None,
        leaves: dict[str, str],
        when: str,
    ) -> None:
        self.when = when
        self._absolute = config.absolute
        self._multiply = config.multiply_by_inputs
        self._target = config.target
        self._init = None if config.init_attr_targets is None else Portable(config.init_attr_targets)
        self._keys = keys
        self._inputs = inputs
        self._leaves = {slot: (config.attribution_key, site) for slot, site in leaves.items()}

    @property
    def result_keys(self) -> tuple[tuple[str, ...], ...]:
        return (*self._keys.values(), *self._leaves.values())

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        inputs = explainable_inputs(call, self._inputs)
        leaves = {slot: key[-1] for slot, key in self._leaves.items()}
        of_inputs, of_leaves = gradients(call, inputs, leaves, self._explained)
        self._keys = {key: name for key, name in self._keys.items() if key in inputs}  # boolean inputs drop out
        results = {self._keys[key]: self._finish(value, inputs[key]) for key, value in of_inputs.items()}
        for slot, (gradient, value) in of_leaves.items():
            key = self._leaves[slot]
            results[key] = with_batch(self._finish(gradient, value), call.batch_size, key[-1])
        return results

    def _finish(self, gradient: Tensor, value: Tensor) -> Tensor:
        if self._multiply:
            gradient = gradient * value
        return gradient.abs() if self._absolute else gradient

    def _explained(self, run: Pass) -> Tensor:
        if self._init is None:
            return (self._target or default_target(run))(run)
        batch = run.outputs.batch_size
        values = self._init(run.outputs.select(*run.out_keys, strict=False), TensorDict({}, batch_size=batch))
        if not isinstance(values, TensorDictBase):
            raise TargetError(f"init_attr_targets must return a TensorDict, got a {type(values).__name__}")
        terms = [per_row(value, batch, f"init_attr_targets[{key!r}]") for key, value in values.items(True, True)]
        if not terms:
            raise TargetError("init_attr_targets returned an empty TensorDict: it holds the values to explain")
        return torch.stack(terms).sum(0)

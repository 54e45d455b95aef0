"""Task vectors: arithmetic with the difference between fine-tuned weights and the policy's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl.arguments.dense import require_dense
from tdhook_rl.arguments.tensors import plain_number
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.method import Binder, Method
from tdhook_rl.policies.tying import named_tensors, put_back, replace_tensors
from tdhook_rl.sites.hooks import Portable
from tdhook_rl.sites.known import own_class
from tdhook_rl.sites.numbers import holding
from tdhook_rl.sites.runtime import Runtime
from tdhook_rl.weights.computed import computed_weights

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class TaskVectors(Method):
    """Add and subtract what fine-tuning changed (Ilharco et al. 2023).

    Args:
        alphas: the strengths that ``compute_alpha`` tries.
        get_test_accuracy: ``get_test_accuracy(hooked)``, the number that ``compute_alpha`` maximises, such as the
            mean return of a rollout.
        get_control_adequacy: ``get_control_adequacy(hooked)``, whether what must not be lost is still there; by
            default every alpha is adequate.

    The hooked policy gets these methods. A vector is a TensorDict of weight names, as in the ``state_dict()`` of
    the user's module (floating-point buffers included), each with the shape of that weight; weights are given as
    a module, a state dict or a TensorDict.

    - ``get_task_vector(finetuned)``: fine-tuned weights minus the policy's.
    - ``get_forget_vector(finetuned)``: its negative, which makes the policy worse at the task.
    - ``get_weights(*vectors, alpha=None)``: the policy's weights plus ``alpha`` times the sum of the vectors, for
      ``load_state_dict``, with the policy's integer buffers; by default the alpha of ``compute_alpha``.
    - ``with_applied_vectors(*vectors, alpha=None)``: a context in which the hooked policy, and it alone, has these
      weights. Contexts nest, and their changes are summed before they are added: a vector and its negative leave
      the weights as they are, bit for bit.
    - ``compute_alpha(*vectors)``: the alpha of highest accuracy among the adequate ones; of equals the first.

    Within ``with_applied_vectors`` the hooked policy has tensors of its own, and afterwards the user's again. What
    is trained, loaded or synchronised into it meanwhile is lost with them. Workers that were started before have
    their own copy: send them the weights with ``collector.update_policy_weights_()``.

    Raises:
        InputError: if a weight that changes is computed by a norm, a mask or a parametrisation, if weights differ in
            names or shapes from the policy's or are not finite, if a running variance would be negative, if an alpha is
            needed and none can be computed, or if no alpha is adequate.

    Example:
        >>> net, finetuned = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> with TaskVectors().prepare(net) as hooked:
        ...     vector = hooked.get_task_vector(finetuned)
        ...     with hooked.with_applied_vectors(vector, alpha=1.0) as applied:
        ...         close = torch.allclose(applied.module.weight, finetuned.weight)
        ...     close, hooked.module.weight is net.weight
        (True, True)
    """

    alphas: Sequence[float] | Tensor = ()
    get_test_accuracy: Callable[[Any], float] | None = None
    get_control_adequacy: Callable[[Any], bool] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.alphas, Tensor):
            require_dense(self.alphas, "alphas")
        if isinstance(self.alphas, Tensor) and self.alphas.ndim != 1:
            raise InputError(f"alphas= is a list of strengths, got a tensor of shape {tuple(self.alphas.shape)}")
        object.__setattr__(self, "alphas", tuple(_check_alpha(alpha) for alpha in self.alphas))

    def bind(self, binder: Binder) -> None:
        accuracy = None if self.get_test_accuracy is None else Portable(self.get_test_accuracy)
        adequacy = None if self.get_control_adequacy is None else Portable(self.get_control_adequacy)
        arithmetic = _Arithmetic(binder, tuple(self.alphas), accuracy, adequacy)
        for name in ("get_task_vector", "get_forget_vector", "get_weights", "with_applied_vectors", "compute_alpha"):
            binder.expose(name, getattr(arithmetic, name))


class _Arithmetic:
    """The methods of a hooked policy that :class:`TaskVectors` adds."""

    def __init__(
        self, binder: Binder, alphas: tuple[float, ...], accuracy: Portable | None, adequacy: Portable | None
    ) -> None:
        self._policy = binder.policy
        self._root = binder.root
        self._runtime: Runtime = binder.runtime
        self._alphas = alphas
        self._accuracy = accuracy
        self._adequacy = adequacy
        self._base: dict[str, Tensor] | None = None  # the weights outside every with_applied_vectors
        self._change: dict[str, Tensor] | None = None  # what the contexts entered so far add to them

    def get_task_vector(self, finetuned: nn.Module | Weights) -> TensorDict:
        base = self._weights()
        found = _matched(finetuned, base, "the fine-tuned weights")
        return TensorDict({name: found[name] - weight.detach() for name, weight in base.items()})

    def get_forget_vector(self, finetuned: nn.Module | Weights) -> TensorDict:
        return TensorDict({name: -change for name, change in self.get_task_vector(finetuned).items()})

    def get_weights(self, *vectors: Weights, alpha: float | None = None) -> TensorDict:
        # What counts (steps, batches) is none of the weights, but load_state_dict asks for it.
        kept = {name: one.clone() for name, one in self._root.state_dict().items() if isinstance(one, Tensor)}
        return TensorDict(kept | self._changed(self._weights(), self._scaled(vectors, alpha)))

    @contextmanager
    def with_applied_vectors(self, *vectors: Weights, alpha: float | None = None) -> Iterator[Any]:
        base, outer = self._weights(), self._change
        change = self._scaled(vectors, alpha)
        if outer is not None:
            change = {name: outer[name] + change[name] for name in change}
        values = self._changed(base, change)
        tensors = _weights_of(self._root)
        new: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            value = values[name]
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            if not torch.equal(new.setdefault(id(tensor), value), value):
                raise InputError(
                    f"{name!r} is tied to another weight of {own_class(self._root).__name__}, but the vectors change "
                    "the two differently: fine-tune with the weights tied"
                )
        with self._runtime.lock:  # not in the middle of a collector's forward
            replaced = replace_tensors(self._policy, new)
            self._base, self._change = base, change
        try:
            yield self._policy
        finally:
            with self._runtime.lock:
                put_back(replaced)
                self._base, self._change = (None if outer is None else base), outer

    def compute_alpha(self, *vectors: Weights) -> float:
        if self._accuracy is None or not self._alphas:
            raise InputError(
                "no alpha was given, and computing one needs TaskVectors(alphas=(...), get_test_accuracy=...)"
            )
        best: tuple[float, float] | None = None
        for alpha in self._alphas:
            with self.with_applied_vectors(*vectors, alpha=alpha) as policy:
                if self._adequacy is not None and not bool(self._adequacy(policy)):
                    continue
                accuracy = float(self._accuracy(policy))
            if math.isnan(accuracy):
                raise InputError(f"get_test_accuracy returned NaN at alpha {alpha}")
            if best is None or accuracy > best[0]:
                best = accuracy, alpha
        if best is None:
            raise InputError(
                f"get_control_adequacy accepted none of the alphas {self._alphas}: try smaller ones or ask for less"
            )
        return best[1]

    def _changed(self, base: Weights, change: Weights) -> dict[str, Tensor]:
        values = _added(base, change)
        for name, value in values.items():
            if name.rpartition(".")[2] != "running_var" or not bool((value < 0).any()):
                continue
            most = float((base[name] / -change[name])[value < 0].min())
            raise InputError(
                f"{name!r} would be {float(value.min()):g} with these vectors, and no variance is negative (what it "
                f"normalises would be NaN): at most {most:.3g} times this change leaves one, by a smaller alpha="
            )
        return values

    def _weights(self) -> dict[str, Tensor]:
        self._runtime.require_open()
        return _weights_of(self._root) if self._base is None else self._base

    def _scaled(self, vectors: tuple[Weights, ...], alpha: float | None) -> dict[str, Tensor]:
        if not vectors:
            raise InputError("give at least one vector of get_task_vector() or get_forget_vector()")
        base = self._weights()
        checked = [_matched(vector, base, "the vector") for vector in vectors]
        alpha = self.compute_alpha(*vectors) if alpha is None else _check_alpha(alpha)
        found = {name: alpha * sum((one[name] for one in checked[1:]), checked[0][name]) for name in base}
        _require_linear(self._root, found)
        return found


def _require_linear(root: nn.Module, change: Weights) -> None:
    """Sums of what a weight is computed from are no sums of weights.

    Raises:
        InputError: if a change reaches a norm, a mask or a parametrisation.
    """
    for path, module in root.named_modules():
        for name, computed in computed_weights(module).items():
            prefix = f"{path}." if path else ""
            within = [f"{prefix}{one}" for one in (*computed.originals, f"{name}_mask") if not computed.is_mask]
            within = within or [f"{prefix}{name}_mask"]  # under one mask, weights change as they should
            chain = f"{prefix}parametrizations.{name}."
            changed = [
                key
                for key, value in change.items()
                if (key in within or key.startswith(chain)) and bool((value != 0).any())
            ]
            if changed:
                raise InputError(
                    f"the {name!r} of the layer {path!r} ({type(module).__name__}) is computed by {computed.kind}, and "
                    f"the vectors change {changed[0]!r}, so that it would not change in proportion to them: make it a "
                    "plain weight before fine-tuning (torch.nn.utils.parametrize.remove_parametrizations, "
                    "remove_spectral_norm, remove_weight_norm, prune.remove)"
                )


def _weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and persistent buffers, under every name that they have."""
    kept = module.state_dict().keys()
    return {name: tensor for name, tensor in named_tensors(module).items() if name in kept and _is_weight(tensor)}


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _added(base: Weights, change: Weights) -> dict[str, Tensor]:
    # where: -0.0 + 0.0 is 0.0, and an untouched weight keeps every bit.
    return {
        name: torch.where(change[name] != 0, weight.detach() + change[name], weight.detach())
        for name, weight in base.items()
    }


def _matched(given: nn.Module | Weights, base: Weights, what: str) -> dict[str, Tensor]:
    """Weights by name, with the device and dtype of the policy's."""
    if not isinstance(given, (nn.Module, Mapping)):
        raise InputError(f"{what} must be a module, a state dict or a TensorDict, got a {type(given).__name__}")
    weights = _weights_of(given) if isinstance(given, nn.Module) else {n: t for n, t in given.items() if _is_weight(t)}
    for name in [*base, *weights]:
        if name not in weights or name not in base:
            side, names = (f"{what} lack", weights) if name in base else ("the policy lacks", base)
            raise InputError(f"{side.replace('vector lack', 'vector lacks')} {name!r}; {nearest(name, names)}")
        if weights[name].shape != base[name].shape:
            raise InputError(
                f"{what}: {name!r} has shape {tuple(weights[name].shape)}, but the policy's has "
                f"{tuple(base[name].shape)}"
            )
        if not bool(torch.isfinite(weights[name]).all()):
            raise InputError(f"{what}: {name!r} has NaN or infinite entries")
    remedy = "take weights of the policy's kind and size"
    return {
        name: holding(
            weights[name].detach(), own.dtype, f"{what}: {name!r}", f"the policy's weight is {own.dtype}", remedy
        ).to(own.device)
        for name, own in base.items()
    }


def _check_alpha(alpha: Any) -> float:
    number = plain_number(alpha)
    if isinstance(alpha, Tensor) and alpha.numel() == 1:
        require_dense(alpha, "alpha")
        number = alpha.item()
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        raise InputError(f"alpha must be a finite number, got {alpha!r:.80}")
    return number

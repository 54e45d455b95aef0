"""Integrated gradients: gradients averaged along the straight path from a baseline, which add up to the change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.attribution.base import BoundAttribution, Explained, GradientAttribution
from tdhook_rl.attribution.gradients import activations, gradients
from tdhook_rl.batching import CONV_CHUNK, default_chunk_size
from tdhook_rl.errors import InputError, MissingKeyError, nearest
from tdhook_rl.passes import Call, Pass, with_batch

if TYPE_CHECKING:
    from tdhook_rl.method import Binder

__all__ = ["IntegratedGradients", "quadrature"]

Quadrature = Literal["gausslegendre", "riemann_middle", "riemann_left", "riemann_right", "riemann_trapezoid"]

#: Rows of one pass (points of the path times rows of the batch); what bounds the memory.
PATH_ROWS = 8192


@cache
def quadrature(method: Quadrature, steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Points in [0, 1] and weights that add up to 1.

    Args:
        method: ``"gausslegendre"`` (exact for polynomials of degree ``2 * steps - 1``), or a rule of equal steps.
        steps: how many points.

    Example:
        >>> quadrature("riemann_trapezoid", 3)
        ((0.0, 0.5, 1.0), (0.25, 0.5, 0.25))
    """
    if method == "gausslegendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        points, weights = (points + 1) / 2, weights / 2
    elif method == "riemann_trapezoid":
        points = np.linspace(0, 1, steps) if steps > 1 else np.array([0.5])
        weights = np.full(steps, 1.0 if steps == 1 else 1 / (steps - 1))
        if steps > 1:
            weights[[0, -1]] /= 2
    else:
        shift = {"riemann_middle": 0.5, "riemann_left": 0.0, "riemann_right": 1.0}[method]
        points, weights = (np.arange(steps) + shift) / steps, np.full(steps, 1 / steps)
    return tuple(points.tolist()), tuple(weights.tolist())


class _BoundIntegratedGradients(BoundAttribution):
    def __init__(self, config: IntegratedGradients, binder: Binder) -> None:
        super().__init__(config, binder)
        self._points, self._weights = quadrature(config.method, config.n_steps)
        self._multiply = config.multiply_by_inputs
        self._baseline = config.baseline
        self._baseline_key = config.baseline_key
        self._rows = config.chunk_size or (CONV_CHUNK if default_chunk_size(binder.policy) else PATH_ROWS)
        self._delta_key = config.delta_key if config.compute_convergence_delta else None
        self._deltas: dict[tuple[str, ...], Tensor] = {}
        # The baselines of the inputs are read from the data, also by annotate.
        self.reads = [*self.reads, *(self._baseline_of(key) for key in binder.policy.in_keys)]

    @property
    def result_keys(self) -> tuple[tuple[str, ...], ...]:
        keys = super().result_keys
        if self._delta_key is None:
            return keys
        return (*keys, *((self._delta_key, *([name] if name else [])) for name in self.names))

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        results = super().compute(call)
        deltas, self._deltas = self._deltas, {}
        return results | deltas

    def attribute(
        self, call: Call, explained: Explained, targets: Sequence[Callable[[Pass], Tensor]]
    ) -> list[tuple[dict[NestedKey, Tensor], dict[str, Tensor]]]:
        found: list[tuple[dict[NestedKey, Tensor], dict[str, Tensor]]] = [({}, {}) for _ in targets]
        # Two paths where both are asked for: an activation in the place of what is computed cuts off the inputs.
        groups = [Explained(explained.inputs, {}), Explained({}, explained.leaves)]
        for group in groups:
            if group.inputs or group.leaves:
                parts = self._attribute_group(call, group, targets)
                for (all_inputs, all_leaves), (of_inputs, of_leaves) in zip(found, parts, strict=True):
                    all_inputs.update(of_inputs)
                    all_leaves.update(of_leaves)
        return found

    def _attribute_group(
        self, call: Call, explained: Explained, targets: Sequence[Callable[[Pass], Tensor]]
    ) -> list[tuple[dict[NestedKey, Tensor], dict[str, Tensor]]]:
        inputs, sites = explained.inputs, explained.leaves
        path_inputs = self._path_inputs(call, inputs)
        baselines = {key: self._read_baseline(call, key, value) for key, value in path_inputs.items()}
        ends = {key: inputs.get(key, call.inputs[key]) for key in baselines}
        inner = self._inner_path(call, sites, ends, baselines)
        averages = self._integrate(call, inputs, sites, ends, baselines, inner, targets)
        if self._delta_key is not None and not self._deltas:
            self._measure_deltas(call, ends, baselines, inner, targets, averages)
        if not self._multiply:
            return averages
        return [
            (
                {key: value * (inputs[key] - baselines[key]) for key, value in of_inputs.items()},
                {slot: value * (inner[slot][1] - inner[slot][0]) for slot, value in of_leaves.items()},
            )
            for of_inputs, of_leaves in averages
        ]

    def _path_inputs(self, call: Call, inputs: Mapping[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        """The inputs that have a baseline: the explained ones, or all floating-point ones for inner activations."""
        if inputs:
            return dict(inputs)
        return {
            key: call.inputs[key]
            for key in call.policy.policy_in_keys
            if call.inputs[key].is_floating_point() or call.data.get(self._baseline_of(key), None) is not None
        }

    def _integrate(
        self,
        call: Call,
        inputs: Mapping[NestedKey, Tensor],
        sites: Mapping[str, str],
        ends: Mapping[NestedKey, Tensor],
        baselines: Mapping[NestedKey, Tensor],
        inner: Mapping[str, tuple[Tensor, Tensor]],
        targets: Sequence[Callable[[Pass], Tensor]],
    ) -> list[tuple[dict[NestedKey, Tensor], dict[str, Tensor]]]:
        batch = call.batch_size
        rows = max(batch.numel(), 1)
        at_once = max(1, self._rows // rows)
        totals: list[tuple[dict[NestedKey, Tensor], dict[str, Tensor]]] = [({}, {}) for _ in targets]
        for start in range(0, len(self._points), at_once):
            alphas = self._points[start : start + at_once]
            points = len(alphas)
            stored = repeat_rows(call.data, points)
            path = {key: _between(baselines[key], ends[key], alphas, batch) for key in ends}
            middle = {slot: _between(low, high, alphas, batch) for slot, (low, high) in inner.items()}
            weights = next(iter(path.values())).new_tensor(self._weights[start : start + at_once])
            found, _ = gradients(
                call,
                {key: path[key] for key in inputs},
                middle,
                sites,
                targets,
                stored=stored.update({key: value for key, value in path.items() if key not in inputs}),
                weights=weights.repeat_interleave(rows),
            )
            for (of_inputs, of_leaves), (sum_inputs, sum_leaves) in zip(found, totals, strict=True):
                for part, total in ((of_inputs, sum_inputs), (of_leaves, sum_leaves)):
                    for key, value in part.items():
                        value = value.reshape(points, *batch, *value.shape[1:]).sum(0)
                        total[key] = value if key not in total else total[key] + value
        return totals

    def _inner_path(
        self,
        call: Call,
        sites: Mapping[str, str],
        ends: Mapping[NestedKey, Tensor],
        baselines: Mapping[NestedKey, Tensor],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        if not sites:
            return {}
        batch = call.batch_size
        low, high = activations(call, sites, baselines), activations(call, sites, ends)
        return {
            slot: (with_batch(low[slot], batch, site), with_batch(high[slot], batch, site))
            for slot, site in sites.items()
        }

    def _measure_deltas(
        self,
        call: Call,
        ends: Mapping[NestedKey, Tensor],
        baselines: Mapping[NestedKey, Tensor],
        inner: Mapping[str, tuple[Tensor, Tensor]],
        targets: Sequence[Callable[[Pass], Tensor]],
        averages: Sequence[tuple[dict[NestedKey, Tensor], dict[str, Tensor]]],
    ) -> None:
        batch = call.batch_size
        with torch.no_grad():
            high, low = call.replay(ends), call.replay(baselines)
            changes = [target(high) - target(low) for target in targets]
        for name, change, (of_inputs, of_leaves) in zip(self.names, changes, averages, strict=True):
            terms = [value * (ends[key] - baselines[key]) for key, value in of_inputs.items()]
            terms += [value * (inner[slot][1] - inner[slot][0]) for slot, value in of_leaves.items()]
            total = torch.stack([term.reshape(*batch, -1).sum(-1) for term in terms]).sum(0)
            key = (self._delta_key or "", *([name] if name else []))
            self._deltas[key] = total - change

    def _baseline_of(self, key: NestedKey) -> tuple[str, ...]:
        return (self._baseline_key, *((key,) if isinstance(key, str) else key))

    def _read_baseline(self, call: Call, key: NestedKey, value: Tensor) -> Tensor:
        if self._baseline is not None:
            return torch.full_like(value, self._baseline)
        name = self._baseline_of(key)
        found = call.data.get(name, None)
        if found is None:
            raise MissingKeyError(
                f"IntegratedGradients needs the baseline of {key!r} under {name!r}, which the data lacks; "
                f"{nearest(str(name), map(str, call.data.keys(True, True)))}. Put a neutral input there (zeros, say), "
                "or give a number for all: IntegratedGradients(baseline=0.0)"
            )
        if found.shape != value.shape or found.device != value.device:
            raise InputError(
                f"the baseline {name!r} has shape {tuple(found.shape)} on {found.device}; it must match {key!r}, "
                f"which has shape {tuple(value.shape)} on {value.device}"
            )
        original = call.inputs[key].dtype
        if found.dtype not in (value.dtype, original):
            raise InputError(f"the baseline {name!r} is {found.dtype}; it must match {key!r}, which is {original}")
        return found.to(value.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class IntegratedGradients(GradientAttribution):
    """Integrated gradients (Sundararajan et al. 2017) of inputs and of inner activations.

    Args:
        n_steps: points on the path. Gauss-Legendre with 16 is ample for smooth (tanh) nets, 32 to 64 for ReLU.
        method: the quadrature rule, see :func:`quadrature`.
        baseline: a number that is the baseline everywhere; by default the baseline of input ``k`` is read from the
            data under ``(baseline_key, k)``, of the shape, device and dtype of the input.
        baseline_key: the root of the baselines in the data.
        multiply_by_inputs: multiply by input minus baseline, so that attributions add up to the change of the
            target (completeness); ``False`` gives the average gradient.
        compute_convergence_delta: also write the sum of the attributions minus the change of the target (of the
            inputs' attributions where inner activations are explained as well).
        delta_key: where that is written, batch-shaped.
        chunk_size: rows (points times batch) of one pass; by default 64 for convolutional nets, else 8192. The
            memory needed does not grow with ``n_steps``.

    The other arguments are those of :class:`tdhook_rl.attribution.base.GradientAttribution`. With
    ``input_modules`` the path runs between the activations at the baseline and at the input.

    Writes ``(attribution_key, in_key)`` and ``(attribution_key, path)``: batch + the shape of what is explained.

    Raises:
        MissingKeyError: if a baseline is absent.
        InputError: if a baseline has another shape, device or dtype than its input.

    Example:
        >>> from tensordict import TensorDict
        >>> net = torch.nn.Linear(4, 1)
        >>> x = torch.randn(3, 4)
        >>> with IntegratedGradients().prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": x, ("baseline", "input"): torch.zeros(3, 4)}, batch_size=3))
        >>> torch.allclose(data["attr", "input"].sum(-1), (net(x) - net.bias).squeeze(-1), atol=1e-6)
        True
    """

    n_steps: int = 50
    method: Quadrature = "gausslegendre"
    baseline: float | None = None
    baseline_key: str = "baseline"
    multiply_by_inputs: bool = True
    compute_convergence_delta: bool = False
    delta_key: str = "convergence_delta"
    chunk_size: int | None = None

    bound_class: ClassVar[type[BoundAttribution]] = _BoundIntegratedGradients

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n_steps, int) or self.n_steps < 1:
            raise InputError(f"n_steps is a positive integer, got {self.n_steps!r}")
        if self.method not in get_args(Quadrature):
            raise InputError(f"no quadrature is named {self.method!r}; {nearest(self.method, get_args(Quadrature))}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise InputError(f"chunk_size is a positive number of rows, got {self.chunk_size}")


def repeat_rows(data: TensorDictBase, points: int) -> TensorDictBase:
    """The rows of the data once for each point of the path, as one batch dimension."""
    repeated = data.expand(points, *data.batch_size)
    return repeated.reshape(-1) if data.ndim else repeated.clone(recurse=False)


def _between(low: Tensor, high: Tensor, alphas: Sequence[float], batch: torch.Size) -> Tensor:
    """Points from low to high, ``(points * rows, features)``."""
    weights = torch.tensor(alphas, dtype=low.dtype, device=low.device).reshape(-1, *(1,) * low.ndim)
    path = torch.lerp(low[None], high[None], weights)
    return path.flatten(0, len(batch)) if batch else path

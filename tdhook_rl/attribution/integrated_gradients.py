"""Integrated gradients: gradients averaged along the straight path from a baseline, which add up to the change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.arguments.checked import require_counts
from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.attribution.base import BoundAttribution, GradientAttribution, compiled
from tdhook_rl.attribution.baselines import Baseline, Baselines, check_baseline, points_between
from tdhook_rl.attribution.gradients import gradients
from tdhook_rl.attribution.leaves import activations
from tdhook_rl.attribution.question import Attributed, Question
from tdhook_rl.attribution.undefined import nan_undefined_rows, through_time
from tdhook_rl.calls.passes import Call, with_batch
from tdhook_rl.calls.repeatable import coupled, require_rows_apart
from tdhook_rl.errors import InputError, MissingKeyError, SiteError, nearest
from tdhook_rl.method import Binder
from tdhook_rl.policies.draws import action_keys, draws, sample_keys
from tdhook_rl.replaying.batching import conv_chunk, repeat_rows, row_vectors
from tdhook_rl.sites.numbers import difference, first_order

Quadrature = Literal["gausslegendre", "riemann_middle", "riemann_left", "riemann_right", "riemann_trapezoid"]

#: Rows of one pass (points of the path times rows of the batch); what bounds the memory. Measured on CPU with nets
#: 64 to 256 wide: 2048 to 4096 rows are fastest, since activations stay in the cache; 8192 take up to a sixth longer.
PATH_ROWS = 4096


@cache
def quadrature(method: Quadrature, steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Points in [0, 1] and weights that add up to 1.

    Args:
        method: ``"gausslegendre"`` (exact for polynomials of degree ``2 * steps - 1``), or a rule of equal steps. The
            trapezoid has half weight at both ends; captum 0.9 divides its weights by ``steps`` instead of
            ``steps - 1``, so that its attributions fall short by ``1 / steps``.
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
        self._one_pass: tuple[tuple, list[tuple[Tensor, Tensor]]] = ((), [])  # the last schedule of a single pass
        self.is_product = config.multiply_by_inputs
        given, root = config.baseline, config.baseline_key
        self.baselines = Baselines("IntegratedGradients", given, root, as_input=True, known=binder.policy.in_keys)
        self._chunk_size = config.chunk_size
        self.compiled = compiled(self, config)
        self.beside = config.delta_key if config.compute_convergence_delta else None
        self._deltas: dict[tuple[str, ...], Tensor] = {}
        # The baselines of the inputs are read from the data, also by annotate. Replays need them only where a
        # callback or the policy reads them as well.
        others = [*self.reads, *binder.policy.in_keys]
        self._unread = frozenset([config.baseline_key]) - {key_parts(key)[0] for key in others}
        self.reads = [*self.reads, *(self.baselines.key_of(key) for key in binder.policy.in_keys)]
        # What targets may read of the stored data although the policy reads it as an input.
        self._drawn = [key for child in binder.policy.modules() if draws(child) for key in sample_keys(child)]
        self._results: frozenset[str] | None = None  # known once every method is bound
        self._read_by_targets: frozenset[NestedKey] = frozenset(["action", *binder.policy.out_keys, *self._drawn])

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        size = rows_at_once(call, self._chunk_size)
        if call.batch_size.numel() <= size:
            return self._compute_rows(call)
        parts = [self._compute_rows(block) for block in _blocks(call, size)]
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return {key: value.reshape((*call.batch_size, *value.shape[1:])) for key, value in joined.items()}

    def _compute_rows(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        results = super().compute(call)
        deltas, self._deltas = self._deltas, {}
        return results | deltas

    def attribute(self, question: Question) -> list[Attributed]:
        if len(question.sites) + bool(question.inputs) == 1:
            return self._attribute_group(question)
        found: list[Attributed] = [({}, {}) for _ in question.targets]
        # A path for each activation: one in the place of what is computed cuts off the inputs and earlier ones.
        groups = [question._replace(sites={})] if question.inputs else []
        groups += [question._replace(inputs={}, sites={slot: site}) for slot, site in question.sites.items()]
        for group in groups:
            for (all_inputs, all_leaves), (of_inputs, of_leaves) in zip(
                found, self._attribute_group(group), strict=True
            ):
                all_inputs.update(of_inputs)
                all_leaves.update(of_leaves)
        return found

    def _attribute_group(self, question: Question) -> list[Attributed]:
        call, inputs = question.call, question.inputs
        path_inputs = self._path_inputs(call, inputs)
        baselines = {key: self.baselines.of(call, key, value) for key, value in path_inputs.items()}
        ends = {key: inputs.get(key, call.inputs[key]) for key in baselines}
        inner = self._inner_path(call, question.sites, ends, baselines)
        averages = self._integrate(question, baselines, inner)
        if self.beside is not None and not self._deltas:
            self._measure_deltas(question, ends, baselines, inner, averages)
        if not self.is_product:
            return averages
        return [
            (
                {key: value * (inputs[key] - baselines[key]).detach() for key, value in of_inputs.items()},
                {slot: first_order(value, difference(*reversed(inner[slot]))) for slot, value in of_leaves.items()},
            )
            for of_inputs, of_leaves in averages
        ]

    def _path_inputs(self, call: Call, inputs: Mapping[NestedKey, Tensor]) -> dict[NestedKey, Tensor]:
        """The inputs that have a baseline: the explained ones, or, for inner activations, numbers and pixels.

        Tokens and counters have one where the data holds it.
        """
        if inputs:
            return dict(inputs)
        keys = call.policy.policy_in_keys
        chosen = {
            key: value
            for key in keys
            if (value := call.inputs.get(key)) is not None
            and (
                value.is_floating_point()
                or value.dtype == torch.uint8
                or call.data.get(self.baselines.key_of(key), None) is not None
            )
        }
        if not chosen:
            raise MissingKeyError(
                f"IntegratedGradients of inner activations compares them with those at a baseline, and none of the "
                f"inputs {keys} has one: put neutral indices (padding tokens, say) into the data under "
                f"{self.baselines.key_of(keys[0])!r}"
            )
        return chosen

    def _integrate(
        self, question: Question, baselines: Mapping[NestedKey, Tensor], inner: Mapping[str, tuple[Tensor, Tensor]]
    ) -> list[Attributed]:
        call, inputs = question.call, question.inputs
        batch = call.batch_size
        rows = batch.numel()
        shapes = {key: value.shape for key, value in inputs.items()}, {s: low.shape for s, (low, _) in inner.items()}
        totals: list[Attributed] = [({}, {}) for _ in question.targets]
        stored = None
        left_out = self._not_repeated(call, inputs)
        like = next(iter((*inputs.values(), *(low for low, _ in inner.values()))))
        passes = self._passes(call, like)
        # What the policy puts out at the end is compared with what is stored, and would take a pass of its own.
        kept = rows if not inner and call.compares and call.replayed is None and call.as_it_was(inputs, None) else 0
        for number, (alphas, weights) in enumerate(passes, 1):
            points, end = len(alphas), number == len(passes)
            if stored is None or stored.batch_size[0] != points * rows:
                stored = repeat_rows(call.data, points, left_out)
            between = question._replace(
                inputs={key: points_between(baselines[key], high, alphas, batch, end) for key, high in inputs.items()},
                placed={
                    slot: points_between(low, high, alphas, batch, end, True) for slot, (low, high) in inner.items()
                },
                stored=stored,
                weights=weights,
                own=kept if end else 0,
                defined={},
            )
            found, _ = gradients(between)
            for one, total in zip(found, totals, strict=True):
                for part, sums, shape in zip(one, total, shapes, strict=True):
                    for key, value in part.items():
                        if batch == (1,) and shape[key][:1] == batch:
                            value = value[: points - end].sum(0, keepdim=True)
                        else:
                            value = value.reshape(points, *shape[key])[: points - end].sum(0)
                        sums[key] = value if key not in sums else sums[key] + value
        # A row whose own target is no number has no attribution, also where the path reaches it from numbers.
        for index, defined in (between.defined or {}).items():
            there = through_time(call, defined.reshape(points, *batch)[-1])
            for part in totals[index]:
                part.update({key: nan_undefined_rows(there, value) for key, value in part.items()})
        return totals

    def _not_repeated(self, call: Call, inputs: Mapping[NestedKey, Tensor]) -> frozenset[str]:
        """What no pass reads of the stored data: baselines, results of an earlier call, inputs that are replaced."""
        records = [record.key for record in call.policy._hooked.records]
        # A target of the user's may read anything, and so may what decides where interventions act.
        if self.reads_inputs or any(key not in call.inputs for key in records):
            return self._unread
        if self._results is None:
            state = call.policy._hooked
            written: list[NestedKey] = list(call.policy.result_keys)
            if state.chain is not None and self._own_targets and not state.draws:
                # Of what the policy has put out, passes over its chain read what was decided.
                out_keys = call.policy.policy_out_keys
                written += out_keys
                chosen = [key for key, _ in state.actions.values()]
                self._read_by_targets = frozenset([*action_keys(out_keys), *chosen, *self._drawn])
            read = [*call.policy._hooked_read_keys(), *records, *self._read_by_targets]
            roots = {key_parts(key)[0] for key in read}
            self._results = frozenset(key_parts(key)[0] for key in written) - roots
        replaced = {key for key in inputs if isinstance(key, str)} - self._read_by_targets
        return self._unread | self._results | replaced

    def _passes(self, call: Call, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The points of each pass, and a weight for each of its rows: as many as fit, in passes of equal size.

        The last point is the end of the path, without a weight: what there is in the row itself. It is always there,
        since the last bits of a pass are those of its number of rows.
        """
        points, weights = (*self._points, 1.0), (*self._weights, 0.0)
        rows = call.batch_size.numel()
        number = math.ceil(len(points) / max(1, rows_at_once(call, self._chunk_size) // max(rows, 1)))
        known, passes = self._one_pass
        keep = number == 1 and type(like) is Tensor and not torch.compiler.is_compiling()
        key = (rows, like.dtype, like.device)
        if keep and known == key:
            return passes
        dtype = like.real.dtype if like.is_complex() else like.dtype  # a compiler does not know to_real()
        # Ordinary tensors, also where the first call is in inference mode.
        with torch.inference_mode(False) if keep else nullcontext():
            alphas, shares = (torch.tensor(values, dtype=dtype, device=like.device) for values in (points, weights))
            size = math.ceil(len(points) / number)
            passes = [
                (a, w.repeat_interleave(rows)) for a, w in zip(alphas.split(size), shares.split(size), strict=True)
            ]
        if keep:
            self._one_pass = key, passes
        return passes

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
        offer = "" if self._partly else "; Saliency(missing='nan') explains a module that runs on some rows only"
        try:
            low, high = (activations(call, sites, one, offer=offer) for one in (baselines, ends))
            return {
                slot: (with_batch(low[slot], batch, site, offer), with_batch(high[slot], batch, site, offer))
                for slot, site in sites.items()
            }
        except (SiteError, InputError) as error:
            if not self._partly:
                raise
            raise type(error)(
                f"integrated gradients of {', '.join(map(repr, sites.values()))} go from what a module gives at the "
                "baseline to what it gives on the data, so missing='nan' cannot be had where it runs on part of the "
                f"rows, or on others at the baseline: use Saliency(missing='nan'), or explain the inputs ({error})"
            ) from error

    def _measure_deltas(
        self,
        question: Question,
        ends: Mapping[NestedKey, Tensor],
        baselines: Mapping[NestedKey, Tensor],
        inner: Mapping[str, tuple[Tensor, Tensor]],
        averages: Sequence[Attributed],
    ) -> None:
        call = question.call
        with torch.no_grad():
            high, low = call.replay(ends), call.replay(baselines)
            changes = [target(high.lent()) - target(low.lent()) for target in question.targets]
        for name, change, (of_inputs, of_leaves) in zip(self.names, changes, averages, strict=True):
            terms = [value * (ends[key] - baselines[key]).detach() for key, value in of_inputs.items()]
            terms += [first_order(value, difference(*reversed(inner[slot]))) for slot, value in of_leaves.items()]
            total = torch.stack([row_vectors(term, call.batch_size).sum(-1) for term in terms]).sum(0)
            key = (self.beside or "", *([name] if name else []))
            self._deltas[key] = total - change


@dataclass(frozen=True, eq=False, kw_only=True)
class IntegratedGradients(GradientAttribution):
    """Integrated gradients (Sundararajan et al. 2017) of inputs and of inner activations.

    Args:
        n_steps: points on the path. Gauss-Legendre with 16 is ample for smooth (tanh) nets, 32 to 64 for ReLU.
        method: the quadrature rule, see :func:`quadrature`.
        baseline: a number, a tensor of the shape of a row's features, or a mapping of input keys to these; by default
            the baseline of input ``k`` is read from the data under ``(baseline_key, k)``, of the shape, device and
            dtype of the input.
        baseline_key: the root of the baselines in the data.
        multiply_by_inputs: multiply by input minus baseline, so that attributions add up to the change of the
            target (completeness); ``False`` gives the average gradient.
        compute_convergence_delta: also write the sum of the attributions minus the change of the target (of the
            inputs' attributions where inner activations are explained as well, else of the first of several).
        delta_key: where that is written, batch-shaped.
        chunk_size: rows (points times batch) of one pass; by default at most 4096, fewer for convolutional nets.
            The memory needed does not grow with ``n_steps`` or the batch.
        compile: as of :class:`~tdhook_rl.attribution.saliency.Saliency`.

    The other arguments are those of :class:`tdhook_rl.attribution.base.GradientAttribution`. With
    ``input_modules`` the path runs between the activations at the baseline and at the input, and the inputs stay as
    they are: what reaches the target past the modules is not attributed to them, and shows in the delta.

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
    baseline: Baseline | None = None
    baseline_key: str = "baseline"
    multiply_by_inputs: bool = True
    compute_convergence_delta: bool = False
    delta_key: str = "convergence_delta"
    chunk_size: int | None = None
    compile: bool | Mapping[str, Any] = False

    bound_class: ClassVar[type[BoundAttribution]] = _BoundIntegratedGradients

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "baseline", check_baseline(self.baseline))
        require_counts(n_steps=self.n_steps)
        if self.method not in get_args(Quadrature):
            raise InputError(f"no quadrature is named {self.method!r}; {nearest(self.method, get_args(Quadrature))}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise InputError(f"chunk_size is a positive number of rows, got {self.chunk_size}")


def rows_at_once(call: Call, chunk_size: int | None) -> int:
    """Rows of one pass over copies of the data: what the user asked for, else what is fast on CPU.

    Where copies in one pass would change what it computes, each copy is a pass of its own.
    """
    if len(call.batch_size) > 1:
        require_rows_apart(call, f"a batch of shape {tuple(call.batch_size)} is computed as rows")
    if coupled(call):
        return max(1, call.batch_size.numel())
    if chunk_size is not None:
        return chunk_size
    if call.policy._hooked.traits.convolutional:
        return conv_chunk(call.inputs.values(), call.batch_size)
    return PATH_ROWS


def _blocks(call: Call, size: int) -> Iterator[Call]:
    """The call as calls on so many rows each, with one batch dimension."""
    last = call.data.ndim - 1
    data = call.data.flatten(0, last)
    inputs = {key: value.flatten(0, last) for key, value in call.inputs.items()}
    for start in range(0, data.batch_size[0], size):
        block = slice(start, start + size)
        yield Call(call.policy, call._forward, data[block], {key: value[block] for key, value in inputs.items()})

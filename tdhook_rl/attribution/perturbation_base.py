"""What the perturbation methods share: perturbed copies of an input, measured in passes of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.attribution.base import BoundAttribution, GradientAttribution
from tdhook_rl.attribution.explainable import require_all_there, unless_masks
from tdhook_rl.attribution.groups import Groups
from tdhook_rl.attribution.integrated_gradients import rows_at_once
from tdhook_rl.attribution.question import Attributed, Question
from tdhook_rl.calls.decisions import one_hot_action
from tdhook_rl.calls.open_choices import closed_choices
from tdhook_rl.calls.passes import Call, Pass
from tdhook_rl.calls.several_choices import require_one_choice
from tdhook_rl.errors import InputError, MissingKeyError, TargetError, TdhookError, nearest
from tdhook_rl.method import Binder
from tdhook_rl.replaying.batching import repeat_rows, row_vectors, shallow_copy
from tdhook_rl.targets import Target, default_target, is_own, of_rows

Measure = Callable[[Pass], Tensor]


class Changes(Protocol):
    """The perturbed copies of one input, made as they are needed."""

    count: int

    def make(self, start: int, stop: int) -> Tensor:
        """Copies ``start`` to ``stop``, ``(copies, *batch, *features)``."""

    def spread(self, scores: Tensor) -> Tensor:
        """From a score for each copy, ``(count, *batch)``, to a map with the batch first."""


class BoundPerturbation(BoundAttribution):
    """Measures the policy on perturbed copies; subclasses say what is perturbed, measured and compared."""

    def __init__(self, config: Perturbation, binder: Binder) -> None:
        super().__init__(config, binder)
        self._chunk_size = config.chunk_size

    def attribute(self, question: Question) -> list[Attributed]:
        call, inputs = question.call, question.inputs
        measures = self._measures(question.targets)
        found: list[Attributed] = [({}, {}) for _ in measures]
        # What the policy was given, also where it has overwritten an input since.
        whole = shallow_copy(call.data)
        for key, value in {**call.inputs, **inputs}.items():
            whole.set(key, value)
        with torch.no_grad():
            run = call.replay(inputs)
            before = [measure(run) for measure in measures]
            for key, value in inputs.items():
                changes = self._changes(call, key, value, inputs)
                scores: list[list[Tensor]] = [[] for _ in measures]
                at_once = max(1, rows_at_once(call, self._chunk_size) // max(call.batch_size.numel(), 1))
                for start in range(0, changes.count, at_once):
                    changed = changes.make(start, min(start + at_once, changes.count))
                    copies = len(changed)
                    flat = changed.flatten(0, len(call.batch_size)) if call.batch_size else changed
                    run = _replay(call, key, flat, repeat_rows(whole, copies))
                    for kept, reference, measure in zip(scores, before, measures, strict=True):
                        after = measure(run)
                        after = after.reshape(copies, *call.batch_size, *after.shape[1:])
                        scored = self._compare(reference.expand_as(after), after)
                        kept.append(row_vectors(scored, torch.Size([copies, *call.batch_size])).sum(-1))
                for (of_inputs, _), kept in zip(found, scores, strict=True):
                    of_inputs[key] = changes.spread(torch.cat(kept))
        return found

    def _explained_inputs(self, call: Call) -> dict[NestedKey, Tensor]:
        """The inputs in their own dtype: nothing is differentiated."""
        return super()._explained_inputs(call) if self._init["inputs"] else own_inputs(call, self.inputs)

    def _as_explained(self, call: Call, key: NestedKey, value: Tensor) -> Tensor:
        return value

    def _changes(self, call: Call, key: NestedKey, value: Tensor, inputs: Mapping[NestedKey, Tensor]) -> Changes:
        raise NotImplementedError

    def _measures(self, targets: Sequence[Measure]) -> Sequence[Measure]:
        return targets

    def _compare(self, before: Tensor, after: Tensor) -> Tensor:
        """The score of each copy and row, from what was measured before and after; feature dimensions are summed."""
        return before - after

    def _function(self, target: Target | None, call: Call) -> Measure:
        return super()._function(target, call) if self._init["targets"] else _WithoutGradient(target)


def own_inputs(call: Call, keys: Sequence[NestedKey] | None) -> dict[NestedKey, Tensor]:
    """The inputs to perturb: those asked for, else all that are not boolean, else (there are no others) all.

    Raises:
        InputError: if one holds no tensor.
    """
    tensors = [key for key in call.policy.policy_in_keys if isinstance(call.inputs.get(key), Tensor)]
    if keys is None:
        require_all_there(call)
        keys = unless_masks(call, {key: call.inputs[key] for key in tensors})
    for key in keys:
        if key not in tensors:
            if key not in call.inputs:
                raise MissingKeyError(f"{key!r} is to be perturbed, and the data lacks it: the policy does without")
            raise InputError(f"the input {key!r} is a {type(call.inputs[key]).__name__}: tensors can be perturbed")
    return {key: call.inputs[key] for key in keys}


def _replay(call: Call, key: NestedKey, value: Tensor, stored: TensorDictBase) -> Pass:
    if value.is_floating_point():
        return call.replay({key: value}, stored)
    try:
        return call.replay({key: value}, stored)
    except TdhookError:
        raise
    except Exception as error:  # whatever the user's network raises
        raise InputError(
            f"the policy does not run where parts of {key!r} ({value.dtype}) are replaced "
            f"({type(error).__name__}: {error}): give a baseline that it can read, such as the index of a padding token"
        ) from error


@dataclass(frozen=True)
class _WithoutGradient:
    """A target where nothing requires a gradient: the sum of outputs cannot ask which of them depend on the input.

    It need not, since only differences count.
    """

    target: Target | None

    def __call__(self, run: Pass) -> Tensor:
        target = self.target or default_target(run)
        if getattr(target, "name", None) != "output_sum":
            return target(run if is_own(target) else run.lent())
        batch = run.outputs.batch_size
        values = [run.outputs.get(key, None) for key in run.out_keys]
        terms = [row_vectors(v, batch).sum(-1) for v in values if isinstance(v, Tensor) and v.is_floating_point()]
        if not terms:
            raise TargetError(f"none of the outputs {run.out_keys} is a floating-point tensor: give a target=")
        return of_rows(torch.stack(terms).sum(0), run, "output_sum")


@dataclass(frozen=True)
class Output:
    """An output of the policy, the first of several that it has."""

    keys: Sequence[NestedKey]
    method: str

    def __call__(self, run: Pass) -> Tensor:
        return _rows_first(run, self.found(run)[1])

    def found(self, run: Pass) -> tuple[NestedKey, Tensor]:
        """Its key and value."""
        for key in self.keys:
            value = run.outputs.get(key, None)
            if value is not None:
                return key, value
        known = [str(key) for key in run.outputs.keys(True, True)]
        asked = " or ".join(repr(key) for key in self.keys)
        raise TargetError(
            f"{self.method} reads {asked}, which the policy does not output; {nearest(self.keys[0], known)}. "
            "Name another output with key="
        )


def _rows_first(run: Pass, values: Tensor) -> Tensor:
    """The copies of an ensemble, which stand before the rows, as features: their scores add up."""
    rows = run.stored.ndim
    copies = range(run.outputs.ndim - rows)
    return values.movedim(tuple(copies), tuple(rows + one for one in copies)) if copies else values


@dataclass(frozen=True)
class OpenOutput:
    """Logits or values of discrete actions, with 0 for choices that were not open, which cannot change anything."""

    output: Output

    def __call__(self, run: Pass) -> Tensor:
        key, values = self.output.found(run)
        if values.is_floating_point():
            values = values.masked_fill(closed_choices(run, key, values), 0.0)
        return _rows_first(run, values)


@dataclass(frozen=True)
class ChosenFirst:
    """Logits or values of discrete actions (of ``"probs"``, as torch's distributions call probabilities, the
    logarithms), the stored action first and the others after it; of choices that were not open minus infinity."""

    output: Output

    def __call__(self, run: Pass) -> Tensor:
        key, values = self.output.found(run)
        if values.ndim != run.outputs.batch_dims + 1 or values.shape[-1] < 2:
            raise TargetError(
                f"SARFA compares one choice among two or more discrete actions, but the values have shape "
                f"{tuple(values.shape)} at batch size {tuple(run.outputs.batch_size)}"
            )
        require_one_choice(run, values, key, "SARFA")
        if key_parts(key)[-1] == "probs":
            values = values.log()
        order = one_hot_action(run, values, key).sort(dim=-1, descending=True, stable=True).indices
        return values.masked_fill(closed_choices(run, key, values), -torch.inf).gather(-1, order)


class Occluded:
    """Groups of features in turn replaced by their baseline."""

    def __init__(self, groups: Groups, value: Tensor, baseline: Tensor) -> None:
        self.groups = groups
        self.count = groups.count
        self.value = value
        self.baseline = baseline

    def make(self, start: int, stop: int) -> Tensor:
        return torch.where(self.groups.mask(start, stop, self.value), self.baseline, self.value)

    def spread(self, scores: Tensor) -> Tensor:
        return self.groups.spread(scores)


class Blurred:
    """Places of an image in turn blended with a blurred copy, through a Gaussian mask; bytes are rounded."""

    def __init__(self, value: Tensor, stride: int, sigma: float, blur_sigma: float) -> None:
        self.dtype = value.dtype
        self.value = value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
        self.size = (int(value.shape[-2]), int(value.shape[-1]))
        self.grid = tuple(-(-length // stride) for length in self.size)
        self.count = self.grid[0] * self.grid[1]
        self.sigma = sigma
        by_row, by_column = (self._smoothing(length, blur_sigma) for length in self.size)
        self.difference = by_row @ value @ by_column.T - value

    def _near(self, length: int, centres: Tensor, sigma: float) -> Tensor:
        places = torch.arange(length, dtype=self.value.dtype, device=self.value.device)
        return torch.exp(-((places - centres[:, None]) ** 2) / (2 * sigma**2))

    def _smoothing(self, length: int, sigma: float) -> Tensor:
        centres = torch.arange(length, dtype=self.value.dtype, device=self.value.device)
        weights = self._near(length, centres, sigma)
        return weights / weights.sum(-1, keepdim=True)  # at the border the weights inside add up to 1

    def make(self, start: int, stop: int) -> Tensor:
        index = torch.arange(start, stop, device=self.value.device)
        parts = []
        for place, places, length in zip(
            (index // self.grid[1], index % self.grid[1]), self.grid, self.size, strict=True
        ):
            centres = (place.to(self.value.dtype) + 0.5) * (length / places) - 0.5
            parts.append(self._near(length, centres, self.sigma))
        masks = parts[0][:, :, None] * parts[1][:, None, :]
        blended = self.value + masks.reshape(len(index), *(1,) * (self.value.ndim - 2), *self.size) * self.difference
        return blended if self.dtype == blended.dtype else blended.round().to(self.dtype)

    def spread(self, scores: Tensor) -> Tensor:
        maps = scores.movedim(0, -1).reshape(-1, 1, *self.grid)
        maps = torch.nn.functional.interpolate(maps, size=self.size, mode="bilinear", align_corners=False)
        return maps.reshape((*scores.shape[1:], *self.size))


@dataclass(frozen=True, eq=False, kw_only=True)
class Perturbation(GradientAttribution):
    """Base of the perturbation methods: explains inputs, without gradients, in their own dtype.

    ``inputs`` are by default all that are not boolean, or all where there are no others.

    Args:
        chunk_size: rows (copies times batch) of one pass; by default at most 4096, fewer for convolutional nets.
    """

    chunk_size: int | None = None

    bound_class: ClassVar[type[BoundAttribution]] = BoundPerturbation

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.input_modules:
            raise InputError(f"{name} perturbs inputs: input_modules= belongs to gradients, such as Saliency")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise InputError(f"chunk_size is a positive number of rows, got {self.chunk_size}")

    def _refuse_targets(self, instead: str) -> None:
        if self.target is not None or self.init_attr_targets is not None:
            raise TargetError(f"{type(self).__name__} {instead}: leave out target= and init_attr_targets=")

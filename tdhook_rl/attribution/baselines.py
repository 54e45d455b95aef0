"""Baselines of inputs: an argument (a number, a tensor of features, one of these by input) or entries of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.arguments.keys import key_parts, required
from tdhook_rl.arguments.tensors import numbers
from tdhook_rl.attribution.explainable import require_inputs
from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import InputError, nearest

Baseline = float | Tensor | Mapping[NestedKey, float | Tensor]


@dataclass(frozen=True)
class Baselines:
    """The baselines of a method.

    Args:
        method: its name.
        given: as :func:`check_baseline` returns it; ``None`` for baselines that are read from the data.
        root: where they lie in the data: under ``(root, key)`` that of input ``key``.
        as_input: whether one in the data has to be of the dtype of its input, or else of any that this can hold.
        known: the inputs of the policy.

    Raises:
        InputError: if one is given for what is no input.
    """

    method: str
    given: Any
    root: str
    as_input: bool
    known: Sequence[NestedKey]

    def __post_init__(self) -> None:
        if isinstance(self.given, Mapping):
            require_inputs("baseline= names", self.given, self.known)

    def key_of(self, key: NestedKey) -> tuple[str, ...]:
        """Where the baseline of an input lies in the data."""
        return (self.root, *key_parts(key))

    def of(self, call: Call, key: NestedKey, value: Tensor) -> Tensor:
        """The baseline of an input, of its shape, dtype and device.

        Raises:
            MissingKeyError: if the data lacks it.
            InputError: if it does not fit the input.
        """
        if self.given is not None:
            return filled(self.given, key, value, call.batch_size)
        name = self.key_of(key)
        remedy = f". Put a neutral input there (zeros, say), or give a number for all: {self.method}(baseline=0.0)"
        found = required(call.data, name, f"{self.method} needs the baseline of {key!r} under", remedy)
        if found.shape != value.shape or found.device != value.device:
            raise InputError(
                f"the baseline {name!r} has shape {tuple(found.shape)} on {found.device}; it must match {key!r}, "
                f"which has shape {tuple(value.shape)} on {value.device}"
            )
        if not self.as_input:
            return _in_dtype(found, value, key)
        original = call.inputs[key].dtype
        if found.dtype not in (value.dtype, original):
            raise InputError(f"the baseline {name!r} is {found.dtype}; it must match {key!r}, which is {original}")
        return found if found.dtype is value.dtype else found.to(value.dtype)


def check_baseline(baseline: Any) -> Any:
    """The baseline as numbers and tensors, lists and arrays turned into tensors.

    Raises:
        InputError: for what is neither, or not finite.

    Example:
        >>> check_baseline(0.5), check_baseline([0.0, 1.0])
        (0.5, tensor([0., 1.]))
    """
    if isinstance(baseline, Mapping):
        return {unravel_key(key): check_baseline(value) for key, value in baseline.items()}
    if baseline is None or (isinstance(baseline, Real) and abs(float(baseline)) < 2.0**63):
        return baseline
    try:
        tensor = torch.as_tensor(baseline).detach()
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is not None and tensor.numel():
        tensor = numbers(tensor, "baseline=")
    if tensor is None or tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
        raise InputError(
            "baseline= is a finite number, a tensor of the shape of the input's features, or {input: one of these}; "
            f"got {baseline!r}"
        )
    return tensor


def filled(baseline: Any, key: NestedKey, value: Tensor, batch: torch.Size) -> Tensor:
    """The baseline of one input, as :func:`check_baseline` returns it, in the shape, dtype and device of the input.

    Raises:
        InputError: if it does not fit the features, or a mapping lacks the input.
    """
    if isinstance(baseline, Mapping):
        if key not in baseline:
            raise InputError(
                f"baseline= has none for the input {key!r}; {nearest(key, baseline)}: give one for "
                "each explained input, or leave the input out with inputs=[...]"
            )
        baseline = baseline[key]
    if not isinstance(baseline, Tensor):
        if value.is_floating_point():
            return torch.full_like(value, baseline)
        return _in_dtype(torch.as_tensor(baseline), value, key).expand_as(value)
    features = value.shape[len(batch) :]
    try:
        fits = torch.broadcast_shapes(baseline.shape, features) == features
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            f"baseline= has shape {tuple(baseline.shape)}, but a row of the input {key!r} has shape {tuple(features)}: "
            f"give a tensor for one row, or put one for each row into the data under ('baseline', {key!r}) and leave "
            "baseline= out (None)"
        )
    return _in_dtype(baseline, value, key).expand_as(value)


def _in_dtype(baseline: Tensor, value: Tensor, key: NestedKey) -> Tensor:
    """A baseline in the dtype and on the device of its input.

    Raises:
        InputError: if an input of integers or booleans cannot be what it says.
    """
    converted = baseline.to(value.device, value.dtype)
    if not value.is_floating_point() and not value.is_complex() and baseline.dtype != value.dtype:
        same = converted.to(torch.float64) == baseline.to(value.device, torch.float64)
        if not bool(same.all()):
            wrong = baseline.to(value.device)[~same].reshape(-1)[0]
            raise InputError(
                f"the baseline of the input {key!r} holds {float(wrong):g}, which is no {value.dtype}: the input is "
                "perturbed in its own dtype"
            )
    return converted


def points_between(
    low: Tensor, high: Tensor, alphas: Tensor, batch: torch.Size, end: bool = False, inner: bool = False
) -> Tensor:
    """Points on the straight way from a baseline to a value, ``(points * rows, features)``.

    Args:
        low, high: of the rows.
        alphas: how far each point lies, from 0 to 1.
        batch: the batch shape of the rows.
        end: the last point is ``high`` to the bit.
        inner: they are activations, of which an entry that is the same infinity at both ends, such as the logit of a
            closed action, is so on the way.
    """
    if alphas.dtype is not low.dtype or alphas.device != low.device:
        alphas = alphas.to(low)
    one_row = batch == (1,) and low.shape[:1] == batch  # whose points are the rows of a pass
    path = torch.lerp(low, high, alphas.reshape(-1, *(1,) * (low.ndim - one_row)))
    if inner:
        path = torch.where(high.isinf() & (low == high), high, path)
    if one_row:
        if end:
            path[-1:] = high
        return path
    if end:
        path[-1] = high
    # Convolutional nets flatten the leading dimensions before their layers.
    leading = len(batch) if low.shape[: len(batch)] == batch else 1
    return path.flatten(0, leading) if batch else path

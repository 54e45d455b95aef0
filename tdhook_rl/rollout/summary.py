"""A batch's results as a few numbers for a log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.checked import Checked, checked
from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.batches.annotation import OnMismatch
from tdhook_rl.calls.preconditions import require_hooked
from tdhook_rl.calls.provenance import is_stamp, stamp_key
from tdhook_rl.calls.real_rows import real_rows, row_mask, surely_finite
from tdhook_rl.errors import InputError, listed


@checked
def summarise(data: TensorDictBase, result_keys: Sequence[NestedKey]) -> dict[str, float]:
    """One number for each result: over the rows that were computed, padding left out.

    Attributions and activations are summarised by their mean absolute value, what lies in [0, 1] or counts
    (probes, masks, controls) by its mean. ``computed.<root>`` is the share of rows that were computed. Rows that are
    NaN or infinite, because what the policy saw was, are left out; ``nonfinite.<key>`` is their share, where there are
    any.

    Args:
        data: a batch with results; rows where ``("collector", "mask")`` is false are padding.
        result_keys: which entries, such as ``hooked.result_keys``; absent ones are left out.

    Returns:
        names joined by dots, such as ``"attr.observation"``, and floats.

    Example:
        >>> from tensordict import TensorDict
        >>> data = TensorDict({"attr": {"observation": torch.tensor([[-1.0], [3.0]])}}, batch_size=2)
        >>> summarise(data, [("attr", "observation")])
        {'attr.observation': 2.0}
    """
    return summary_of(data, result_keys, lambda key: result_rows(data, key))


def summary_of(
    data: TensorDictBase, result_keys: Sequence[NestedKey], rows_of: Callable[[tuple[str, ...]], ResultRows]
) -> dict[str, float]:
    """The same, for whoever has the rows of a result already."""
    found: dict[str, float] = {}
    for parts in _tensor_keys(data, result_keys):
        name = ".".join(parts)
        if parts[0] == "computed":
            real = real_rows(data)
            value = data.get(parts)
            found[name] = _mean((value if real is None else value[real.to(value.device)]).cpu())
            continue
        rows = rows_of(parts)
        if rows.nonfinite:
            found[f"nonfinite.{name}"] = rows.nonfinite
        found[name] = _mean(rows.values.abs() if parts[0] not in ("probe", "steered", "control") else rows.values)
    return found


@dataclass(frozen=True)
class ResultRows:
    """The rows of a result that were computed, are no padding, and are finite.

    Attributes:
        values: ``(rows, *features)``, on the CPU.
        places: which rows of the batch these are, counted through all its dimensions.
        nonfinite: the share of rows that are not finite, of those that what the policy saw should have given.
    """

    values: Tensor
    places: Tensor
    nonfinite: float


def result_rows(data: TensorDictBase, key: NestedKey) -> ResultRows:
    """The usable rows of a result.

    Example:
        >>> from tensordict import TensorDict
        >>> data = TensorDict({"attr": {"observation": torch.tensor([[-1.0], [float("nan")]])}}, batch_size=2)
        >>> found = result_rows(data, ("attr", "observation"))
        >>> found.values, found.places, found.nonfinite
        (tensor([[-1.]]), tensor([0]), 0.5)
    """
    parts = key_parts(key)
    value = data.get(parts).detach().cpu()
    padding = real_rows(data)
    real = torch.ones(data.batch_size, dtype=torch.bool) if padding is None else padding.cpu()
    mask = row_mask(data, ("computed", parts[0]))
    computed = real if mask is None else real & mask.cpu()
    # Rows that a schedule has left out are NaN as well, but what the policy saw in them was not.
    stamp = data.get(stamp_key(parts[0]), None)
    seen = computed if stamp is None else computed | (real & ~torch.isfinite(stamp.cpu()))
    nonfinite = 0.0
    if not surely_finite(value):
        finite = torch.isfinite(value)
        finite = finite.flatten(real.ndim).all(-1) if value.ndim > real.ndim else finite
        if not bool(finite[seen].all()):
            nonfinite = _mean(~finite[seen])
        computed = computed & finite
    rows = value.reshape(real.numel(), *value.shape[real.ndim :])
    if bool(computed.all()):  # no copy
        return ResultRows(rows, torch.arange(len(rows)), nonfinite)
    places = computed.reshape(-1).nonzero().squeeze(-1)
    return ResultRows(rows[places], places, nonfinite)


def _tensor_keys(data: TensorDictBase, keys: Sequence[NestedKey]) -> list[tuple[str, ...]]:
    named = [key_parts(key) for key in keys]
    for parts in named:
        if isinstance(node := data.get(parts, None), TensorDictBase):
            inside = [(*parts, *key_parts(key)) for key in node.keys(True, True)]
            raise InputError(
                f"{'.'.join(parts)!r} is no entry but holds entries: name each, such as {listed(inside, 3)}"
            )
    return [parts for parts in named if not is_stamp(parts) and isinstance(data.get(parts, None), Tensor)]


def _mean(rows: Tensor) -> float:
    return float(rows.double().mean()) if rows.numel() else float("nan")


@dataclass(frozen=True)
class AnnotatedMetrics(metaclass=Checked):
    """What an ``Evaluator`` or a loop logs: annotates a batch of trajectories and summarises the results.

    Args:
        policy: the hooked policy; it travels to the evaluator's process.
        on_mismatch: as of ``annotate``.

    Example:
        >>> from tdhook_rl import Saliency
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import make_actor
        >>> with Saliency().prepare(make_actor()) as policy:
        ...     metrics = AnnotatedMetrics(policy)
        ...     found = metrics(CueCorners(batch_size=[4]).rollout(5, policy, break_when_any_done=False))
        >>> sorted(found)
        ['attr.observation', 'computed.attr']
    """

    policy: Any
    on_mismatch: OnMismatch = "warn"

    def __post_init__(self) -> None:
        require_hooked(self.policy, "AnnotatedMetrics")

    @checked
    def __call__(self, data: TensorDictBase) -> dict[str, float]:
        return summarise(self.policy.annotate(data, on_mismatch=self.on_mismatch), self.policy.result_keys)

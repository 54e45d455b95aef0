"""A batch's results as a few numbers for a log."""

from __future__ import annotations

from collections.abc import Sequence
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
from tdhook_rl.calls.real_rows import real_rows, row_mask

__all__ = ["AnnotatedMetrics", "summarise"]


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
    padding = real_rows(data)
    real = torch.ones(data.batch_size, dtype=torch.bool) if padding is None else padding.cpu()
    found: dict[str, float] = {}
    for key in result_keys:
        parts = key_parts(key)
        value = data.get(parts, None)
        if not isinstance(value, Tensor) or is_stamp(parts):
            continue
        value, name = value.detach().cpu(), ".".join(parts)
        if parts[0] == "computed":
            found[name] = _mean(value[real])
            continue
        mask = row_mask(data, ("computed", parts[0]))
        computed = real if mask is None else real & mask.cpu()
        # Rows that a schedule has left out are NaN as well, but what the policy saw in them was not.
        stamp = data.get(stamp_key(parts[0]), None)
        seen = computed if stamp is None else computed | (real & ~torch.isfinite(stamp.cpu()))
        finite = torch.isfinite(value)
        finite = finite.flatten(real.ndim).all(-1) if value.ndim > real.ndim else finite
        if not bool(finite[seen].all()):
            found[f"nonfinite.{name}"] = _mean(~finite[seen])
        rows = value[computed & finite]
        found[name] = _mean(rows.abs() if parts[0] not in ("probe", "steered", "control") else rows)
    return found


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

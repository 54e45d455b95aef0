"""A batch's results as a few numbers for a log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.annotation import OnMismatch

__all__ = ["AnnotatedMetrics", "summarise"]


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
    batch = data.batch_size
    real = data.get(("collector", "mask"), None)
    real = torch.ones(batch, dtype=torch.bool) if real is None else real.reshape(batch).cpu()
    found: dict[str, float] = {}
    for key in result_keys:
        parts = (key,) if isinstance(key, str) else tuple(key)
        value = data.get(parts, None)
        if not isinstance(value, Tensor):
            continue
        value = value.detach().cpu()
        if parts[0] == "computed":
            found[".".join(parts)] = _mean(value[real])
            continue
        mask = data.get(("computed", parts[0]), None)
        rows = value[real if mask is None else real & mask.reshape(batch).cpu()]
        name = ".".join(parts)
        finite = torch.isfinite(rows)
        finite = finite.flatten(1).all(-1) if rows.ndim > 1 else finite
        if not bool(finite.all()):
            found[f"nonfinite.{name}"] = _mean(~finite)
            rows = rows[finite]
        found[name] = _mean(rows.abs() if parts[0] not in ("probe", "steered", "control") else rows)
    return found


def _mean(rows: Tensor) -> float:
    return float(rows.double().mean()) if rows.numel() else float("nan")


@dataclass(frozen=True)
class AnnotatedMetrics:
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

    def __call__(self, data: TensorDictBase) -> dict[str, float]:
        return summarise(self.policy.annotate(data, on_mismatch=self.on_mismatch), self.policy.result_keys)

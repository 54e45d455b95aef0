"""Batches from a collector: a check beforehand, splits, online probes, results in trainers, live controls, a guard.

Knows collectors, trainers and processes, and hooked policies as what runs in them; no environment by name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tdhook_rl.probes.quantities import Future, Return
from tdhook_rl.probes.splits import EPISODE, GroupSplit
from tdhook_rl.rollout.alike import alike_episodes
from tdhook_rl.rollout.cka_matrix import CkaMatrix, cka_matrix
from tdhook_rl.rollout.diagnostics import NetworkDiagnostics, Plasticity
from tdhook_rl.rollout.guarded import Guarded
from tdhook_rl.rollout.interrupts import Interruptible, ignore_interrupts, starting_workers
from tdhook_rl.rollout.live_controls import set_controls
from tdhook_rl.rollout.online_probe import OnlineProbe
from tdhook_rl.rollout.probe_suite import ProbeSuite
from tdhook_rl.rollout.summary import AnnotatedMetrics, summarise

if TYPE_CHECKING:
    from tdhook_rl.doctor.check import check
    from tdhook_rl.doctor.findings import Finding, Report
    from tdhook_rl.rollout.trainer_hook import AnnotateHook

# The trainers of TorchRL are imported with the hook that joins them.
_HOME = {
    "AnnotateHook": "tdhook_rl.rollout.trainer_hook",
    "Finding": "tdhook_rl.doctor.findings",
    "Report": "tdhook_rl.doctor.findings",
    "check": "tdhook_rl.doctor.check",
}

__all__ = [
    "EPISODE",
    "AnnotateHook",
    "AnnotatedMetrics",
    "CkaMatrix",
    "Finding",
    "Future",
    "GroupSplit",
    "Guarded",
    "Interruptible",
    "NetworkDiagnostics",
    "OnlineProbe",
    "Plasticity",
    "ProbeSuite",
    "Report",
    "Return",
    "alike_episodes",
    "check",
    "cka_matrix",
    "ignore_interrupts",
    "set_controls",
    "starting_workers",
    "summarise",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tdhook_rl.rollout' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)

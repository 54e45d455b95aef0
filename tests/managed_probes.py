"""Probes that a manager fits where a policy runs, for tests of them."""

from __future__ import annotations

from typing import Any

from tdhook_rl.latent.probing import ProbeManager, Probing

KEYS = ["labels", "step_type"]
SITE = "module.0.module.1"


def accuracy(predictions: Any, labels: Any) -> dict[str, Any]:
    assert type(predictions) is type(labels)
    assert predictions.shape == labels.shape
    return {"accuracy": (predictions == labels).sum() / len(labels), "rows": len(labels)}


def probing(manager: ProbeManager, pattern: Any = SITE, **options: Any) -> Probing:
    return Probing(pattern, manager.probe_factory, additional_keys=KEYS, **options)

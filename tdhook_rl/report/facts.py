"""What a run is: its methods, targets, sites, seed and versions, as a document for people and W&B."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

__all__ = ["facts_of"]

_PACKAGES = ("tdhook_rl", "torch", "torchrl", "tensordict", "wandb")


def facts_of(policy: Any, *, seed: int | None, experiment: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about a hooked policy and its run.

    Example:
        >>> from tdhook_rl import Saliency, targets
        >>> from tdhook_rl.examples.agent import make_actor
        >>> with Saliency(target=targets.entropy()).prepare(make_actor()) as policy:
        ...     facts = facts_of(policy, seed=0, experiment="cues", config={"lr": 1e-3})
        >>> facts["targets"], facts["results"], facts["seed"]
        (['entropy'], ['attr.observation', 'computed.attr'], 0)
    """
    methods = policy._hooked.runtime.methods
    chosen = [getattr(method, "target", None) for method in [getattr(one, "method", one) for one in methods]]
    listed = [each for one in chosen for each in (one.values() if isinstance(one, Mapping) else [one])]
    results = [key if isinstance(key, str) else ".".join(key) for key in policy.result_keys]
    sites = [".".join(key[1:]) for key in policy.result_keys if isinstance(key, tuple) and key[0] == "cache"]
    return {
        "experiment": experiment,
        "seed": seed,
        "methods": [repr(method)[:500] for method in methods],
        "targets": [getattr(one, "name", repr(one)) for one in listed if one is not None],
        "sites": sites,
        "results": [name for name in results if not name.endswith(".stamp")],
        "policy": type(policy).__name__.removeprefix("Hooked"),
        "parameters": sum(one.numel() for one in policy.parameters()),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "config": dict(config),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

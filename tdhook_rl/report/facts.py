"""What a run is: its methods, targets, sites, seed and versions, as a document for people and W&B."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from tdhook_rl.internals.torch_names import held_parameters
from tdhook_rl.sites.known import own_class

__all__ = ["facts_of"]

_PACKAGES = ("tdhook_rl", "torch", "torchrl", "tensordict", "wandb")


def facts_of(policy: Any, *, seed: int | None, experiment: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about a hooked policy and its run.

    Example:
        >>> from tdhook_rl import Saliency, targets
        >>> from tdhook_rl.examples.agent import make_actor
        >>> with Saliency(target=targets.entropy()).prepare(make_actor()) as policy:
        ...     facts = facts_of(policy, seed=0, experiment="cues", config={"lr": 1e-3})
        >>> facts["methods"], facts["results"], facts["seed"]
        (['Saliency(target=entropy)'], ['attr.observation', 'computed.attr'], 0)
    """
    methods = policy._hooked.runtime.methods
    explaining = [one for one in (getattr(one, "method", one) for one in methods) if hasattr(one, "target")]
    listed = [
        each for one in explaining
        for each in (one.target.values() if isinstance(one.target, Mapping) else [one.target])
    ]  # fmt: skip
    results = [key if isinstance(key, str) else ".".join(key) for key in policy.result_keys]
    sites = [".".join(key[1:]) for key in policy.result_keys if isinstance(key, tuple) and key[0] == "cache"]
    return {
        "experiment": experiment,
        "seed": seed,
        "methods": [_said(method)[:500] for method in methods],
        "targets": ["(default)" if one is None else getattr(one, "name", repr(one)) for one in listed],
        "sites": sites,
        "results": [name for name in results if not name.endswith(".stamp")],
        "policy": own_class(policy).__name__,
        "parameters": sum(one.numel() for one in held_parameters(policy).values()),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "config": dict(config),
    }


def _said(method: Any) -> str:
    """A method as it is written: without what was left as it is by default."""
    if not dataclasses.is_dataclass(method) or isinstance(method, type):
        return repr(method)
    given = []
    for one in dataclasses.fields(method):
        value = getattr(method, one.name)
        if one.repr and not (value is one.default or (isinstance(value, str | float | tuple) and value == one.default)):
            said = getattr(value, "name", None) or (_said(value) if dataclasses.is_dataclass(value) else repr(value))
            given.append(f"{one.name}={said}")
    return f"{type(method).__name__}({', '.join(given)})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

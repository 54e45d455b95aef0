"""Interpretability for TorchRL policies: what an agent looks at, what it knows, and changing its mind.

One pattern: ``with Method(...).prepare(policy) as hooked:``. The hooked policy goes wherever a policy goes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tdhook_rl import targets
    from tdhook_rl.attribution import LRP, GradCAM, GuidedBackpropagation, IntegratedGradients, Saliency
    from tdhook_rl.latent import (
        ActivationAddition,
        ActivationCaching,
        ActivationPatching,
        ControlRecord,
        DirectionalAblation,
        DirectionClamping,
        SteeringVectors,
    )
    from tdhook_rl.latent.probing import LinearProbe, ProbeReadout
    from tdhook_rl.method import Compose, HookedModule, Method
    from tdhook_rl.scheduled import Scheduled
    from tdhook_rl.weights import Adapters, Pruning, TaskVectors

_NAMES = {
    "attribution": ("GradCAM", "GuidedBackpropagation", "IntegratedGradients", "LRP", "Saliency"),
    "latent": (
        "ActivationAddition",
        "ActivationCaching",
        "ActivationPatching",
        "ControlRecord",
        "DirectionClamping",
        "DirectionalAblation",
        "SteeringVectors",
    ),
    "latent.probing": ("LinearProbe", "ProbeReadout"),
    "method": ("Compose", "HookedModule", "Method"),
    "scheduled": ("Scheduled",),
    "targets": ("targets",),
    "weights": ("Adapters", "Pruning", "TaskVectors"),
}
_HOME = {name: f"tdhook_rl.{home}" for home, names in _NAMES.items() for name in names}

__all__ = [
    "LRP",
    "ActivationAddition",
    "ActivationCaching",
    "ActivationPatching",
    "Adapters",
    "Compose",
    "ControlRecord",
    "DirectionClamping",
    "DirectionalAblation",
    "GradCAM",
    "GuidedBackpropagation",
    "HookedModule",
    "IntegratedGradients",
    "LinearProbe",
    "Method",
    "ProbeReadout",
    "Pruning",
    "Saliency",
    "Scheduled",
    "SteeringVectors",
    "TaskVectors",
    "__version__",
    "targets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tdhook_rl' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return module if name == "targets" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Interpretability for TorchRL policies: what an agent looks at, what it knows, and changing its mind.

One pattern: ``with Method(...).prepare(policy) as hooked:``. The hooked policy goes wherever a policy goes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tdhook_rl import targets
    from tdhook_rl.attribution import Saliency
    from tdhook_rl.latent import ActivationCaching, SteeringVectors
    from tdhook_rl.latent.probing import LinearProbe, ProbeReadout
    from tdhook_rl.method import Compose, Method

_HOME = {
    "ActivationCaching": "tdhook_rl.latent",
    "Compose": "tdhook_rl.method",
    "LinearProbe": "tdhook_rl.latent.probing",
    "Method": "tdhook_rl.method",
    "ProbeReadout": "tdhook_rl.latent.probing",
    "Saliency": "tdhook_rl.attribution",
    "SteeringVectors": "tdhook_rl.latent",
    "targets": "tdhook_rl.targets",
}

__all__ = [
    "ActivationCaching",
    "Compose",
    "LinearProbe",
    "Method",
    "ProbeReadout",
    "Saliency",
    "SteeringVectors",
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

"""One row for each method: from it the hygiene, batching and transport tests are generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tdhook_rl import ActivationCaching, LinearProbe, ProbeReadout, Saliency, SteeringVectors
from tdhook_rl.method import Method
from tests.policies import Case


@dataclass(frozen=True)
class Row:
    """How to configure a method for a policy, and whether it only observes."""

    make: Callable[[Case], Method]
    observes: bool


def probe(case: Case) -> LinearProbe:
    width = torch.Size(case.features).numel()
    return LinearProbe(weight=torch.randn(3, width), bias=torch.randn(3), path=case.site)


def identity(module_key: str, output: torch.Tensor) -> torch.Tensor:
    return output


METHODS = {
    "activation_caching": Row(lambda case: ActivationCaching(case.site), True),
    "activation_caching_pattern": Row(lambda case: ActivationCaching(case.site.replace(".", r"\.") + "$"), True),
    "saliency_step": Row(lambda case: Saliency(when="step"), True),
    "saliency_batch": Row(lambda case: Saliency(when="batch"), True),
    "saliency_latent": Row(lambda case: Saliency(when="step", input_modules=[case.site]), True),
    "probe_readout": Row(lambda case: ProbeReadout({"concept": probe(case)}), True),
    "steering_alpha_0": Row(lambda case: SteeringVectors({case.site: torch.randn(case.features)}, alpha=0.0), True),
    "steering": Row(lambda case: SteeringVectors({case.site: torch.randn(case.features)}, alpha=1.0), False),
    "steering_function": Row(
        lambda case: SteeringVectors(modules_to_steer=[case.site], steer_fn=lambda k, o: o + 1.0), False
    ),
}

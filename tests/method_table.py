"""One row for each method: from it the hygiene, batching and transport tests are generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict

from tdhook_rl import ActivationCaching, LinearProbe, ProbeReadout, Saliency, SteeringVectors
from tdhook_rl.attribution import LRP, ActivationMaximisation, IntegratedGradients, Occlusion
from tdhook_rl.latent import DirectionalAblation, DirectionClamping
from tdhook_rl.method import Method
from tdhook_rl.weights import Adapters, TaskVectors
from tests.policies import Case

DIRECTIONS = ["fwd", "fwd_pre", "bwd", "bwd_pre"]


@dataclass(frozen=True)
class Row:
    """How to configure a method for a policy, and whether it only observes."""

    make: Callable[[Case], Method]
    observes: bool


def probe(case: Case) -> LinearProbe:
    width = torch.Size(case.features).numel()
    return LinearProbe(weight=torch.randn(3, width), bias=torch.randn(3), path=case.site)


def no_share_out(name: str, module: torch.nn.Module) -> bool:
    """Modules of the tests' policies that no LRP rule is meant for, among them one that only raises."""
    return type(module).__name__ in ("NormalParamExtractor", "biased_softplus", "Broken")


METHODS = {
    "activation_caching": Row(lambda case: ActivationCaching(case.site), True),
    "activation_caching_pattern": Row(lambda case: ActivationCaching(case.site.replace(".", r"\.") + "$"), True),
    "activation_caching_directions": Row(
        lambda case: ActivationCaching(case.site, directions=DIRECTIONS, cache=TensorDict()), True
    ),
    "activation_caching_callback": Row(
        lambda case: ActivationCaching(
            case.site,
            callback=lambda output, args: output * args[0].sum(-1, keepdim=True),
            use_nested_keys=True,
            cache_key="own",
        ),
        True,
    ),
    "activation_caching_gradients": Row(
        lambda case: ActivationCaching(
            case.site.replace(".", r"\.") + "$", directions=["bwd", "bwd_pre"], cache=TensorDict(), relative=False
        ),
        True,
    ),
    "saliency_step": Row(lambda case: Saliency(when="step"), True),
    "saliency_batch": Row(lambda case: Saliency(when="batch"), True),
    "saliency_latent": Row(lambda case: Saliency(when="step", input_modules=[case.site]), True),
    "integrated_gradients_step": Row(lambda case: IntegratedGradients(baseline=0.0, n_steps=4, when="step"), True),
    "integrated_gradients_batch": Row(lambda case: IntegratedGradients(baseline=0.0, n_steps=4, when="batch"), True),
    "lrp": Row(lambda case: LRP(when="step", skip_modules=no_share_out), True),
    "occlusion": Row(lambda case: Occlusion(when="step", groups=[[0, 1], [2, 3, 4]]), True),
    "activation_maximisation": Row(lambda case: ActivationMaximisation(case.site, n_steps=2, when="batch"), True),
    "task_vectors": Row(lambda case: TaskVectors(alphas=(0.5, 1.0)), True),
    "probe_readout": Row(lambda case: ProbeReadout({"concept": probe(case)}), True),
    "steering_alpha_0": Row(lambda case: SteeringVectors({case.site: torch.randn(case.features)}, alpha=0.0), True),
    "steering": Row(lambda case: SteeringVectors({case.site: torch.randn(case.features)}, alpha=1.0), False),
    "steering_function": Row(
        lambda case: SteeringVectors(modules_to_steer=[case.site], steer_fn=lambda k, o: o + 1.0), False
    ),
    "ablation": Row(lambda case: DirectionalAblation({case.site: torch.randn(case.features)}), False),
    "clamping": Row(lambda case: DirectionClamping({case.site: torch.randn(case.features)}, value=1.0), False),
    "adapters": Row(lambda case: Adapters({case.site: (torch.nn.Tanh(), case.site, case.site)}), False),
}

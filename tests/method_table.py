"""One row for each method: from it the hygiene, batching and transport tests are generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, LinearProbe, ProbeReadout, Saliency, SteeringVectors
from tdhook_rl.attribution import (
    LRP,
    SARFA,
    ActivationMaximisation,
    GuidedBackpropagation,
    IntegratedGradients,
    Occlusion,
    PerturbationSaliency,
)
from tdhook_rl.attribution.grad_cam import DimsConfig, GradCAM
from tdhook_rl.latent import ActivationAddition, ActivationPatching, DirectionalAblation, DirectionClamping
from tdhook_rl.latent.probing import Probing
from tdhook_rl.method import Method
from tdhook_rl.targets import Target
from tdhook_rl.weights import Adapters, Pruning, TaskVectors
from tests.policies import CASES, ODD, Case

__all__ = ["METHODS", "Row", "pairs"]

RELU = ("relu", "inplace_relu", "batch_norm", "batch_norm_eval", "bytes")
IMAGES = ("pixels", "bytes")
TENSORS = tuple(name for name in (*CASES, *ODD) if name != "tuples")  # whose site returns a tensor
DISCRETE = (
    "categorical relu one_hot actor_value q_value pixels inplace_relu batch_norm batch_norm_eval bytes tuples recurrent"
).split()
INTEGER = Target("an integer", lambda run: run.outputs.get("action", run.outputs.get("state_value", None)).long())
DIRECTIONS = ["fwd", "fwd_pre", "bwd", "bwd_pre"]


@dataclass(frozen=True)
class Row:
    """How to configure a method for a policy, and what may be asked of it.

    Attributes:
        make: the method for a policy.
        observes: whether it leaves the policy's outputs as they are.
        bad: the method with something to explain, or a place, that there is not; ``None`` where it names neither.
        cases: the policies that it is for; all by default.
        second: roots under which it reads a second set of inputs.
        at_site: whether it shows the output of a site, so that this must have a row for each row of the batch.
        by_row: whether results of a row come from this row alone.
        own_weights: whether the hooked policy has tensors of its own.
    """

    make: Callable[[Case], Method]
    observes: bool
    bad: Callable[[Case], Method] | None
    cases: tuple[str, ...] | list[str] | None = None
    second: tuple[str, ...] = ()
    at_site: bool = False
    by_row: bool = True
    own_weights: bool = False

    def data(self, case: Case, *batch: int) -> TensorDict:
        """What the policy reads, and what the method reads beside it."""
        data = case.data(*batch)
        for root in self.second:
            data[root] = case.data(*batch)
        return data

    def fits(self, policy: str, batch: tuple[int, ...]) -> bool:
        """Whether the method can show anything for this policy in a forward of this batch shape."""
        # TorchRL's ConvNet adds a batch dimension of its own to a single frame.
        return not (self.at_site and policy == "pixels" and batch == ())


def pairs(cases: Mapping[str, Case], **wanted: bool) -> list[tuple[str, str]]:
    """The names of each method and each policy that it is for, of the rows with the wanted attributes."""
    return [
        (method, policy)
        for method, row in METHODS.items()
        for policy in cases
        if all(getattr(row, name) == value for name, value in wanted.items())
        if row.cases is None or policy in row.cases
    ]


def nowhere(make: Callable[[Case], Method]) -> Callable[[Case], Method]:
    """The same method at a path that names nothing."""
    return lambda case: make(replace(case, site="module.nowhere"))


def explains(cls: Callable[..., Method], at_site: bool = False, **options: Any) -> Row:
    """A row of an attribution; a callable option is called with the case."""

    def make(case: Case, **more: Any) -> Method:
        return cls(**{key: value(case) if callable(value) else value for key, value in options.items()}, **more)

    def bad(case: Case) -> Method:
        return make(case, target=INTEGER)

    return Row(make, True, bad, at_site=at_site)


def at(make: Callable[[Case], Method], observes: bool, **options: Any) -> Row:
    """A row of a method that is placed on a site."""
    return Row(make, observes, nowhere(make), **options)


def vector(case: Case) -> dict[str, Tensor]:
    return {case.site: torch.randn(case.features)}


def probe(case: Case) -> LinearProbe:
    width = torch.Size(case.features).numel()
    return LinearProbe(weight=torch.randn(3, width), bias=torch.randn(3), path=case.site)


def no_share_out(name: str, module: nn.Module) -> bool:
    """Modules of the tests' policies that no LRP rule is meant for, among them one that only raises."""
    return type(module).__name__ in (
        "NormalParamExtractor",
        "biased_softplus",
        "Broken",
        "Bytes",
        "GRU",
        "Pair",
        "Tuples",
    )


class Reader:
    """A probe that keeps the shape of what it saw."""

    def __init__(self, key: str, direction: str) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def step(self, activation: Tensor) -> None:
        self.shapes.append(tuple(activation.shape))


def only(case: Case) -> list[Any]:
    return [case.key]


def cam(case: Case) -> dict[str, DimsConfig]:
    return {case.site: DimsConfig() if len(case.features) == 3 else DimsConfig((), (-1,))}


GROUPS = {"inputs": only, "groups": [[0, 1], [2, 3, 4]]}
METHODS = {
    "activation_caching": at(lambda case: ActivationCaching(case.site), True, at_site=True),
    "activation_caching_pattern": at(
        lambda case: ActivationCaching(case.site.replace(".", r"\.") + "$"), True, at_site=True
    ),
    "activation_caching_directions": at(
        lambda case: ActivationCaching(case.site, directions=DIRECTIONS, cache=TensorDict()), True, at_site=True
    ),
    "activation_caching_callback": at(
        lambda case: ActivationCaching(
            case.site,
            callback=lambda output, args: output * args[0].sum(-1, keepdim=True),
            use_nested_keys=True,
            cache_key="own",
        ),
        True,
        at_site=True,
        cases=TENSORS,
    ),
    "activation_caching_gradients": at(
        lambda case: ActivationCaching(
            case.site.replace(".", r"\.") + "$", directions=["bwd", "bwd_pre"], cache=TensorDict(), relative=False
        ),
        True,
        at_site=True,
    ),
    "saliency_step": explains(Saliency, when="step"),
    "saliency_batch": explains(Saliency, when="batch"),
    "saliency_latent": explains(Saliency, when="step", input_modules=lambda case: [case.site]),
    "integrated_gradients_step": explains(IntegratedGradients, baseline=0.0, n_steps=4, when="step"),
    "integrated_gradients_batch": explains(IntegratedGradients, baseline=0.0, n_steps=4, when="batch"),
    "integrated_gradients_latent": explains(
        IntegratedGradients, True, baseline=0.0, n_steps=4, when="step", input_modules=lambda case: [case.site]
    ),
    "grad_cam": explains(GradCAM, at_site=True, modules_to_attribute=cam, when="step"),
    "guided_backpropagation": replace(explains(GuidedBackpropagation, when="step"), cases=RELU),
    "lrp": explains(LRP, when="step", skip_modules=lambda case: no_share_out),
    "occlusion": explains(Occlusion, when="step", **GROUPS),
    "sarfa": Row(
        lambda case: SARFA(when="step", inputs=[case.key], groups=GROUPS["groups"]),
        True,
        lambda case: SARFA(when="step", key="nothing"),
        cases=DISCRETE,
    ),
    "perturbation_saliency": replace(explains(PerturbationSaliency, when="step", stride=3), cases=IMAGES),
    "activation_maximisation": at(
        lambda case: ActivationMaximisation(case.site, n_steps=2, when="batch"), True, at_site=True
    ),
    "activation_patching": at(lambda case: ActivationPatching([case.site]), True, second=("patched",), at_site=True),
    "activation_addition": at(
        lambda case: ActivationAddition([case.site]),
        True,
        second=("positive", "negative"),
        at_site=True,
        by_row=False,
    ),
    "task_vectors": Row(lambda case: TaskVectors(alphas=(0.5, 1.0)), True, None),
    "probing": at(lambda case: Probing(case.site, Reader), True, at_site=True),
    "probe_readout": at(lambda case: ProbeReadout({"concept": probe(case)}), True, at_site=True),
    "steering_alpha_0": at(lambda case: SteeringVectors(vector(case), alpha=0.0), True),
    "steering": at(lambda case: SteeringVectors(vector(case), alpha=1.0), False),
    "steering_function": at(
        lambda case: SteeringVectors(modules_to_steer=[case.site], steer_fn=lambda k, o: o + 1.0), False
    ),
    "ablation": at(lambda case: DirectionalAblation(vector(case)), False),
    "clamping": at(lambda case: DirectionClamping(vector(case), value=1.0), False),
    "adapters": at(lambda case: Adapters({case.site: (nn.Tanh(), case.site, case.site)}), False),
    "pruning": Row(
        lambda case: Pruning(amount_to_prune=0.5), False, lambda case: Pruning(amount_to_prune=10**9), own_weights=True
    ),
}

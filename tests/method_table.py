"""The table of methods: a row for each, of which the hygiene tests, docs/methods.md and the oracle table are made.

``python -m tests.method_table`` writes that of docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from benchmarks import oracle_rows_attribution as attribution
from benchmarks import oracle_rows_estimates as estimates
from benchmarks import oracle_rows_latent as latent
from benchmarks import oracle_rows_lrp as lrp
from tdhook_rl import ActivationCaching, Compose, LinearProbe, ProbeReadout, Saliency, Scheduled, SteeringVectors
from tdhook_rl.attribution import (
    LRP,
    SARFA,
    ActivationMaximisation,
    DimsConfig,
    GradCAM,
    GuidedBackpropagation,
    IntegratedGradients,
    Occlusion,
    PerturbationSaliency,
)
from tdhook_rl.latent import (
    ActivationAddition,
    ActivationPatching,
    ControlRecord,
    DirectionalAblation,
    DirectionClamping,
    MapPatch,
    StateSubtraction,
    UnitValues,
)
from tdhook_rl.latent.probing import Probing
from tdhook_rl.method import Method
from tdhook_rl.targets import Target
from tdhook_rl.weights import Adapters, Pruning, TaskVectors
from tests.method_info import PAGE, MethodInfo, Sample, page
from tests.policies import POLICIES, Case

__all__ = ["DIRECTIONS", "METHODS", "SAMPLES", "pairs", "probe"]

RELU = ("relu", "inplace_relu", "batch_norm", "batch_norm_eval", "bytes")
TENSORS = [name for name in POLICIES if name != "tuples"]  # whose site returns a tensor
MAPS = ["pixels", "bytes"]
DISCRETE = [name for name in POLICIES if name not in ("tanh_normal", "value", "multi_agent")]
INTEGER = Target("an integer", lambda run: run.outputs["action"].long())
DIRECTIONS = ["fwd", "fwd_pre", "bwd", "bwd_pre"]
GROUPS = [[0, 1], [2, 3, 4]]
OF_INPUTS, OF_INPUTS_OR_SITES = (("attr", "in_key"),), (("attr", "in_key"), ("attr", "path"))


def elsewhere(make: Callable[[Case], Method]) -> Callable[[Case], Method]:
    """The same method at a path that names nothing."""
    return lambda case: make(replace(case, site="module.nowhere"))


def pattern(case: Case) -> str:
    return case.site.replace(".", r"\.") + "$"


def narrow(cls: Callable[..., Method], **options: Any) -> Callable[[Case], Method]:
    """The method with a vector that is one longer than the site."""
    return lambda case: cls({case.site: torch.ones(1 + case.features[0])}, **options)


def vector(case: Case) -> dict[str, Tensor]:
    return {case.site: torch.randn(case.features)}


def probe(case: Case) -> LinearProbe:
    width = torch.Size(case.features).numel()
    return LinearProbe(weight=torch.randn(3, width), bias=torch.randn(3), path=case.site)


def no_share_out(name: str, module: nn.Module) -> bool:
    """Modules of the tests' policies that no LRP rule is meant for, among them those that only raise."""
    return type(module).__name__ in (
        "NormalParamExtractor", "biased_softplus", "Broken", "Bytes", "GRU", "Pair", "Switch", "Tuples",
    )  # fmt: skip


def product_with_inputs(output: Tensor, args: tuple[Tensor, ...]) -> Tensor:
    return output * args[0].sum(-1, keepdim=True)


def one_more(key: str, output: Tensor) -> Tensor:
    return output + 1.0


class Reader:
    """A probe that keeps the shape of what it saw."""

    def __init__(self, key: str, direction: str) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def step(self, activation: Tensor) -> None:
        self.shapes.append(tuple(activation.shape))


class AtRest(SteeringVectors):
    """Steering with alpha 0, which observes."""

    observes = True


def cam(case: Case) -> dict[str, DimsConfig]:
    return {case.site: DimsConfig() if len(case.features) == 3 else DimsConfig((), (-1,))}


def caching(case: Case) -> Method:
    return ActivationCaching(case.site)


def ablation(case: Case) -> Method:
    return DirectionalAblation(vector(case))


def clamping(case: Case) -> Method:
    return DirectionClamping(vector(case), value=1.0)


def some(case: Case, rows: TensorDictBase) -> Tensor:
    """Some of the rows, by what the policy sees in each."""
    value = rows[case.key].double()
    return value.sum(tuple(range(rows.ndim, value.ndim))) > 0


def elsewhere_seen(case: Case, rows: TensorDictBase) -> TensorDictBase:
    """A counterfactual: what the policy sees, in reverse; of bytes the same as of floats."""
    return rows.set(case.key, rows[case.key].flip(-1))


def subtraction(case: Case) -> Method:
    return StateSubtraction(case.site, lambda rows: elsewhere_seen(case, rows))


def some_of(case: Case) -> Callable[[TensorDictBase], Tensor]:
    return lambda rows: some(case, rows)


def steering(case: Case) -> Method:
    return SteeringVectors(vector(case), alpha=1.0)


def readout(case: Case) -> Method:
    return ProbeReadout({"concept": probe(case)})


NOWHERE, NO_GRADIENT = "'module.nowhere'", "which has no gradient"
METHODS: Sequence[MethodInfo] = (
    MethodInfo(
        Saliency,
        "gradient of a target, of inputs or activations; absolute, times input",
        OF_INPUTS_OR_SITES,
        [attribution.saliency, attribution.taken_action, attribution.of_bytes, latent.recurrent],
        {
            "step": Sample(lambda case: Saliency(when="step")),
            "batch": Sample(lambda case: Saliency(when="batch")),
            "latent": Sample(lambda case: Saliency(when="step", input_modules=[case.site])),
        },
        {
            NO_GRADIENT: lambda case: Saliency(target=INTEGER),
            NOWHERE: lambda case: Saliency(input_modules=["module.nowhere"]),
        },
    ),
    MethodInfo(
        IntegratedGradients,
        "gradients along a path from a baseline; complete, memory bounded by a chunk",
        [*OF_INPUTS_OR_SITES, ("convergence_delta",)],
        [attribution.integrated_gradients, attribution.trapezoid, attribution.inner_activation],
        {
            "step": Sample(lambda case: IntegratedGradients(baseline=0.0, n_steps=4, when="step")),
            "batch": Sample(lambda case: IntegratedGradients(baseline=0.0, n_steps=4, when="batch")),
            "latent": Sample(
                lambda case: IntegratedGradients(baseline=0.0, n_steps=4, when="step", input_modules=[case.site])
            ),
            "delta": Sample(lambda case: IntegratedGradients(baseline=0.0, n_steps=4, compute_convergence_delta=True)),
        },
        {
            NO_GRADIENT: lambda case: IntegratedGradients(target=INTEGER, baseline=0.0),
            "n_steps= is a positive integer": lambda case: IntegratedGradients(n_steps=0),
        },
    ),
    MethodInfo(
        GradCAM,
        "channels of an activation weighted by their gradient",
        (("attr", "path"),),
        [attribution.grad_cam, attribution.grad_cam_over_time],
        {"": Sample(lambda case: GradCAM(modules_to_attribute=cam(case), when="step"))},
        {
            NO_GRADIENT: lambda case: GradCAM(target=INTEGER, modules_to_attribute=cam(case)),
            NOWHERE: elsewhere(lambda case: GradCAM(modules_to_attribute=cam(case))),
        },
    ),
    MethodInfo(
        GuidedBackpropagation,
        "gradients clamped at ReLUs, and only there",
        OF_INPUTS,
        [attribution.guided],
        {"": Sample(lambda case: GuidedBackpropagation(when="step"), policies=RELU)},
        {NO_GRADIENT: lambda case: GuidedBackpropagation(target=INTEGER)},
    ),
    MethodInfo(
        LRP,
        "relevance shared out by rules: epsilon, gamma, alpha-beta, z-plus, w-square, flat",
        OF_INPUTS_OR_SITES,
        lrp.RULES,
        {
            "": Sample(lambda case: LRP(when="step", skip_modules=no_share_out)),
            "latent": Sample(
                lambda case: LRP(when="step", skip_modules=no_share_out, input_modules=[case.site]),
                policies=["categorical"],
            ),
        },
        {NO_GRADIENT: lambda case: LRP(target=INTEGER, skip_modules=no_share_out)},
    ),
    MethodInfo(
        Occlusion,
        "change of the target when features are replaced",
        OF_INPUTS,
        [attribution.occlusion],
        {"": Sample(lambda case: Occlusion(when="step", inputs=[case.key], groups=GROUPS))},
        {"baseline= is a finite number": lambda case: Occlusion(baseline=float("nan"))},
    ),
    MethodInfo(
        SARFA,
        "the same, specific and relevant to the action",
        OF_INPUTS,
        [attribution.sarfa],
        {"": Sample(lambda case: SARFA(when="step", inputs=[case.key], groups=GROUPS), policies=DISCRETE)},
        {"SARFA reads 'nothing', which the policy does not output": lambda case: SARFA(when="step", key="nothing")},
    ),
    MethodInfo(
        PerturbationSaliency,
        "change under local blur, for images; rows and columns",
        OF_INPUTS,
        [attribution.perturbation_saliency],
        {"": Sample(lambda case: PerturbationSaliency(when="step", stride=3), policies=["pixels", "bytes"])},
        {"stride is a positive number": lambda case: PerturbationSaliency(stride=0)},
    ),
    MethodInfo(
        ActivationMaximisation,
        "inputs that maximise modules or a target",
        OF_INPUTS,
        [attribution.activation_maximisation],
        {"": Sample(lambda case: ActivationMaximisation(case.site, n_steps=2, when="batch"))},
        {NOWHERE: elsewhere(lambda case: ActivationMaximisation(case.site, n_steps=2))},
    ),
    MethodInfo(
        ActivationCaching,
        "what named modules return or receive, or a function of it; gradients of both, of any loss",
        (("cache", "path"),),
        [latent.caching],
        {
            "": Sample(caching),
            "pattern": Sample(lambda case: ActivationCaching(pattern(case))),
            "directions": Sample(
                lambda case: ActivationCaching(case.site, directions=DIRECTIONS, cache=TensorDict()),
                waive={"nothing_is_kept": "the caller's cache keeps what the last call gave"},
            ),
            "callback": Sample(
                lambda case: ActivationCaching(case.site, callback=product_with_inputs, use_nested_keys=True),
                policies=TENSORS,
            ),
            "gradients": Sample(
                lambda case: ActivationCaching(
                    pattern(case), directions=["bwd", "bwd_pre"], cache=TensorDict(), relative=False
                )
            ),
        },
        {NOWHERE: elsewhere(caching)},
        "gradients into `cache=`",
    ),
    MethodInfo(
        ProbeReadout,
        "a fitted linear probe, at every step",
        (("probe", "name"),),
        [latent.readout],
        {"": Sample(readout)},
        {NOWHERE: elsewhere(readout)},
    ),
    MethodInfo(
        Probing,
        "feeds activations to scikit-learn or torch estimators (`ProbeManager`, `BilinearProbeManager`)",
        (),
        [estimates.probing],
        {"": Sample(lambda case: Probing(case.site, Reader))},
        {NOWHERE: elsewhere(lambda case: Probing(case.site, Reader))},
        "the manager's metrics",
    ),
    MethodInfo(
        ActivationPatching,
        "runs on other inputs with some activations as they were",
        (("patched", "out_key"),),
        [latent.patching],
        {"": Sample(lambda case: ActivationPatching([case.site]), second=["patched"])},
        {NOWHERE: elsewhere(lambda case: ActivationPatching([case.site]))},
    ),
    MethodInfo(
        ActivationAddition,
        "extracts a steering vector from positive and negative inputs",
        (("steer", "path"),),
        [latent.addition],
        {
            "": Sample(
                lambda case: ActivationAddition([case.site]),
                second=["positive", "negative"],
                waive={"every_batch_shape": "without a batch size the first dimension is that of the samples"},
            )
        },
        {NOWHERE: elsewhere(lambda case: ActivationAddition([case.site]))},
    ),
    MethodInfo(
        SteeringVectors,
        "adds `alpha * vector` to modules or to the state a policy carries, or applies a function; at some steps, or "
        "where a key, a function or a probe says so",
        (("steered", "name"),),
        [latent.steering_function, latent.steering_rows],
        {
            "": Sample(steering),
            "at rest": Sample(lambda case: AtRest(vector(case), alpha=0.0)),
            "in some rows": Sample(
                lambda case: SteeringVectors(
                    vector(case), alpha=lambda rows: some(case, rows) * 0.5, when=some_of(case)
                )
            ),
            "function": Sample(lambda case: SteeringVectors(modules_to_steer=[case.site], steer_fn=one_more)),
        },
        {NOWHERE: elsewhere(steering), "has the shape of the features": narrow(SteeringVectors)},
        "changes the action",
    ),
    MethodInfo(
        DirectionalAblation,
        "takes a direction out",
        (),
        [latent.ablation],
        {"": Sample(ablation)},
        {NOWHERE: elsewhere(ablation), "has the shape of the features": narrow(DirectionalAblation)},
        "changes the action",
    ),
    MethodInfo(
        DirectionClamping,
        "holds a direction at a value",
        (),
        [latent.clamping],
        {"": Sample(clamping)},
        {NOWHERE: elsewhere(clamping), "has the shape of the features": narrow(DirectionClamping, value=1.0)},
        "changes the action",
    ),
    MethodInfo(
        UnitValues,
        "sets units, or channels of maps, to values: ablates them, or holds them at a mean",
        (("steered", "name"),),
        [latent.unit_values],
        {
            "": Sample(lambda case: UnitValues({case.site: [0, 2]})),
            "in some rows": Sample(lambda case: UnitValues({case.site: {1: 0.5}}, when=some_of(case))),
        },
        {
            NOWHERE: elsewhere(lambda case: UnitValues({case.site: [0]})),
            "unit 99 of .* is set, but": lambda case: UnitValues({case.site: [99]}),
        },
        "changes the action",
    ),
    MethodInfo(
        MapPatch,
        "sets a square of a convolution's maps, for channels that say where something is",
        (("steered", "name"),),
        [latent.map_patch],
        {
            "": Sample(lambda case: MapPatch(case.site, square=(1, 2), value=5.5, channels=[1]), policies=MAPS),
            "mean in some rows": Sample(
                lambda case: MapPatch(case.site, square=(1, 2), value="mean", when=some_of(case)), policies=MAPS
            ),
        },
        {
            NOWHERE: elsewhere(lambda case: MapPatch(case.site, square=(0, 0), value=1.0)),
            "no maps of rows and columns": lambda case: MapPatch("module.0.module.1", square=(0, 0), value=1.0),
        },
        "changes the action",
    ),
    MethodInfo(
        StateSubtraction,
        "takes out, in each state, what a counterfactual input has not, or puts its activation in (a live patch)",
        (("steered", "name"),),
        [latent.subtraction],
        {
            "": Sample(subtraction),
            "in some rows": Sample(
                lambda case: StateSubtraction(
                    case.site, lambda rows: elsewhere_seen(case, rows), alpha=0.5, when=some_of(case)
                )
            ),
        },
        {NOWHERE: elsewhere(subtraction)},
        "changes the action",
    ),
    MethodInfo(
        ControlRecord,
        "what interventions and probes were set to when the row was computed",
        (("control", "name"),),
        [latent.control],
        {"": Sample(lambda case: Compose(steering(case), ControlRecord()))},
        {"found no control": lambda case: ControlRecord()},
    ),
    MethodInfo(
        Scheduled,
        "another method in every so many calls, or for some rows only",
        (),
        [latent.scheduled],
        {
            "": Sample(
                lambda case: Scheduled(Saliency(when="step"), fraction=0.5),
                waive=dict.fromkeys(
                    ("a_raising_model_leaves_nothing_behind", "pickles", "deep_copies"),
                    "it counts its calls, and draws other rows in each",
                ),
            )
        },
        {"leaves nothing out": lambda case: Scheduled(Saliency(when="step"))},
        "that method's keys; NaN elsewhere",
    ),
    MethodInfo(
        Pruning,
        "takes the least important weights out, on the hooked policy only",
        (),
        [latent.pruning],
        {"": Sample(lambda case: Pruning(amount_to_prune=0.5))},
        {"but there are 416 weights": lambda case: Pruning(amount_to_prune=10**9)},
        "changes the action",
    ),
    MethodInfo(
        Adapters,
        "inserts modules",
        (),
        [latent.adapters],
        {"": Sample(lambda case: Adapters({case.site: (nn.Tanh(), case.site, case.site)}))},
        {NOWHERE: elsewhere(lambda case: Adapters({case.site: (nn.Tanh(), case.site, case.site)}))},
        "changes the action",
    ),
    MethodInfo(
        TaskVectors,
        "adds differences of weights, on the hooked policy only",
        (),
        [latent.task_vectors],
        {"": Sample(lambda case: TaskVectors(alphas=(0.5, 1.0)))},
        {"alpha must be a finite number": lambda case: TaskVectors(alphas=(float("nan"),))},
        "changes the action, where they are applied",
    ),
)

#: Every configuration by its name.
SAMPLES = {name: sample for info in METHODS for name, sample in info.named_samples()}


def pairs(policies: Mapping[str, Case], **wanted: bool) -> list[tuple[str, str]]:
    """The names of each sample and each policy that it is for, of samples that are as wanted."""
    return [
        (name, policy)
        for name, sample in SAMPLES.items()
        for policy in policies
        if policy in sample.policies and all(getattr(sample, key) == value for key, value in wanted.items())
    ]


if __name__ == "__main__":
    PAGE.write_text(page(METHODS))

"""Rows of the oracle table: runs, activations, steering and weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.comparison import Case, row
from benchmarks.oracle_rows_attribution import INDEX, ROWS, inputs, result, target
from tdhook_rl import Compose, HookedModule, LinearProbe, ProbeReadout, Saliency, Scheduled, targets
from tdhook_rl.latent import (
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    ControlRecord,
    DirectionalAblation,
    DirectionClamping,
    MapPatch,
    StateSubtraction,
    SteeringVectors,
    UnitValues,
)
from tdhook_rl.weights import Adapters, Pruning, TaskVectors
from tests.oracles import row_gradients
from tests.policies import FEATURES, HIDDEN, mlp
from tests.test_recurrent import recurrent_actor, step_by_step

CACHE, STEER = ("cache", "1"), ("steer", "1")


def vector() -> Tensor:
    return torch.randn(HIDDEN, dtype=torch.float64)


def latent(name: str, *args: Any, **options: Any) -> Any:
    import tdhook.latent

    return getattr(tdhook.latent, name)(*args, **options)


@row("run: save a module and override another", "the layers by hand")
def run() -> Case:
    net, x, value = mlp().double(), inputs(), inputs()
    value = torch.randn(ROWS, HIDDEN, dtype=torch.float64)

    def through(hooked: Any) -> Tensor:
        data = TensorDict({"input": x}, batch_size=ROWS)
        with hooked.run(data, grad_enabled=True) as run:
            run.save("3")
            run.set("1", value)
        return run.get("3", cache_key="my_key").resolve()

    def tdhooks() -> Tensor:
        with latent("ActivationCaching", "3").prepare(copy.deepcopy(net)) as hooked:
            return through(hooked)

    return Case(net[2:4](value), lambda: through(HookedModule.from_module(net)), None, tdhooks)


@row("run: gradient at a module", "autograd on the layers by hand")
def gradient() -> Case:
    net, x = mlp().double(), inputs()
    hidden = net[:2](x).detach().requires_grad_()

    def ours() -> Tensor:
        data = TensorDict({"input": x}, batch_size=ROWS)
        with HookedModule.from_module(net).run(data, target=lambda d: d["output"][:, 1]) as run:
            run.save_grad("2")
        return run.get_grad("2").resolve()

    return Case(torch.autograd.grad(net[2:](hidden)[:, 1].sum(), hidden)[0], ours)


@row("ActivationCaching before an in-place activation", "the layers by hand")
def caching() -> Case:
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).double()
    x, key = inputs(), ("cache", "0")

    def theirs() -> Tensor:
        from captum.attr import LayerActivation

        return LayerActivation(net, net[0]).attribute(x)

    return Case(
        net[0](x),
        lambda: result(ActivationCaching("0"), net, x, key),
        theirs,
        lambda: result(latent("ActivationCaching", "0"), net, x, key),
    )


@row("ActivationPatching over time and batch", "the source's outputs")
def patching() -> Case:
    net, x, other = mlp().double(), inputs(4, ROWS), inputs(4, ROWS)
    key = ("patched", "output")
    return Case(
        net(x),
        lambda: result(ActivationPatching(["3"]), net, x, key, patched=other),
        None,
        lambda: result(latent("ActivationPatching", ["3"]), net, x, key, patched=other),
    )


@row("ActivationAddition without a batch size", "difference of means by hand")
def addition() -> Case:
    net, positive, negative = mlp().double(), inputs(), inputs()
    data = TensorDict({("positive", "input"): positive, ("negative", "input"): negative})

    def extract(method: Any) -> Tensor:
        with method.prepare(copy.deepcopy(net)) as hooked:
            return hooked(data.clone())[STEER]

    return Case(
        net[:2](positive).mean(0) - net[:2](negative).mean(0),
        lambda: extract(ActivationAddition(["1"])),
        None,
        lambda: extract(latent("ActivationAddition", ["1"])),
    )


@row("SteeringVectors, steer_fn=lambda k, o: ...", "the layers by hand")
def steering_function() -> Case:
    net, x, steer = mlp().double(), inputs(), vector()
    options: dict[str, Any] = {"modules_to_steer": ["1"], "steer_fn": lambda k, o: o + 1.5 * steer}
    return Case(
        net[2:](net[:2](x) + 1.5 * steer),
        lambda: result(SteeringVectors(**options), net, x, "output"),
        None,
        lambda: result(latent("SteeringVectors", **options), net, x, "output"),
    )


@row("SteeringVectors, a vector and an alpha for each row", "the layers by hand")
def steering_rows() -> Case:
    net, x, steer = mlp().double(), inputs(), vector()
    alpha = torch.linspace(-1, 1, ROWS, dtype=torch.float64)

    def ours() -> Tensor:
        with SteeringVectors({"1": steer}, alpha="alpha").prepare(net) as hooked:
            return hooked(TensorDict({"input": x, "alpha": alpha}, batch_size=ROWS))["output"]

    return Case(net[2:](net[:2](x) + alpha[:, None] * steer), ours)


@row("DirectionalAblation", "a projection matrix")
def ablation() -> Case:
    net, x, direction = mlp().double(), inputs(), vector()
    away = torch.eye(HIDDEN, dtype=torch.float64) - torch.outer(direction, direction) / (direction @ direction)
    return Case(net[2:](net[:2](x) @ away), lambda: result(DirectionalAblation({"1": direction}), net, x, "output"))


@row("DirectionClamping", "a projection matrix")
def clamping() -> Case:
    net, x, direction = mlp().double(), inputs(), vector()
    unit = direction / direction.norm()
    away = torch.eye(HIDDEN, dtype=torch.float64) - torch.outer(unit, unit)
    return Case(
        net[2:](net[:2](x) @ away + 2 * unit),
        lambda: result(DirectionClamping({"1": direction}, value=2.0), net, x, "output"),
    )


@row("UnitValues", "units put into the layers by hand")
def unit_values() -> Case:
    net, x = mlp().double(), inputs()
    hidden = net[:2](x).clone()
    hidden[:, 2], hidden[:, 5] = 0.25, -1.5
    return Case(net[2:](hidden), lambda: result(UnitValues({"1": {2: 0.25, 5: -1.5}}), net, x, "output"))


@row("MapPatch, a square for each row", "the square put into the maps by hand")
def map_patch() -> Case:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).double()
    x, squares = torch.randn(ROWS, 3, 8, 8).double(), torch.randint(6, (ROWS, 2))
    maps = net[:2](x).clone()
    for one, (across, down) in enumerate(squares.tolist()):
        maps[one, 1, across, down] = 5.5

    def ours() -> Tensor:
        with MapPatch("1", square="square", value=5.5, channels=[1]).prepare(net) as hooked:
            return hooked(TensorDict({"input": x, "square": squares}, batch_size=ROWS))["output"]

    return Case(net[2:](maps), ours)


@row("StateSubtraction", "the layers by hand, run twice")
def subtraction() -> Case:
    net, x = mlp().double(), inputs()
    here, there = net[:2](x), net[:2](x.cos())
    method = StateSubtraction("1", lambda rows: rows.set("input", rows["input"].cos()), alpha=1.5)
    return Case(net[2:](here + 1.5 * (there - here)), lambda: result(method, net, x, "output"))


@row("ProbeReadout", "softmax of the layers by hand")
def readout() -> Case:
    net, x = mlp().double(), inputs()
    probe = LinearProbe(weight=torch.randn(3, HIDDEN).double(), bias=torch.randn(3).double(), path="1")
    return Case(
        (net[:2](x) @ probe.weight.mT + probe.bias).softmax(-1),
        lambda: result(ProbeReadout({"concept": probe}), net, x, ("probe", "concept")),
    )


@row("ControlRecord, a number that was changed", "the number")
def control() -> Case:
    net, x = mlp().double(), inputs()

    def ours() -> Tensor:
        with Compose(SteeringVectors({"1": vector()}, alpha=1.0), ControlRecord()).prepare(net) as hooked:
            hooked.controls["steering.alpha"] = 0.25
            return hooked(TensorDict({"input": x}, batch_size=ROWS))["control", "steering.alpha"]

    return Case(torch.full((ROWS,), 0.25), ours)


@row("Scheduled, for rows that are named", "forward-mode Jacobians of these rows")
def scheduled() -> Case:
    net, x = mlp().double(), inputs()
    where = torch.arange(ROWS) % 2 == 0

    def ours() -> Tensor:
        with Scheduled(Saliency(target=target()), where="where").prepare(net) as hooked:
            found = hooked(TensorDict({"input": x, "where": where}, batch_size=ROWS))
        assert torch.equal(found["computed", "attr"], where)
        return found["attr", "input"][where]

    return Case(row_gradients(lambda v: net(v)[INDEX], x[where]), ours)


@row("Saliency of a recurrent policy over trajectories", "each step by itself, at its hidden state")
def recurrent() -> Case:
    actor = recurrent_actor()
    data = step_by_step(actor, torch.randn(3, 6, 4, dtype=torch.float64))
    expected = torch.zeros(3, 6, 4, dtype=torch.float64)
    for trajectory in range(3):
        for step in range(6):
            one = data[trajectory, step].select(*actor.in_keys)
            x = one["observation"].clone().requires_grad_()
            logit = actor.get_dist_params(one.set("observation", x))["logits"][data["action"][trajectory, step]]
            expected[trajectory, step] = torch.autograd.grad(logit, x)[0]

    def ours() -> Tensor:
        with Saliency(target=targets.chosen_logit(), inputs=["observation"]).prepare(actor) as hooked:
            return hooked.annotate(data)["attr", "observation"]

    def tdhooks() -> Tensor:
        from tdhook.attribution import Saliency as Tdhook

        # It takes no stored action as a target: the logits of all actions weighted by a mask of the caller's.
        mask = nn.functional.one_hot(data["action"], 3).double()

        def chosen(outputs: Any, _: Any) -> TensorDict:
            logits = outputs["logits"]
            return TensorDict(out=logits * mask.reshape(logits.shape), batch_size=outputs.batch_size)

        def observation(given: Any, _: Any) -> TensorDict:
            return given.select("observation")

        with Tdhook(init_attr_targets=chosen, init_attr_inputs=observation).prepare(copy.deepcopy(actor)) as hooked:
            return hooked(data.select(*actor.in_keys).clone())["attr", "observation"]

    return Case(expected, ours, None, tdhooks)


def weight_method(name: str, **options: Any) -> Any:
    import tdhook.weights

    return getattr(tdhook.weights, name)(**options)


@row("Pruning, a share of all weights", "a threshold in numpy")
def pruning() -> Case:
    net, x = mlp().double(), inputs()
    weights = [module.weight.detach().numpy() for module in net if isinstance(module, nn.Linear)]
    sizes = np.sort(np.abs(np.concatenate([one.ravel() for one in weights])))
    threshold = sizes[round(0.3 * len(sizes)) - 1]
    pruned = copy.deepcopy(net)
    with torch.no_grad():
        for module in pruned:
            if isinstance(module, nn.Linear):
                module.weight[module.weight.abs() <= threshold] = 0

    def importance(module_key: str, parameter_name: str, parameter: Tensor) -> Tensor | None:
        return parameter.abs() if parameter_name == "weight" else None

    options: dict[str, Any] = {"importance_callback": importance, "amount_to_prune": 0.3}
    return Case(
        pruned(x),
        lambda: result(Pruning(**options), net, x, "output"),
        None,
        lambda: result(weight_method("Pruning", **options), net, x, "output"),
    )


@row("Adapters, named by dotted paths", "the layers by hand")
def adapters() -> Case:
    net = nn.Sequential(mlp(HIDDEN), nn.Linear(HIDDEN, HIDDEN)).double()
    x, adapter = inputs(), nn.Linear(HIDDEN, HIDDEN).double()
    placed = {"0.3": (adapter, "0.1", "0.3")}
    return Case(
        net[1](net[0][4:](adapter(net[0][:2](x)))),
        lambda: result(Adapters(adapters=placed), net, x, "output"),
        None,
        lambda: result(weight_method("Adapters", adapters=placed), net, x, "output"),
    )


@row("TaskVectors, half of the way", "weights by hand")
def task_vectors() -> Case:
    net, finetuned, x = mlp().double(), mlp().double(), inputs()
    middle = copy.deepcopy(net)
    with torch.no_grad():
        for a, b in zip(middle.parameters(), finetuned.parameters(), strict=True):
            a.add_(0.5 * (b - a))

    def halfway(method: Any) -> Tensor:
        with method.prepare(copy.deepcopy(net)) as hooked:
            applied = hooked.with_applied_vectors(hooked.get_task_vector(finetuned), alpha=0.5)
            with applied as policy:
                model = hooked if policy is None else policy
                return model(TensorDict({"input": x}, batch_size=ROWS))["output"]

    def tdhooks() -> Tensor:
        nothing = {"get_test_accuracy": lambda module: 1.0, "get_control_adequacy": lambda module: True}
        return halfway(weight_method("TaskVectors", alphas=[0.5], **nothing))

    return Case(middle(x), lambda: halfway(TaskVectors()), None, tdhooks)

"""Several saliencies of one policy explain one pass: it runs once for them, and the numbers are those of each alone."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.attribution import GuidedBackpropagation, IntegratedGradients
from tdhook_rl.targets import Target

ROWS = 6


class Counted(nn.Module):
    """Two inputs, one of them left out of one target, and a count of its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.other = nn.Linear(2, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        RUNS.append(None)
        return self.body(x) + self.other(y).tanh()


RUNS: list[None] = []


def _policy() -> Any:
    torch.manual_seed(0)
    net = TensorDictModule(Counted(), ["x", "y"], ["logits"])
    return ProbabilisticActor(net, ["logits"], distribution_class=torch.distributions.Categorical).double()


def _uses_up(run: Any) -> Tensor:
    slope = torch.autograd.grad(run.outputs["logits"].sum(), run.outputs["x"], create_graph=True)[0]
    return slope.square().sum(-1) + run.outputs["logits"].square().sum(-1)


METHODS = {
    "log-prob": Saliency(target=targets.taken_action_log_prob(), attribution_key="a"),
    "default, one input": Saliency(inputs=["y"], attribution_key="b"),
    "product": Saliency(target=targets.entropy(), multiply_by_inputs=True, attribution_key="c"),
    "absolute": Saliency(target=targets.logit(0), absolute=True, attribution_key="d"),
    "several": Saliency(target={"one": targets.margin(), "two": targets.logit(2)}, attribution_key="e"),
    "of the user's": Saliency(target=Target("uses up", _uses_up), attribution_key="f"),
    "of a layer": Saliency(input_modules=["module.0.module.body.1"], attribution_key="g"),
    "guided": GuidedBackpropagation(target=targets.logit(1), inputs=["x"], attribution_key="h"),
    "path": IntegratedGradients(target=targets.logit(1), baseline=0.0, n_steps=5, attribution_key="i"),
    "computed inputs": Saliency(init_attr_inputs=lambda inputs, _: inputs * 2, attribution_key="k"),
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("when", ["step", "batch"])
def test_each_is_what_it_is_alone(when: str, backwards: bool) -> None:
    policy = _policy()
    data = TensorDict({"x": torch.randn(ROWS, 4).double(), "y": torch.randn(ROWS, 2).double()}, batch_size=ROWS)
    methods = [dataclasses.replace(one, when=when) for one in METHODS.values()]
    methods = methods[::-1] if backwards else methods
    results = []
    for group in (methods, *([one] for one in methods)):
        with Compose(*group).prepare(policy) as hooked, torch.no_grad():
            torch.manual_seed(1)
            found = hooked(data.clone())
            results.append(found if when == "step" else hooked.annotate(found))
    together, alone = results[0], results[1:]
    for one, found in zip(methods, alone, strict=True):
        for key, value in found[one.attribution_key].items(True, True):
            torch.testing.assert_close(together[one.attribution_key][key], value, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("when", ["step", "batch"])
def test_eight_run_the_policy_as_often_as_one(when: str) -> None:
    def runs(number: int) -> int:
        several = [
            Saliency(target=targets.logit(index % 3), when=when, attribution_key=f"a{index}") for index in range(number)
        ]
        with Compose(*several).prepare(_policy()) as hooked, torch.no_grad():
            data = TensorDict({"x": torch.randn(ROWS, 4), "y": torch.randn(ROWS, 2)}, batch_size=ROWS).double()
            for _ in range(5):  # whether passes can be repeated is seen in the first calls
                data = hooked(data.select("x", "y"))
                hooked.annotate(data.select("x", "y", "logits", "action"))
            RUNS.clear()
            data = hooked(data.select("x", "y"))
            hooked.annotate(data.select("x", "y", "logits", "action"))
            return len(RUNS)

    assert runs(8) == runs(1)


def test_graphs_do_not_outlive_the_call() -> None:
    seen = []
    policy = _policy()
    several = [Saliency(target=targets.logit(index), attribution_key=f"a{index}") for index in range(3)]
    with Compose(ActivationCaching("module.0.module.body.1"), *several).prepare(policy) as hooked, torch.no_grad():
        hooked.hooked_root.get_submodule("module.0.module.body").register_forward_hook(
            lambda module, args, out: seen.append(weakref.ref(out)) if out.requires_grad else None
        )
        data = hooked(TensorDict({"x": torch.randn(ROWS, 4), "y": torch.randn(ROWS, 2)}, batch_size=ROWS).double())
        found = hooked.annotate(data)
        gc.collect()
        assert seen
        assert all(one() is None for one in seen)
        assert not any(value.requires_grad for value in found.values(True, True))

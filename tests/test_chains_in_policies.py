"""Policies around chains: keys, modes, errors, and those that are left to autograd."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, set_skip_existing
from torch import nn
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.calls.chains import Record
from tdhook_rl.errors import MismatchError
from tests.chains import MODES, by_autograd, chain, data, logit


def test_an_actor_is_explained_by_its_chain(records: list[Record]) -> None:
    net = chain()
    logits = TensorDictModule(net, ["observation"], ["logits"])
    actor = ProbabilisticActor(logits, ["logits"], distribution_class=torch.distributions.Categorical)
    x = torch.randn(7, 6, dtype=torch.double)
    with Saliency().prepare(actor) as hooked:
        with torch.no_grad():
            batch = hooked(TensorDict({"observation": x}, batch_size=7))
        found = hooked.annotate(batch)
    assert len(records) == 1
    taken = batch["action"].unsqueeze(-1)
    expected = by_autograd(net, x, lambda y: y.log_softmax(-1).gather(-1, taken))
    torch.testing.assert_close(found["attr", "observation"], expected)


def test_modules_that_are_functions() -> None:
    net, x = chain(), torch.randn(7, 6, dtype=torch.double)
    policy = TensorDictSequential(
        TensorDictModule(net, ["observation"], ["logits"]),
        TensorDictModule(lambda logits: logits.argmax(-1), ["logits"], ["action"]),
    )
    for method in (Saliency(target=targets.logit(1)), ActivationCaching("module.0.module.1")):
        with method.prepare(policy) as hooked:
            assert torch.equal(hooked(TensorDict({"observation": x}, batch_size=7))["action"], net(x).argmax(-1))
    with Saliency(target=targets.logit(0, "y")).prepare(TensorDictModule(torch.tanh, ["x"], ["y"])) as hooked:
        found = hooked.annotate(TensorDict({"x": x}, batch_size=7))["attr", "x"]
    torch.testing.assert_close(found, by_autograd(torch.tanh, x, lambda y: y[..., 0]))


class Undeclared(TensorDictModuleBase):
    in_keys: ClassVar = ["input"]
    out_keys: ClassVar = ["action"]

    def __init__(self) -> None:
        super().__init__()
        self.net = chain()

    def forward(self, data: TensorDict) -> TensorDict:
        data["logits"] = self.net(data["input"])
        return data.set("action", data["logits"].argmax(-1))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_outputs_that_are_not_declared_can_be_explained(mode: type) -> None:
    policy, one = Undeclared(), data(5)
    expected = by_autograd(policy.net, one["input"], logit)
    with Saliency(target=targets.logit(1), when="step").prepare(policy) as hooked, mode():
        for _ in range(2):  # at the second call the data has them already
            torch.testing.assert_close(hooked(one)["attr", "input"], expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("known", [True, False])
def test_entries_of_the_caller_are_not_explained(known: bool, mode: type) -> None:
    net = chain() if known else nn.Sequential(chain(), nn.LayerNorm(3).double())
    nested = {"x": torch.randn(5, 6).double(), "action_value": torch.randn(5, 4), "action": torch.zeros(5).long()}
    one = TensorDict({"a": nested, "action_value": torch.randn(5, 2)}, batch_size=5)
    policy = TensorDictModule(net, [("a", "x")], [("a", "y")])
    with Saliency(when="step").prepare(policy) as hooked, mode():
        found = hooked(one)["attr", "a", "x"]
    torch.testing.assert_close(found, by_autograd(net, nested["x"], lambda y: y.sum(-1)))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_errors_are_in_the_policys_own_words(mode: type) -> None:
    wide = TensorDict({"input": torch.randn(5, 7).double()}, batch_size=5)
    with Saliency(target=targets.logit(1, "output")).prepare(chain()) as hooked, mode():
        for call in (hooked, hooked.annotate):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as error:
                call(wide)
            assert "TensorDictModule failed with operation" in str(error.value.__cause__)


def test_paths_do_not_stand_in_for_what_is_stored() -> None:
    net, one = chain(), data(5)
    with IntegratedGradients(target=targets.logit(1, "output"), baseline=0.0, when="batch").prepare(net) as hooked:
        stored = hooked(one)
        hooked.annotate(stored, on_mismatch="raise")
        with torch.no_grad():
            net[0].weight.mul_(2)
        with pytest.raises(MismatchError):
            hooked.annotate(stored, on_mismatch="raise")


def test_outputs_that_are_there_already_may_be_kept() -> None:
    net, one = chain(), data(5).set("output", torch.zeros(5, 3).double())
    method = Saliency(target=targets.logit(1, "output"))
    with method.prepare(net) as hooked, set_skip_existing(True), torch.no_grad():
        assert not hooked(one)["output"].any()


def test_a_chain_behind_other_layers_is_left_to_autograd(records: list[Record]) -> None:
    net = nn.Sequential(nn.LayerNorm(6), chain()).double()
    one = data(5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked.annotate(one)
    assert not records
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))


def test_an_activation_inside_a_chain() -> None:
    net, one = chain(), data(5)
    method = Compose(
        ActivationCaching("1"), Saliency(target=targets.logit(1, "output"), input_modules=["1"], when="batch")
    )
    with method.prepare(net) as hooked:
        found = hooked.annotate(hooked(one))
    hidden = net[1](net[0](one["input"]))
    torch.testing.assert_close(found["cache", "1"], hidden)
    torch.testing.assert_close(found["attr", "1"], by_autograd(net[2:], hidden, logit))


@pytest.mark.parametrize("out_features", [3, (3, 2)])
def test_networks_of_torchrl(out_features: int | tuple[int, int], records: list[Record]) -> None:
    net = MLP(in_features=6, out_features=out_features, num_cells=[8, 8]).double()
    critic = ValueOperator(net, ["observation"], ["state_value"])
    x = torch.randn(5, 6, dtype=torch.double)
    with Saliency().prepare(critic) as hooked:
        found = hooked(TensorDict({"observation": x}, batch_size=5))
    assert bool(records) is (out_features == 3)
    assert torch.equal(found["state_value"], net(x))
    torch.testing.assert_close(found["attr", "observation"], by_autograd(net, x, lambda y: y))


def test_weights_of_a_chain_that_carry_a_graph() -> None:
    net, one, scale = chain(), data(5), torch.ones((), dtype=torch.double, requires_grad=True)
    policy = TensorDictModule(net, ["input"], ["output"])
    with Saliency(target=targets.logit(1, "output")).prepare(policy) as hooked:
        found = torch.func.functional_call(hooked, {"module.0.weight": net[0].weight * scale}, (one.clone(),))
    torch.testing.assert_close(found["attr", "input"], by_autograd(net, one["input"], logit))
    assert torch.autograd.grad(found["output"].sum(), scale)[0] != 0


@MODES
def test_other_entries_of_the_caller_are_not_explained(mode: type) -> None:
    net, one = chain(), data(5)
    one["next", "action_value"] = torch.randn(5, 2)
    one["action"] = torch.zeros(5, dtype=torch.long)
    policy = TensorDictModule(net, ["input"], ["state_value"])
    expected = by_autograd(net, one["input"], lambda y: y)
    with Saliency(when="step").prepare(policy) as hooked, mode():
        torch.testing.assert_close(hooked(one)["attr", "input"], expected)


@MODES
def test_results_go_where_the_caller_says(mode: type) -> None:
    net, one, out = chain(), data(5), TensorDict({}, batch_size=5)
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked, mode():
        assert hooked(one, tensordict_out=out) is out
    assert torch.equal(out["output"], net(one["input"]))
    torch.testing.assert_close(out["attr", "input"], by_autograd(net, one["input"], logit))


def test_shapes_without_numbers() -> None:
    net = chain().to("meta")
    with Saliency(target=targets.logit(1, "output")).prepare(net) as hooked:
        found = hooked(TensorDict({"input": torch.empty(5, 6, dtype=torch.double, device="meta")}, batch_size=5))
    assert found["attr", "input"].shape == (5, 6)

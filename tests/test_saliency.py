"""Saliency against Jacobians in float64, for every target; inputs that cannot be explained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchrl.modules import QValueActor

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, targets
from tdhook_rl.errors import InputError, KeyCollisionError, MissingKeyError, SiteError, TargetError
from tests.oracles import row_gradients
from tests.policies import ACTIONS, CASES, FEATURES, actor_value, categorical, mlp, tanh_normal, value

F64 = torch.float64


def collected(actor: nn.Module, rows: int = 5) -> TensorDict:
    return actor(TensorDict({"observation": torch.randn(rows, FEATURES, dtype=F64)}, batch_size=rows)).detach()


def pick(values: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return values[..., action]


TARGETS = {
    "taken_action_log_prob": (targets.taken_action_log_prob(), lambda z, a: z.log_softmax(-1)[a]),
    "chosen_logit": (targets.chosen_logit(), lambda z, a: z[a]),
    "logit": (targets.logit(2), lambda z, a: z[2]),
    "entropy": (targets.entropy(), lambda z, a: -(z.softmax(-1) * z.log_softmax(-1)).sum()),
    "margin": (
        targets.margin(),
        lambda z, a: z[a] - torch.stack([z[i] for i in range(ACTIONS) if i != a]).amax(),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("when", ["step", "batch"])
def test_targets_of_a_categorical_policy(name: str, when: str) -> None:
    target, formula = TARGETS[name]
    actor = categorical().double()
    net = actor.module[0].module
    with Saliency(target=target, when=when).prepare(actor) as hooked:
        data = collected(hooked if when == "step" else actor)
        found = hooked.annotate(data)["attr", "observation"]
        assert (when == "step") == ("attr" in data.keys())
    for row, action, gradient in zip(data["observation"], data["action"].tolist(), found, strict=True):
        expected = row_gradients(lambda x, action=action: formula(net(x), action), row[None])[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_state_value_and_latent_of_a_shared_trunk() -> None:
    operator = actor_value().double()
    trunk, head = operator.module[0].module, operator.module[2].module
    x = torch.randn(4, FEATURES, dtype=F64)
    method = Saliency(target=targets.state_value(), inputs=["observation"], input_modules=["module.0.module"])
    with method.prepare(operator) as hooked:
        found = hooked.annotate(TensorDict({"observation": x}, batch_size=4))
    torch.testing.assert_close(found["attr", "observation"], row_gradients(lambda v: head(trunk(v)), x))
    torch.testing.assert_close(found["attr", "module.0.module"], row_gradients(head, trunk(x)))


def test_chosen_q_is_the_stored_action_not_the_greedy_one() -> None:
    net = mlp().double()
    actor = QValueActor(net, in_keys=["observation"], spec=None, action_space="categorical")
    data = TensorDict({"observation": torch.randn(6, FEATURES, dtype=F64)}, batch_size=6)
    data["action"] = torch.arange(6) % ACTIONS
    with Saliency().prepare(actor) as hooked:  # chosen_q is the default of a Q-value actor
        found = hooked.annotate(data)["attr", "observation"]
    for row, action, gradient in zip(data["observation"], data["action"].tolist(), found, strict=True):
        torch.testing.assert_close(gradient, row_gradients(lambda x, a=action: net(x)[a], row[None])[0])


def test_one_hot_and_continuous_actions() -> None:
    case = CASES["one_hot"]
    actor = case.build().double()
    data = collected(actor)
    net = actor.module[0].module
    with Saliency(target=targets.chosen_logit()).prepare(actor) as hooked:
        found = hooked.annotate(data)["attr", "observation"]
    for row, action, gradient in zip(data["observation"], data["action"], found, strict=True):
        torch.testing.assert_close(gradient, row_gradients(lambda x, a=action: (net(x) * a).sum(), row[None])[0])
    actor = tanh_normal().double()
    data = collected(actor)
    with Saliency().prepare(actor) as hooked:
        found = hooked.annotate(data)["attr", "observation"]
    x = data["observation"].clone().requires_grad_()
    log_prob = actor.get_dist(TensorDict({"observation": x}, batch_size=5)).log_prob(data["action"])
    torch.testing.assert_close(found, torch.autograd.grad(log_prob.sum(), x)[0])


def test_a_linear_net_is_explained_by_its_weights() -> None:
    net = nn.Linear(FEATURES, 1).double()
    x = torch.randn(7, FEATURES, dtype=F64)
    data = TensorDict({"input": x}, batch_size=7)
    expected = net.weight.expand(7, -1)
    for options, value_ in (
        ({}, expected),
        ({"absolute": True}, expected.abs()),
        ({"multiply_by_inputs": True}, expected * x),
    ):
        with Saliency(**options).prepare(net) as hooked:
            torch.testing.assert_close(hooked(data.clone())["attr", "input"], value_)


def test_the_callbacks_of_the_seed() -> None:
    net = mlp().double()
    x = torch.randn(3, FEATURES, dtype=F64)

    def init_attr_targets(outputs, _):
        return TensorDict(out=outputs["output"][..., 1], batch_size=outputs.batch_size)

    with Saliency(init_attr_targets=init_attr_targets).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=3))
    torch.testing.assert_close(found["attr", "input"], row_gradients(lambda v: net(v)[1], x))
    torch.testing.assert_close(found["output"], net(x))


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "vmap"])
def test_gradients_inside_callers_that_have_none(mode: str) -> None:
    net = value().double()
    x = torch.randn(4, FEATURES, dtype=F64)
    expected = row_gradients(net.module, x)
    with Saliency(when="step").prepare(net) as hooked:
        if mode == "vmap":
            found = torch.vmap(lambda v: hooked(TensorDict({"observation": v}))["attr", "observation"])(x)
        else:
            with getattr(torch, mode)():
                found = hooked(TensorDict({"observation": x}, batch_size=4))["attr", "observation"]
    torch.testing.assert_close(found, expected)


class Odd(nn.Module):
    """A forward that autograd differentiates, and functorch does not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inner, self.outer = nn.Linear(FEATURES, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "checkpoint":
            return self.outer(checkpoint(self.inner, x, use_reentrant=False).tanh())
        if self.how == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                return self.outer(self.inner(x).tanh())
        if self.how == "numpy":
            scale = torch.from_numpy(np.abs(x.detach().numpy()).sum(-1, keepdims=True))
            return self.outer(self.inner(x).tanh() * scale)
        with torch.inference_mode(False), torch.enable_grad():  # a gradient of its own
            leaf = x.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.inner(leaf).tanh().sum(), leaf)
        return self.outer(self.inner(x + slope).tanh())


@pytest.mark.parametrize("how", ["checkpoint", "save_on_cpu", "numpy", "own gradient"])
@pytest.mark.parametrize("method", [Saliency, IntegratedGradients])
def test_what_functorch_cannot_differentiate_is_explained_in_inference_mode(how: str, method: type) -> None:
    net = Odd(how).double()
    x = torch.randn(4, FEATURES, dtype=F64)
    data = TensorDict({"input": x, ("baseline", "input"): torch.zeros_like(x)}, batch_size=4)
    with method(when="step").prepare(net) as hooked:
        expected = hooked(data.clone())
        with torch.inference_mode():
            found = hooked(data.clone())
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"])
    if method is Saliency:
        x.requires_grad_()
        torch.testing.assert_close(found["attr", "input"], torch.autograd.grad(net(x).sum(), x)[0])


def test_inside_vmap_it_is_refused() -> None:
    x = torch.randn(4, FEATURES, dtype=F64)
    with Saliency(when="step").prepare(Odd("checkpoint").double()) as hooked:
        with pytest.raises(InputError, match=r"hooks on saved tensors .*checkpoint.* inside vmap"):
            torch.vmap(lambda v: hooked(TensorDict({"input": v}))["attr", "input"])(x)


def test_integer_inputs_are_explained_where_floats_give_the_same_outputs() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2)

        def forward(self, frame: torch.Tensor) -> torch.Tensor:
            return self.net(frame.float() / 255)

    frames = torch.randint(0, 256, (3, 4), dtype=torch.uint8)
    net = Scale()
    with Saliency().prepare(net) as hooked:
        found = hooked(TensorDict({"input": frames}, batch_size=3))
    torch.testing.assert_close(found["attr", "input"], (net.net.weight.sum(0) / 255).expand(3, -1))
    assert found["input"].dtype == torch.uint8


def test_token_inputs_raise_and_name_input_modules() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 1))
    tokens = TensorDict({"input": torch.randint(0, 10, (3,))}, batch_size=3)
    with Saliency().prepare(net) as hooked, pytest.raises(InputError, match=r"input_modules=\[path\]"):
        hooked(tokens.clone())
    with Saliency(input_modules=["0"]).prepare(net) as hooked:
        found = hooked(tokens.clone())
    torch.testing.assert_close(found["attr", "0"], net[1].weight.expand(3, -1))


class Detaching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() * 2


def test_no_gradient_path_raises() -> None:
    data = TensorDict({"input": torch.randn(3, 4)}, batch_size=3)
    with Saliency().prepare(Detaching()) as hooked, pytest.raises(TargetError, match="depends on the explained input"):
        hooked(data.clone())
    net = nn.Sequential(Detaching(), nn.Linear(4, 1))  # requires grad through the weights only
    with Saliency().prepare(net) as hooked, pytest.raises(TargetError, match="no gradient reaches"):
        hooked(data.clone())
    with torch.inference_mode(), Saliency().prepare(Detaching()) as hooked, pytest.raises(TargetError):
        hooked(data.clone())


def test_bad_targets_say_what_there_is() -> None:
    case = CASES["categorical"]
    actor = categorical()
    data = actor(case.data(3)).detach()
    expected = {
        "nearest: 'logits'": targets.chosen_logit(key="logit"),
        r"4 entries": targets.logit(9),
        "integer tensor": targets.Target("mine", lambda run: run.stored["action"]),
        "must start with the batch shape": targets.Target("mine", lambda run: run.outputs["logits"].sum()),
        "does not output": targets.state_value(),
    }
    for message, target in expected.items():
        with Saliency(target=target).prepare(actor) as hooked, pytest.raises(TargetError, match=message):
            hooked.annotate(data)
    with Saliency().prepare(actor) as hooked:
        with pytest.raises(TargetError, match="stored action 'action', which the data lacks"):
            hooked.annotate(case.data(3))
        with pytest.raises(MissingKeyError, match="'observation'"):
            hooked.annotate(data.exclude("observation"))
        with pytest.raises(InputError, match="nothing to annotate"):
            hooked.annotate(data[:0])
    with (
        Saliency(target=targets.entropy()).prepare(value()) as hooked,
        pytest.raises(TargetError, match="distribution"),
    ):
        hooked(case.data(3))
    with pytest.raises(TargetError, match="give one of them"):
        Saliency(target=targets.entropy(), init_attr_targets=lambda a, b: a)
    with pytest.raises(InputError, match="when="):
        Saliency(when="always")


def test_wrong_inputs_sites_and_keys_are_refused() -> None:
    case = CASES["categorical"]
    actor = categorical()
    with pytest.raises(InputError, match="nearest: 'observation'"):
        Saliency(inputs=["obs"]).prepare(actor).__enter__()
    other = Saliency(init_attr_inputs=lambda inputs, _: TensorDict({"obs": inputs["observation"]}, inputs.batch_size))
    with other.prepare(actor) as hooked, pytest.raises(InputError, match=r"init_attr_inputs returned.*'observation'"):
        hooked.annotate(hooked(case.data(3)))
    with pytest.raises(SiteError, match="nearest"):
        Saliency(input_modules=["module.0.mlp"]).prepare(actor).__enter__()
    for methods in ((Saliency(), Saliency()), (ActivationCaching(case.site), ActivationCaching(case.site))):
        with pytest.raises(KeyCollisionError, match="two methods write"):
            Compose(*methods).prepare(actor).__enter__()
    with pytest.raises(KeyCollisionError, match="collides with the policy's key"):
        ActivationCaching(case.site, cache_key="observation").prepare(actor).__enter__()
    with pytest.raises(KeyCollisionError, match="underscore"):
        ActivationCaching(case.site, cache_key="_cache").prepare(actor).__enter__()
    with pytest.raises(InputError, match="takes methods"):
        Compose(actor)


def test_batch_norm_in_training_mode_keeps_its_statistics() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    data = TensorDict({"observation": torch.randn(16, 4)}, batch_size=16)
    module = TensorDictModule(net, in_keys=["observation"], out_keys=["state_value"])
    with Saliency(when="batch").prepare(module) as hooked:
        before = net[1].running_mean.clone(), int(net[1].num_batches_tracked)
        with pytest.warns(UserWarning, match=r"module.1' \(BatchNorm1d\) normalises by its batch"):
            hooked.annotate(data)
        assert torch.equal(net[1].running_mean, before[0])
        assert int(net[1].num_batches_tracked) == before[1]
        assert hooked.module[1].training


def test_dropout_repeats_its_mask_in_the_second_pass() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1, bias=False)).double()
    x = torch.ones(5, 8, dtype=F64)
    with Compose(ActivationCaching("0"), Saliency(when="step")).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))
    torch.testing.assert_close(found["attr", "input"], net[1].weight * found["cache", "0"])

"""Steering: exact effects, per-row strengths, live controls, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.errors import InputError, MissingKeyError, SiteError
from tests.policies import CASES, HIDDEN, categorical, mlp

CASE = CASES["categorical"]
SITE = CASE.site


def test_steering_the_first_pre_activation_is_a_change_of_the_input() -> None:
    # Adding W[:, j] before the first activation is the same as adding 1 to input j (float64: to rounding).
    actor = categorical().double()
    data = TensorDict({"observation": torch.randn(64, 6, dtype=torch.float64)}, batch_size=64)
    shifted = data.clone()
    shifted["observation"][:, 2] += 1.0
    vector = actor.module[0].module[0].weight[:, 2].detach()
    with SteeringVectors({"module.0.module.0": vector}).prepare(actor) as hooked:
        steered = hooked(data.clone())["logits"]
    torch.testing.assert_close(steered, actor(shifted)["logits"], rtol=0, atol=1e-12)


def test_get_dist_and_log_prob_are_steered() -> None:
    actor = categorical()
    data = actor(CASE.data(5))
    with SteeringVectors({SITE: torch.ones(HIDDEN)}).prepare(actor) as hooked:
        logits = hooked(data.clone())["logits"]
        expected = torch.distributions.Categorical(logits=logits)
        assert torch.equal(hooked.get_dist(data.clone()).logits, expected.logits)
        assert torch.equal(hooked.log_prob(data.clone()), expected.log_prob(data["action"]))
        assert not torch.equal(actor.get_dist(data.clone()).logits, expected.logits)


@pytest.mark.parametrize("batch", [(), (4,), (3, 2)])
def test_every_row_has_its_own_alpha(batch: tuple[int, ...]) -> None:
    actor = categorical()
    data = CASE.data(*batch).set("alpha", torch.rand(batch))
    vector = torch.randn(HIDDEN)
    with SteeringVectors({SITE: vector}, alpha="alpha").prepare(actor) as hooked:
        assert hooked.in_keys == ["observation", "alpha"]
        found = hooked(data.clone())["logits"]
        through_dist = hooked.get_dist(data.clone())
        assert not hooked._hooked.runtime.rows
    net = actor.module[0].module
    hidden = net[1](net[0](data["observation"])) + data["alpha"][..., None] * vector
    torch.testing.assert_close(found, net[4](net[3](net[2](hidden))))
    torch.testing.assert_close(through_dist.probs, found.softmax(-1))


def test_rows_of_a_plain_module_and_trailing_one() -> None:
    net = mlp()
    x, alpha = torch.randn(4, 6), torch.tensor([0.0, 1.0, 0.5, 2.0])
    with SteeringVectors({"1": torch.ones(HIDDEN)}, alpha=("gate", "alpha")).prepare(net) as hooked:
        flat = hooked(TensorDict({"input": x, ("gate", "alpha"): alpha}, batch_size=4))["output"]
        column = hooked(TensorDict({"input": x, ("gate", "alpha"): alpha[:, None]}, batch_size=4))["output"]
    assert torch.equal(flat, column)
    assert torch.equal(flat[0], net(x)[0])


def test_per_row_vectors() -> None:
    net = mlp()
    data = TensorDict({"input": torch.randn(4, 6), "v": torch.randn(4, HIDDEN)}, batch_size=4)
    with SteeringVectors({"1": "v"}).prepare(net) as hooked:
        found = hooked(data.clone())["output"]
    torch.testing.assert_close(found, net[2:](net[1](net[0](data["input"])) + data["v"]))


def test_alpha_rows_of_a_convolution_that_flattens_the_batch() -> None:
    case = CASES["pixels"]
    actor = case.build()
    data = case.data(3, 2).set("alpha", torch.tensor([[0.0, 1.0]] * 3))
    with SteeringVectors({case.site: torch.ones(4, 6, 6)}, alpha="alpha").prepare(actor) as hooked:
        found = hooked(data.clone())["logits"]
    plain = actor(data.clone())["logits"]
    torch.testing.assert_close(found[:, 0], plain[:, 0])
    assert not torch.allclose(found[:, 1], plain[:, 1])


def test_alpha_0_keeps_every_bit() -> None:
    identity = nn.Identity()
    values = torch.tensor([[-0.0, float("inf"), 1e-40, float("nan")]])
    with SteeringVectors({"0": torch.full((4,), 3.0)}, alpha=0.0).prepare(nn.Sequential(identity)) as hooked:
        found = hooked(TensorDict({"input": values}, batch_size=1))["output"]
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize(
    "function",
    [
        lambda k, o: o + 1,
        lambda module_key, output: output + 1,
        lambda *, module_key, output: output + 1,
        lambda output, module_key: output + 1,
        lambda **kwargs: kwargs["output"] + 1,
    ],
)
def test_steer_fn_by_position_or_keyword(function) -> None:
    net = mlp()
    x = torch.randn(2, 6)
    with SteeringVectors(modules_to_steer=["1"], steer_fn=function).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=2))["output"]
    torch.testing.assert_close(found, net[2:](net[1](net[0](x)) + 1))


def test_each_module_is_told_its_own_key() -> None:
    seen = []

    def record(module_key: str, output: torch.Tensor) -> torch.Tensor:
        seen.append(module_key)
        return output

    with SteeringVectors(modules_to_steer=["1", r"3$"], steer_fn=record).prepare(mlp()) as hooked:
        hooked(TensorDict({"input": torch.randn(2, 6)}, batch_size=2))
    assert seen == ["1", "3"]


def test_the_order_is_the_order_written() -> None:
    net = mlp()
    data = TensorDict({"input": torch.randn(3, 6)}, batch_size=3)
    steering = SteeringVectors({"1": torch.ones(HIDDEN)})
    with Compose(ActivationCaching("1"), steering, ActivationCaching("1", cache_key="after")).prepare(net) as hooked:
        found = hooked(data)
    torch.testing.assert_close(found["after", "1"], found["cache", "1"] + 1)


def test_attribution_explains_the_steered_network() -> None:
    actor = categorical().double()
    data = TensorDict({"observation": torch.randn(5, 6, dtype=torch.float64)}, batch_size=5)
    vector = torch.randn(HIDDEN, dtype=torch.float64)
    method = Compose(SteeringVectors({SITE: vector}), Saliency(target=targets.logit(1), when="step"))
    with method.prepare(actor) as hooked:
        found = hooked(data.clone())["attr", "observation"]
    net = actor.module[0].module
    expected = torch.func.vmap(torch.func.grad(lambda x: net[2:](net[1](net[0](x)) + vector)[1]))(data["observation"])
    torch.testing.assert_close(found, expected)


def test_controls_are_live_shared_and_survive_a_device_copy() -> None:
    net = mlp()
    data = TensorDict({"input": torch.randn(3, 6)}, batch_size=3)
    with SteeringVectors({"1": torch.ones(HIDDEN)}, alpha=0.0).prepare(net) as hooked:
        twin = copy.deepcopy(hooked)
        before = twin(data.clone())["output"]
        hooked.controls["steering.alpha"] = 2.0
        assert hooked.controls["steering.alpha"].is_shared()
        assert not torch.equal(twin(data.clone())["output"], before)
        hooked.controls.update_({"steering.1": torch.zeros(HIDDEN)})
        torch.testing.assert_close(twin(data.clone())["output"], before)
        for name, value, error in (
            ("steering.1", torch.ones(3), InputError),
            ("steering.alpha", float("nan"), InputError),
            ("steering.alhpa", 1.0, MissingKeyError),
        ):
            with pytest.raises(error, match=name.replace(".", r"\.")):
                hooked.controls[name] = value
        with pytest.raises(TypeError, match="cannot be deleted"):
            del hooked.controls["steering.alpha"]
        assert list(hooked.state_dict()) == [f"module.{name}" for name in net.state_dict()]


def test_bad_steering_is_refused() -> None:
    net = mlp()
    data = TensorDict({"input": torch.randn(3, 6)}, batch_size=3)
    with pytest.raises(InputError, match="either vectors"):
        SteeringVectors()
    with pytest.raises(InputError, match="go together"):
        SteeringVectors(steer_fn=lambda k, o: o)
    with pytest.raises(SiteError, match="nearest"):
        SteeringVectors({"9": torch.ones(3)}).prepare(net).__enter__()
    with pytest.raises(InputError, match="NaN"):
        SteeringVectors({"1": torch.full((HIDDEN,), float("nan"))}).prepare(net).__enter__()
    with pytest.raises(InputError, match="must accept"):
        SteeringVectors(modules_to_steer=["1"], steer_fn=lambda a: a).prepare(net).__enter__()
    with (
        SteeringVectors({"1": torch.ones(5)}).prepare(net) as hooked,
        pytest.raises(InputError, match=r"shape \(5,\).*\(3, 16\)"),
    ):
        hooked(data.clone())
    with SteeringVectors({"1": torch.ones(HIDDEN)}, alpha="alpha").prepare(net) as hooked:
        with pytest.raises(MissingKeyError, match="per-row key 'alpha'"):
            hooked(data.clone())
        with pytest.raises(MissingKeyError, match="alpha"):
            hooked(input=data["input"])
        with pytest.raises(InputError, match="per-row alpha"):
            hooked(data.clone().set("alpha", torch.ones(3, 2)))
    with (
        SteeringVectors(modules_to_steer=["1"], steer_fn=lambda k, o: None).prepare(net) as hooked,
        pytest.raises(InputError, match="got NoneType"),
    ):
        hooked(data.clone())

"""LRP: each rule against a share-out written with explicit contribution matrices, and conservation."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Compose, Saliency, targets
from tdhook_rl.attribution import LRP
from tdhook_rl.attribution.lrp_rules import (
    AlphaBeta,
    Epsilon,
    EpsilonPlus,
    Flat,
    Gamma,
    Pass,
    Rule,
    Sum,
    Uniform,
    WSquare,
    ZPlus,
)
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.metrics import completeness_gap
from tests.policies import categorical

F64 = torch.float64
EPS = 1e-3


def as_matrix(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A linear module as a matrix (inputs, outputs) and a bias vector, from its values on unit vectors."""
    zero = module(torch.zeros_like(x)[None])[0].flatten()
    units = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    return module(units).flatten(1) - zero, zero


def sign(value: Tensor) -> Tensor:
    return torch.where(value >= 0, 1.0, -1.0).to(value.dtype)


def share(parts: Tensor, extra: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """Relevance in proportion to the parts (inputs, outputs); ``extra`` is the bias's part."""
    total = parts.sum(0) + extra
    total = total + epsilon * sign(total)
    safe = torch.where(total == 0, torch.ones_like(total), total)
    return (parts / safe * torch.where(total == 0, 0.0, relevance)).sum(1)


def replica(rule: Rule, module: nn.Module, x: Tensor, relevance: Tensor) -> Tensor:
    """The rule in matrix form, for one row."""
    w, b = as_matrix(module, x)
    a = x.flatten()[:, None] * w
    r = relevance.flatten()
    connected = (w != 0).to(x.dtype)
    forms: dict[type, Callable[[], Tensor]] = {
        Epsilon: lambda: share(a, b, r, EPS),
        Gamma: lambda: share(a + 0.5 * a.clamp(min=0), b + 0.5 * b.clamp(min=0), r, EPS),
        ZPlus: lambda: share(a.clamp(min=0), b.clamp(min=0), r, EPS),
        AlphaBeta: lambda: (
            2 * share(a.clamp(min=0), b.clamp(min=0), r, EPS) - share(a.clamp(max=0), b.clamp(max=0), r, EPS)
        ),
        WSquare: lambda: share(w**2, torch.zeros_like(b), r, 0.0),
        Flat: lambda: share(connected, torch.zeros_like(b), r, 0.0),
    }
    return forms[type(rule)]().reshape(x.shape)


MODULES = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (7,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1, dilation=2), (2, 5, 5)),
    "grouped conv2d": (lambda: nn.Conv2d(4, 4, 2, groups=2), (4, 4, 4)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), (2, 3, 3)),
}
RULES = [Epsilon(EPS), Gamma(0.5, EPS), ZPlus(epsilon=EPS), AlphaBeta(2.0, 1.0, EPS), WSquare(), Flat()]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rules_equal_their_matrix_form(name: str, rule: Rule) -> None:
    build, shape = MODULES[name]
    module = build().double()
    x = torch.randn(4, *shape, dtype=F64)
    relevance = torch.randn_like(module(x))
    (found,) = rule.share(module, (x,), relevance)
    for row in range(4):
        torch.testing.assert_close(found[row], replica(rule, module, x[row], relevance[row]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)])
def test_pooling_and_batch_norm_share_by_contribution(pool: nn.Module) -> None:
    x = torch.randn(3, 2, 4, 4, dtype=F64)
    norm = nn.BatchNorm2d(2).double()
    norm(x)  # statistics
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.uniform_(-1.0, 1.0)
    for module in (pool, norm.eval()):
        relevance = torch.randn_like(module(x))
        (found,) = Epsilon(EPS).share(module, (x,), relevance)
        for row in range(3):
            torch.testing.assert_close(found[row], replica(Epsilon(EPS), module, x[row], relevance[row]))


def logit(index: int) -> targets.Target:
    return targets.Target("logit", lambda run: run.outputs["output"][..., index])


def relu_net(bias: bool, inplace: bool = False) -> nn.Sequential:
    layers = [nn.Linear(6, 12, bias=bias), nn.ReLU(inplace), nn.Linear(12, 12, bias=bias), nn.ReLU(inplace)]
    return nn.Sequential(*layers, nn.Linear(12, 3, bias=bias)).double()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_net_layer_by_layer(bias: bool, inplace: bool) -> None:
    net = relu_net(bias, inplace)
    x = torch.randn(5, 6, dtype=F64)
    with LRP(rule_mapper=Uniform(Epsilon(EPS)), target=logit(1), inputs=["input"], input_modules=["1"]).prepare(
        net
    ) as hooked:
        found = hooked(TensorDict({"input": x.clone()}, batch_size=5))
    for row in range(5):
        first = net[0](x[row]).relu()
        second = net[2](first).relu()
        relevance = torch.zeros(3, dtype=F64)
        relevance[1] = net[4](second)[1]  # it starts at the explained output
        relevance = replica(Epsilon(EPS), net[4], second, relevance)
        relevance = replica(Epsilon(EPS), net[2], first, relevance)
        torch.testing.assert_close(found["attr", "1"][row], relevance)
        torch.testing.assert_close(found["attr", "input"][row], replica(Epsilon(EPS), net[0], x[row], relevance))


def test_lrp_0_without_bias_is_gradient_times_input() -> None:
    net = relu_net(bias=False)
    data = TensorDict({"input": torch.randn(5, 6, dtype=F64)}, batch_size=5)
    method = Compose(
        LRP(rule_mapper=Uniform(Epsilon(0.0), epsilon=0.0), target=logit(2)),
        Saliency(target=logit(2), multiply_by_inputs=True, attribution_key="gxi"),
    )
    with method.prepare(net) as hooked:
        found = hooked(data.clone())
    torch.testing.assert_close(found["attr", "input"], found["gxi", "input"])


COMPOSITES = {
    "epsilon": Uniform(Epsilon(0.0), epsilon=0.0),
    "gamma": Uniform(Gamma(0.3, 0.0), epsilon=0.0),
    "alpha_beta": Uniform(AlphaBeta(2.0, 1.0, 0.0), epsilon=0.0),
    "epsilon_plus": EpsilonPlus(0.0),
    "flat_first": Uniform(Epsilon(0.0), names={"0": Flat()}, epsilon=0.0),
    "w_square_first": Uniform(Epsilon(0.0), names={"0": WSquare()}, epsilon=0.0),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_relevance_is_conserved_without_bias(name: str) -> None:
    # Positive weights keep every share-out defined (no output has only contributions of the wrong sign).
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3, bias=False),
    ).double()
    if name == "alpha_beta":
        rows = torch.randn(4, 2, 6, 6, dtype=F64)
    else:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.abs_()
        rows = torch.rand(4, 2, 6, 6, dtype=F64)
    method = LRP(rule_mapper=COMPOSITES[name], target=logit(0), compute_relevance_gap=True)
    with method.prepare(net) as hooked:
        found = hooked(TensorDict({"input": rows}, batch_size=4))
    assert float(found["relevance_gap"].abs().max()) < 1e-10
    torch.testing.assert_close(found["attr", "input"].sum((1, 2, 3)), net(rows)[:, 0])


class Residual(nn.Module):
    def __init__(self, as_module: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6, bias=False)
        self.sum = Sum() if as_module else None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) if self.sum is None else self.sum(x, self.inner(x))


def test_a_residual_sum_conserves_as_a_module_and_as_an_operator() -> None:
    data = TensorDict({"input": torch.randn(4, 6, dtype=F64)}, batch_size=4)
    found, net = {}, nn.Sequential(Residual(True), nn.Linear(6, 1, bias=False)).double()
    for as_module in (True, False):
        own = nn.Sequential(Residual(as_module), nn.Linear(6, 1, bias=False)).double()
        own.load_state_dict(net.state_dict())
        with LRP(rule_mapper=Uniform(Epsilon(0.0), epsilon=0.0), compute_relevance_gap=True).prepare(own) as hooked:
            found[as_module] = hooked(data.clone())
        assert float(found[as_module]["relevance_gap"].abs().max()) < 1e-10
    torch.testing.assert_close(found[True]["attr", "input"], found[False]["attr", "input"])


def test_a_policy_is_explained_from_the_logit_of_its_action() -> None:
    actor = categorical(nn.ReLU).double()
    data = actor(TensorDict({"observation": torch.randn(6, 6, dtype=F64)}, batch_size=6)).detach()
    with LRP(compute_relevance_gap=True).prepare(actor) as hooked:
        found = hooked.annotate(data)
        twin = pickle.loads(pickle.dumps(hooked))
        torch.testing.assert_close(twin.annotate(data)["attr", "observation"], found["attr", "observation"])
    with LRP(target=targets.chosen_logit()).prepare(actor) as hooked:
        torch.testing.assert_close(hooked.annotate(data)["attr", "observation"], found["attr", "observation"])


TARGETS = {
    "default": (None, lambda y: y),
    "logit": (logit(1), lambda y: y * torch.tensor([0, 1, 0])),
    "difference": (
        targets.Target("difference", lambda run: 2 * run.outputs["output"][..., 0] - run.outputs["output"][..., 2]),
        lambda y: y * torch.tensor([2, 0, -1]),
    ),
    "square": (targets.Target("square", lambda run: run.outputs["output"].square()), lambda y: 2 * y * y),
}


@pytest.mark.parametrize("name", TARGETS)
def test_relevance_starts_at_each_output_times_its_slope(name: str) -> None:
    target, start = TARGETS[name]
    net = relu_net(bias=False)
    x = torch.randn(5, 6, dtype=F64)
    mapper = Uniform(Epsilon(0.0), epsilon=0.0)
    with LRP(rule_mapper=mapper, target=target, compute_relevance_gap=True).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))
    # Without biases LRP-0 of one output is gradient times input; relevance is linear in where it starts.
    jacobian = torch.stack([torch.func.jacrev(lambda v: net(v))(row) for row in x])
    y = net(x).detach()
    shares = torch.where(y == 0, 0, start(y) / y)
    torch.testing.assert_close(found["attr", "input"], torch.einsum("bj,bji->bi", shares, jacobian) * x)
    if name != "square":
        assert float(found["relevance_gap"].abs().max()) < 1e-12


def test_a_policy_without_bias_is_complete_for_its_logit() -> None:
    net = relu_net(bias=False)
    module = TensorDictModule(net, in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical)
    data = actor(TensorDict({"observation": torch.randn(6, 6, dtype=F64)}, batch_size=6)).detach()
    with LRP(rule_mapper=Uniform(Epsilon(0.0), epsilon=0.0)).prepare(actor) as hooked:
        assert float(completeness_gap(hooked, hooked.annotate(data)).abs().max()) < 1e-12


class Parts(nn.Module):
    """Logits and means of three parts that an action is drawn from."""

    def __init__(self, width: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.layer = (3, *width), nn.Linear(4, 3 + 3 * torch.Size(width).numel(), bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, means = self.layer(x).tensor_split([3], -1)
        return logits, means.reshape(*x.shape[:-1], *self.shape)


@pytest.mark.parametrize("width", [(), (2,)])
def test_logits_of_what_a_continuous_action_is_drawn_from_are_no_choices(width: tuple[int, ...]) -> None:
    def mixture(logits: Tensor, means: Tensor) -> Distribution:
        return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(means, 1.0), len(width)))

    module = TensorDictModule(Parts(width), ["x"], ["logits", "means"]).double()
    actor = ProbabilisticActor(module, in_keys=["logits", "means"], distribution_class=mixture, return_log_prob=True)
    data = actor(TensorDict({"x": torch.randn(5, 4, dtype=torch.float64)}, 5)).detach()
    # Of a linear net without biases relevance is the gradient times the input.
    with Saliency(multiply_by_inputs=True).prepare(actor) as hooked:
        expected = hooked.annotate(data.clone())["attr", "x"]
    with LRP(rule_mapper=Uniform(Epsilon(0.0), epsilon=0.0)).prepare(actor) as hooked:
        found = hooked.annotate(data.clone())["attr", "x"]
    torch.testing.assert_close(found, expected)


def test_a_start_of_ones_where_asked() -> None:
    net = relu_net(bias=False)
    data = TensorDict({"input": torch.randn(5, 6, dtype=F64)}, batch_size=5)

    def chosen(outputs, _):
        return TensorDict(out=outputs["output"][..., 1], batch_size=outputs.batch_size)

    mapper = Uniform(Epsilon(0.0), epsilon=0.0)
    ones = LRP(rule_mapper=mapper, init_attr_targets=chosen, init_attr_grads=lambda t, _: t.apply(torch.ones_like))
    with ones.prepare(net) as hooked:
        found = hooked(data.clone())["attr", "input"]
    torch.testing.assert_close(found.sum(-1), torch.ones(5, dtype=F64))


def test_the_weights_and_neighbours_are_untouched() -> None:
    net = relu_net(bias=True)
    before = {name: (id(p), p._version, p.grad) for name, p in net.named_parameters()}
    forwards = [vars(child).get("forward") for child in net.modules()]
    data = TensorDict({"input": torch.randn(5, 6, dtype=F64)}, batch_size=5)
    both = Compose(LRP(target=logit(0)), LRP(rule_mapper=EpsilonPlus(), target=logit(0), attribution_key="second"))
    with both.prepare(net) as hooked:
        hooked(data.clone())
    assert {name: (id(p), p._version, p.grad) for name, p in net.named_parameters()} == before
    assert [vars(child).get("forward") for child in net.modules()] == forwards


def test_what_has_no_rule_is_refused() -> None:
    with pytest.raises(SiteError, match=r"no rule for the module '0' \(LSTM\).*rule_mapper="):
        LRP().prepare(nn.Sequential(nn.LSTM(3, 4))).__enter__()
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1))
    with pytest.raises(SiteError, match="Softmax"):
        LRP().prepare(net).__enter__()
    with LRP(skip_modules=lambda name, module: isinstance(module, nn.Softmax)).prepare(net) as hooked:
        hooked(TensorDict({"input": torch.randn(2, 3)}, batch_size=2))
    with pytest.raises(InputError, match="alpha - beta must be 1"):
        AlphaBeta(2.0, 2.0)
    with pytest.raises(InputError, match="one shape"):
        Pass().share(nn.Linear(2, 3), (torch.zeros(1, 2),), torch.zeros(1, 3))
    with pytest.raises(InputError, match="not linear"):
        Epsilon().share(nn.Tanh(), (torch.zeros(1, 2),), torch.zeros(1, 2))
    with LRP().prepare(relu_net(True)) as hooked, torch.inference_mode():
        with pytest.raises(InputError, match="inference_mode"):
            hooked(TensorDict({"input": torch.randn(2, 6, dtype=F64)}, batch_size=2))


@pytest.mark.parametrize("run", ["@0", "@1", "@-1", "@-2", "@all"])
def test_relevance_of_each_run(run: str) -> None:
    """Layers without biases hand on all of it: what a run has adds up to the output."""
    one, two, head = (nn.Linear(4, size, bias=False, dtype=torch.float64) for size in (4, 4, 1))
    act = nn.Tanh()
    net, data = nn.Sequential(one, act, two, act, head), TensorDict({"input": torch.randn(6, 4).double()}, [6])
    with LRP(input_modules=[f"1{run}"]).prepare(net) as hooked:
        found = hooked(data)["attr", f"1{run}"]
    last = net[:4](data["input"]) * head.weight
    if run in ("@1", "@-1"):
        torch.testing.assert_close(found, last, atol=1e-4, rtol=1e-4)
    else:
        by_run = found.unbind(1) if run == "@all" else [found]
        for one_run in by_run:
            torch.testing.assert_close(one_run.sum(-1), last.sum(-1), atol=1e-3, rtol=1e-3)

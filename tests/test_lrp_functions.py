"""LRP of what a forward computes without modules, and of layers that are called otherwise.

The oracle is conservation in float64 without biases, the relevance of the same network written with modules, and a
network's share-out written by hand.
"""

from __future__ import annotations

import gc
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import ConvNet, NormalParamExtractor, ProbabilisticActor, TanhDelta
from torchrl.modules.models.models import DuelingMlpDQNet

from tdhook_rl import LRP, Compose, SteeringVectors
from tdhook_rl.attribution.lrp_cuts import Graph, LookForCuts
from tdhook_rl.attribution.lrp_rules import AlphaBeta, Epsilon, Gamma, Pass, Rule, Sum, Uniform, WSquare
from tdhook_rl.errors import InputError, SiteError

F64 = torch.float64
W = 6


def exact() -> Uniform:
    return Uniform(Epsilon(0.0), epsilon=0.0)


class Block(nn.Module):
    """A piece of a forward, and all that it may use."""

    def __init__(self, middle: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.middle = middle
        self.lin, self.other = nn.Linear(W, W, bias=False), nn.Linear(W, W, bias=False)
        self.relu, self.in_place, self.drop = nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.sum, self.normed = Sum(), nn.utils.parametrizations.weight_norm(nn.Linear(W, W, bias=False))
        self.raw = nn.Parameter(torch.randn(W, W))
        self.register_buffer("scale", torch.randn(W))

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self, x)


def statement(net: Block, x: Tensor) -> Tensor:
    h = net.lin(x)
    net.in_place(h)
    return h


def in_place(act: Callable[[Tensor, Tensor], object]) -> Callable[[Block, Tensor], Tensor]:
    def middle(net: Block, x: Tensor) -> Tensor:
        h = net.lin(x)
        act(h, x)
        return h

    return middle


def filled(net: Block, x: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    found += net.lin(x)
    found[:, 1:4] -= x[:, 2:5]
    return found.add_(x, alpha=2)


def standardised(net: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().mean() + 1
    return net.lin(x / scale)


def loop(net: Block, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x + F.relu(net.lin(x))
    return x


def symlog(net: Block, x: Tensor) -> Tensor:
    h = net.lin(x)
    return torch.sign(h) * torch.log1p(h.abs())


def square(net: Block, x: Tensor) -> Tensor:
    h = net.lin(x)
    return h * h + h**2


CONSERVED: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "residual": lambda net, x: x + net.lin(x),
    "difference": lambda net, x: net.lin(x) - 0.3 * x,
    "stack and sum": lambda net, x: torch.stack([net.lin(x), x, net.other(x)]).sum(0),
    "sum()": lambda net, x: sum([x, net.lin(x)]),
    "minus the mean": lambda net, x: net.lin(x) - x.mean(-1, keepdim=True),
    "cumulative sum": lambda net, x: x.cumsum(-1),
    "scaled": lambda net, x: net.lin(x * net.scale / 255),
    "standardised": standardised,
    "F.relu": lambda net, x: F.relu(net.lin(x)),
    "tanh": lambda net, x: net.lin(x).tanh(),
    "clamp": lambda net, x: net.lin(x).clamp(min=0),
    "gelu": lambda net, x: F.gelu(net.lin(x)),
    "softplus": lambda net, x: F.softplus(net.lin(x)),
    "symlog": symlog,
    "square": square,
    "loop": loop,
    "reused": lambda net, x: net.relu(net.lin(net.relu(net.lin(x)))),
    "keyword": lambda net, x: net.lin(input=net.relu(input=x)),
    ".forward": lambda net, x: net.lin.forward(net.relu.forward(x)),
    "F.linear": lambda net, x: F.linear(x, net.lin.weight),
    "F.linear by keyword": lambda net, x: F.linear(weight=net.lin.weight, input=x),
    "matmul": lambda net, x: x @ net.raw,
    "einsum": lambda net, x: torch.einsum("bi,ij->bj", x, net.raw),
    "F.conv1d": lambda net, x: F.conv1d(x[:, None], net.raw[:1, None, :3], padding=1)[:, 0],
    "average": lambda net, x: F.avg_pool1d(x[:, None], 3, 1, 1)[:, 0],
    "interpolated": lambda net, x: F.interpolate(x[:, None], size=W, mode="linear")[:, 0],
    "cat": lambda net, x: torch.cat([net.lin(x)[:, :2], x[:, 2:]], -1),
    "torus": lambda net, x: F.conv1d(F.pad(x[:, None], (1, 2), mode="circular"), net.raw[:1, None, :4])[:, 0],
    "diagonals": lambda net, x: (
        x.diag_embed().sum(1) + torch.stack([torch.block_diag(*row[:, None, None]) for row in x]).sum(2)
    ),
    "narrowed": lambda net, x: torch.cat([torch.narrow_copy(x, 1, 1, 3), x[:, 3:]], 1),
    "where": lambda net, x: torch.where(x > 0, x, net.lin(x)),
    "maximum": lambda net, x: torch.maximum(x, net.lin(x)),
    "max": lambda net, x: torch.stack([x, net.lin(x)]).max(0).values,
    "masked": lambda net, x: net.lin(x).masked_fill(x > 0, 0.0),
    "softmax beside": lambda net, x: (x.softmax(-1), net.lin(x))[1],
    "dropout": lambda net, x: net.drop(net.lin(x)),
    "F.dropout": lambda net, x: F.dropout(net.lin(x), 0.4, net.training),
    "statement": statement,
    "h += x": in_place(lambda h, x: h.add_(x)),
    "h *= c": in_place(lambda h, x: h.mul_(-2).div_(3)),
    "relu_": in_place(lambda h, x: h.relu_()),
    "F.relu in place": in_place(lambda h, x: F.relu(h, inplace=True)),
    "a part in place": in_place(lambda h, x: h[:, :3].relu_()),
    "written into": in_place(lambda h, x: h.__setitem__((slice(None), slice(2)), x[:, 2:4])),
    "buffer": filled,
    "index_put": lambda net, x: torch.index_put(net.lin(x), (torch.arange(4)[:, None], torch.arange(2)), x[:, 2:4]),
    "scatter": lambda net, x: net.lin(x).scatter(1, torch.tensor([[0, 4]] * 4), x[:, 2:4]),
    "select_scatter": lambda net, x: net.lin(x).select_scatter(x[:, 0], 1, 3),
}


def gap(net: nn.Module, x: Tensor, **options: object) -> float:
    with LRP(rule_mapper=exact(), **options).prepare(net) as hooked:
        torch.manual_seed(3)
        first = hooked(TensorDict({"input": x.clone()}, batch_size=len(x)))
        torch.manual_seed(3)
        again = hooked(TensorDict({"input": x.clone()}, batch_size=len(x)))
    torch.testing.assert_close(first["attr", "input"], again["attr", "input"])
    torch.manual_seed(3)
    torch.testing.assert_close(first["output"], net(x.clone()))
    attribution, output = first["attr", "input"].detach(), first["output"].detach()
    total = attribution.flatten(1).sum(-1) - output.flatten(1).sum(-1)
    return float(total.abs().max() / (attribution.abs().max() + output.abs().max() + 1e-30))


@pytest.mark.parametrize("name", CONSERVED)
def test_relevance_is_conserved_through(name: str) -> None:
    net = nn.Sequential(Block(CONSERVED[name]), nn.ReLU(), nn.Linear(W, 2, bias=False)).double()
    assert gap(net, torch.randn(4, W, dtype=F64)) < 1e-9


def test_a_pass_is_gone_when_its_results_are() -> None:
    # What a node of a graph holds, and holds the node by its graph, no garbage collection of Python's finds.
    before = sum(type(one) is Graph for one in gc.get_objects())
    for middle in CONSERVED.values():
        with LRP().prepare(nn.Sequential(Block(middle), nn.ReLU(), nn.Linear(W, 2))) as hooked:
            hooked(TensorDict({"input": torch.randn(4, W)}, batch_size=4))
    del hooked
    gc.collect()
    assert sum(type(one) is Graph for one in gc.get_objects()) == before


def test_relevance_is_conserved_through_random_networks() -> None:
    draw = random.Random(0)
    # The softplus of an entry that was masked is a constant, which keeps its share.
    names = [name for name in CONSERVED if name != "softplus"]
    for _ in range(40):
        middles = [CONSERVED[draw.choice(names)] for _ in range(draw.randint(2, 5))]
        net = nn.Sequential(*map(Block, middles), nn.Linear(W, 2, bias=False)).double()
        assert gap(net, torch.randn(4, W, dtype=F64)) < 1e-6


REFUSED: dict[str, tuple[Callable[[Block, Tensor], Tensor], str]] = {
    "gate": (lambda net, x: net.lin(x) * torch.sigmoid(net.other(x)), r"product \(mul\)"),
    "attention": (lambda net, x: (x[:, :, None] @ net.lin(x)[:, None, :]).sum(-1), r"product \(matmul\)"),
    "softmax": (lambda net, x: net.lin(x).softmax(-1), "softmax"),
    "norm": (lambda net, x: x / x.norm(dim=-1, keepdim=True), r"quotient \((div|true_divide)\)"),
    "layer_norm": (lambda net, x: F.layer_norm(net.lin(x), (W,)), "layer_norm"),
    "in place": (in_place(lambda h, x: h.mul_(x)), r"[mM]ul"),
    "sdpa": (
        lambda net, x: F.scaled_dot_product_attention(x[:, None], net.lin(x)[:, None], x[:, None])[:, 0],
        "scaled_dot_product_attention",
    ),
    "logsumexp": (lambda net, x: x - x.logsumexp(-1, keepdim=True), "logsumexp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_linear_in_several_tensors_is_refused_by_name(name: str) -> None:
    middle, said = REFUSED[name]
    net = nn.Sequential(Block(middle), nn.Linear(W, 2)).double()
    with LRP().prepare(net) as hooked, pytest.raises(InputError, match=f"no rule for .*{said}"):
        hooked(TensorDict({"input": torch.randn(3, W, dtype=F64)}, batch_size=3))


def test_a_refusal_names_the_module_and_skipping_it_takes_its_gradient() -> None:
    middle = REFUSED["gate"][0]
    net = nn.Sequential(nn.Linear(W, W, bias=False), Block(middle), nn.Linear(W, 1, bias=False)).double()
    x = torch.randn(3, W, dtype=F64)
    with LRP().prepare(net) as hooked, pytest.raises(InputError, match=r"'1' \(Block\)"):
        hooked(TensorDict({"input": x}, batch_size=3))
    method = LRP(rule_mapper=exact(), skip_modules=lambda name, module: name.startswith("1"), input_modules=["0", "1"])
    with method.prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=3))["attr"]
    at = net[0](x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(net[1](at), at, found["1"])
    torch.testing.assert_close(found["0"], expected)


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@torch.jit.script
def scripted(x: Tensor, y: Tensor) -> Tensor:
    return x * y + x


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("middle", [lambda net, x: Opaque.apply(x), lambda net, x: scripted(net.lin(x), x)])
def test_what_cannot_be_seen_is_refused(middle: Callable) -> None:
    net = nn.Sequential(Block(middle), nn.Linear(W, 1)).double()
    with LRP().prepare(net) as hooked, pytest.raises(InputError, match=r"no rule for .*(Opaque|CppFunction|Add)"):
        hooked(TensorDict({"input": torch.randn(3, W, dtype=F64)}, batch_size=3))


@pytest.mark.parametrize("rule", [Epsilon(0.0), Gamma(0.3, 0.0), WSquare(), AlphaBeta(2.0, 1.0, 1e-9)])
@pytest.mark.parametrize("how", ["keyword", ".forward", "F.linear", "F.linear by keyword"])
def test_a_layer_has_its_rule_however_it_is_called(how: str, rule: Rule) -> None:
    found = []
    net = nn.Sequential(Block(CONSERVED[how]), nn.Linear(W, 2)).double()
    x = torch.randn(3, W, dtype=F64)
    for middle in (CONSERVED[how], lambda net, x: net.lin(x if how.startswith("F.linear") else net.relu(x))):
        net[0].middle = middle
        with LRP(rule_mapper=Uniform(names={"0.lin": rule})).prepare(net) as hooked:
            found.append(hooked(TensorDict({"input": x}, batch_size=3))["attr", "input"])
    torch.testing.assert_close(*found)


def test_a_residual_net_by_hand() -> None:
    """The relevance of x + W x, then a ReLU and a head, in matrices; the biases keep their share."""
    net = nn.Sequential(Block(lambda net, x: F.relu(x + net.lin(x) + net.scale)), nn.Linear(W, 1)).double()
    x = torch.randn(4, W, dtype=F64)
    with LRP(rule_mapper=exact()).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=4))["attr", "input"]
    weight, head = net[0].lin.weight.detach(), net[1].weight.detach()[0]
    for row in range(4):
        total = x[row] + weight @ x[row] + net[0].scale
        relevance = total.relu() * head  # of an output that is its sum plus the bias's share
        ratio = relevance / total
        expected = x[row] * ratio + x[row] * (weight.T @ ratio)
        torch.testing.assert_close(found[row], expected)


def test_plain_networks_are_not_run_function_by_function(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(W, W), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.1), nn.Linear(W, 1)).eval()
    with LRP().prepare(net) as hooked:
        hooked(TensorDict({"input": torch.randn(3, W)}, batch_size=3))
        assert not hooked._hooked.bound[0]._by_function
        # What is cut off is looked for once.
        monkeypatch.setattr(LookForCuts, "__torch_function__", lambda *_: pytest.fail("looked for again"))
        hooked(TensorDict({"input": torch.randn(3, W)}, batch_size=3))


def test_networks_of_torchrl() -> None:
    shaped = {"depth": 1, "num_cells": 8, "out_features": 4}
    conv = {"num_cells": [4], "kernel_sizes": 3, "strides": 1, "paddings": 0}
    net = DuelingMlpDQNet(
        out_features=3, mlp_kwargs_feature={"in_features": W, **shaped}, mlp_kwargs_output={"depth": 1, "num_cells": 8}
    ).double()
    with torch.no_grad():
        net(torch.randn(2, W, dtype=F64))
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    assert gap(net, torch.randn(4, W, dtype=F64)) < 1e-9
    maps = nn.Sequential(ConvNet(in_features=2, **conv), nn.Linear(4 * 16, 2, bias=False)).double()
    with torch.no_grad():
        for name, parameter in maps.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    assert gap(maps, torch.randn(3, 2, 6, 6, dtype=F64)) < 1e-9


def test_a_mean_from_a_parameter_extractor() -> None:
    net = nn.Sequential(nn.Linear(W, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False), NormalParamExtractor())
    module = TensorDictModule(net.double(), in_keys=["observation"], out_keys=["loc", "scale"])
    x = torch.randn(5, W, dtype=F64)

    def mean(outputs: TensorDict, _: TensorDict) -> TensorDict:
        return TensorDict(loc=outputs["loc"], batch_size=outputs.batch_size)

    with LRP(rule_mapper=exact(), init_attr_targets=mean).prepare(module) as hooked:
        data = hooked(TensorDict({"observation": x}, batch_size=5))
    torch.testing.assert_close(data["attr", "observation"].sum(-1), data["loc"].sum(-1))


def test_a_steering_vector_is_a_bias() -> None:
    net = nn.Sequential(nn.Linear(W, W, bias=False), nn.Linear(W, 1, bias=False)).double()
    vector = torch.randn(W, dtype=F64)
    x = torch.randn(3, W, dtype=F64)
    for order in (0, 1):
        methods = [LRP(rule_mapper=exact()), SteeringVectors({"0": vector}, alpha=1.0)]
        with Compose(*(methods if order else methods[::-1])).prepare(net) as hooked:
            data = hooked(TensorDict({"input": x}, batch_size=3))
        share = net(x)[:, 0]  # what the vector has added is its own share
        torch.testing.assert_close(data["attr", "input"].sum(-1), share)


def test_inner_activations_of_a_residual_net_and_copies_of_the_hooked_policy() -> None:
    net = nn.Sequential(Block(CONSERVED["residual"]), nn.ReLU(), nn.Linear(W, 2, bias=False)).double()
    x = torch.randn(3, W, dtype=F64)
    method = LRP(rule_mapper=exact(), inputs=["input"], input_modules=["0"], compute_relevance_gap=True)
    with method.prepare(net[:]) as hooked:
        data = hooked(TensorDict({"input": x}, batch_size=3))
        torch.testing.assert_close(data["attr", "0"].sum(-1), data["output"].sum(-1))
        torch.testing.assert_close(data["relevance_gap"], torch.zeros(3, dtype=F64))
    plain = nn.Sequential(nn.Linear(W, W), Sum(), nn.Linear(W, 1)).double()
    with LRP(rule_mapper=exact()).prepare(plain) as hooked:
        twin = pickle.loads(pickle.dumps(hooked))
        data = TensorDict({"input": x}, batch_size=3)
        torch.testing.assert_close(twin(data.clone())["attr", "input"], hooked(data.clone())["attr", "input"])


def test_own_rules_and_layers_of_torch_without_one() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    net = nn.Sequential(nn.Linear(W, W, bias=False), Doubles(), nn.Linear(W, 1, bias=False)).double()
    x = torch.randn(3, W, dtype=F64)

    def mapper(name: str, module: nn.Module) -> Rule | None:
        return Pass() if isinstance(module, Doubles) else exact()(name, module)

    with LRP(rule_mapper=mapper).prepare(net) as hooked:
        data = hooked(TensorDict({"input": x}, batch_size=3))
    torch.testing.assert_close(data["attr", "input"].sum(-1), data["output"].sum(-1), rtol=1e-4, atol=1e-5)
    for layer in (nn.GRU(W, W), nn.MultiheadAttention(W, 2), nn.LayerNorm(W), nn.TransformerEncoderLayer(W, 2)):
        with pytest.raises(SiteError, match="no rule for the module"):
            LRP().prepare(nn.Sequential(layer)).__enter__()


class Turned(torch.autograd.Function):
    """A function of the user's that gives a view of its input."""

    @staticmethod
    def forward(ctx, x):
        return x.flatten(0).view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("functional", [False, True])
def test_backward_hooks_that_look_stand_in_no_way_and_functions_of_views_are_named(functional: bool) -> None:
    def made(turned: bool = False) -> nn.Module:
        torch.manual_seed(0)
        act = (lambda net, x: F.relu(x)) if functional else (lambda net, x: net.relu(x))
        middle = (lambda net, x: Turned.apply(net.lin(x))) if turned else (lambda net, x: net.lin(act(net, x)))
        return nn.Sequential(nn.Linear(W, W), Block(middle), nn.Linear(W, 2)).double()

    x, found = torch.randn(3, W, dtype=F64), []
    for hooked_modules in ([], ["", "0", "1", "1.lin", "2"]):
        net, seen = made(), []
        for name in hooked_modules:
            net.get_submodule(name).register_full_backward_hook(lambda *_, seen=seen: seen.append(1))
        with LRP(rule_mapper=exact()).prepare(net) as hooked:
            found.append(hooked(TensorDict({"input": x}, batch_size=3))["attr", "input"])
        assert bool(seen) == bool(hooked_modules)
    torch.testing.assert_close(*found)
    with LRP().prepare(made(turned=True)) as hooked, pytest.raises(InputError, match=r"no rule for .*'Turned'"):
        hooked(TensorDict({"input": x}, batch_size=3))


CUT: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "detach": lambda net, x: net.lin(x) + (2 * x).detach()[:, :],
    "no_grad": lambda net, x: net.lin(x) - torch.no_grad()(lambda: net.other(x) * 2)(),
    "straight through": lambda net, x: x + (x.round() - x).detach(),
    "sign": lambda net, x: net.lin(x).add_(torch.sign(x)),
    "cut bias": lambda net, x: F.linear(x, net.raw, net.other(x).detach().mean(0)),
    "addmm": lambda net, x: torch.addmm(net.other(x.detach()), x, net.raw),
    "addmv": lambda net, x: torch.stack([torch.addmv(net.other(row.detach()), net.raw, row) for row in x]),
    "chosen weights": lambda net, x: net.lin(x) + F.embedding(x.argmax(-1), net.raw),
    "module": lambda net, x: net.sum(net.lin(x), net.other(x.detach())),
}
JOINED: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "cat": lambda net, x: torch.cat([net.lin(x)[:, :2], net.other(x).detach()[:, 2:]], -1),
    "cat of a layer": lambda net, x: torch.cat([net.lin(x)[:, :2], net.other(x.detach())[:, 2:]], -1),
    "cat of computed weights": lambda net, x: torch.cat([x[:, :2], net.normed(x.detach())[:, 2:]], -1),
    "cat under no_grad": lambda net, x: torch.cat([x[:, :2], torch.no_grad()(lambda: net.other(x))()[:, 2:]], -1),
    "comparison": lambda net, x: torch.cat([net.lin(x)[:, :2], (x > 0).to(x)[:, 2:]], -1),
    "one hot": lambda net, x: torch.cat([net.lin(x)[:, :3], F.one_hot(x.argmax(-1) % 3, 3).to(x)], -1),
    "stack": lambda net, x: torch.stack([net.lin(x), x.data], 1).sum(1),
    "where": lambda net, x: torch.where(x > 0, net.lin(x), x.detach()),
    "written": in_place(lambda h, x: h[:, 2:].copy_(x.detach()[:, 2:])),
    "written before": lambda net, x: written_before(net, x),
    "numpy": lambda net, x: net.lin(x) + torch.from_numpy(x.detach().numpy() + 1),
    "tolist": lambda net, x: net.lin(x) + torch.tensor(x.tolist(), dtype=x.dtype),
}
NOT_CUT: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "zeros of its shape": lambda net, x: torch.cat([net.lin(x)[:, :2], torch.zeros_like(x)[:, 2:]], -1),
    "a constant": lambda net, x: torch.cat([net.lin(x)[:, :2], x.new_zeros(len(x), W - 2)], -1),
    "chosen entries": lambda net, x: net.lin(x).gather(-1, x.argsort(-1)),
    "a mask": lambda net, x: net.lin(x) * (x > 0),
    "a gate": lambda net, x: net.lin(x) * net.other(x).detach().sigmoid(),
    "larger": lambda net, x: torch.maximum(net.lin(x), x.detach()),
    "looked at": lambda net, x: net.lin(x) if float(x.detach().norm()) > 0 else x,
    "counted": lambda net, x: net.lin(x) + 0 * net.scale.add_(x.detach().mean(0)),
}


def written_before(net: Block, x: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    found[:, :2] = net.other(x).detach()[:, :2]
    found[:, 2:] = net.lin(x)[:, 2:]
    return found


@pytest.mark.parametrize("name", [*CUT, *JOINED])
def test_a_share_that_is_cut_off_from_the_inputs_is_said(name: str) -> None:
    net = nn.Sequential(Block((CUT | JOINED)[name]), nn.Linear(W, 1)).double()
    words = "adds a value" if name in CUT else "joins what it computes|hands a value to numpy"
    with LRP().prepare(net) as hooked:
        for _ in range(2):  # not only the first time
            with pytest.warns(UserWarning, match=rf"'0.*' \(.*\) ({words}) .* cut off"):
                hooked(TensorDict({"input": torch.randn(3, W, dtype=F64)}, batch_size=3))


@pytest.mark.parametrize("name", NOT_CUT)
def test_what_keeps_no_share_is_not_said_to(name: str) -> None:
    net = nn.Sequential(Block(NOT_CUT[name]), nn.Linear(W, 1, bias=False)).double()
    with LRP(rule_mapper=exact()).prepare(net) as hooked:
        data = hooked(TensorDict({"input": torch.randn(3, W, dtype=F64)}, batch_size=3))
    torch.testing.assert_close(data["attr", "input"].sum(-1), data["output"].sum(-1))


def test_a_squashed_deterministic_action() -> None:
    net = nn.Sequential(nn.Linear(W, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)).double()
    module = TensorDictModule(net, in_keys=["observation"], out_keys=["param"])
    actor = ProbabilisticActor(module, in_keys=["param"], distribution_class=TanhDelta)
    with LRP(rule_mapper=exact()).prepare(actor) as hooked:
        data = hooked.annotate(actor(TensorDict({"observation": torch.randn(5, W, dtype=F64)}, batch_size=5)))
    torch.testing.assert_close(data["attr", "observation"].sum(-1), data["action"].sum(-1))


def test_under_vmap_it_is_refused() -> None:
    net = nn.Linear(W, 1)
    with LRP().prepare(net) as hooked, pytest.raises(InputError, match="vmap"):
        torch.vmap(lambda x: hooked(TensorDict({"input": x}, batch_size=[]))["attr", "input"])(torch.randn(3, W))

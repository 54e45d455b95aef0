"""Policies that work in place: on what they are given, on what a module put out, and by statements."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tdhook_rl import (
    ActivationCaching,
    ActivationPatching,
    Compose,
    DirectionalAblation,
    HookedModule,
    IntegratedGradients,
    Saliency,
    SteeringVectors,
    targets,
)
from tdhook_rl.attribution import Occlusion
from tdhook_rl.latent import StateSubtraction
from tdhook_rl.sweeps import attribution_patching, find_circuit
from tests.policies import CASES, FEATURES

ONE, ROWS = targets.logit(0), 5


class Sums(nn.Module):
    """A block that adds in place to what a module put out."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace, self.first, self.last = inplace, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.inplace:
            y += x
            y *= 2
        else:
            y = 2 * (y + x)
        return self.last(y.sin())


class Net(nn.Module):
    """The same function, written out of place, as statements in place, and in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        inplace = how != "usual"
        self.first, self.act, self.last = nn.Linear(4, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 3)
        self.block = nn.Sequential(nn.ELU(inplace=inplace))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "usual":
            skip = h + 1
            y = self.block(self.act(h) + skip)
        elif self.how == "statements":
            skip = h + 1
            self.act(h)
            y = h + skip
            self.block(y)
        else:  # the same object by its new name
            skip = h + 1
            y = self.act(input=h)
            y = self.block(y + skip)
        return self.last(y)


def nets() -> list[Net]:
    made = [Net(how) for how in ("usual", "statements", "returned")]
    for one in made[1:]:
        one.load_state_dict(made[0].state_dict())
    return made


SITES = ("first", "act", "block", "block.0", "last")
GUARDS = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def methods(site: str) -> dict[str, Any]:
    vector = torch.linspace(-1, 1, 3 if site == "last" else 8)
    return {
        "steering": SteeringVectors({site: vector}),
        "ablation": DirectionalAblation({site: vector}),
        "steered and explained": Compose(
            SteeringVectors({site: vector}), ActivationCaching(site), Saliency(target=ONE, when="step")
        ),
        "cached and steered": Compose(ActivationCaching(site), SteeringVectors({site: vector})),
        "leaf": Saliency(target=ONE, when="step", input_modules=[site], inputs=["observation"]),
        "path": IntegratedGradients(target=ONE, when="step", baseline=0.0, n_steps=4, input_modules=[site]),
    }


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("method", methods("act"))
def test_what_acts_on_a_module_acts_on_what_flows_on(method: str, site: str, guard: str) -> None:
    x, found = torch.randn(ROWS, 4), []
    for net in nets():
        with methods(site)[method].prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
            for _ in range(2):
                with GUARDS[guard]():
                    one = hooked(TensorDict({"observation": x.clone()}, [ROWS]))
            found.append(one)
    for other in found[1:]:
        for key, value in found[0].exclude("computed").items(True, True):
            torch.testing.assert_close(other[key], value)


@pytest.mark.parametrize("site", SITES)
def test_runs_override_and_differentiate_what_flows_on(site: str) -> None:
    x, found = torch.randn(ROWS, 4), []
    for net in nets():
        hooked = HookedModule.from_module(net, in_keys=["observation"], out_keys=["logits"])
        data = TensorDict({"observation": x.clone()}, [ROWS])
        with hooked.run(data) as run:
            run.set(site, torch.full((ROWS, 3 if site == "last" else 8), 0.5))
        again = TensorDict({"observation": x.clone()}, [ROWS])
        with hooked.run(again, target=lambda d: d["logits"][:, 0]) as run:
            value, gradient = run.get(site), run.get_grad_output(site)
        found.append((data["logits"], value.resolve(), gradient.resolve()))
        hooked.restore()
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one)


@pytest.mark.parametrize("guard", GUARDS)
def test_sums_in_place_behind_a_module(guard: str) -> None:
    x, found = torch.randn(ROWS, 4), []
    nets = [Sums(inplace) for inplace in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    method = Compose(
        ActivationCaching("first"),
        SteeringVectors({"first": torch.ones(4)}),
        Saliency(target=ONE, when="step", input_modules=["first"], inputs=["observation"]),
    )
    for net in nets:
        with method.prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked, GUARDS[guard]():
            found.append(hooked(TensorDict({"observation": x.clone()}, [ROWS])))
    for key, value in found[0].exclude("computed").items(True, True):
        torch.testing.assert_close(found[1][key], value)
    torch.testing.assert_close(found[1]["cache", "first"], nets[0].first(x).detach())


def test_patching_with_the_clean_activation_restores_the_output() -> None:
    x = torch.randn(ROWS, 4)
    for net in nets():
        clean = TensorDict({"observation": x, ("patched", "observation"): torch.randn(ROWS, 4)}, [ROWS])
        with ActivationPatching(["act"]).prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
            found = hooked(clean)
        assert found["logits"].isfinite().all()


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x /= 255.0
        x.sub_(x.mean(-1, keepdim=True))
        return self.net(x)


class ScalesNested(TensorDictModuleBase):
    in_keys = [("agents", "observation")]  # noqa: RUF012
    out_keys = ["logits"]  # noqa: RUF012

    def __init__(self, inner: Scales) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, data: TensorDict) -> TensorDict:
        data["agents", "observation"].div_(255.0)
        x = data["agents", "observation"]
        x -= x.mean(-1, keepdim=True)
        return data.set("logits", self.inner.net(x))


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("when", ["step", "batch"])
def test_observations_scaled_in_place(when: str, nested: bool, guard: str) -> None:
    inner = Scales()
    key: Any = ("agents", "observation") if nested else "observation"
    policy = ScalesNested(inner) if nested else TensorDictModule(inner, ["observation"], ["logits"])
    x = torch.rand(ROWS, 4) * 255

    def right(x: Tensor) -> Tensor:
        x = x / 255.0
        return inner.net(x - x.mean(-1, keepdim=True))[:, 0]

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(right(leaf).sum(), leaf)
    removed = [right(x) - right(x.clone().index_fill_(1, torch.tensor([i]), 0.0)) for i in range(4)]
    method = Compose(
        Saliency(target=ONE, when=when),
        Saliency(target=ONE, when=when, multiply_by_inputs=True, attribution_key="product"),
        IntegratedGradients(target=ONE, baseline=0.0, n_steps=40, when=when, attribution_key="path"),
        Occlusion(target=ONE, when=when, attribution_key="occluded"),
        ActivationCaching("inner.net.1" if nested else "module.net.1"),
    )
    with method.prepare(policy) as hooked:
        for _ in range(2):
            data = TensorDict({key: x.clone()}, [ROWS])
            with GUARDS[guard]():
                found = hooked(data) if when == "step" else hooked.annotate(data, on_mismatch="ignore")
            torch.testing.assert_close(found["attr"][key], gradient)
            torch.testing.assert_close(found["product"][key], gradient * x)
            torch.testing.assert_close(found["occluded"][key], torch.stack(removed, -1).detach())
            plain = TensorDict({key: x.clone()}, [ROWS])
            policy(plain)
            expected = plain if when == "step" else TensorDict({key: x}, [ROWS])
            torch.testing.assert_close(data[key], expected[key])


class Measured(nn.Module):
    """A class of the user's over layers of which one saves its statistics for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


def _slopes(way: str) -> Callable[[nn.Module, list[TensorDict]], list[Tensor]]:
    def found(net: nn.Module, states: list[TensorDict]) -> list[Tensor]:
        table = attribution_patching(net, *states, "first", metric="output", way=way, chunk_size=3, compare=0)
        return [table.estimates]

    def by_hand(net: nn.Module, states: list[TensorDict]) -> list[Tensor]:
        base, source = (net.first(one["input"]).detach() for one in (states if way == "noising" else states[::-1]))
        leaf = base.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net.last(net.norm(leaf).tanh()).sum(), leaf)
        return [(slope * (source - base)).T]

    found.by_hand = by_hand
    return found


def _circuit(net: nn.Module, states: list[TensorDict]) -> list[Tensor]:
    return [find_circuit(net, *states, "first", metric="output", chunk_size=3, controls=0).importance["first"]]


def _importance(net: nn.Module, states: list[TensorDict]) -> list[Tensor]:
    lost, gained = (_slopes(way).by_hand(net, states)[0] for way in ("noising", "denoising"))
    gap = (net(states[0]["input"]) - net(states[1]["input"])).detach().squeeze(-1)
    return [((gained - lost) * gap.sign()).sum(-1) / (2 * gap.abs().sum())]


def _trained(net: nn.Module, states: list[TensorDict]) -> list[Tensor]:
    method = StateSubtraction("norm", lambda rows: rows.set("input", rows["input"] * 0.5), alpha=0.5)
    with method.prepare(net) as hooked:
        sum(hooked(states[0].clone())["output"].sum() for _ in range(6)).backward()
    return [net.first.weight.grad]


def _trained_by_hand(net: nn.Module, states: list[TensorDict]) -> list[Tensor]:
    own = copy.deepcopy(net)
    x = states[0]["input"]
    middle = torch.lerp(own.norm(own.first(x)), own.norm(own.first(x * 0.5)), 0.5)
    return list(torch.autograd.grad(6 * own.last(middle.tanh()).sum(), own.first.weight))


_circuit.by_hand, _trained.by_hand = _importance, _trained_by_hand


@pytest.mark.parametrize(
    "found",
    [_slopes("noising"), _slopes("denoising"), _circuit, _trained],
    ids=["noising", "denoising", "circuit", "training"],
)
def test_later_passes_leave_what_a_graph_has_saved(found: Any) -> None:
    """A backward pass may come after other passes: it finds the buffers that its own forward read."""
    torch.manual_seed(2)
    net = Measured().double().eval()
    states = [TensorDict({"input": torch.randn(8, 4, dtype=torch.float64)}, 8) for _ in range(2)]
    torch.testing.assert_close(found(net, states), found.by_hand(net, states), rtol=1e-9, atol=1e-12)


class Copies(TorchDispatchMode):
    """Counts copies of tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.clone.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["categorical", "one_hot", "tanh_normal", "value", "actor_value"])
def test_what_is_given_to_layers_that_leave_it_is_not_copied(name: str) -> None:
    """``inplace`` of a TensorDictModule says where its outputs go, not that it works on its inputs."""
    case, method = CASES[name], Saliency(when="step", target=targets.output_sum())
    policy, data = case.build(), case.data(7)
    with method.prepare(policy) as hooked, Copies((7, FEATURES)) as copies:
        hooked(data.clone(False))
    assert not copies.count
    replaced = copy.deepcopy(policy)
    first = next(path for path, child in replaced.named_modules() if isinstance(child, nn.Linear))
    replaced.set_submodule(first, nn.Sequential(nn.ELU(inplace=True), replaced.get_submodule(first)))
    kept = data["observation"].clone()
    with (
        Saliency(when="step", target=targets.output_sum()).prepare(replaced) as hooked,
        Copies((7, FEATURES)) as copies,
    ):
        hooked(data.clone())
    assert copies.count
    assert torch.equal(data["observation"], kept)


class Doubled(nn.Module):
    """A module of one's own, which may write into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class DoubledWithSum(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.sum()


class DoubledInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class AsItIs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Around(nn.Module):
    """Calls a module as a statement, for what it returns, or beside what it is given."""

    def __init__(self, act: nn.Module, how: str) -> None:
        super().__init__()
        self.first, self.act, self.last, self.how = nn.Linear(4, 3), act, nn.Linear(3, 3), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.act(h)
        y = y[0] if isinstance(y, tuple) else y
        return self.last(h if self.how == "statement" else y if self.how == "returned" else h + y)

    def right(self, x: Tensor) -> Tensor:
        """With 1 added to what the module puts out, by hand."""
        h = self.first(x)
        y = h.relu() if isinstance(self.act, nn.ReLU) else h if isinstance(self.act, AsItIs) else 2 * h
        in_place = isinstance(self.act, (DoubledInPlace, nn.ReLU))
        h = y + 1 if in_place else h
        return self.last(h if self.how == "statement" else y + 1 if self.how == "returned" else h + y + 1)


ACTS: dict[str, Callable[[], nn.Module]] = {
    "new": Doubled, "several": DoubledWithSum, "in place": DoubledInPlace, "as it is": AsItIs,
    "a layer in place": lambda: nn.ReLU(inplace=True), "dropout in place": lambda: Dropped(0.5, inplace=True).eval(),
}  # fmt: skip


class Dropped(nn.Dropout, AsItIs):
    """A layer that is told to work in place and leaves its input as it is in eval mode."""


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("how", ["statement", "returned", "beside"])
@pytest.mark.parametrize("name", ACTS)
def test_modules_of_ones_own_are_steered_where_they_write(name: str, how: str, guard: str) -> None:
    net, x = Around(ACTS[name](), how).eval(), torch.randn(ROWS, 4)
    with SteeringVectors({"act": torch.ones(3)}).prepare(net) as hooked, GUARDS[guard]():
        for given in (x, x.clone()):  # a tensor that counts its versions, and, under inference, one that does not
            found = hooked(TensorDict({"input": given}, [ROWS]))["output"]
            torch.testing.assert_close(found, net.right(x))


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["new", "several", "a layer in place"])
def test_modules_of_ones_own_are_steered_in_one_graph(name: str, backend: str, guard: str) -> None:
    torch.compiler.reset()
    net, x = Around(ACTS[name](), "returned"), torch.randn(ROWS, 4)
    with SteeringVectors({"act": torch.ones(3)}).prepare(net) as hooked, GUARDS[guard]():
        compiled = torch.compile(hooked, fullgraph=True, backend=backend)
        for given in (x, x.clone()):
            torch.testing.assert_close(compiled(TensorDict({"input": given}, [ROWS]))["output"], net.right(x))


@pytest.mark.parametrize("guard", GUARDS)
def test_what_a_graph_cannot_see_is_run_without_it_or_told(guard: str) -> None:
    torch.compiler.reset()
    net, x = Around(DoubledInPlace(), "beside"), torch.randn(ROWS, 4)
    with SteeringVectors({"act": torch.ones(3)}).prepare(net) as hooked, GUARDS[guard]():
        found = torch.compile(hooked, backend="eager")(TensorDict({"input": x.clone()}, [ROWS]))["output"]
        torch.testing.assert_close(found, net.right(x))
        torch.compiler.reset()
        with pytest.raises(Exception, match="let it return a new tensor"):
            torch.compile(hooked, fullgraph=True, backend="eager")(TensorDict({"input": x.clone()}, [ROWS]))

"""A compiled call is explained as it ran: in one graph if a second pass can be in it, else uncompiled, or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, targets
from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.errors import InputError
from tdhook_rl.replaying.traceable import require_traceable, trace_risks


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(4))
        self.calls, self.seen = 0, [torch.zeros(5, 4)]


class Normalises(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.net((x - self.mean).tanh())


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x / self.calls).tanh()


class Keeps(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.net(x - self.seen[-2]).tanh()


class Drops(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(nn.functional.dropout(x.tanh(), 0.5, self.training))


class Draws(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net((x + torch.randn_like(x)).tanh())


class Asks(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.noisy(x))

    def noisy(self, x: Tensor) -> Tensor:
        return (x * torch.rand(5, 1)).tanh()


class Plain(Base):
    """Local lists, in-place work on what it has computed, a dropout that is off."""

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for scale in (1.0, 2.0):
            found.append(self.dropout(x).tanh().mul(scale).mul_(2.0))
        return self.net(sum(found))


class Hooks(Base):
    """MuZero's scaling of gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(halved(x.tanh() * self.net.weight.sum()))


def halved(hidden: Tensor) -> Tensor:
    if hidden.requires_grad:
        hidden.register_hook(lambda slope: slope * 0.5)
    return hidden


class Checkpoints(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(checkpoint(torch.tanh, x, use_reentrant=False))


class CheckpointsByName(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(getattr(torch.utils.checkpoint, "check" + "point")(torch.tanh, x, use_reentrant=False))


STATEFUL = {
    "buffer": (Normalises, "state"),
    "counter": (Counts, "'calls'"),
    "list": (Keeps, "'seen'"),
    "functional dropout": (Drops, "dropout"),
    "noise": (Draws, "randn_like"),
    "noise in a method": (Asks, "'rand'"),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)), "dropout"),
    "spectral norm": (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)), nn.Tanh()), "buffers"),
}
#: What the compiler takes for something else, see below.
MISTAKEN = {"tensor hook": (Hooks, "'register_hook'"), "checkpoint": (Checkpoints, "'checkpoint'")}


@pytest.mark.parametrize("name", [*STATEFUL, *MISTAKEN])
def test_what_code_shows_is_named(name: str) -> None:
    build, word = (STATEFUL | MISTAKEN)[name]
    policy = nn.Sequential(nn.Linear(4, 4), build())
    with pytest.raises(InputError, match=word):
        require_traceable(policy.modules(), trace_risks(policy))


class Breaks(Base):
    """Its graph breaks inside a module that is called inside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Leaves())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.inner(x).tanh())


class Leaves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(torch.tensor(x.detach().numpy()).abs().max().item())


def _of_forward(method: Callable, policy: nn.Module, run: Callable) -> list[TensorDict]:
    """What three calls of the hooked policy give, each from its own noise."""
    found = []
    with method().prepare(policy, in_keys=["x"], out_keys=["logits"]) as hooked, torch.no_grad():
        called = run(hooked)
        for seed in range(3):
            torch.manual_seed(seed)
            data = TensorDict({"x": torch.randn(5, 4)}, [5])
            found.append(called(data))
    return found


def _require_same(found: list[TensorDict], expected: list[TensorDict]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert set(one.keys(True, True)) == set(other.keys(True, True))
        for key, value in other.items(True, True):
            if not is_stamp(key):  # one number for each context
                torch.testing.assert_close(one[key], value, equal_nan=True)


METHODS = {
    "saliency": lambda: Saliency(target=targets.logit(0), when="step"),
    "integrated gradients": lambda: IntegratedGradients(
        target=targets.logit(0), when="step", n_steps=4, baseline=0.0, compute_convergence_delta=True
    ),
    "caching": lambda: ActivationCaching(".*"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [Plain, Drops])
def test_what_neither_writes_nor_draws_is_one_graph_after_one_that_broke(build: Callable, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dynamo's, where it breaks a graph
        _of_forward(METHODS[method], Breaks(), lambda hooked: torch.compile(hooked, backend="eager"))
    policy = build().eval()
    graphs = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(module)
        return module.forward

    expected = _of_forward(METHODS[method], policy, lambda hooked: hooked)
    found = _of_forward(METHODS[method], policy, lambda hooked: torch.compile(hooked, fullgraph=True, backend=backend))
    _require_same(found, expected)
    assert 1 <= len(graphs) <= 2  # the second, where what a call finds is known from then on


# One after the other in one process, since what the compiler knows of one policy meets the next.
@pytest.mark.filterwarnings("ignore")  # of dynamo's, where it breaks a graph
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*STATEFUL, "graph that breaks"])
def test_a_call_that_is_no_whole_graph_runs_uncompiled_and_is_explained_as_it_ran(name: str, method: str) -> None:
    torch.manual_seed(0)
    policy = Breaks() if name == "graph that breaks" else STATEFUL[name][0]()
    twin = copy.deepcopy(policy)
    expected = _of_forward(METHODS[method], twin, lambda hooked: hooked)
    found = _of_forward(METHODS[method], policy, lambda hooked: torch.compile(hooked, backend="eager"))
    _require_same(found, expected)
    for one, other in zip(policy.state_dict().items(), twin.state_dict().items(), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(one[1], other[1])


@pytest.mark.filterwarnings("ignore")  # of dynamo's, where it breaks a graph
@pytest.mark.parametrize("name", ["counter", "functional dropout", "spectral norm"])
def test_its_gradient_is_that_of_the_forward_that_ran(name: str) -> None:
    torch.manual_seed(0)
    policy = STATEFUL[name][0]()
    twin = copy.deepcopy(policy)
    with METHODS["saliency"]().prepare(policy, in_keys=["x"], out_keys=["logits"]) as hooked, torch.no_grad():
        compiled = torch.compile(hooked, backend="eager")
        for seed in range(3):
            x = torch.randn(5, 4).requires_grad_()
            torch.manual_seed(seed)
            with torch.enable_grad():
                y = twin(x)
                gradient = torch.autograd.grad(y[:, 0].sum(), x)[0]
            torch.manual_seed(seed)
            found = compiled(TensorDict({"x": x.detach()}, [5]))
            torch.testing.assert_close(found["logits"], y.detach())
            torch.testing.assert_close(found["attr", "x"], gradient)


@pytest.mark.filterwarnings("ignore")  # of dynamo's, and that it goes on uncompiled
@pytest.mark.parametrize(
    ("build", "own"),
    [(Hooks, False), (Hooks, True), (Checkpoints, False), (Checkpoints, True), (CheckpointsByName, True)],
)
def test_what_a_compiler_is_wrong_about_runs_uncompiled_and_leaves_nothing(build: Callable, own: bool) -> None:
    policy, x = build().eval(), torch.randn(5, 4)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(policy(leaf)[:, 0].sum(), leaf)
    saliency = Saliency(target=targets.logit(0), when="step", compile={"backend": "eager"} if own else False)
    for grad in (False, True):
        with Compose(saliency, ActivationCaching("net")).prepare(policy, in_keys=["x"], out_keys=["logits"]) as hooked:
            called = hooked if own else torch.compile(hooked, backend="eager")
            for _ in range(2):  # the first call left the second without results
                with torch.set_grad_enabled(grad):
                    found = called(TensorDict({"x": x.clone()}, [5]))
                torch.testing.assert_close(found["attr", "x"], slope)
                torch.testing.assert_close(found["cache", "net"], policy(x).detach())
    # The compiler had left hooks on saved tensors off, in the whole process.
    again = x.clone().requires_grad_()
    torch.autograd.grad(Checkpoints()(again).sum(), again)

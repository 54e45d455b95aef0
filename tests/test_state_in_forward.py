"""Policies that write in their forward: they are run as often as the user runs them, and explained by what they saw."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from torchrl.modules import BatchRenorm1d

from tdhook_rl import Compose, IntegratedGradients, Saliency, Scheduled, targets
from tdhook_rl.attribution import Occlusion
from tdhook_rl.errors import MismatchError

ONE = targets.logit(0)


class Buffer(nn.Module):
    """A running mean that is written in place, in place past autograd, or replaced."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(4))
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        moved = x.detach().mean(0) if x.ndim > 1 else x.detach()
        if self.how == "in place":
            self.mean.lerp_(moved, 0.5)
        elif self.how == "data":
            self.mean.data.add_(moved)
        elif self.how == "view":
            self.mean[:2] += moved[:2]
        else:
            self.mean = 0.5 * self.mean + moved
        return self.linear((x - self.mean).tanh())


class Parameter(nn.Module):
    """A running mean that is kept as a parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mean = nn.Linear(4, 3), nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.data.mul_(0.5).add_(x.detach().mean(0))
        return self.linear((x - self.mean).tanh())


class Defaults:
    """Of which an object holds nothing at first: what a forward adds to it begins in the class."""

    calls = 0


class Attribute(nn.Module):
    """State of some kind in attributes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 3)
        self.count: Any = 0
        self.frames = collections.deque([torch.zeros(5, 4)] * 2, maxlen=2)
        self.cache: dict[str, Any] = {"scales": [1.0]}
        self.helper = SimpleNamespace(scale=1.0, inner=SimpleNamespace(seen=[]))
        self.defaults = Defaults()
        self.kept = torch.ones(4)
        self.pair: Any = (torch.ones(5, 4), torch.ones(5, 4))
        self.table = np.ones(4, dtype=np.float32)
        self.store = TensorDict({"last": torch.ones(4)})
        self.beside = [nn.BatchNorm1d(4, affine=False)]
        self.generator = torch.Generator().manual_seed(0)
        self.numpy, self.python = np.random.default_rng(0), random.Random(0)

    def scale(self, x: Tensor) -> Any:
        match self.kind:
            case "counter":
                self.count += 1
                return self.count
            case "deque":
                self.frames.append(x.detach())
                return 1 + self.frames[0]
            case "dictionary":
                self.cache["scales"].append(self.cache["scales"][-1] + 1)
                self.cache.setdefault("first", x.detach().clone())
                return self.cache["scales"][-1] + self.cache["first"]
            case "helper":
                self.helper.scale *= 1.5
                self.helper.inner.seen.append(self.helper.scale)
                return sum(self.helper.inner.seen)
            case "defaults of a class":
                self.defaults.calls += 1
                return self.defaults.calls
            case "tensor in place":
                self.kept.mul_(1.5)
                return self.kept
            case "tuple":
                self.pair = (self.pair[1], x.detach() + self.pair[0])
                return self.pair[0]
            case "tuple in place":
                self.pair[1].add_(x.detach())
                return self.pair[1]
            case "array":
                self.table += 1
                return torch.from_numpy(self.table.copy())
            case "tensordict":
                self.store["last"] = self.store["last"] * 1.5
                return self.store["last"]
            case "module in a list":
                return 1 + self.beside[0](x.detach())
            case "generator":
                return torch.rand(4, generator=self.generator)
            case "numpy generator":
                return float(self.numpy.random())
            case "python generator":
                return self.python.random()
            case "global generators":
                return random.random() + float(np.random.rand()) + torch.rand(4)
            case _:
                raise AssertionError(self.kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x * self.scale(x)).tanh())


KINDS = (
    "counter", "deque", "dictionary", "helper", "defaults of a class", "tensor in place", "tuple", "tuple in place",
    "array", "tensordict", "module in a list", "generator", "numpy generator", "python generator", "global generators",
)  # fmt: skip


def layered(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 3))


POLICIES: dict[str, Callable[[], nn.Module]] = {
    **{f"buffer {how}": lambda how=how: Buffer(how) for how in ("in place", "data", "view", "replaced")},
    **{kind: lambda kind=kind: Attribute(kind) for kind in KINDS},
    "parameter": Parameter,
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)),
    "no running statistics": lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)),
    "batch renorm": lambda: nn.Sequential(nn.Linear(4, 8), BatchRenorm1d(8, warmup_steps=2), nn.Linear(8, 3)),
    "spectral norm of old": lambda: layered(spectral_norm(nn.Linear(4, 8))),
    "spectral norm": lambda: layered(parametrizations.spectral_norm(nn.Linear(4, 8))),
}


def seeded() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def streams() -> list[Any]:
    return [torch.rand(()).item(), random.random(), np.random.rand()]


@pytest.mark.filterwarnings("ignore:.*moved together")
@pytest.mark.filterwarnings("ignore:.*forward writes")
@pytest.mark.filterwarnings("ignore:.*normalises by its batch")
@pytest.mark.parametrize("mode", ["no_grad", "inference", "grad"])
@pytest.mark.parametrize("name", POLICIES)
def test_outputs_and_attributions_are_those_of_a_plain_twin(name: str, mode: str) -> None:
    torch.manual_seed(0)
    policy = POLICIES[name]()
    twin, inside = copy.deepcopy(policy), copy.deepcopy(policy)
    batches = [torch.randn(5, 4) + step for step in range(6)]
    guard = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}[mode]
    rights, plain = [], []
    seeded()
    for x in batches:
        leaf = x.clone().requires_grad_()
        output = twin(leaf)
        plain.append(output.detach())
        rights.append(torch.autograd.grad(output[:, 0].sum(), leaf)[0])
    after = streams()
    method = Compose(
        Saliency(target={"one": ONE, "two": ONE}, when="step"),
        IntegratedGradients(target=ONE, baseline=0.0, n_steps=4, when="step", attribution_key="path"),
        Scheduled(Occlusion(target=ONE, when="step", attribution_key="occluded"), every=2),
    )
    seeded()
    with method.prepare(inside, in_keys=["observation"], out_keys=["logits"]) as hooked:
        for x, logits, right in zip(batches, plain, rights, strict=True):
            with guard():
                found = hooked(TensorDict({"observation": x.clone()}, [5]))
            torch.testing.assert_close(found["logits"], logits)
            for target in ("one", "two"):
                torch.testing.assert_close(found["attr", target, "observation"], right, rtol=1e-4, atol=1e-5)
        assert streams() == after
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(inside.state_dict()[key], value)


@pytest.mark.filterwarnings("ignore:.*moved together")
@pytest.mark.parametrize("name", POLICIES)
def test_annotate_leaves_what_a_policy_holds(name: str) -> None:
    torch.manual_seed(0)
    policy = POLICIES[name]()
    x = torch.randn(5, 4)
    policy(x)
    before = copy.deepcopy(policy.state_dict())
    method = Compose(
        Saliency(target=ONE, when="batch"),
        IntegratedGradients(target=ONE, baseline=0.0, n_steps=4, when="batch", attribution_key="path"),
    )
    with method.prepare(policy, in_keys=["observation"], out_keys=["logits"]) as hooked:
        seeded()
        then = hooked.hooked_root.__dict__.get("count"), repr(hooked.hooked_root.__dict__.get("cache"))
        for _ in range(3):
            hooked.annotate(TensorDict({"observation": x}, [5]), on_mismatch="ignore")
        assert (hooked.hooked_root.__dict__.get("count"), repr(hooked.hooked_root.__dict__.get("cache"))) == then
        found = streams()
        seeded()
        assert streams() == found
        for (key, value), own in zip(before.items(), policy.state_dict().values(), strict=True):
            assert torch.equal(own, value), key
        assert all(a is b for a, b in zip(policy.buffers(), hooked.hooked_root.buffers(), strict=True))


def test_what_a_forward_writes_is_named_where_rows_differ() -> None:
    with Saliency(target=ONE, when="batch").prepare(
        Buffer("in place"), in_keys=["observation"], out_keys=["logits"]
    ) as hooked:
        rows = hooked(TensorDict({"observation": torch.randn(5, 4)}, [5]))
        hooked(TensorDict({"observation": torch.randn(5, 4) + 3}, [5]))
        with pytest.raises(MismatchError, match=r"forward writes 'mean' \(Buffer\)"):
            hooked.annotate(rows, on_mismatch="raise")
        with pytest.raises(MismatchError, match="not known"):
            hooked.annotate(rows.select("observation"), on_mismatch="raise")
        with pytest.warns(UserWarning, match=r"forward writes 'mean' \(Buffer\)"):
            hooked.annotate(rows)


class Views(nn.Module):
    """Views of a buffer, of a plain tensor or of a weight, in a container, by which the forward writes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear, self.plain = how, nn.Linear(4, 3), torch.zeros(4)
        self.register_buffer("total", torch.zeros(4))
        total = self.total[:2]
        self.list, self.helper, self.store = (
            [total],
            SimpleNamespace(view=total),
            TensorDict({"view": total, "name": "a text"}),
        )
        self.cache, self.weight = {"view": self.plain[:2]}, (self.linear.weight.data[0, :2],)

    def forward(self, x: Tensor) -> Tensor:
        view = {
            "list": self.list[0],
            "helper": self.helper.view,
            "dictionary": self.cache["view"],
            "tensordict": self.store["view"],
            "weight": self.weight[0],
        }[self.how]
        view += x.detach().mean(0)[:2]
        return self.linear((x * (1 + self.total + self.plain)).tanh())


class OverArray(nn.Module):
    """A running sum of which an array and a tensor, or two arrays, are views; one is written, the other is read."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(4, 3)
        self.array = np.zeros(4, dtype=np.float32)
        if how.startswith("buffer"):
            self.register_buffer("total", torch.zeros(4))
            self.array = self.total.numpy()
        else:
            self.total = torch.from_numpy(self.array)
        self.half, self.kept = self.array[:2], {"total": [self.total]}

    def forward(self, x: Tensor) -> Tensor:
        moved = x.detach().mean(0)
        if "half" in self.how:
            self.half += moved[:2].numpy()
        elif "array" in self.how:
            self.array += moved.numpy()
        else:
            self.total += moved
        read = {"tensor": self.total, "list": self.kept["total"][0]}.get(self.how.rpartition(" ")[2])
        return self.linear((x * (torch.from_numpy(self.array) if read is None else read)).tanh())


OVER_ARRAY = (
    "array, then tensor", "tensor, then array", "half, then tensor", "half, then array", "array, then list",
    "tensor, then list", "buffer: array, then tensor", "buffer: tensor, then array",
)  # fmt: skip
ONE_MEMORY = {
    **{how: lambda how=how: OverArray(how) for how in OVER_ARRAY},
    **{f"view in a {how}": lambda how=how: Views(how) for how in ("list", "helper", "dictionary", "tensordict")},
    "view of a weight": lambda: Views("weight"),
}


@pytest.mark.filterwarnings("ignore:.*forward writes")
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("how", ONE_MEMORY)
def test_views_of_one_memory_stay_so(how: str, when: str) -> None:
    torch.manual_seed(0)
    policy, twin = ONE_MEMORY[how](), ONE_MEMORY[how]()
    twin.load_state_dict(policy.state_dict())
    method = Compose(
        Saliency(target=ONE, when=when),
        IntegratedGradients(target=ONE, baseline=0.0, n_steps=4, when=when, attribution_key="path"),
    )
    with method.prepare(policy, in_keys=["observation"], out_keys=["logits"]) as hooked:
        for _ in range(5):
            leaf = torch.randn(5, 4).requires_grad_()
            output = twin(leaf)
            (right,) = torch.autograd.grad(output[:, 0].sum(), leaf)
            with torch.no_grad():
                found = hooked(TensorDict({"observation": leaf.detach().clone()}, [5]))
            torch.testing.assert_close(found["logits"], output.detach())
            if when == "step":
                torch.testing.assert_close(found["attr", "observation"], right)
            else:
                hooked.annotate(found, on_mismatch="ignore")
            assert torch.equal(policy.total, twin.total)


@pytest.mark.parametrize("how", ["in place", "view", "replaced"])
def test_a_step_on_meta_has_no_numbers_to_compare(how: str) -> None:
    policy = Buffer(how).to("meta")
    with Saliency(target=ONE, when="step").prepare(policy, in_keys=["observation"], out_keys=["logits"]) as hooked:
        found = hooked(TensorDict({"observation": torch.empty(5, 4, device="meta")}, [5]))
    assert found["attr", "observation"].shape == (5, 4)


class Late(nn.Module):
    """Writes from some call on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mean = nn.Linear(4, 3), nn.Buffer(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 100:
            self.mean += x.detach().mean(0)
        return self.linear((x - self.mean).tanh())


def test_state_that_is_first_written_late() -> None:
    policy = Late()
    twin = copy.deepcopy(policy)
    with Saliency(target=ONE, when="step").prepare(policy, in_keys=["observation"], out_keys=["logits"]) as hooked:
        for step in range(12):
            leaf = (torch.randn(5, 4) + (20 if step > 8 else 0)).requires_grad_()
            (right,) = torch.autograd.grad(twin(leaf)[:, 0].sum(), leaf)
            with torch.no_grad():
                found = hooked(TensorDict({"observation": leaf.detach()}, [5]))
            torch.testing.assert_close(found["attr", "observation"], right)
    assert torch.equal(policy.mean, twin.mean)


def test_rows_that_meet_are_explained_together_and_said_to_be() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double().eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    with Occlusion(target=ONE, when="step").prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
        with pytest.warns(UserWarning, match=r"statistics in '0' \(BatchNorm1d\)"):
            found = hooked(TensorDict({"observation": x}, [6]))["attr", "observation"]
    without = torch.stack([net(x.clone().index_fill_(1, torch.tensor([i]), 0.0))[:, 0] for i in range(4)], -1)
    torch.testing.assert_close(found, (net(x)[:, :1] - without).detach())


class Centred(nn.Module):
    """Rows meet in arithmetic, which no class shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x - x.mean(0)).tanh())


def test_rows_that_meet_in_arithmetic() -> None:
    net = Centred().double()
    x = torch.randn(6, 4, dtype=torch.float64)
    method = IntegratedGradients(target=ONE, baseline=0.0, n_steps=20, when="step")
    with method.prepare(net, in_keys=["observation"], out_keys=["logits"]) as hooked:
        with pytest.warns(UserWarning, match="depends on the other rows"):
            found = hooked(TensorDict({"observation": x}, [6]))["attr", "observation"]
    change = net(x)[:, 0].sum() - net(torch.zeros_like(x))[:, 0].sum()
    torch.testing.assert_close(found.sum(), change.detach())

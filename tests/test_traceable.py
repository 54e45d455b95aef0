"""A compiled call is explained as it ran: in one graph if a second pass can be in it, else uncompiled, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import Saliency, targets
from tdhook_rl.errors import InputError
from tdhook_rl.traceable import require_traceable, signs


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


@pytest.mark.parametrize("name", STATEFUL)
def test_what_code_shows_is_named(name: str) -> None:
    build, word = STATEFUL[name]
    policy = nn.Sequential(nn.Linear(4, 4), build())
    with pytest.raises(InputError, match=word):
        require_traceable(policy, signs(policy))


@pytest.mark.parametrize("build", [Plain, Drops])
def test_what_neither_writes_nor_draws_stays_one_graph(build: Callable) -> None:
    policy = build().eval()
    method = Saliency(target=targets.logit(0), when="step")
    with method.prepare(policy, in_keys=["x"], out_keys=["logits"]) as hooked, torch.no_grad():
        data = TensorDict({"x": torch.randn(5, 4)}, [5])
        found = torch.compile(hooked, fullgraph=True, backend="eager")(data.clone())
        torch.testing.assert_close(found["attr", "x"], hooked(data.clone())["attr", "x"])


@pytest.mark.filterwarnings("ignore")  # of dynamo's, where it breaks a graph
@pytest.mark.parametrize("name", ["counter", "functional dropout", "spectral norm"])
def test_what_does_is_refused_or_runs_uncompiled_and_is_explained_as_it_ran(name: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    policy = STATEFUL[name][0]()
    twin = copy.deepcopy(policy)
    method = Saliency(target=targets.logit(0), when="step")
    with method.prepare(policy, in_keys=["x"], out_keys=["logits"]) as hooked, torch.no_grad():
        compiled = torch.compile(hooked, backend="eager")
        for seed in range(3):
            x = torch.randn(5, 4).requires_grad_()
            torch.manual_seed(seed)
            with torch.enable_grad():
                y = twin(x)
                gradient = torch.autograd.grad(y[:, 0].sum(), x)[0]
            torch.manual_seed(seed)
            try:
                found = compiled(TensorDict({"x": x.detach()}, [5]))
            except InputError:  # where the graph was broken after the call had begun
                return
            torch.testing.assert_close(found["logits"], y.detach())
            torch.testing.assert_close(found["attr", "x"], gradient)

"""Networks that causal tests are tried on in float64, and what is computed in them by plain forward hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tests.zoo_entry import Entry

__all__ = ["NETWORKS", "PAIRS", "Attention", "Network", "edited", "states_of", "zoo_states"]

PAIRS = 5


def zoo_states(entry: Entry, policy: nn.Module, seed: int) -> TensorDictBase:
    """Inputs of a policy of the zoo, without what it puts out."""
    torch.manual_seed(seed)
    found = entry.env(policy, PAIRS, seed=seed).rollout(2, break_when_any_done=False)[:, -1]
    return found.exclude("next", *(key for key in policy.out_keys if key not in policy.in_keys))


class Attention(nn.Module):
    """A residual block of attention written by hand: tokens of 4 features, 2 heads; and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(4))
        self.mixed, self.out, self.head = nn.Identity(), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        query, key, value = (
            one(tokens).unflatten(-1, (2, 2)).transpose(-3, -2) for one in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-1, -2)).softmax(-1)
        tokens = tokens + self.out(self.mixed((weights @ value).transpose(-3, -2).flatten(-2)))
        return self.head(tokens.tanh().mean(-2))


class Step(nn.Module):
    """One step of a GRU from a state that is read off the input."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x[..., :3], x[..., 3:]))


class Agents(nn.Module):
    """Two agents who share a network, and what becomes of both."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.mix = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.shared(x).flatten(-2).tanh())


class InPlace(nn.Module):
    """Works in place on what its layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).add_(0.3).tanh_()
        return self.head(self.second(hidden).sin_())


class Keeping(nn.Linear):
    """Keeps what it gives, for others to read."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Kept(nn.Module):
    """Reads a layer twice: what it gives, in which something may be put in, and what it has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same, self.head = Keeping(4, 6), nn.Identity(), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        kept, self.first.last = self.first.last, None
        return self.head(self.same(hidden).tanh() + hidden.sin() * kept.cos())


def _replacing() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.Identity(), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ELU(inplace=True), nn.Linear(5, 1)
    )


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(-3), nn.Linear(36, 1)
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))


@dataclass(frozen=True)
class Network:
    """A network, the shape of its input, its sites with the axis of their units, and a number for each state."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sites: dict[str, int]

    def build(self) -> nn.Module:
        torch.manual_seed(7)
        return self.make().double()

    def metric(self, output: Tensor) -> Tensor:
        return output.squeeze(-1).sin() + output.squeeze(-1)


NETWORKS = {
    "mlp": Network(_mlp, (4,), {"0": -1, "1": -1, "3": -1}),
    "conv": Network(_conv, (2, 5, 5), {"0": -3, "3": -3}),
    "attention": Network(Attention, (3, 4), {"embed": -1, "mixed": -1, "out": -1}),
    "gru step": Network(Step, (8,), {"cell": -1}),
    "agents": Network(Agents, (2, 3), {"shared.1": -1}),
    "in place": Network(InPlace, (4,), {"first": -1, "second": -1}),
    "layers in place": Network(_replacing, (4,), {"0": -1, "1": -1, "2": -1, "3": -1, "4": -1}),
    "kept beside": Network(Kept, (4,), {"first": -1, "same": -1}),
}


def states_of(network: Network, count: int, seed: int) -> Tensor:
    return torch.randn(count, *network.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edited(
    net: nn.Module, path: str, x: Tensor, edit: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """What a copy of a network puts out where the output of a module is changed, and that output as it was."""
    own = copy.deepcopy(net)
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        seen.append(output.detach().clone())
        return None if edit is None else edit(output)

    own.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        return own(x), seen[0]

"""Random networks of the things that people write in a forward, and what they compute, written a second time.

Every module here has a ``forward``, which is what the library is given, and a ``value``, which computes the same out of
place and calls ``at(module, output)`` behind every module, so that an oracle can see and change what a module puts out.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WIDTH", "At", "Policy", "compute", "random_network"]

WIDTH = 4
At = Callable[[nn.Module, Tensor], Tensor]


def compute(module: nn.Module, x: Tensor, at: At) -> Tensor:
    """What a module puts out, out of place; ``at`` sees the output of each module and may replace it."""
    if isinstance(module, Node):
        y = module.value(x, at)
    elif isinstance(module, nn.Sequential):
        y = x
        for child in module:
            y = compute(child, y, at)
    elif isinstance(module, nn.Linear):
        y = F.linear(x, module.weight, module.bias)
    elif isinstance(module, nn.LayerNorm):
        y = F.layer_norm(x, module.normalized_shape, module.weight, module.bias)
    elif isinstance(module, nn.ReLU):
        y = torch.relu(x)
    elif isinstance(module, nn.Tanh):
        y = torch.tanh(x)
    elif isinstance(module, nn.Dropout):
        y = F.dropout(x, module.p, module.training)
    else:
        raise TypeError(type(module).__name__)
    return at(module, y)


class Node(nn.Module):
    """A module that says what it computes a second time.

    Attributes:
        conserves: whether relevance of this module adds up to its output where it has no bias.
    """

    conserves = True

    def value(self, x: Tensor, at: At) -> Tensor:
        raise NotImplementedError


class Residual(Node):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)

    def value(self, x: Tensor, at: At) -> Tensor:
        return x + compute(self.block, x, at)


class ResidualInPlace(Residual):
    """The block ends in a linear layer, whose output autograd does not keep."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        out += x
        return out


class ReluStatement(Node):
    """A ReLU in place, of which the result is not used."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        self.relu(h)
        return h

    def value(self, x: Tensor, at: At) -> Tensor:
        return compute(self.relu, compute(self.block, x, at), at)


class Scaled(Node):
    def __init__(self, block: nn.Module, factor: float) -> None:
        super().__init__()
        self.block = block
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x / self.factor) * self.factor

    def value(self, x: Tensor, at: At) -> Tensor:
        return compute(self.block, x / self.factor, at) * self.factor


class Functional(Node):
    """An activation by function."""

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__()
        self.block = block
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        return {"relu": F.relu, "tanh": torch.tanh, "method": lambda v: v.relu(), "clamp": lambda v: v.clamp(min=0)}[
            self.name
        ](h)

    def value(self, x: Tensor, at: At) -> Tensor:
        h = compute(self.block, x, at)
        if self.name == "clamp":  # at 0 its slope is 1, that of a ReLU 0
            return h.clamp_min(0)
        return torch.tanh(h) if self.name == "tanh" else torch.relu(h)


class Gate(Node):
    conserves = False

    def __init__(self, block: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * torch.sigmoid(self.gate(x))

    def value(self, x: Tensor, at: At) -> Tensor:
        return compute(self.block, x, at) * torch.sigmoid(compute(self.gate, x, at))


class Branches(Node):
    """Two branches, added, or concatenated and mixed."""

    def __init__(self, left: nn.Module, right: nn.Module, joined: bool, bias: bool) -> None:
        super().__init__()
        self.left = left
        self.right = right
        self.mix = nn.Linear(2 * WIDTH, WIDTH, bias=bias) if joined else None

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return left + right if self.mix is None else self.mix(torch.cat([left, right], -1))

    def value(self, x: Tensor, at: At) -> Tensor:
        left, right = compute(self.left, x, at), compute(self.right, x, at)
        return left + right if self.mix is None else compute(self.mix, torch.cat([left, right], -1), at)


class Detached(Node):
    """One of two branches has no gradient."""

    conserves = False

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left = left
        self.right = right

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            right = self.right(x)
        return self.left(x) + right

    def value(self, x: Tensor, at: At) -> Tensor:
        right = compute(self.right, x, at).detach()
        return compute(self.left, x, at) + right


class Loop(Node):
    """A cell and an activation that run several times."""

    def __init__(self, cell: nn.Module, act: nn.Module, times: int) -> None:
        super().__init__()
        self.cell = cell
        self.act = act
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.act(self.cell(x))
        return x

    def value(self, x: Tensor, at: At) -> Tensor:
        for _ in range(self.times):
            x = compute(self.act, compute(self.cell, x, at), at)
        return x


class CalledOtherwise(Node):
    """A linear layer that is called by keyword, through its forward, or by its weight: no hook of it may run."""

    def __init__(self, bias: bool, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "keyword":
            return self.layer(input=x)
        if self.how == "forward":
            return self.layer.forward(x)
        return F.linear(x, self.layer.weight, self.layer.bias)

    def value(self, x: Tensor, at: At) -> Tensor:
        y = F.linear(x, self.layer.weight, self.layer.bias)
        return at(self.layer, y) if self.how == "keyword" else y


class Pair(Node):
    """An inner module that returns a tuple."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = _Two(block)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]

    def value(self, x: Tensor, at: At) -> Tensor:
        return at(self.inner, compute(self.inner.block, x, at))


class _Two(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.block(x), 7


class Stateful(Node):
    """A module that writes in its forward."""

    conserves = False


class Normaliser(Stateful):
    """A running mean in buffers, moved in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            rows = x.detach().reshape(-1, WIDTH)
            self.rows += len(rows)
            self.mean += (rows - self.mean).sum(0) / self.rows
        return x - self.mean

    def value(self, x: Tensor, at: At) -> Tensor:
        if self.training:
            rows = x.detach().reshape(-1, WIDTH)
            self.rows = self.rows + len(rows)
            self.mean = self.mean + (rows - self.mean).sum(0) / self.rows
        return x - self.mean


class Counter(Stateful):
    """A number in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.5 / self.calls)

    def value(self, x: Tensor, at: At) -> Tensor:
        return self.forward(x)


class Memory(Stateful):
    """The last means, in a deque, a list or an attribute."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.last: deque[Tensor] | list[Tensor] | Tensor = {
            "deque": deque([torch.zeros(WIDTH)], maxlen=2),
            "list": [torch.zeros(WIDTH)],
            "attribute": torch.zeros(WIDTH),
        }[kind]

    def forward(self, x: Tensor) -> Tensor:
        last = self.last if self.kind == "attribute" else self.last[-1]
        mean = x.detach().reshape(-1, WIDTH).mean(0)
        if self.kind == "attribute":
            self.last = mean
        elif self.kind == "deque":
            self.last.append(mean)
        else:
            self.last[-1] = mean
        return x + last

    def value(self, x: Tensor, at: At) -> Tensor:
        return self.forward(x)


class Policy(Node):
    """The network as a whole: features to logits.

    Attributes:
        in_place: the features are scaled in place.
    """

    def __init__(self, first: nn.Linear, body: nn.Module, head: nn.Linear, in_place: bool) -> None:
        super().__init__()
        self.first = first
        self.body = body
        self.head = head
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x /= 2
        return self.head(self.body(self.first(x)))

    def value(self, x: Tensor, at: At) -> Tensor:
        x = x / 2 if self.in_place else x
        return compute(self.head, compute(self.body, compute(self.first, x, at), at), at)

    def has(self, *kinds: type[nn.Module]) -> bool:
        return any(isinstance(child, kinds) for child in self.modules())


class _Grower:
    def __init__(self, rng: random.Random, kinds: str, bias: bool) -> None:
        self.rng = rng
        self.kinds = kinds
        self.bias = bias
        self.shared: list[nn.Module] = []

    def grow(self, depth: int) -> nn.Module:
        rng = self.rng
        if depth == 0 or rng.random() < 0.15:
            return self.leaf()
        kind = rng.choice(self._names())
        inner = depth - 1
        if kind == "sequence":
            return nn.Sequential(*(self.grow(inner) for _ in range(rng.randint(1, 3))))
        if kind == "residual":
            return Residual(self.grow(inner))
        if kind == "in place":
            return rng.choice((ResidualInPlace, ReluStatement))(self.ends_linear(inner))
        if kind == "scaled":
            return Scaled(self.grow(inner), rng.choice((0.5, 255.0, -3.0)))
        if kind == "functional":
            return Functional(self.grow(inner), rng.choice(("relu", "tanh", "method", "clamp")))
        if kind == "gate":
            return Gate(self.grow(inner), self.grow(inner))
        if kind == "branches":
            return Branches(self.grow(inner), self.grow(inner), rng.random() < 0.5, self.bias)
        if kind == "detached":
            return Detached(self.grow(inner), self.grow(inner))
        if kind == "loop":
            return Loop(self.leaf(), rng.choice((nn.Tanh(), nn.ReLU(), nn.ReLU(inplace=True))), rng.randint(2, 3))
        if kind == "called":
            return CalledOtherwise(self.bias, rng.choice(("keyword", "forward", "weight")))
        if kind == "pair":
            return Pair(self.grow(inner))
        if kind == "shared":
            if not self.shared or rng.random() < 0.4:
                self.shared.append(rng.choice((nn.Tanh(), nn.ReLU(), self.linear())))
            return nn.Sequential(self.leaf(), rng.choice(self.shared))
        if kind == "state":
            return rng.choice((Normaliser, Counter, *(lambda k=k: Memory(k) for k in ("deque", "list", "attribute"))))()
        if kind == "noise":
            return nn.Sequential(self.leaf(), nn.Dropout(0.4))
        raise ValueError(kind)

    def _names(self) -> list[str]:
        plain = ["sequence", "sequence", "residual", "scaled", "functional", "branches", "in place", "pair", "called"]
        more = {
            "reuse": ["loop", "shared", "shared"], "state": ["state", "state"], "noise": ["noise"],
            "arithmetic": ["gate", "detached"],
        }  # fmt: skip
        return plain + [name for kind, names in more.items() if kind in self.kinds for name in names]

    def linear(self) -> nn.Linear:
        return nn.Linear(WIDTH, WIDTH, bias=self.bias)

    def leaf(self) -> nn.Module:
        act = self.rng.choice((nn.Tanh, nn.ReLU, lambda: nn.ReLU(inplace=True), None, None))
        layers: list[nn.Module] = [self.linear()]
        if act is not None:
            layers.append(act())
        if self.rng.random() < 0.1 and self.bias:
            layers.append(nn.LayerNorm(WIDTH))
        return nn.Sequential(*layers) if len(layers) > 1 else layers[0]

    def ends_linear(self, depth: int) -> nn.Module:
        return nn.Sequential(self.grow(depth), self.linear())


def random_network(seed: int, kinds: str = "reuse state noise arithmetic") -> Policy:
    """A network of features to three logits, in float64 and training mode; the same for the same seed.

    Args:
        kinds: what it may have beside plain trees: ``"reuse"``, ``"state"``, ``"noise"``, ``"arithmetic"``.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    bias = rng.random() < 0.5
    body = _Grower(rng, kinds, bias).grow(rng.randint(1, 3))
    in_place = "state" in kinds and rng.random() < 0.2
    return Policy(nn.Linear(WIDTH, WIDTH, bias=bias), body, nn.Linear(WIDTH, 3, bias=bias), in_place).double()

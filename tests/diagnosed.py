"""Networks of many kinds, beside what they compute by hand in float64, and measures of that by their definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import GRUModule, LSTMModule, MultiAgentConvNet, MultiAgentMLP, QValueModule

Array = np.ndarray


@dataclass
class Kind:
    """A policy with a site.

    Attributes:
        policy: its last layer gives logits or action values.
        site: the path looked at.
        states: what it is asked about.
        activations: what the site computes now, ``(states, ...)``, as numpy.
        units: the same as ``(rows, units)``.
        outputs: the logits or values of the states, ``(states, actions)``.
        along: whether it is run along trajectories.
    """

    policy: nn.Module
    site: str
    states: TensorDict
    activations: Callable[[], Array]
    units: Callable[[Array], Array]
    outputs: Callable[[Array], Array]
    along: bool = False


def double(value: Tensor) -> Array:
    return value.detach().double().numpy()


def drawing(net: nn.Module, key: str = "observation") -> ProbabilisticTensorDictSequential:
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, [key], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical),
    )


def dense(x: Array, layer: nn.Linear) -> Array:
    return x @ double(layer.weight).T + double(layer.bias)


def mlp() -> Kind:
    net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(40, 4)
    return Kind(
        drawing(net), "module.0.module.1", TensorDict({"observation": x}, [40]),
        lambda: np.maximum(dense(double(x), net[0]), 0), lambda value: value, lambda value: dense(value, net[2]),
    )  # fmt: skip


def conv() -> Kind:
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 3))
    x = torch.randn(20, 2, 5, 5)

    def maps() -> Array:
        kernel, found = double(net[0].weight), np.zeros((20, 6, 3, 3))
        for row in range(3):
            for column in range(3):
                patch = double(x)[:, :, row : row + 3, column : column + 3]
                found[:, :, row, column] = np.einsum("nchw,ochw->no", patch, kernel) + double(net[0].bias)
        return np.maximum(found, 0)

    return Kind(
        drawing(net), "module.0.module.1", TensorDict({"observation": x}, [20]), maps,
        lambda value: value.transpose(0, 2, 3, 1).reshape(-1, 6),
        lambda value: dense(value.reshape(20, -1), net[3]),
    )  # fmt: skip


def recurrent(cell: str) -> Kind:
    """Three trajectories of eight steps; the second begins anew in the middle."""
    given = {"input_size": 4, "hidden_size": 7}
    if cell == "gru":
        keys = {"in_keys": ["observation", "h", "is_init"], "out_keys": ["f", ("next", "h")]}
        core: nn.Module = GRUModule(**given, **keys)
    else:
        keys = {"in_keys": ["observation", "h", "c", "is_init"], "out_keys": ["f", ("next", "h"), ("next", "c")]}
        core = LSTMModule(**given, **keys)
    head = nn.Linear(7, 3)
    policy = ProbabilisticTensorDictSequential(
        core, TensorDictModule(head, ["f"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical),
    )  # fmt: skip
    x, init = torch.randn(3, 8, 4), torch.zeros(3, 8, 1, dtype=torch.bool)
    init[:, 0], init[1, 4] = True, True
    memory = {name: torch.zeros(3, 8, 1, 7) for name in ("h", "c")}
    states = TensorDict({"observation": x, "is_init": init, **memory}, [3, 8])
    layer = core.gru if cell == "gru" else core.lstm

    def sigmoid(value: Array) -> Array:
        return 1 / (1 + np.exp(-value))

    def run() -> Array:
        w, u = double(layer.weight_ih_l0), double(layer.weight_hh_l0)
        b, d = double(layer.bias_ih_l0), double(layer.bias_hh_l0)
        found = np.zeros((3, 8, 7))
        for one in range(3):
            h = c = np.zeros(7)
            for step in range(8):
                if init[one, step]:
                    h = c = np.zeros(7)
                given, own = w @ double(x[one, step]) + b, u @ h + d
                if cell == "gru":
                    r, z = (sigmoid(given[n : n + 7] + own[n : n + 7]) for n in (0, 7))
                    n = np.tanh(given[14:] + r * own[14:])
                    h = (1 - z) * n + z * h
                else:
                    i, f, g, o = np.split(given + own, 4)
                    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                    h = sigmoid(o) * np.tanh(c)
                found[one, step] = h
        return found.reshape(24, 7)

    return Kind(
        policy, f"module.0.{cell}", states, run, lambda value: value, lambda value: dense(value, head), along=True
    )


def agents(shared: bool) -> Kind:
    """Three agents, of which each decides; Q-networks."""
    net = MultiAgentMLP(
        n_agent_inputs=4, n_agent_outputs=3, n_agents=3, centralized=False, share_params=shared, depth=1, num_cells=9,
        activation_class=nn.ReLU,
    )  # fmt: skip
    x = torch.randn(30, 3, 4)
    policy = TensorDictSequential(
        TensorDictModule(net, [("agents", "observation")], [("agents", "action_value")]),
        QValueModule(
            action_value_key=("agents", "action_value"), action_space="categorical",
            out_keys=[("agents", "action"), ("agents", "action_value"), ("agents", "chosen_action_value")],
        ),
    )  # fmt: skip

    def layer(value: Array, place: str) -> Array:
        weight, bias = (double(net.params[place, name]) for name in ("weight", "bias"))
        if shared:
            weight, bias = np.stack([weight] * 3), np.stack([bias] * 3)
        return np.einsum("nai,aoi->nao", value, weight) + bias

    return Kind(
        policy, "module.0.module._empty_net.1", TensorDict({("agents", "observation"): x}, [30]),
        lambda: np.maximum(layer(double(x), "0"), 0),
        lambda value: value.reshape(-1, 9) if shared else value.reshape(30, 27), lambda value: layer(value, "2"),
    )  # fmt: skip


def pixels_of_agents() -> Kind:
    """Agents with kernels of their own, which have channels of their own."""
    net = MultiAgentConvNet(
        n_agents=2, centralized=False, share_params=False, in_features=1, num_cells=[4], kernel_sizes=2, strides=1,
        activation_class=nn.ReLU,
    )  # fmt: skip
    x = torch.randn(20, 2, 1, 3, 3)

    def maps() -> Array:
        kernel, bias = double(net.params["0", "weight"]), double(net.params["0", "bias"])
        found = np.zeros((20, 2, 4, 2, 2))
        for row in range(2):
            for column in range(2):
                patch = double(x)[..., row : row + 2, column : column + 2]
                found[..., row, column] = np.einsum("nachw,aochw->nao", patch, kernel) + bias
        return np.maximum(found, 0)

    policy = TensorDictModule(net, [("agents", "pixels")], [("agents", "action_value")])
    return Kind(
        policy, "module._empty_net.1", TensorDict({("agents", "pixels"): x}, [20]), maps,
        lambda value: value.transpose(0, 3, 4, 1, 2).reshape(-1, 8), lambda value: value.reshape(20, 2, -1),
    )  # fmt: skip


KINDS: dict[str, Callable[[], Kind]] = {
    "mlp": mlp,
    "conv": conv,
    "gru": lambda: recurrent("gru"),
    "lstm": lambda: recurrent("lstm"),
    "agents, shared": lambda: agents(True),
    "agents apart": lambda: agents(False),
    "agents apart, pixels": pixels_of_agents,
}

# ------------------------------------------------------------------ measures by their definitions


def debiased_cka(a: Array, b: Array) -> float:
    """By the sums of Song et al. 2012, over kernels without their diagonals."""
    n = len(a)

    def hsic(k: Array, m: Array) -> float:
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        return (
            np.trace(k @ m) + one @ k @ one * (one @ m @ one) / (n - 1) / (n - 2) - 2 / (n - 2) * one @ k @ m @ one
        ) / (n * (n - 3))

    k, m = (value.reshape(n, -1) @ value.reshape(n, -1).T for value in (a, b))
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def dormant(units: Array, tau: float = 0.025) -> Array:
    sizes = np.abs(units).mean(0)
    return sizes <= tau * sizes.mean()


def ranks(value: Array, delta: float = 0.01) -> tuple[int, float, float]:
    s = np.linalg.svd(value.reshape(len(value), -1), compute_uv=False)
    shares = s / s.sum()
    held = shares[shares > 0]
    srank = next(k for k in range(1, len(s) + 1) if shares[:k].sum() >= 1 - delta - 1e-12)
    return srank, float(np.exp(-(held * np.log(held)).sum())), float((s**2).sum() / s[0] ** 2)


def divergence(before: Array, after: Array) -> Array:
    """KL of softmaxes, in each state."""

    def log_softmax(value: Array) -> Array:
        return value - np.log(np.exp(value - value.max(-1, keepdims=True)).sum(-1, keepdims=True)) - value.max(
            -1, keepdims=True
        )  # fmt: skip

    p, q = log_softmax(before), log_softmax(after)
    return (np.exp(p) * (p - q)).sum(-1)

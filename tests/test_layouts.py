"""The layout of a module's output is read where the module says it, also where two dimensions have one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tdhook_rl import (
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    Compose,
    DirectionalAblation,
    HookedModule,
    IntegratedGradients,
    ProbeReadout,
    Saliency,
    SteeringVectors,
)
from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing import LinearProbe

SIZES = [(6, 6), (6, 4), (4, 6), (1, 5), (5, 1)]  # rows and steps


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Sequences(nn.Module):
    """A sequence module, and a head that reads its last step (or its mean, of attention)."""

    def __init__(self, core: nn.Module, batch_first: bool) -> None:
        super().__init__()
        self.core, self.head, self.batch_first = core, nn.Linear(8, 2), True
        self.swaps = not batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.swaps else x
        h = self.core(x, x, x) if isinstance(self.core, nn.MultiheadAttention) else self.core(x)
        h = h[0] if isinstance(h, tuple) else h
        return self.head(h[-1] if self.swaps else h[:, -1])


CORES: dict[str, Callable[[bool], nn.Module]] = {
    "rnn": lambda first: nn.RNN(8, 8, batch_first=first),
    "gru": lambda first: nn.GRU(8, 8, num_layers=2, batch_first=first),
    "lstm": lambda first: nn.LSTM(8, 4, bidirectional=True, batch_first=first),
    "attention": lambda first: nn.MultiheadAttention(8, 2, batch_first=first),
    "layer": lambda first: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=first),
    "encoder": lambda first: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=first), 1, enable_nested_tensor=False
    ),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The same network with time first inside, and with the batch first."""
    turned, plain = Sequences(CORES[name](False), False), Sequences(CORES[name](True), True)
    plain.load_state_dict(turned.state_dict())
    return turned, plain


def called(hooked: Any, data: TensorDict, mode: str) -> TensorDict:
    if mode == "annotate":
        return hooked.annotate(data)
    if mode == "compiled":
        return torch.compile(hooked, fullgraph=True, backend="aot_eager")(data.clone())
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)():
        return hooked(data.clone())


METHODS: dict[str, Callable[[], Any]] = {
    "caching": lambda: ActivationCaching("core"),
    "steering of rows": lambda: SteeringVectors({"core": torch.arange(8.0)}, alpha="alpha"),
    "vectors of rows": lambda: SteeringVectors({"core": "vector"}),
    "function": lambda: SteeringVectors(
        modules_to_steer=["core"],
        steer_fn=lambda module_key, output: output * torch.arange(len(output)).reshape(-1, 1, 1),
    ),
    "ablation": lambda: DirectionalAblation({"core": torch.arange(8.0)}),
    "saliency": lambda: Saliency(input_modules=["core"], when="step"),
    "integrated gradients": lambda: IntegratedGradients(input_modules=["core"], baseline=0.0, n_steps=3),
    "patching": lambda: Compose(ActivationPatching(["core"]), ActivationCaching("head")),
    "addition": lambda: ActivationAddition(["core"]),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("core", CORES)
def test_time_first_and_batch_first_give_the_same(core: str, method: str, sizes: tuple[int, int]) -> None:
    rows, steps = sizes
    data = TensorDict({"input": torch.randn(rows, steps, 8)}, [rows])
    data["alpha"], data["vector"] = torch.arange(float(rows)), torch.randn(rows, 8)
    for key in ("patched", "positive", "negative"):
        data[key, "input"] = torch.randn(rows, steps, 8)
    found = []
    for net in pair(core):
        with METHODS[method]().prepare(net) as hooked:
            found.append([called(hooked, data, mode) for mode in ("no_grad", "inference_mode", "annotate")])
    for turned, plain in zip(*found, strict=True):
        for key in plain.exclude("computed").keys(True, True):
            torch.testing.assert_close(turned[key], plain[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("core", ["attention"])
def test_time_first_and_batch_first_give_the_same_compiled(core: str) -> None:
    data = TensorDict({"input": torch.randn(6, 6, 8), "alpha": torch.arange(6.0)}, [6])
    found = []
    for net in pair(core):
        method = Compose(ActivationCaching("core"), SteeringVectors({"core": torch.arange(8.0)}, alpha="alpha"))
        with method.prepare(net) as hooked, torch.no_grad():
            found.append(called(hooked, data, "compiled"))
    for key in found[1].exclude("computed").keys(True, True):
        torch.testing.assert_close(found[0][key], found[1][key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inner", ["self_attn", "linear1", "norm2"])
def test_what_is_inside_of_a_transformer_has_its_layout(inner: str) -> None:
    data = TensorDict({"input": torch.randn(6, 6, 8)}, [6])
    found = []
    for net in pair("layer"):
        with ActivationCaching(f"core.{inner}").prepare(net) as hooked:
            found.append(hooked(data.clone())["cache", f"core.{inner}"])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("core", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_last_states_have_their_layers_behind_the_rows(core: str, batch_first: bool) -> None:
    """Also where there are as many layers (times directions) as rows, and however they are asked for."""
    net, x = Sequences(CORES[core](batch_first), batch_first), torch.randn(2, 2, 8)
    state = net.core(x if batch_first else x.transpose(0, 1))[1]
    cells = isinstance(state, tuple)
    expected = (state[0] if cells else state).transpose(0, 1)
    pick = (lambda output: output[1][0]) if cells else (lambda output: output[1])
    for more in ({}, {"cache": TensorDict()}):
        with ActivationCaching("core", callback=pick, **more).prepare(net) as hooked:
            torch.testing.assert_close(hooked(TensorDict({"input": x}, [2]))["cache", "core"], expected)
    # What was computed from it is as the callback left it.
    with ActivationCaching("core", callback=lambda output: pick(output)[-1]).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, [2]))["cache", "core"]
    torch.testing.assert_close(found, expected[:, -1])


def test_inputs_and_requests_have_their_rows_first() -> None:
    data = TensorDict({"input": torch.randn(6, 6, 8)}, [6])
    found = []
    for net in pair("gru"):
        cache = TensorDict()
        method = ActivationCaching("core", directions=["fwd_pre", "bwd_pre"], cache=cache)
        with method.prepare(net) as hooked:
            seen = hooked(data.clone())
            seen["output"].square().sum().backward()
            slope = cache["bwd_pre", "core"]
            with hooked.run(data.clone(), target=lambda run: run["output"].square().sum()) as run:
                proxies = run.get("core"), run.get_input("core"), run.get_grad_output("core")
            with hooked.run(changed := data.clone()) as run:
                run.set("core", torch.arange(6.0).reshape(6, 1, 1).expand(6, 6, 8))
        values = [seen["cache", "fwd_pre", "core"], slope, changed["output"]]
        found.append([*values, *(proxy.resolve() for proxy in proxies)])
    for turned, plain in zip(*found, strict=True):
        torch.testing.assert_close(turned, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [(6, 4), (4, 6)])
def test_batches_of_trajectories(batch: tuple[int, int]) -> None:
    """With two batch dimensions the shapes say whether a time-first module was given them as they are or turned."""
    core, x = nn.GRU(3, 8), torch.randn(*batch, 3)
    for turn in (True, False):

        class Net(nn.Module):
            def __init__(self, turn: bool) -> None:
                super().__init__()
                self.core, self.turn = core, turn

            def forward(self, x: Tensor) -> Tensor:
                return self.core(x.transpose(0, 1))[0].transpose(0, 1) if self.turn else self.core(x)[0]

        with ActivationCaching("core").prepare(Net(turn)) as hooked:
            data = hooked(TensorDict({"input": x}, batch))
            torch.testing.assert_close(data["cache", "core"], data["output"])
            square = TensorDict({"input": torch.randn(5, 5, 3)}, (5, 5))
            with pytest.raises(InputError, match="either dimension may be time"):
                hooked(square.clone())
        # What treats all rows alike need not know.
        with SteeringVectors({"core": torch.ones(8)}).prepare(Net(turn)) as hooked:
            torch.testing.assert_close(hooked(square.clone())["output"], Net(turn)(square["input"]) + 1)


@pytest.mark.parametrize("shape", [(5, 1, 3), (5, 3)])
def test_a_trajectory_whose_steps_are_the_rows(shape: tuple[int, ...]) -> None:
    core, x = nn.GRU(3, 8), torch.randn(5, 3)
    net = nn.Sequential(nn.Unflatten(1, shape[1:]) if len(shape) > 2 else nn.Identity(), core)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = net

        def forward(self, x: Tensor) -> Tensor:
            return self.core(x)[0]

    with ActivationCaching("core.1").prepare(Net()) as hooked:
        found = hooked(TensorDict({"input": x}, [5]))["cache", "core.1"]
    torch.testing.assert_close(found, core(x.reshape(shape))[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_sequences_have_a_row_for_each_trajectory(batch_first: bool) -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = nn.GRU(3, 8, batch_first=batch_first), nn.Linear(8, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            padded = pad_packed_sequence(self.core(packed)[0], batch_first=True)[0]
            return self.head(padded.sum(1))

    net, x, lengths = Packs(), torch.randn(3, 4, 3), torch.tensor([2, 4, 1])
    data = TensorDict({"x": x, "lengths": lengths, "alpha": torch.tensor([0.0, 1.0, 0.0])}, [3])
    with ActivationCaching("core").prepare(net, in_keys=["x", "lengths"]) as hooked:
        found = hooked(data.clone())["cache", "core"]
    for row, length in enumerate(lengths):
        single = net.core(x[row, :length][None] if batch_first else x[row, :length][:, None])[0].reshape(length, 8)
        torch.testing.assert_close(found[row, :length], single)
        assert found[row, length:].eq(0).all()
    with SteeringVectors({"core": torch.ones(8)}, alpha="alpha").prepare(net, in_keys=["x", "lengths"]) as hooked:
        steered = hooked(data.clone())["output"]
    expected = net(x, lengths)
    expected[1] += 4 * net.head.weight.sum(-1)
    torch.testing.assert_close(steered, expected)


# ---------------------------------------------------------------------- channels

MAPS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BEHIND: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda dims: nn.Identity(),
    "relu": lambda dims: nn.ReLU(),
    "norm": lambda dims: [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims - 1](8),
    "group norm": lambda dims: nn.GroupNorm(2, 8),
    "pool": lambda dims: [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d][dims - 1](3, 1, 1),
    "block": lambda dims: nn.Sequential(MAPS[dims](8, 8, 3, padding=1), nn.Tanh()),
}


def convolutional(dims: int, behind: str, size: int) -> nn.Module:
    layers = [MAPS[dims](3, 8, 3, padding=1), nn.Tanh(), BEHIND[behind](dims), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * size**dims, 2))


@pytest.mark.parametrize("size", [8, 5])
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("dims", MAPS)
def test_a_vector_for_maps_is_for_channels_at_every_size(dims: int, behind: str, size: int) -> None:
    net = convolutional(dims, behind, size)
    data = TensorDict({"input": torch.randn(2, 3, *[size] * dims)}, [2])
    data["vector"] = torch.randn(2, 8)
    vector = torch.randn(8)
    full, ones = vector.reshape(8, *[1] * dims), [1] * dims
    plain = net[:3](data["input"])
    unit = full / full.norm()
    expected = {
        "steering": plain + full,
        "rows": plain + data["vector"].reshape(2, 8, *ones),
        "ablation": plain - (plain * unit).sum(1, keepdim=True) * unit,
    }
    methods = {
        "steering": [SteeringVectors({"2": vector}), SteeringVectors({"2": full})],
        "rows": [SteeringVectors({"2": "vector"})],
        "ablation": [DirectionalAblation({"2": vector}), DirectionalAblation({"2": full})],
    }
    for name, several in methods.items():
        for method in several:
            with Compose(method, ActivationCaching("2")).prepare(net) as hooked:
                torch.testing.assert_close(hooked(data.clone())["cache", "2"], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [8, 5])
def test_a_vector_for_tokens_is_for_features_at_every_size(size: int) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    x, vector = torch.randn(2, size, 3), torch.randn(8)
    for site in range(4):
        with Compose(SteeringVectors({str(site): vector}), ActivationCaching(str(site))).prepare(net) as hooked:
            found = hooked(TensorDict({"input": x}, [2]))["cache", str(site)]
        torch.testing.assert_close(found, net[: site + 1](x) + vector)


class Free(nn.Module):
    """A forward of its own: nothing says what its activation is given."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.conv, self.act = MAPS[dims](3, 8, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)).flatten(1).sum(-1, keepdim=True)


@pytest.mark.parametrize("size", [8, 5])
@pytest.mark.parametrize("dims", MAPS)
def test_where_nothing_says_it_an_error_asks(dims: int, size: int) -> None:
    net, data = Free(dims), TensorDict({"input": torch.randn(2, 3, *[size] * dims)}, [2])
    plain = net.act(net.conv(data["input"]))
    for vector in (torch.ones(8), torch.ones(size)):
        for method in (SteeringVectors({"act": vector}), DirectionalAblation({"act": vector})):
            with method.prepare(net) as hooked, pytest.raises(InputError, match=r"the shape \(n(, 1)+\) for channels"):
                hooked(data.clone())
    for shape in ((8, *[1] * dims), (*[1] * dims, size), (8, *[size] * dims)):
        vector = torch.randn(shape)
        with Compose(SteeringVectors({"act": vector}), ActivationCaching("act")).prepare(net) as hooked:
            torch.testing.assert_close(hooked(data.clone())["cache", "act"], plain + vector)


def test_vectors_that_do_not_fit_are_errors() -> None:
    net = convolutional(2, "conv", 5)
    data = TensorDict({"input": torch.randn(2, 3, 5, 5)}, [2])
    for vector in (torch.ones(5), torch.ones(5, 1, 1), torch.ones(1), torch.ones(2, 8, 5, 5)):
        with (
            SteeringVectors({"0": vector}).prepare(net) as hooked,
            pytest.raises(InputError, match="one number for each"),
        ):
            hooked(data.clone())
    flat = nn.Sequential(nn.Linear(4, 8))
    for vector in (torch.ones(1), torch.ones(4), torch.ones(1, 8), torch.ones(8, 1)):
        with (
            SteeringVectors({"0": vector}).prepare(flat) as hooked,
            pytest.raises(InputError, match="shape of the feat"),
        ):
            hooked(TensorDict({"input": torch.randn(8, 4)}, [8]))


def test_wrapped_modules_and_probes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    policy = TensorDictModule(net, ["pixels"], ["maps"])
    data = TensorDict({"pixels": torch.randn(2, 3, 8, 8)}, [2])
    vector = torch.randn(8)
    for path in ("module", "module.1", "module.0"):
        with SteeringVectors({path: vector}).prepare(policy) as hooked:
            found = hooked(data.clone())["maps"]
        plain = net[0](data["pixels"])
        placed = vector[:, None, None]
        torch.testing.assert_close(
            found, net[1](plain + placed) if path == "module.0" else net(data["pixels"]) + placed
        )
    # A probe reads all features; rows come first for it too.
    turned, plain_net = pair("gru")
    probe = LinearProbe(weight=torch.randn(2, 48), bias=torch.zeros(2), path="core", kind="lda")
    data = TensorDict({"input": torch.randn(6, 6, 8)}, [6])
    found = []
    for one in (turned, plain_net):
        with ProbeReadout({"door": probe}).prepare(one) as hooked:
            found.append(hooked(data.clone())["probe", "door"])
    torch.testing.assert_close(*found)
    assert HookedModule.from_module(turned).module.core._hooked_layout.time_first


class HeadOfSteps(nn.Module):
    """A linear layer behind a module that takes time first, and one before it, which say nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.core, self.behind = nn.Linear(3, 3), nn.GRU(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.core(self.before(x).transpose(0, 1))[0])[-1]


def test_what_stands_beside_a_time_first_module_is_not_guessed() -> None:
    net, square, other = HeadOfSteps(), torch.randn(6, 6, 3), torch.randn(6, 4, 3)
    for site in ("before", "behind"):
        with ActivationCaching(site).prepare(net) as hooked, pytest.raises(InputError, match="take time first"):
            hooked(TensorDict({"input": square}, [6]))
    with ActivationCaching("behind").prepare(net) as hooked, pytest.raises(InputError, match="does not start with"):
        hooked(TensorDict({"input": other}, [6]))
    with ActivationCaching("before").prepare(net) as hooked:
        hooked(TensorDict({"input": other}, [6]))
        found = hooked(TensorDict({"input": square}, [6]))["cache", "before"]
    torch.testing.assert_close(found, net.before(square))
    # What treats all rows alike need not know.
    for site in ("before", "behind"):
        with SteeringVectors({site: torch.zeros(1).expand(3 if site == "before" else 2)}).prepare(net) as hooked:
            torch.testing.assert_close(hooked(TensorDict({"input": square}, [6]))["output"], net(square))

"""Randomisation, pruning and task vectors of layers whose weights are computed when they are used."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import NoisyLinear

from tdhook_rl import Pruning, Saliency, TaskVectors
from tdhook_rl.errors import InputError
from tdhook_rl.metrics import cascading_randomisation

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


def twice_pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(prune.random_unstructured(layer, "weight", 0.1), "weight", 0.2)


MASKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "mask": lambda layer: prune.random_unstructured(layer, "weight", 0.2),
    "rows": lambda layer: prune.ln_structured(layer, "weight", 0.2, n=2, dim=1),
    "two masks": twice_pruned,
}
NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral_norm": spectral_norm,
    "SpectralNorm": parametrizations.spectral_norm,
    "weight_norm": weight_norm,
    "weight_norm of all": lambda layer: weight_norm(layer, dim=None),
    "WeightNorm": parametrizations.weight_norm,
}
WRAPS = MASKS | NORMS


def built(wrap: Callable[[nn.Module], nn.Module], bias: bool = True) -> nn.Sequential:
    net = nn.Sequential(wrap(nn.Linear(6, 64, bias)), nn.Tanh(), wrap(nn.Linear(64, 1, bias))).eval()
    with torch.no_grad():  # the norms of old have a graph until then, and cannot be copied
        net(X)
    return net


def data() -> TensorDict:
    return TensorDict({"input": X.clone()}, batch_size=[64])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", WRAPS)
def test_a_cascade_randomises_them(name: str, bias: bool) -> None:
    net = built(WRAPS[name], bias)
    before = copy.deepcopy(net.state_dict())
    scores = cascading_randomisation(Saliency(), net, data())
    assert list(scores) == ["original", "2", "0"]
    assert float(scores["0"].mean()) < 0.7
    assert float(scores["2"].mean()) < 0.9
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("layer", [lambda: nn.Conv1d(2, 4, 3, padding=1), lambda: nn.ConvTranspose1d(2, 4, 3)])
@pytest.mark.parametrize("name", NORMS)
def test_a_cascade_over_convolutions(name: str, layer: Callable[[], nn.Module]) -> None:
    net = nn.Sequential(NORMS[name](layer()), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1)).eval()
    x = torch.randn(8, 2, 6)
    with torch.no_grad():
        net(x)
    scores = cascading_randomisation(Saliency(), net, TensorDict({"input": x}, batch_size=[8]), layers=["0"])
    assert float(scores["0"].mean()) < 0.7


def test_a_seed_does_not_draw_the_initial_weights_again() -> None:
    for seed in (0, 1, 42):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 32))
        state = torch.get_rng_state()
        scores = cascading_randomisation(Saliency(), net, data(), seed=seed, out_keys=["output"])
        assert float(scores["0"].mean()) < 0.9
        assert torch.equal(torch.get_rng_state(), state)
        again = cascading_randomisation(Saliency(), net, data(), seed=seed, out_keys=["output"])
        torch.testing.assert_close(again["0"], scores["0"])


def test_what_stays_as_it_was_is_refused_by_name() -> None:
    net = built(spectral_norm)

    def nothing_lasting(layer: nn.Module) -> None:
        nn.init.normal_(layer.weight.data)  # which the next forward computes anew

    with pytest.raises(InputError, match=r"layer '2' \(Linear\) has the same weights.*spectral_norm"):
        cascading_randomisation(Saliency(), net, data(), initialise=nothing_lasting)

    class Positive(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.exp()

    plain = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 1))
    parametrize.register_parametrization(plain[2], "weight", Positive())
    with pytest.raises(InputError, match=r"'2' is computed by Positive"):
        cascading_randomisation(Saliency(), plain, data())


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("amount", [0.25, 0.5])
def test_pruning_under_a_mask_is_that_of_the_effective_weights(name: str, amount: float) -> None:
    net = built(MASKS[name])
    weights = [net[i].weight.detach().clone() for i in (0, 2)]
    every = torch.cat([weight.abs().flatten() for weight in weights])
    gone = torch.zeros(len(every), dtype=torch.bool)
    gone[every.argsort(stable=True)[: round(amount * len(every))]] = True
    plain = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 1))
    for index, weight, part in zip((0, 2), weights, gone.split([w.numel() for w in weights]), strict=True):
        plain[index].weight.data = weight.masked_fill(part.reshape(weight.shape), 0)
        plain[index].bias.data = net[index].bias.data.clone()
    seen: list[tuple[str, str, Tensor]] = []

    def importance(module_key: str, parameter_name: str, parameter: Tensor) -> Tensor | None:
        if parameter_name != "weight":
            return None
        seen.append((module_key, parameter_name, parameter.detach().clone()))
        return parameter.abs()

    for method in (Pruning(amount_to_prune=amount), Pruning(importance, amount)):
        with method.prepare(net) as hooked:
            torch.testing.assert_close(hooked(data())["output"], plain(X))
    assert [one[:2] for one in seen] == [("0", "weight"), ("2", "weight")]
    assert all(torch.equal(one[2], weight) for one, weight in zip(seen, weights, strict=True))
    with Pruning(modules_to_prune={"0": (0, 10)}).prepare(net) as hooked:
        hooked(data())
        rows = (hooked.module[0].weight_orig * hooked.module[0].weight_mask == 0).all(1).sum()
        assert int(rows) >= 10


class Noisy(nn.Module):
    """A noisy layer as many scripts write it, whose noise is there in training mode."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        for name, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            self.register_parameter(f"{name}_mu", nn.Parameter(torch.randn(shape)))
            self.register_parameter(f"{name}_sigma", nn.Parameter(torch.full(shape, 0.02)))
            self.register_buffer(f"{name}_epsilon", torch.randn(shape))

    def effective(self, name: str) -> Tensor:
        mean = getattr(self, f"{name}_mu")
        noise = getattr(self, f"{name}_sigma") * getattr(self, f"{name}_epsilon")
        return mean + noise if self.training else mean

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective("weight"), self.effective("bias"))


@pytest.mark.parametrize("noise", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
@pytest.mark.parametrize("layer", [NoisyLinear, Noisy])
def test_the_noise_of_a_pruned_weight_goes_with_it(layer: type[nn.Module], noise: ExplorationType) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(layer(6, 8), nn.Tanh(), nn.Linear(8, 4)).train(noise is ExplorationType.RANDOM)
    means = net[0].weight_mu.detach(), net[2].weight.detach()
    every = torch.cat([one.abs().flatten() for one in means])
    gone = torch.zeros(len(every), dtype=torch.bool)
    gone[every.argsort(stable=True)[: len(every) // 2]] = True
    rows = torch.zeros(8, 6, dtype=torch.bool)
    rows[means[0].abs().sum(-1).argsort()[:3]] = True
    with set_exploration_type(noise):
        effective = net[0].weight.detach() if layer is NoisyLinear else net[0].effective("weight").detach()
        bias = net[0].bias.detach() if layer is NoisyLinear else net[0].effective("bias").detach()
        for method, masks in (
            (Pruning(amount_to_prune=0.5), gone.split([48, 32])),
            (Pruning(modules_to_prune={"0": (0, 3)}), (rows, torch.zeros(32, dtype=torch.bool))),
        ):
            hidden = (X @ effective.masked_fill(masks[0].reshape(8, 6), 0).T + bias).tanh()
            expected = hidden @ means[1].masked_fill(masks[1].reshape(4, 8), 0).T + net[2].bias
            with method.prepare(net) as hooked:
                torch.testing.assert_close(hooked(data())["output"], expected)


@pytest.mark.parametrize("name", NORMS)
def test_pruning_names_a_weight_under_a_norm(name: str) -> None:
    net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), NORMS[name](nn.Linear(64, 1))).eval()
    with torch.no_grad():
        net(X)
    for method in (
        Pruning(amount_to_prune=0.5),
        Pruning(amount_to_prune=0.5, modules_to_prune="2"),
        Pruning(modules_to_prune={"2": (1, 3)}),
    ):
        with pytest.raises(InputError, match=rf"'2.weight' is computed by .*{name.removesuffix(' of all')}"):
            method.prepare(net).__enter__()
    with Pruning(amount_to_prune=0.5, skip_modules="2").prepare(net) as hooked:
        zeros = (hooked.module[0].weight == 0).sum()
    assert int(zeros) == 192


@pytest.mark.parametrize("name", WRAPS)
def test_task_vectors_act_in_proportion_or_name_the_layer(name: str) -> None:
    net = built(WRAPS[name])
    tuned = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with torch.no_grad():
        tuned(X)
    with TaskVectors().prepare(net) as hooked:
        vector = hooked.get_task_vector(tuned)
        if name in NORMS:
            with pytest.raises(InputError, match=rf"'weight' of the layer '0' .*{name.removesuffix(' of all')}"):
                hooked.get_weights(vector, alpha=0.5)
            return
        with hooked.with_applied_vectors(vector, alpha=0.5):
            found = hooked(data())["output"]
    plain = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 1))
    for index in (0, 2):
        for which in ("weight", "bias"):
            one, two = (getattr(part[index], which).detach() for part in (net, tuned))
            getattr(plain[index], which).data = one + 0.5 * (two - one)
    torch.testing.assert_close(found, plain(X))
    other = built(WRAPS[name])  # under other masks
    if name == "mask":
        with TaskVectors().prepare(net) as hooked, pytest.raises(InputError, match="a pruning mask"):
            hooked.get_weights(hooked.get_task_vector(other), alpha=0.5)

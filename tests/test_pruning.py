"""Pruning: which weights are zero, against NumPy."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.weights import Pruning
from tests.policies import CASES, HIDDEN, categorical, mlp
from tests.test_paths import TwoHeads
from tests.test_weights import assert_bits, bits

CASE = CASES["categorical"]
WEIGHTS = 6 * HIDDEN + HIDDEN * HIDDEN + HIDDEN * 4  # the weights of mlp()


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 1.0, 0, 1, 17, WEIGHTS])
def test_the_smallest_weights_are_zero_and_no_others(amount: float | int) -> None:
    net = mlp()
    with Pruning(amount_to_prune=amount).prepare(net) as hooked:
        found = hooked.module
        weights = [net[i].weight.detach().numpy() for i in (0, 2, 4)]
        flat = np.concatenate([weight.ravel() for weight in weights])
        count = amount if isinstance(amount, int) else round(amount * WEIGHTS)
        flat[np.argsort(np.abs(flat), kind="stable")[:count]] = 0
        assert (flat == 0).sum() == count
        start = 0
        for i, weight in zip((0, 2, 4), weights, strict=True):
            expected = flat[start : start + weight.size].reshape(weight.shape)
            assert np.array_equal(found[i].weight.detach().numpy(), expected)
            assert found[i].bias is net[i].bias  # what is not pruned stays tied
            start += weight.size


def test_the_hooked_policy_computes_with_the_pruned_weights() -> None:
    actor = categorical()
    data = CASE.data(5)
    with Pruning(amount_to_prune=0.8).prepare(actor) as hooked:
        pruned = copy.deepcopy(actor)
        pruned.load_state_dict(hooked.state_dict())
        assert torch.equal(hooked(data.clone())["logits"], pruned(data.clone())["logits"])
        assert torch.equal(hooked.get_dist(data.clone()).logits, pruned.get_dist(data.clone()).logits)
        assert not torch.equal(actor(data.clone())["logits"], pruned(data.clone())["logits"])


def test_restricted_and_skipped_modules() -> None:
    net = mlp()
    for options in (
        {"modules_to_prune": ["2"]},
        {"modules_to_prune": r"2$"},
        {"skip_modules": ["0", "4"]},
        {"skip_modules": lambda name, module: name in ("0", "4")},
        {"modules_to_prune": ["0", "2"], "skip_modules": "0"},
    ):
        with Pruning(amount_to_prune=10, **options).prepare(net) as hooked:
            assert [int((hooked.module[i].weight == 0).sum()) for i in (0, 2, 4)] == [0, 10, 0]
            assert hooked.module[0].weight is net[0].weight
    actor = categorical()
    with Pruning(amount_to_prune=10, modules_to_prune=["module.0.module"]).prepare(actor) as hooked:
        assert sum(int((p == 0).sum()) for p in hooked.parameters()) == 10


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize(("dim", "amount"), [(0, 3), (1, 0.25), (-1, 5), (0, 0), (0, 1.0)])
def test_slices_of_lowest_norm_are_zero(order: float, dim: int, amount: float | int) -> None:
    net = mlp()
    weight = net[2].weight.detach().double().numpy()
    count = amount if isinstance(amount, int) else round(amount * HIDDEN)
    norms = np.linalg.norm(weight, ord=order, axis=1 - dim % 2)
    expected = np.moveaxis(weight.copy(), dim, 0)
    expected[np.argsort(norms, kind="stable")[:count]] = 0
    with Pruning(modules_to_prune={"2": (dim, amount)}, norm=order).prepare(net) as hooked:
        assert np.array_equal(hooked.module[2].weight.detach().numpy(), np.moveaxis(expected, 0, dim))
        assert hooked.module[0].weight is net[0].weight


def test_slices_of_a_convolution_and_of_two_dimensions() -> None:
    actor = CASES["pixels"].build()
    with Pruning(modules_to_prune={"module.0.module.0.2": (1, 2)}).prepare(actor) as hooked:
        weight = hooked.module[0].module[0][2].weight
        norms = actor.module[0].module[0][2].weight.abs().sum((0, 2, 3))
        assert set(torch.where((weight == 0).all(0).all(-1).all(-1))[0].tolist()) == set(norms.argsort()[:2].tolist())
    with Pruning(modules_to_prune={"2": (0, 3), r"2$": (1, 2)}).prepare(mlp()) as hooked:
        zero = hooked.module[2].weight == 0
        assert (int(zero.all(1).sum()), int(zero.all(0).sum())) == (3, 2)


def test_the_users_importance_decides() -> None:
    net = mlp()
    net[0].bias.grad = torch.arange(HIDDEN, dtype=torch.float32)
    seen = []

    def gradient(module_key: str, parameter_name: str, parameter: nn.Parameter) -> torch.Tensor | None:
        seen.append((module_key, parameter_name))
        return None if parameter.grad is None else parameter.grad

    for importance in (gradient, lambda key, name, p: gradient(key, name, p)):
        with Pruning(importance, 5).prepare(net) as hooked:
            assert torch.equal(hooked.module[0].bias == 0, torch.arange(HIDDEN) < 5)
            assert hooked.module[0].weight is net[0].weight
    assert seen[:2] == [("0", "weight"), ("0", "bias")]


def test_what_is_trained_loaded_or_synchronised_later() -> None:
    actor = categorical()
    data = CASE.data(4)
    with Pruning(amount_to_prune=0.5).prepare(actor) as hooked:
        kept = bits(hooked)
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter.add_(0.01)
        # The copies are those of the preparation, which is said once; what was not pruned is followed.
        with pytest.warns(UserWarning, match=r"has changed at 'module\.0\.module\.0\.weight'"):
            hooked(data.clone())
        hooked(data.clone())
        assert torch.equal(hooked.module[0].module[0].weight, kept["module.0.module.0.weight"])
        assert torch.equal(hooked.module[0].module[0].bias, actor.module[0].module[0].bias)
        # Loaded weights replace the edits.
        hooked.load_state_dict(actor.state_dict())
        assert torch.equal(hooked(data.clone())["logits"], actor(data.clone())["logits"])
    with Pruning(amount_to_prune=0.5).prepare(actor) as hooked:
        # Raw weight sync is no different.
        TensorDict.from_module(hooked).data.update_(TensorDict.from_module(actor).data)
        assert_bits(hooked, bits(actor))


class TiedWeights(nn.Module):
    """A weight that two modules hold, of which neither holds the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.other(self.first(x)))


NAMES_OF_ONE = [
    (TwoHeads, ["actor.0.0", "critic.0.0", "actor.0", "critic.0"], ["actor.0.0.weight"]),
    (TiedWeights, ["first", "last"], ["first.weight"]),
]


@pytest.mark.parametrize(("make", "names", "held"), NAMES_OF_ONE)
def test_a_weight_is_the_same_by_each_of_its_names(make: type[nn.Module], names: list[str], held: list[str]) -> None:
    """Whichever path or pattern says what is pruned, or what is left alone: a trunk of two heads, a tied weight."""
    net = make()
    weights = {name for name, one in net.named_parameters() if one.ndim > 1}

    def pruned(**options: object) -> set[str]:
        with Pruning(**options).prepare(net) as hooked:  # type: ignore[arg-type]
            own = dict(hooked.module.named_parameters())
        return {name for name in weights if bool((own[name] == 0).any())}

    for name in names:
        every = {f"{re.escape(name)}$", name}
        for said in every:
            assert pruned(amount_to_prune=1.0, modules_to_prune=said) == set(held)
            assert pruned(amount_to_prune=1.0, skip_modules=said) == weights - set(held)
    for one in names[:2]:
        assert pruned(amount_to_prune=1.0, skip_modules=lambda path, _, one=one: path == one) == weights - set(held)
        assert pruned(modules_to_prune={one: (0, 2)}) == set(held)
        for other in names[:2]:
            with pytest.raises(SiteError, match=r"skip_modules= leaves"):
                pruned(modules_to_prune={one: (0, 2)}, skip_modules=other)
    if make is TwoHeads:  # what holds it is pruned with it
        assert pruned(amount_to_prune=1.0, modules_to_prune="critic") == {*held, "critic.1.weight"}
        assert pruned(amount_to_prune=1.0, skip_modules="critic") == {"actor.1.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs amount_to_prune"),
        ({"amount_to_prune": 1.5}, "share from 0.0 to 1.0"),
        ({"amount_to_prune": -1}, "got -1"),
        ({"amount_to_prune": True}, "got True"),
        ({"amount_to_prune": WEIGHTS + 1}, f"is {WEIGHTS + 1}, but there are {WEIGHTS} weights"),
        ({"amount_to_prune": 2.0, "modules_to_prune": {"0": (0, 1)}}, "a share from 0.0 to 1.0"),
        ({"modules_to_prune": {"0": 1}}, r"must be \(dim, amount\)"),
        ({"modules_to_prune": {"0": (0, 2.0)}}, "share from"),
        ({"modules_to_prune": {"0": (0, 17)}}, "is 17, but there are 16 slices along dimension 0"),
        ({"modules_to_prune": {"0": (2, 1)}}, r"'0\.weight' of shape \(16, 6\) has no dimension 2"),
        ({"modules_to_prune": {"1": (0, 1)}}, r"'1' \(Tanh\) has no weight of its own.*nearest: '"),
        ({"modules_to_prune": {"7": (0, 1)}}, "matches '7'; nearest"),
        ({"amount_to_prune": 1, "modules_to_prune": ["1"]}, "nothing to prune"),
        ({"amount_to_prune": 1, "modules_to_prune": ["seven"]}, "nearest"),
        ({"amount_to_prune": 1, "skip_modules": ["seven"]}, "nearest"),
        ({"amount_to_prune": 1, "importance_callback": lambda k, n, p: p * float("nan")}, "NaN or infinite scores"),
        ({"amount_to_prune": 1, "importance_callback": lambda k, n, p: p.sum()}, r"shape \(16, 6\) for '0\.weight'"),
        ({"amount_to_prune": 1, "importance_callback": lambda k, n, p: 3.0}, "got float"),
        ({"amount_to_prune": 1, "importance_callback": lambda parameter: parameter}, "must accept \\(module_key"),
    ],
)
def test_bad_pruning_is_refused(options: dict, message: str) -> None:
    with pytest.raises((InputError, SiteError), match=message):
        Pruning(**options).prepare(mlp()).__enter__()

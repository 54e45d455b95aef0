"""Networks before they were trained: of what layers people have, and what of them is drawn anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import AddStateIndependentNormalScale, InteractionType, TensorDictModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchrl.modules import NoisyLinear, ProbabilisticActor, TanhNormal

from tdhook_rl import Saliency
from tdhook_rl.errors import InputError
from tdhook_rl.metrics import cascading_randomisation, untrained_copy
from tdhook_rl.rollout import GroupSplit, ProbeSuite


class Tokens(nn.Module):
    """A token before the features, each of which becomes one, read by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(1, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.reshape(-1, 4, 1))
        read = self.block(torch.cat([self.token.expand(len(tokens), 1, 8), tokens], 1))
        return self.head(read[:, 0]).reshape(*x.shape[:-1], 4)


class ByHand(nn.Module):
    """A layer of one's own, without a method that initialises it."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Drawing(nn.Module):
    """A network that initialises its layers, as ``nanoGPT`` and ``transformers`` do."""

    def __init__(self, knows: tuple[type, ...] = (ByHand,)) -> None:
        super().__init__()
        self.knows = knows
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), ByHand())
        self.apply(self._init_weights)

    def _init_weights(self, layer: nn.Module) -> None:
        if isinstance(layer, self.knows):
            nn.init.normal_(layer.matrix, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a scale beside the mean": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)),
    "attention and a token": Tokens,
    "drawn by what is around": Drawing,
    "with noise": lambda: nn.Sequential(NoisyLinear(4, 8), nn.PReLU(8), NoisyLinear(8, 4)),
    "with norms of weights": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 8)), nn.LayerNorm(8),
        prune.l1_unstructured(nn.Linear(8, 4), "weight", 3),
    ),
}  # fmt: skip


def actor_of(name: str) -> ProbabilisticActor:
    """A normal policy whose scale is a parameter, moved from where it began as training does."""
    torch.manual_seed(3)
    net = nn.Sequential(NETWORKS[name](), AddStateIndependentNormalScale(4))
    with torch.no_grad():
        for one in net.parameters():
            one.add_(0.3 * torch.randn_like(one))
    module = TensorDictModule(net, ["observation"], ["loc", "scale"])
    draws = InteractionType.RANDOM  # of the likeliest action no gradient says anything
    return ProbabilisticActor(
        module, ["loc", "scale"], distribution_class=TanhNormal, return_log_prob=True, default_interaction_type=draws
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_all_matrices_are_drawn_anew_and_scales_and_tokens_stay(name: str) -> None:
    actor = actor_of(name)
    kept, state = {path: one.clone() for path, one in actor.state_dict().items()}, torch.get_rng_state()
    new, again = untrained_copy(actor), untrained_copy(actor)
    assert torch.equal(torch.get_rng_state(), state)
    for path, one in actor.named_parameters():
        value = new.get_parameter(path)
        assert torch.equal(one, kept[path])
        assert torch.equal(value, again.get_parameter(path))
        stays = path.endswith(("state_independent_scale", "token"))
        assert torch.equal(value, one) is stays, path


def test_attention_begins_as_torch_makes_it() -> None:
    for options in ({}, {"kdim": 3, "vdim": 5, "add_bias_kv": True}, {"bias": False}):
        layer = nn.MultiheadAttention(64, 2, **options)
        made: Any = untrained_copy(layer)
        for name, one in nn.MultiheadAttention(64, 2, **options).named_parameters():
            value = made.get_parameter(name)
            assert torch.allclose(value.std(), one.std(), rtol=0.3), name
            assert torch.allclose(value.abs().max(), one.abs().max(), rtol=0.3), name


@pytest.mark.parametrize("network", [lambda: nn.Sequential(ByHand()), lambda: Drawing(knows=()), ByHand])
def test_a_matrix_that_nothing_draws_is_named(network: Callable[[], nn.Module]) -> None:
    with pytest.raises(InputError, match=r"\(ByHand\) has weights and no reset_parameters\(\); give"):
        untrained_copy(network())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cascade_draws_every_layer_that_has_more_than_a_scale(name: str) -> None:
    actor = actor_of(name)
    data = actor(TensorDict({"observation": torch.randn(16, 4)}, [16]))  # and leaves a graph behind
    found = cascading_randomisation(Saliency(), actor, data)
    running = {
        path for path, layer in actor.named_modules()
        if any(value.ndim > 1 for key, value in layer._parameters.items() if value is not None and key != "token")
        and not path.endswith("out_proj") and "parametrizations" not in path
    }  # fmt: skip
    assert running <= found.keys()
    assert "module.0.module.1" not in found  # the scale
    assert float(list(found.values())[-1].mean()) < 0.9


def test_a_probe_suite_has_its_control_for_a_normal_policy_of_tokens() -> None:
    actor = actor_of("attention and a token")
    data = actor(TensorDict({"observation": torch.randn(400, 4)}, [400]))
    data["episode"], data["side"] = torch.arange(400) // 10, (data["observation"][:, 0] > 0).long()
    suite = ProbeSuite(actor, sites=["module.0.module.0.head"], concepts={"side": "side"}, split=GroupSplit("episode"))
    suite.update(data)
    cell = suite.table()["module.0.module.0.head", "side"]
    assert cell.untrained is not None
    assert cell.untrained.rows == cell.trained.rows

"""Patterns of interventions: each place once, and no name that only begins alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import (
    ActivationCaching,
    ActivationPatching,
    DirectionalAblation,
    HookedModule,
    Pruning,
    Saliency,
    SteeringVectors,
)
from tdhook_rl.errors import SiteError, nearest
from tdhook_rl.latent import DirectionClamping


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.layer1, self.layer10, self.layer2 = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.layer2(self.layer10(self.layer1(x)))


VECTOR = torch.ones(4)
INTERVENTIONS: dict[str, Callable[[str], Any]] = {
    "steering": lambda site: SteeringVectors({site: VECTOR}),
    "function": lambda site: SteeringVectors(modules_to_steer=[site], steer_fn=lambda module_key, output: output),
    "ablation": lambda site: DirectionalAblation({site: VECTOR}),
    "clamping": lambda site: DirectionClamping({site: VECTOR}, value=1.0),
    "patching": lambda site: ActivationPatching([site]),
}
TOO_MUCH = {
    r"blocks\.1": "blocks.10",
    r"blocks\.[01]": "blocks.10",
    r"blocks\.1@0": "blocks.10",
    r"blocks\.\d": "blocks.10",
    r"blocks\.2": "blocks.2.linear",
    r"blocks\.(2|3)(\..*)?$": "blocks.2.linear",
    r".*": "blocks.0.linear",
    r"blo": "blocks.0.linear",
    r"(layer1|layer2)": "layer10",
    r"layer\d": "layer10",
}
RIGHT = {
    r"blocks\.1$": ["blocks.1"],
    r"blocks\.(1|10)$": ["blocks.1", "blocks.10"],
    r"blocks\.1\d$": ["blocks.10", "blocks.11"],
    "blocks.1": ["blocks.1"],
    "blocks[1]": ["blocks.1"],
    "blocks[1:3]": ["blocks.1", "blocks.2"],
    r".*linear$": [f"blocks.{index}.linear" for index in range(12)],
    r"blocks\.\d+\.lin": [f"blocks.{index}.linear" for index in range(12)],
    r"layer\d+": ["layer1", "layer10", "layer2"],
    r"layer(1|10)$": ["layer1", "layer10"],
}


@pytest.mark.parametrize("pattern", TOO_MUCH)
@pytest.mark.parametrize("method", INTERVENTIONS)
def test_a_pattern_that_catches_more_is_refused_with_the_list(method: str, pattern: str) -> None:
    with pytest.raises(SiteError, match=f"'{TOO_MUCH[pattern]}'") as refused:
        INTERVENTIONS[method](pattern).prepare(Net(), return_context=False)
    assert "re.match" in str(refused.value)
    assert "$'" in str(refused.value)


@pytest.mark.parametrize("pattern", RIGHT)
def test_what_is_meant_is_steered_once(pattern: str) -> None:
    net, x = Net(), torch.randn(3, 4)
    chosen = [net.get_submodule(path) for path in RIGHT[pattern]]
    handles = [module.register_forward_hook(lambda module, args, output: output + VECTOR) for module in chosen]
    expected = net(x)
    for handle in handles:
        handle.remove()
    with SteeringVectors({pattern: VECTOR}).prepare(net) as hooked:
        torch.testing.assert_close(hooked(TensorDict({"input": x}, [3]))["output"], expected)


def test_what_only_observes_may_catch_as_much_as_it_likes() -> None:
    net, data = Net(), TensorDict({"input": torch.randn(3, 4)}, [3])
    with ActivationCaching(r"blocks\.1").prepare(net) as hooked:
        assert len(list(hooked(data.clone())["cache"].keys())) == 6
    with Saliency(input_modules=[r"blocks\.1"]).prepare(net) as hooked:
        assert len(list(hooked(data.clone())["attr"].keys())) == 6


def test_requests_and_pruning_refuse_too() -> None:
    net = Net()
    hooked = HookedModule.from_module(net)
    with (
        pytest.raises(SiteError, match=r"blocks\.10"),
        hooked.run(TensorDict({"input": torch.randn(3, 4)}, [3])) as run,
    ):
        run.set(r"blocks\.1", torch.zeros(3, 4))
    for options in (
        {"modules_to_prune": [r"blocks\.1"], "amount_to_prune": 0.5},
        {"modules_to_prune": {r"blocks\.1\.linear|layer1": (0, 1)}},
        {"skip_modules": [r"blocks\.1"], "amount_to_prune": 0.5},
    ):
        with pytest.raises(SiteError, match=r"'(layer10|blocks\.10)' along with"):
            Pruning(**options).prepare(net, return_context=False)
    # What lies inside is pruned once, whether it is caught by itself or not.
    with Pruning(modules_to_prune=[r"blocks\.2"], amount_to_prune=0.5).prepare(net) as hooked:
        assert int((hooked.module.blocks[2].linear.weight == 0).sum()) > 0


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("module.0.module.3", "module.0.module.0.module.3"),
        ("encoder.act", "module.0.module.encoder.act"),
        ("net.layers.0.mlp", "module.0.module.layers.0.mlp"),
        (r"layers\.0\.mlp$", "module.0.module.layers.0.mlp"),
        ("layers.0.mlp@all", "module.0.module.layers.0.mlp"),
    ],
)
def test_the_nearest_paths_end_alike(asked: str, found: str) -> None:
    known = ["module", "module.0", "module.0.module", "module.0.module.0", "module.0.module.0.module"]
    known += [f"module.0.module.0.module.{index}" for index in range(5)]
    known += ["module.0.module.encoder", "module.0.module.encoder.act", "module.1.module.0"]
    known += [f"module.0.module.layers.{index}.{name}" for index in range(3) for name in ("attn", "mlp")]
    assert nearest(asked, known).startswith(f"nearest: '{found}'")

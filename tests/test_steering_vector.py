"""Directions as artifacts: extracted from any source, against arithmetic by hand in float64; files, and wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import nn

from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.latent import SteeringVector


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def states(*batch: int, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    return TensorDict({"input": torch.randn(*batch, 4, generator=generator)}, batch)


def norms(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.double().flatten(1).norm(dim=1)


# ------------------------------------------------------------------------------------------------ the shuffled control


def test_shuffled_extractions_exchange_the_two_of_a_pair() -> None:
    net, positive, negative = mlp(), states(3, seed=1), states(3, seed=2)
    found = SteeringVector.from_pairs(net, "1", positive, negative, shuffles=5, seed=3)
    assert found.shuffled is not None
    apart = (net[:2](positive["input"]) - net[:2](negative["input"])).double()
    # Three differences of six features: which multiples of them one is made of is known.
    signs = torch.linalg.lstsq(apart.T, 3 * found.shuffled.double().T).solution
    assert torch.allclose(signs.abs(), torch.ones(()).double(), atol=1e-4)
    again = SteeringVector.from_pairs(net, "1", positive, negative, shuffles=5, seed=3)
    other = SteeringVector.from_pairs(net, "1", positive, negative, shuffles=5, seed=4)
    assert torch.equal(found.shuffled, again.shuffled)
    assert not torch.equal(found.shuffled, other.shuffled)
    assert SteeringVector.from_pairs(net, "1", positive, negative, shuffles=0).shuffled is None


def test_shuffled_directions_are_as_long_as_the_vector(tmp_path: Path) -> None:
    found = SteeringVector.from_pairs(mlp(), "1", states(7, seed=1), states(7, seed=2))
    found.save(tmp_path / "vector")
    for vector in (found, SteeringVector.load(tmp_path / "vector")):
        assert vector.shuffled_like().shape == (10, 6)
        assert torch.allclose(norms(vector.shuffled_like(3)), vector.vector.double().norm().expand(3))
    assert torch.equal(SteeringVector.load(tmp_path / "vector").shuffled, found.shuffled)
    with pytest.raises(InputError, match=r"11 shuffled extractions .* has 10"):
        found.shuffled_like(11)
    with pytest.raises(InputError, match="has 0"):
        SteeringVector(vector=torch.ones(3), path="1").shuffled_like()


@pytest.mark.parametrize("wrong", [torch.ones(2, 4), torch.ones(3), torch.ones(0, 3), torch.full((2, 3), torch.nan)])
def test_shuffled_extractions_of_other_features(wrong: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shuffled="):
        SteeringVector(vector=torch.ones(3), path="1", shuffled=wrong)
    document = '{"format": "tdhook_rl/1", "kind": "steering_vector", "facts": {"module_path": "1"}}'
    save_file(
        {"vector": torch.ones(3), "shuffled": wrong}, tmp_path / "x.safetensors", metadata={"tdhook_rl": document}
    )
    with pytest.raises(ArtifactError):
        SteeringVector.load(tmp_path / "x")


@pytest.mark.parametrize("wrong", [1.0, torch.ones(0), [[]], torch.tensor([1j]), [torch.inf, 1], "no numbers"])
def test_vectors_that_are_none(wrong: Any) -> None:
    with pytest.raises(InputError):
        SteeringVector(vector=wrong, path="1")

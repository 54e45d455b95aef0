"""A small network, its inputs, and files of directions in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import Tensor, nn


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def states(*batch: int, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    return TensorDict({"input": torch.randn(*batch, 4, generator=generator)}, batch)


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), atol=2e-6, rtol=1e-4)


def written(folder: Path, tensors: dict[str, Tensor], **facts: Any) -> Path:
    document = {"format": "tdhook_rl/1", "kind": "steering_vector", "facts": {"module_path": "1", **facts}}
    save_file(tensors, folder / "x.safetensors", metadata={"tdhook_rl": json.dumps(document)})
    return folder / "x"

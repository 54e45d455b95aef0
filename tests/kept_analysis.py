"""An analysis that is kept in a folder, for tests of what becomes of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.replay import analyze

ROWS = 3000
METHOD = Compose(ActivationCaching("1"), Saliency(target=targets.logit(0)))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def filled(rows: int = ROWS) -> ReplayBuffer:
    torch.manual_seed(1)
    buffer = ReplayBuffer(storage=LazyTensorStorage(rows))
    buffer.extend(TensorDict({"observation": torch.randn(rows, 4)}, [rows]))
    return buffer


def run(folder: Path, net: nn.Module | None = None, method: Any = METHOD, **options: Any) -> TensorDict:
    options = {"batch_size": 300, **options}
    with method.prepare(net or network(), in_keys=["observation"], out_keys=["logits"]) as hooked:
        return analyze(hooked, filled(), folder, **options)


def is_right(found: TensorDict, right: TensorDict) -> bool:
    assert set(found.keys(True, True)) == set(right.keys(True, True))
    return all(torch.allclose(found[key].float(), value.float(), atol=1e-6) for key, value in right.items(True, True))

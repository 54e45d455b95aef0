"""Through time each trajectory is explained by itself, also where several lie one after the other in a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import pad
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.envs import InitTracker, TransformedEnv
from torchrl.modules import GRUModule, LSTMModule, ProbabilisticActor

from tdhook_rl import Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.rollout import AnnotateHook

ENVS, STEPS = 4, 12


def actor_of(kind: str) -> ProbabilisticActor:
    torch.manual_seed(0)
    core = {"gru": GRUModule, "lstm": LSTMModule}[kind](90, 6, in_key="observation", out_key="hidden")
    head = TensorDictModule(nn.Linear(6, 4), in_keys=["hidden"], out_keys=["logits"])
    return ProbabilisticActor(
        TensorDictSequential(core, head), in_keys=["logits"], distribution_class=Categorical, return_log_prob=True
    )


#: How a batch ``(environments, time)`` may be laid out, and where its rows are then.
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "as collected": lambda data: data,
    "flat": lambda data: data.reshape(-1),
    "one environment after the other": lambda data: torch.cat(list(data.split(2)), 1),
    "steps that were left out": lambda data: torch.cat([data[:, :3], data[:, 5:]], 1),
    "slices of one": lambda data: torch.cat([data[0, 6:9], data[0, 1:4], data[0, 9:]]),
    "two by two": lambda data: data[:, 4:6].reshape(-1),
    "padded": lambda data: pad(data, [0, 0, 0, 3]),
}


@pytest.mark.parametrize("numbered", [True, False], ids=["numbers", "states"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_each_trajectory_is_explained_by_itself(kind: str, layout: str, numbered: bool) -> None:
    """From the stored state of its first row on, and nothing of it reaches another."""
    actor = actor_of(kind)
    env = TransformedEnv(CueCorners(batch_size=[ENVS], max_steps=5, seed=0), InitTracker())
    method = Saliency(target=targets.chosen_logit(), inputs=["observation"], horizon="trajectory")
    with method.prepare(actor) as policy:
        frames = ENVS * STEPS
        collector = Collector(
            env, policy, frames_per_batch=frames, total_frames=2 * frames, auto_register_policy_transforms=True
        )
        _, data = (batch.clone() for batch in collector)
        assert not bool(data["is_init"][:, 0].all())
        data["row"] = torch.arange(frames).reshape(ENVS, STEPS)
        laid = LAYOUTS[layout](data)
        if layout == "padded":
            laid["collector", "mask"] = torch.arange(STEPS + 3).expand(ENVS, -1) < STEPS
        laid = laid if numbered else laid.exclude(("collector", "traj_ids"))
        found = policy.annotate(laid, on_mismatch="raise")
        hooked = AnnotateHook(policy).annotate_batch(laid)
        assert torch.equal(hooked["attr", "observation"].nan_to_num(), found["attr", "observation"].nan_to_num())
        rows, expected = laid.reshape(-1), []
        real = found["computed", "attr"].reshape(-1)
        assert int(real.sum()) == len(rows) - (3 * ENVS if layout == "padded" else 0)
        places = rows["row"][real].tolist()
        starts = [
            at for at, place in enumerate(places)
            if at == 0 or place != places[at - 1] + 1 or place % STEPS == 0
        ]  # fmt: skip
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
            own = data.reshape(-1)[places[start] : places[start] + end - start][None]
            expected.append(policy.annotate(own, on_mismatch="ignore")["attr", "observation"][0])
    torch.testing.assert_close(found["attr", "observation"].reshape(-1, 90)[real], torch.cat(expected))

"""annotate says so when the policy that explains is not the policy that acted."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.attribution import IntegratedGradients, Occlusion
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, MismatchError
from tdhook_rl.examples.agent import FC2, make_actor
from tests.policies import CASES, categorical


def collected(policy: nn.Module, rows: int = 8) -> TensorDict:
    with torch.no_grad():
        return policy(CASES["categorical"].data(rows))


METHODS = [
    Saliency(),
    Saliency(input_modules=["module.0.module.1"]),
    IntegratedGradients(baseline=0.0, n_steps=4),
    Occlusion(),
    ActivationCaching("module.0.module.1"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_changed_weights_are_said_and_equal_ones_are_not(method, mode) -> None:
    actor = categorical()
    data = collected(actor)
    with method.prepare(actor) as hooked, mode():
        hooked.annotate(data)  # warnings are errors here
        hooked.annotate(data.reshape(2, 4), on_mismatch="raise")
        with torch.no_grad():
            actor.module[0].module[0].bias.add_(0.5)
        with pytest.raises(MismatchError, match=r"stored 'logits' of 8 of 8 rows"):
            hooked.annotate(data, on_mismatch="raise")
        with pytest.warns(UserWarning, match="8 of 8 rows"):
            found = hooked.annotate(data)
        hooked.annotate(data)  # once is enough
    assert set(found.keys(True, True)) > set(data.keys(True, True))


def test_it_is_ignored_where_that_is_asked() -> None:
    actor = categorical()
    data = collected(actor)
    with torch.no_grad():
        actor.module[0].module[0].bias.add_(0.5)
    with Saliency().prepare(actor) as hooked:
        hooked.annotate(data, on_mismatch="ignore")
        with pytest.raises(InputError, match="nearest: 'ignore'"):
            hooked.annotate(data, on_mismatch="ignor")


def test_rows_are_counted() -> None:
    actor = categorical()
    data = collected(actor)
    data["logits"] = data["logits"].clone()
    data["logits"][3:5] += 0.1
    with Saliency().prepare(actor) as hooked, pytest.raises(MismatchError, match=r"2 of 8 rows .* 0\.1"):
        hooked.annotate(data, on_mismatch="raise", chunk_size=3)


def test_dropout_and_other_interventions_are_noticed() -> None:
    actor = categorical()
    actor.module[0].module.insert(2, nn.Dropout(0.5))
    with Saliency().prepare(actor) as hooked, pytest.raises(MismatchError, match="dropout"):
        hooked.annotate(collected(actor), on_mismatch="raise")
    actor = categorical()
    method = Compose(SteeringVectors({"module.0.module.1": torch.ones(16)}, alpha=1.0), Saliency())
    with method.prepare(actor) as hooked:
        data = hooked(CASES["categorical"].data(8))
        hooked.annotate(data, on_mismatch="raise")
        hooked.controls["steering.alpha"] = 0.5
        with pytest.raises(MismatchError, match="interventions"):
            hooked.annotate(data, on_mismatch="raise")


def test_random_frames_are_no_mismatch_and_versions_are_named() -> None:
    actor = make_actor()
    with Compose(Saliency(), ActivationCaching(FC2)).prepare(actor) as policy:
        collector = Collector(
            CueCorners(batch_size=[4], seed=0),
            policy,
            postproc=policy.annotate,
            frames_per_batch=32,
            total_frames=96,
            init_random_frames=32,
            track_policy_version=True,
            auto_register_policy_transforms=False,
        )
        batches = []
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for data in collector:
                batches.append(data.clone())
                collector.update_policy_weights_()
        assert batches[0]["logits"].abs().max() == 0
        with torch.no_grad():
            next(actor.parameters()).add_(0.1)
        with pytest.raises(MismatchError, match="under policy version"):
            policy.annotate(batches[-1].exclude("attr", "cache", "computed"), on_mismatch="raise")
        collector.shutdown()

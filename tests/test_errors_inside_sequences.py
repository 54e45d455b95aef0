"""Errors raised inside a sequence that draws in several places, which tensordict wraps in a ``RuntimeError``."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torch.distributions import Categorical, Normal

from tdhook_rl import ActivationCaching, Saliency, SteeringVectors
from tdhook_rl.errors import InputError, MissingKeyError, own_cause


def policy() -> ProbabilisticTensorDictSequential:
    encoder = nn.Sequential(nn.Linear(4, 6), NormalParamExtractor())
    return ProbabilisticTensorDictSequential(
        TensorDictModule(encoder, ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["z"], distribution_class=Normal),
        TensorDictModule(nn.Linear(3, 5), ["z"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical),
    )


def rows() -> TensorDict:
    return TensorDict({"observation": torch.randn(4, 4)}, [4])


def test_a_latent_that_is_not_stored_is_named() -> None:
    one = policy()
    acted = one(rows()).detach().select("observation", "action")
    with Saliency().prepare(one) as hooked, pytest.raises(InputError, match="the latent 'z'"):
        hooked.annotate(acted)


def test_what_hooks_say_comes_through() -> None:
    with SteeringVectors({"module.2.module": torch.ones(5)}, alpha="strength").prepare(policy()) as hooked:
        with pytest.raises(MissingKeyError, match="per-row key 'strength'"):
            hooked(rows())
        with pytest.raises(InputError, match="per-row alpha 'strength'"):
            hooked(rows().set("strength", torch.ones(4, 3, 2)))


def test_the_policys_own_errors_stay_as_they_are() -> None:
    with ActivationCaching("module.2.module").prepare(policy()) as hooked, pytest.raises(RuntimeError) as raised:
        hooked(TensorDict({"observation": torch.randn(4, 3)}, [4]))
    assert own_cause(raised.value) is None

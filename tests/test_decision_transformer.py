"""Decision transformers: a context of several steps; inference wrappers write over what they were given."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.modules import (
    DecisionTransformerInferenceWrapper,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhDelta,
    TanhNormal,
)

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.attribution import IntegratedGradients, Occlusion
from tdhook_rl.errors import InputError
from tests.policies import FEATURES, HIDDEN
from tests.zoo import ZOO
from tests.zoo_entry import CONTEXT, CONTROLS
from tests.zoo_time import CONTEXT_KEYS, block, transformer

SITE = "td_module.module.0.module.transformer.transformer.h.0.attn"


def wrapped() -> DecisionTransformerInferenceWrapper:
    module = TensorDictModule(transformer().eval(), in_keys=CONTEXT_KEYS, out_keys=["param"])
    actor = ProbabilisticActor(module, in_keys=["param"], out_keys=["action"], distribution_class=TanhDelta)
    wrapper = DecisionTransformerInferenceWrapper(actor, inference_context=2)
    names = dict(zip(("observation", "action", "return_to_go"), CONTEXT_KEYS, strict=True))
    wrapper.set_tensor_keys(**names, out_action="action")
    return wrapper


def context(*batch: int) -> TensorDict:
    shapes = (FEATURES, CONTROLS, 1)
    values = {key: torch.randn(*batch, CONTEXT, width) for key, width in zip(CONTEXT_KEYS, shapes, strict=True)}
    return TensorDict(values, batch_size=batch)


def what_it_sees(data: TensorDictBase, leaves: dict[str, Tensor] | None = None) -> list[Tensor]:
    """The context of the wrapper by hand: old steps masked, actions moved on by one step."""
    observation, action, to_go = (data[key] if leaves is None else leaves[key] for key in CONTEXT_KEYS)
    recent = torch.arange(CONTEXT) >= CONTEXT - 2
    action = torch.cat([action * (torch.arange(CONTEXT) >= CONTEXT - 1)[:, None], torch.zeros_like(action[:, :1])], 1)
    return [observation * recent[:, None], action[:, 1:], to_go * recent[:, None]]


def test_the_inference_wrapper_is_explained_while_it_acts() -> None:
    policy, data, vector = wrapped(), context(4), torch.randn(3 * CONTEXT, HIDDEN)
    net: nn.Module = policy.td_module.module[0].module
    method = Compose(
        ActivationCaching(SITE),
        SteeringVectors({SITE: vector}, alpha="strength"),
        Saliency(when="step"),
        IntegratedGradients(when="step", baseline=0.0, n_steps=64, attribution_key="path"),
        Occlusion(when="step", attribution_key="occlusion"),
    )
    data["strength"] = torch.tensor([0.0, 0.3, 0.6, 1.0])
    plain = policy(data.clone())
    with method.prepare(policy) as hooked:
        found = hooked(data.clone())
        with pytest.raises(InputError, match=r"writes over its own inputs .*'action_cat'"):
            hooked.annotate(found.exclude("attr"))
    leaves = {key: data[key].clone().requires_grad_() for key in CONTEXT_KEYS}

    def act(leaves: dict[str, Tensor]) -> Tensor:
        seen = what_it_sees(data, leaves)
        hidden = block(net, seen)[1]
        steered = hidden + data["strength"].reshape(-1, 1, 1) * vector
        return block(net, seen, steered)[0][:, -1].tanh()

    torch.testing.assert_close(found["cache", SITE], block(net, what_it_sees(data))[1])
    action = act(leaves)
    torch.testing.assert_close(found["action"], action)
    assert torch.equal(found["action"][0], plain["action"][0])
    gradients = torch.autograd.grad(action.sum(), list(leaves.values()))
    for key, gradient in zip(CONTEXT_KEYS, gradients, strict=True):
        torch.testing.assert_close(found["attr", key], gradient)
        assert found["path", key].shape == found["occlusion", key].shape == data[key].shape
    nothing = act({key: torch.zeros_like(value) for key, value in leaves.items()})
    total = torch.stack([found["path", key].reshape(4, -1).sum(-1) for key in CONTEXT_KEYS]).sum(0)
    torch.testing.assert_close(total, (action - nothing).sum(-1).detach(), rtol=0.05, atol=0.05)
    one = data["observation_cat"].clone()
    one[:, -1, 2] = 0
    changed = act({**leaves, "observation_cat": one})
    torch.testing.assert_close(found["occlusion", "observation_cat"][:, -1, 2], (action - changed).sum(-1).detach())


def test_the_inference_wrapper_in_a_collector() -> None:
    policy = wrapped()
    with Compose(ActivationCaching(SITE), Saliency(when="step")).prepare(policy) as hooked:
        env = ZOO["decision_transformer"].env(policy, 3)
        collector = Collector(env, hooked, frames_per_batch=15, total_frames=30)
        for data in collector:
            assert data["cache", SITE].shape == (3, 5, 3 * CONTEXT, HIDDEN)
            for key in CONTEXT_KEYS:
                assert data["attr", key].shape == (3, 5, CONTEXT, *env.observation_spec[key].shape[2:])
        collector.shutdown()


def test_samples_that_are_cut_after_they_were_drawn_are_refused() -> None:
    net = TensorDictModule(transformer().eval(), in_keys=CONTEXT_KEYS, out_keys=["hidden"])
    params = nn.Sequential(nn.Linear(CONTROLS, 2 * CONTROLS), NormalParamExtractor())
    net = TensorDictSequential(net, TensorDictModule(params, in_keys=["hidden"], out_keys=["loc", "scale"]))
    actor = ProbabilisticActor(net, in_keys=["loc", "scale"], out_keys=["action"], distribution_class=TanhNormal)
    wrapper = DecisionTransformerInferenceWrapper(actor, inference_context=2)
    names = dict(zip(("observation", "action", "return_to_go"), CONTEXT_KEYS, strict=True))
    wrapper.set_tensor_keys(**names, out_action="action")
    for batch in (4, CONTROLS, CONTEXT):
        with Saliency(when="step").prepare(wrapper) as hooked, pytest.raises(InputError, match="changes it afterwards"):
            hooked(context(batch))

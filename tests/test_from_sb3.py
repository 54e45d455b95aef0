"""Agents of Stable-Baselines3 as TorchRL policies: the same numbers, over the same tensors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import MultiSyncCollector
from torchrl.envs import GymWrapper
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import ClipPPOLoss

pytest.importorskip("stable_baselines3", reason="the adapters are tested against the real package")

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, SteeringVectors
from tdhook_rl.adapters import from_sb3
from tdhook_rl.errors import InputError, PreparationError
from tdhook_rl.testing import check_hooked_policy, check_method
from tests.sb3_agents import (
    ACTIONS,
    OBSERVATIONS,
    Endless,
    key_of,
    make_agent,
    observations,
    odd_extractor,
    own_score,
    tensors,
)

#: Algorithm, observation, action, and what else it is made with.
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    **{f"{name} {seen}": (name, seen, "", {}) for name in ("PPO", "A2C", "DQN", "SAC", "TD3") for seen in OBSERVATIONS},
    **{f"PPO {action}": ("PPO", "vector", action, {}) for action in ACTIONS if action != "one"},
    "SAC matrices": ("SAC", "matrix", "matrix", {}),
    "DDPG": ("DDPG", "vector", "", {}),
    "PPO gSDE": ("PPO", "vector", "torque", {"use_sde": True}),
    "PPO gSDE, expln": ("PPO", "vector", "torque", {"use_sde": True, "policy_kwargs": {"use_expln": True}}),
    "PPO gSDE, squashed": ("PPO", "vector", "torque", {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
    "A2C gSDE, few": ("A2C", "vector", "torque", {"use_sde": True, "policy_kwargs": {"full_std": False}}),
    "SAC gSDE": ("SAC", "vector", "torque", {"use_sde": True}),
    "PPO apart": ("PPO", "dict", "torque", {"policy_kwargs": {"share_features_extractor": False}}),
    "SAC together": ("SAC", "dict", "torque", {"policy_kwargs": {"share_features_extractor": True}}),
}

#: A2C has PPO's networks and DDPG's are TD3's; these are tried with fewer observations unless all are.
FEW = {"A2C", "TD3"}


def cases(*without: str) -> list[Any]:
    """The cases but for those that begin so, with those marked that are slow because they are many."""
    kept = [case for case in CASES if not case.startswith(without)] if without else list(CASES)
    few = {case for case in kept if CASES[case][0] in FEW and CASES[case][1] not in ("vector", "dict")}
    return [pytest.param(case, marks=pytest.mark.slow) if case in few else case for case in kept]


def made(case: str) -> Any:
    name, seen, action, more = CASES[case]
    kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in more.items()}
    return make_agent(name, seen, action, **kwargs)


@pytest.mark.parametrize("case", cases())
def test_it_computes_what_the_agent_computes(case: str) -> None:
    """Actions, values and scores of stored actions: to the bit, for any batch shape, before training and after."""
    agent = made(case)
    actor = from_sb3(agent)
    for round in range(2):
        given, data = observations(agent)
        mode = agent.policy.training
        expected = agent.predict(given, deterministic=True)[0]
        agent.policy.set_training_mode(mode)  # as it was: predict() had switched it
        with torch.no_grad():
            found = actor(data.clone())
            np.testing.assert_array_equal(found["action"].numpy(), expected, strict=True)
            folded = actor(data.clone().reshape(2, 3))
            assert torch.equal(folded["action"].reshape(found["action"].shape), found["action"])
            alone = agent.predict({key: one[0] for key, one in given.items()} if isinstance(given, dict) else given[0],
                                  deterministic=True)[0]  # fmt: skip
            np.testing.assert_array_equal(actor(data[0].clone())["action"].numpy(), alone)
            with set_exploration_type(ExplorationType.RANDOM):
                drawn = actor(data.clone())
            agent.policy.set_training_mode(False)
            score = own_score(agent, given, drawn)(tensors(agent, given))
            if "action_log_prob" in drawn.keys():
                close = {"rtol": 1e-4, "atol": 1e-4} if case.startswith("SAC") else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(drawn["action_log_prob"], score, **close)
            agent.policy.set_training_mode(mode)
        if not round:
            agent.learn(16)  # the weights change under the policy
            assert torch.equal(from_sb3(agent)(data.clone())["action"], actor(data.clone())["action"])


@pytest.mark.parametrize("case", cases("DQN"))
def test_values_are_those_of_the_agent(case: str) -> None:
    agent = made(case)
    given, data = observations(agent)
    both, value = from_sb3(agent, part="actor_value"), from_sb3(agent, part="value")
    with torch.no_grad():
        data = from_sb3(agent)(data)
        observed = tensors(agent, given)
        if hasattr(agent.policy, "predict_values"):
            expected = [agent.policy.predict_values(observed)]
        else:
            expected = list(agent.policy.critic(observed, data["raw_action"]))
        outputs = value(data.clone())
        found = [outputs[key] for key in value.out_keys]
        together = both(data.select(*both.in_keys))
    assert value.out_keys[0] == ("state_value" if hasattr(agent.policy, "predict_values") else "state_action_value")
    for one, other, key in zip(found, expected, value.out_keys, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(together[key], other)
    assert torch.equal(together["action"], data["action"])
    shared = sum(one.numel() for one in both.parameters())
    apart = sum(one.numel() for one in {*from_sb3(agent).parameters(), *value.parameters()})
    assert shared == apart


@pytest.mark.parametrize("case", cases(*(case for case in CASES if CASES[case][1].startswith("ind"))))
def test_explanations_are_gradients_of_the_agents_own_code(case: str) -> None:
    """By autograd through ``evaluate_actions`` and the like, at the stored action, which is not the likeliest one."""
    agent = made(case)
    agent.policy.set_training_mode(False)
    given, data = observations(agent)
    seen = CASES[case][1]
    with Saliency(inputs=["speed"] if seen == "dict" else None).prepare(from_sb3(agent)) as policy:
        with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
            batch = policy(data.clone())
        found = policy.annotate(batch)
    assert torch.equal(found["action"], batch["action"])
    observed = tensors(agent, given)
    leaf = (observed["speed"] if seen == "dict" else observed).float().requires_grad_()
    score = own_score(agent, given, batch)({**observed, "speed": leaf} if seen == "dict" else leaf)
    [expected] = torch.autograd.grad(score.sum(), leaf)
    got = found["attr", "speed" if seen == "dict" else key_of(agent.observation_space)]
    torch.testing.assert_close(got.to(expected.dtype), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize("seen", ["index", "indices", "dict"])
def test_one_hot_is_what_gymenv_gives_unless_told_otherwise(seen: str) -> None:
    agent = make_agent("PPO", seen)
    given, data = observations(agent)
    actor = from_sb3(agent, categorical_action_encoding=False)
    if seen == "dict":
        data["gear"] = torch.nn.functional.one_hot(data["gear"], 4)
    else:
        sizes = [6] if seen == "index" else [3, 4]
        parts = data["observation"].reshape(6, -1).unbind(-1)
        hot = [torch.nn.functional.one_hot(one, size) for one, size in zip(parts, sizes, strict=True)]
        data["observation"] = torch.cat(hot, -1)
    found = actor(data)
    assert torch.equal(found["action"].argmax(-1), torch.as_tensor(agent.predict(given, deterministic=True)[0]))
    log_prob = agent.policy.evaluate_actions(tensors(agent, given), found["action"].argmax(-1))[1]
    torch.testing.assert_close(found["action_log_prob"], log_prob)
    with Saliency().prepare(actor) as policy:
        key = "gear" if seen == "dict" else "observation"
        assert policy.annotate(found.detach())["attr", key].shape == found[key].shape


def test_pictures_may_have_their_channels_last() -> None:
    agent = make_agent("PPO", "pixels")
    _, data = observations(agent)
    assert data["pixels"].shape[1:] == (3, 36, 40)
    turned = TensorDict({"pixels": data["pixels"].movedim(1, -1)}, [6])
    actor = from_sb3(agent)
    assert torch.equal(actor(turned)["logits"], actor(data)["logits"])
    with Saliency().prepare(actor) as policy:
        found = policy.annotate(actor(turned).detach())
    assert found["attr", "pixels"].shape == (6, 36, 40, 3)


@pytest.mark.parametrize("name", ["PPO", "SAC"])
def test_extractors_of_ones_own_run_as_they_are_used(name: str) -> None:
    """In evaluation mode, as in ``predict``, while the agent itself is trained; and nothing of the agent moves."""
    agent = make_agent(name, policy_kwargs={"features_extractor_class": odd_extractor()})
    actor = from_sb3(agent)
    agent.learn(16)
    agent.policy.train()
    before = {key: value.clone() for key, value in agent.policy.state_dict().items()}
    modes = [one.training for one in agent.policy.modules()]
    given, data = observations(agent)
    with Saliency().prepare(actor) as policy:
        found = policy.annotate(policy(data.clone()).detach())
    assert modes == [one.training for one in agent.policy.modules()]
    assert all(torch.equal(value, before[key]) for key, value in agent.policy.state_dict().items())
    np.testing.assert_array_equal(found["action"].numpy(), agent.predict(given, deterministic=True)[0])


@pytest.mark.parametrize("name", ["PPO", "DQN", "SAC"])
def test_saved_agents_are_those_that_were_saved(name: str, tmp_path: Path) -> None:
    """And loaded weights reach a policy that was made before."""
    import stable_baselines3

    agent, other = make_agent(name), make_agent(name)
    agent.learn(16)
    agent.save(tmp_path / "agent")
    _, data = observations(agent)
    expected = from_sb3(agent)(data.clone())
    actor = from_sb3(other)
    with ActivationCaching(r".*\.1$").prepare(actor) as policy:
        before = policy(data.clone())
        assert not all(torch.equal(before[key], expected[key]) for key in actor.out_keys)
        other.set_parameters(tmp_path / "agent", device="cpu")
        loaded = from_sb3(getattr(stable_baselines3, name).load(tmp_path / "agent", device="cpu"))
        for one in (actor, policy, loaded):
            found = one(data.clone())
            assert all(torch.equal(found[key], expected[key]) for key in actor.out_keys)


@pytest.mark.slow
@pytest.mark.limit(150)
@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize("seen", ["vector", "dict"])
def test_workers_of_collectors_are_given_the_policy(seen: str) -> None:
    """In processes that were spawned, which unpickle it; and it is updated there."""
    agent = make_agent("PPO", seen)
    options = {"frames_per_batch": 14, "total_frames": 28, "auto_register_policy_transforms": False}
    options["exploration_type"] = ExplorationType.DETERMINISTIC
    with Saliency(inputs=["speed"] if seen == "dict" else None).prepare(from_sb3(agent)) as policy:
        collector = MultiSyncCollector([partial(environment, seen)] * 2, policy, postproc=policy.annotate, **options)
        for data in collector:
            rows = data.reshape(-1)
            given = {key: rows[key].numpy() for key in policy.in_keys}
            given = given if seen == "dict" else given["observation"]
            np.testing.assert_array_equal(rows["action"].numpy(), agent.predict(given, deterministic=True)[0])
            assert rows["computed", "attr"].all()
            with torch.no_grad():
                for one in agent.policy.parameters():
                    one.mul_(1.5)
            collector.update_policy_weights_()
        collector.shutdown()


def environment(seen: str) -> GymWrapper:
    return GymWrapper(Endless(seen, "one"), categorical_action_encoding=True)


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        pytest.param(name, seen, marks=() if (name, seen) == ("PPO", "vector") else pytest.mark.slow)
        for name in ("PPO", "DQN", "SAC", "TD3")
        for seen in ("vector", "pixels", "dict", "index")
    ],
)
def test_they_are_policies_that_can_be_hooked(name: str, seen: str) -> None:
    agent = make_agent(name, seen)
    action = "one" if name in ("PPO", "DQN") else "torque"
    world = GymWrapper(Endless(seen, action), categorical_action_encoding=True)
    caching = ActivationCaching(r".*\d$")
    explained = {"dict": ["speed"], "index": []}.get(seen)
    method = caching if seen == "index" else Compose(caching, Saliency(inputs=explained))
    for part in ("actor", "actor_value")[: 1 if name == "DQN" else 2]:
        check_hooked_policy(lambda part=part: from_sb3(agent, part), world, method=lambda: method)


METHODS: dict[str, Any] = {
    "saliency": lambda: Saliency(),
    "saliency, per step": lambda: Saliency(when="step"),
    "integrated gradients": lambda: IntegratedGradients(baseline=0.0, n_steps=4),
    "caching": lambda: ActivationCaching(r".*(policy_net|latent_pi)\.\d$"),
    "steering": lambda: SteeringVectors({r".*(policy_net|latent_pi)\.1$": torch.ones(16)}, alpha=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PPO", "SAC"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_on_them_what_is_promised(name: str, method: str) -> None:
    """In any batch shape, empty ones included, in float32 and float64, after errors, pickled."""
    agent = make_agent(name)
    check_method(
        METHODS[method],
        policy=lambda: from_sb3(agent),
        data=lambda *batch: TensorDict({"observation": torch.randn(*batch, 5)}, batch),
    )


@pytest.mark.parametrize("action", ["one", "torque"])
def test_losses_of_torchrl_train_the_agent(action: str) -> None:
    agent = make_agent("PPO", action=action)
    actor, critic = from_sb3(agent), from_sb3(agent, part="value")
    _, data = observations(agent)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        data = actor(data)
    data["advantage"], data["value_target"] = torch.randn(6, 1), torch.randn(6, 1)
    loss = ClipPPOLoss(actor if action == "one" else actor[0], critic)
    loss.set_keys(action="action" if action == "one" else "raw_action", sample_log_prob="action_log_prob")
    found = loss(data)
    torch.testing.assert_close(found["kl_approx"].abs(), torch.zeros(()), atol=1e-6, rtol=0)  # the same scores
    (found["loss_objective"] + found["loss_critic"]).backward()
    before = agent.policy.predict_values(tensors(agent, data["observation"].numpy()))
    assert all(one.grad is not None for one in agent.policy.parameters())
    torch.optim.SGD(agent.policy.parameters(), 0.1).step()
    assert not torch.equal(agent.policy.predict_values(tensors(agent, data["observation"].numpy())), before)


def test_paths_are_those_of_the_agent() -> None:
    for agent, policy in ((make_agent("PPO", "pixels"), "policy"), (make_agent("TD3"), "policy.actor")):
        own: Any = agent
        for name in policy.split("."):
            own = getattr(own, name)
        names = dict(own.named_modules())
        actor = from_sb3(agent)
        layers = [path for path, one in actor.named_modules() if hasattr(one, "weight")]
        assert layers
        for path in layers:
            assert names[path.removeprefix("module.0.module.")].weight is actor.get_submodule(path).weight


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: from_sb3("agent.zip"), InputError, r"PPO.load\('agent.zip'\)"),
        (lambda: from_sb3(torch.nn.Linear(2, 2)), InputError, "from_module"),
        (lambda: from_sb3(make_agent("DQN"), part="value"), InputError, "chosen_q"),
        (lambda: from_sb3(make_agent("PPO"), in_keys={"a": "b"}), InputError, "reads one observation"),
        (lambda: from_sb3(make_agent("PPO", "dict"), in_keys={"camera": "b"}), InputError, "'camera', 'gear', 'speed'"),
        (lambda: from_sb3(make_agent("PPO"), normalize=3), InputError, "VecNormalize"),
        (lambda: from_sb3(make_agent("PPO", action="several"), categorical_action_encoding=False), InputError, "index"),
        (lambda: from_sb3(make_agent("PPO"))(TensorDict({"observation": torch.zeros(3, 4)}, [3])), InputError, "(5,)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(make: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said.replace("(5,)", r"\(5,\)").replace("index", "indices")):
        make()


def test_policies_that_compute_in_a_way_of_their_own_are_refused() -> None:
    agent = make_agent("PPO")

    class Own(type(agent.policy)):
        def get_distribution(self, obs: Any) -> Any:
            return super().get_distribution(obs * 2)

    agent.policy.__class__ = Own
    with pytest.raises(PreparationError, match=r"Own computes in a way of its own \(get_distribution\)"):
        from_sb3(agent)


@pytest.mark.parametrize("name", ["PPO", "DQN", "SAC"])
@pytest.mark.parametrize("how", ["class", "agent"])
def test_algorithms_that_predict_in_a_way_of_their_own_are_refused(name: str, how: str) -> None:
    agent = make_agent(name)

    def predict(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("what from_sb3 would leave out")

    if how == "agent":
        agent.predict = predict
    else:
        agent.__class__ = type("Own", (type(agent),), {"predict": predict})
    with pytest.raises(PreparationError, match=r"has a predict\(\) of its own, .* from_sb3\(model.policy\)"):
        from_sb3(agent)
    from_sb3(agent.policy)

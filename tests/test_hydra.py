"""Methods, hooks and monitors from Hydra's YAML: ``_target_`` makes what Python makes, and a trainer of it trains."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tdhook_rl import Compose, Saliency, targets
from tdhook_rl.arguments.checked import checked
from tdhook_rl.attribution import Occlusion
from tdhook_rl.latent import ControlRecord
from tdhook_rl.method import Method
from tdhook_rl.report import FileSink, Monitor
from tests.method_table import METHODS
from tests.policies import POLICIES

hydra = pytest.importorskip("hydra")
from hydra.errors import InstantiationException  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from tensordict import NestedKey, TensorDict  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
PLAIN = (str, int, float, bool, type(None))


def in_yaml(value: Any) -> bool:
    """Whether a file can say a value."""
    if isinstance(value, list | tuple):
        return all(map(in_yaml, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and in_yaml(one) for name, one in value.items())
    return type(value) in PLAIN


def lists(value: Any) -> Any:
    """The value as YAML has it: without tuples."""
    if isinstance(value, list | tuple):
        return [lists(one) for one in value]
    return {name: lists(one) for name, one in value.items()} if isinstance(value, dict) else value


SAMPLES = {name: sample for info in METHODS for name, sample in info.named_samples()}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_method_is_made_as_in_python(name: str) -> None:
    sample = SAMPLES[name]
    for method in sample.make(POLICIES[sample.usual])._methods():
        given = {one: getattr(method, one) for one in inspect.signature(type(method)).parameters}
        config: dict[str, Any] = {"_target_": f"{type(method).__module__}.{type(method).__name__}", "_partial_": True}
        config |= {one: lists(value) for one, value in given.items() if in_yaml(value)}
        others = {one: value for one, value in given.items() if not in_yaml(value)}
        made = instantiate(OmegaConf.create(config))(**others)
        assert type(made) is type(method)
        for one, value in given.items():
            found = getattr(made, one)
            assert repr(found) == repr(value) if one in others else lists(found) == lists(value)
            assert not type(found).__module__.startswith("omegaconf")


def test_a_composition_and_its_targets() -> None:
    made = instantiate(
        OmegaConf.create(
            """
            _target_: tdhook_rl.Compose
            _convert_: all
            _args_:
              - _target_: tdhook_rl.Saliency
                target: {_target_: tdhook_rl.targets.chosen_logit, key: [agents, logits]}
                inputs: [[agents, observation], mask]
              - _target_: tdhook_rl.latent.ControlRecord
            """
        )
    )
    assert isinstance(made, Compose)
    first, second = made.methods
    assert isinstance(second, ControlRecord)
    assert list(first.inputs) == [("agents", "observation"), "mask"]
    assert first.target.function.function.key == ("agents", "logits")
    assert first.target.name == targets.chosen_logit().name


def test_keys_are_tuples_where_only_keys_fit() -> None:
    @checked
    def take(key: NestedKey | None, keys: str | list[NestedKey] | None = None) -> Any:
        return key, keys

    assert take(OmegaConf.create(["a", "b"]), OmegaConf.create(["a", "b"])) == (("a", "b"), ["a", "b"])
    assert take(["a", "b"], [["a", "b"], "c"]) == (("a", "b"), [("a", "b"), "c"])
    made = instantiate({"_target_": "tdhook_rl.attribution.Occlusion", "groups": {"x": [[0, 1], [2]]}})
    assert isinstance(made, Occlusion)
    assert made.groups == {"x": [[0, 1], [2]]}


@pytest.fixture
def make_trainer(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """TorchRL's PPOTrainer from the example's file, three batches."""
    import torchrl.trainers.algorithms.configs  # noqa: F401

    with hydra.initialize_config_module("tdhook_rl.examples", version_base=None):
        config = hydra.compose("ppo_trainer", [f"logger.log_dir={tmp_path}", "frames=768", *request.param])
    return lambda: instantiate(config.trainer)


HOOKS = "hooks=[{_target_: tdhook_rl.rollout.AnnotateHook, every: 2},{_target_: tdhook_rl.report.Monitor}]"


@pytest.mark.parametrize(
    "make_trainer", [[], [HOOKS]], indirect=True, ids=["a monitor", "a monitor and annotated batches"]
)
def test_the_example_trains(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train()
    monitor = trainer._modules["monitor"]
    assert isinstance(monitor, Monitor)
    assert json.loads((monitor.folder / "summary.json").read_text())["frames"] == 768  # the trainer's end writes it
    monitor.close()
    assert monitor.folder == tmp_path / "pendulum" / "interp"
    curves = FileSink.read(monitor.folder / "log.csv")
    assert [step for step, _ in curves["attr.observation"]] == [256, 512, 768]
    assert len((tmp_path / "pendulum" / "scalars" / "interp" / "attr.observation.csv").read_text().splitlines()) >= 2
    # What acts is what was trained: TorchRL sends the weights of the loss's actor, an object of its own here.
    sent = trainer.collector.policy.state_dict()
    for name, value in trainer.loss_module.actor_network.state_dict().items():
        assert torch.equal(sent[name], value)


@pytest.mark.parametrize("make_trainer", [["collector.policy=${models.actor}"]], indirect=True)
def test_a_policy_that_is_not_hooked_is_named(make_trainer: Any) -> None:
    with pytest.raises(InstantiationException) as failed:
        make_trainer()
    words = str(failed.value.__cause__)
    assert re.search(
        r"the collector's policy is a plain \w+; the loss's actor_network is a plain \w+; the loss's", words
    )
    assert "_target_: tdhook_rl.method.Method.prepare" in words


def test_prepare_is_what_the_file_names() -> None:
    assert Saliency.prepare is Method.prepare


STEERED = "{_target_: tdhook_rl.SteeringVectors, vectors: {'0': [1.0, 1.0]}, when: %s}"


def test_conditions_in_a_list() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 2))
    data = TensorDict({"input": torch.randn(3, 4), "step_count": torch.arange(3)}, [3])
    data["agents", "gate"] = torch.tensor([True, True, False])
    steps = "{_target_: tdhook_rl.latent.AtSteps, steps: [1, 2]}"
    for when, acts in (("[[agents, gate]]", [True, True, False]), (f"[[agents, gate], {steps}]", [False, True, False])):
        config = OmegaConf.create(STEERED % when)
        with instantiate(config, _convert_="all").prepare(net) as hooked:
            assert hooked(data.clone())["steered", "steering"].tolist() == acts
    with pytest.raises(InstantiationException, match="write _convert_: all beside _target_"):
        instantiate(OmegaConf.create(STEERED % f"[{steps}]"))


LISTS = {
    "compose": "{_target_: tdhook_rl.Compose, _args_: [{_target_: tdhook_rl.Saliency}]}",
    "scheduled": "{_target_: tdhook_rl.Scheduled, every: 2, method: {_target_: tdhook_rl.Compose, _args_: [{_target_: "
    "tdhook_rl.Saliency}]}}",
    "grad_cam": "{_target_: tdhook_rl.attribution.GradCAM, modules_to_attribute: {conv: {_target_: "
    "tdhook_rl.attribution.DimsConfig, weight_pooling_dims: [2, 3]}}}",
}


@pytest.mark.parametrize("name", LISTS)
def test_methods_in_lists_are_made_with_the_remedy_of_the_page(name: str) -> None:
    """Without it Hydra ends before anything of ours is called; the page on gotchas has its words."""
    config = OmegaConf.create(LISTS[name])
    with pytest.raises(Exception, match="Unions of containers are not supported"):
        instantiate(config)
    config["_convert_"] = "all"
    assert isinstance(instantiate(config), Method)
    assert "Unions of containers are not supported" in (DOCS / "gotchas.md").read_text()

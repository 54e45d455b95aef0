"""Ways to use ``Monitor``: buffers, other algorithms, several monitors, resumed runs, TorchRL's own monitoring."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector, Evaluator, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import Compose as TransformSequence
from torchrl.envs import GymEnv, InitTracker, TransformedEnv
from torchrl.modules import GRUModule, ProbabilisticActor, QValueActor, TanhNormal
from torchrl.record.loggers.csv import CSVLogger
from torchrl.record.loggers.monitoring import Every, LoggerMonitor

from tdhook_rl import Compose, ControlRecord, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import IntegratedGradients
from tdhook_rl.envs import CueCorners, TMaze
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2, PPO, make_actor, make_critic
from tdhook_rl.report import FileSink, Monitor, open_wandb
from tdhook_rl.rollout import summarise
from tests.monitoring import METHOD, QUIET, batch_of
from tests.wandb_reader import finished, records


def test_frames_are_counted_without_padding(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path, every=2) as monitor:
        data, *padded = (batch_of(policy) for _ in range(3))
        for one in padded:
            one["collector", "mask"] = torch.ones(8, 10, dtype=torch.bool)
            one["collector", "mask"][:, 7:] = False
        assert monitor.step(data) is not None
        assert monitor.step(padded[0]) is None  # not due, and counted
        found = monitor.step(padded[1])
        assert monitor.frames == 80 + 56 + 56
        assert found is not None
        assert found["computed.cache"] == 1.0
    assert [step for step, _ in FileSink.read(tmp_path / "log.csv")["attr.observation"]] == [80, 192]


def test_without_batches_the_newest_rows_of_the_buffer_are_looked_at(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path, rows=20) as monitor:
        with pytest.raises(InputError, match=r"step\(None\) looks at the newest rows of a replay buffer"):
            monitor.step(None)
        monitor.buffer = buffer = ReplayBuffer(storage=LazyTensorStorage(100))
        assert monitor.step(None) is None  # nothing in it yet
        data = batch_of(policy).reshape(-1)
        buffer.extend(data)
        found = monitor.step(None)
        assert found is not None
        assert found[f"cache.{FC2}"] == pytest.approx(float(data["cache", FC2][-20:].abs().mean()), rel=1e-4)
        assert monitor.frames == 80
        assert monitor.step(None) is None
        buffer.extend(batch_of(policy, seed=1).reshape(-1))  # round the ring
        assert monitor.step(None) is not None
        assert monitor.frames == 160


def test_controls_are_logged_as_they_were_in_each_row(tmp_path: Path) -> None:
    steering = SteeringVectors({FC2: torch.ones(64)}, alpha=0.5)
    for number, method in enumerate((steering, Compose(steering, ControlRecord()))):
        with method.prepare(make_actor()) as policy, Monitor(policy, tmp_path / str(number)) as monitor:
            data = batch_of(policy)
            policy.controls["steering.alpha"] = 0.75
            found = monitor.step(data)
        assert found is not None
        assert found["control.steering.alpha"] == (0.75, 0.5)[number]


def test_several_agents_and_inputs_that_are_no_pictures(tmp_path: Path) -> None:
    net = TensorDictModule(nn.Linear(5, 2), in_keys=[("agents", "observation")], out_keys=[("agents", "value")])
    data = TensorDict({"agents": {"observation": torch.randn(6, 3, 5)}}, batch_size=[6])
    with Saliency(target=targets.output_sum()).prepare(net) as policy:
        names = [f"{agent}.{place}" for agent in ("left", "middle", "right") for place in "abcde"]
        with Monitor(policy, tmp_path, feature_names=names) as monitor:
            found = monitor.step(data)
    assert found is not None
    assert found["attr.agents.observation.middle.c"] == pytest.approx(
        float(net.module.weight.detach()[:, 2].sum().abs()), rel=1e-5
    )
    assert (tmp_path / "media" / "bars.agents.observation.0" / "000000006.png").is_file()


def q_network() -> tuple[Any, Any]:
    env = CueCorners(batch_size=[4])
    net = QValueActor(nn.Linear(90, 4), in_keys=["observation"], spec=CueCorners().action_spec)
    return env, net


def continuous() -> tuple[Any, Any]:
    env = GymEnv("Pendulum-v1")
    net = TensorDictModule(
        nn.Sequential(nn.Linear(3, 2), NormalParamExtractor()), in_keys=["observation"], out_keys=["loc", "scale"]
    )
    return env, ProbabilisticActor(net, in_keys=["loc", "scale"], spec=env.action_spec, distribution_class=TanhNormal)


def recurrent() -> tuple[Any, Any]:
    maze = TMaze(batch_size=[4])
    core = GRUModule(
        input_size=7, hidden_size=8, in_keys=["observation", "h", "is_init"], out_keys=["f", ("next", "h")]
    )
    head = TensorDictModule(nn.Linear(8, maze.n_actions), in_keys=["f"], out_keys=["logits"])
    env = TransformedEnv(maze, TransformSequence(InitTracker(), core.make_tensordict_primer()))
    categorical = torch.distributions.Categorical
    return env, ProbabilisticActor(TensorDictSequential(core, head), in_keys=["logits"], distribution_class=categorical)


@pytest.mark.parametrize("make", [q_network, continuous, recurrent])
def test_policies_of_other_algorithms(make: Callable[[], tuple[Any, Any]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    env, actor = make()
    with Saliency().prepare(actor) as policy, Monitor(policy, tmp_path) as monitor:
        collector = Collector(
            env, policy, frames_per_batch=40, total_frames=80, auto_register_policy_transforms=False
        )  # fmt: skip
        for data in collector:
            found = monitor.step(data)
            assert found is not None
            assert found["computed.attr"] == 1.0
            inputs = [key for key in policy.policy_in_keys if key != "is_init"]
            assert all(found[f"attr.{key}"] >= 0 for key in inputs)
        collector.shutdown()
    assert monitor.frames == 80
    assert (tmp_path / "media" / "bars.observation.0" / "000000040.png").is_file()


@pytest.mark.slow
def test_workers_log_into_one_run_in_the_main_process(tmp_path: Path) -> None:
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    actor = make_actor()
    ppo = PPO(actor, make_critic(), epochs=1)
    with METHOD.prepare(actor) as policy, Monitor(policy, run, folder=tmp_path / "local", env=CueCorners) as monitor:
        collector = MultiSyncCollector(
            [CueCorners] * 2, policy, frames_per_batch=40, total_frames=120, cat_results=0, postproc=policy.annotate
        )
        logged = []
        for data in collector:
            found = monitor.step(data)
            assert found is not None
            logged.append(found["attr.observation.light 0"])
            assert found["attr.observation"] == pytest.approx(float(data["attr", "observation"].abs().mean()), rel=1e-5)
            ppo.update(data)
            collector.update_policy_weights_()
        collector.shutdown()
    rows = [row for row in finished(run) if "interp/attr.observation" in row]
    assert [row["interp/step"] for row in rows] == [40, 80, 120]
    assert [row["interp/attr.observation.light 0"] for row in rows] == logged
    assert len(set(logged)) == 3
    assert len(list(tmp_path.rglob("*.wandb"))) == 1  # no worker has opened another


def test_two_monitors_on_one_run(tmp_path: Path) -> None:
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    critic = make_critic()
    with METHOD.prepare(make_actor()) as policy, Saliency().prepare(critic) as value:
        first = Monitor(policy, run)
        with pytest.warns(UserWarning, match="this one does as interp2/"):
            second = Monitor(value, run)
        for seed in range(3):
            data = batch_of(policy, seed=seed)
            first.step(data)
            second.step(data)
        first.close()
        second.close()
    rows = finished(run)
    for prefix in ("interp", "interp2"):
        assert [row[f"{prefix}/step"] for row in rows if f"{prefix}/attr.observation" in row] == [80, 160, 240]
    assert first.folder != second.folder


def test_a_run_that_is_opened_for_it_ends_with_it(tmp_path: Path) -> None:
    sink = open_wandb(tmp_path, "cues", {"lr": 1e-3}, group="seeds")
    assert sink is not None
    assert sink.logger.group == "seeds"
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, sink) as monitor:
        monitor.step(batch_of(policy))
    with pytest.raises(wandb.errors.UsageError, match="is finished"):
        sink.logger.log({"a": 1})
    assert [row["interp/step"] for row in finished(sink.logger) if "interp/attr.observation" in row] == [80]
    (path,) = Path(sink.logger.settings.sync_dir).glob("*.wandb")
    (began,) = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"][:1]
    assert (began.run_group, began.display_name) == ("seeds", "cues")
    assert monitor.folder == Path(sink.logger.settings.sync_dir) / "interp"


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy:
        with Monitor(policy, tmp_path, media_every=2) as monitor:
            monitor.step(batch_of(policy))
            state = monitor.state_dict()
        with pytest.raises(Exception, match="exists already"):
            Monitor(policy, tmp_path)
        with Monitor(policy, tmp_path, media_every=2, resume=True) as resumed:
            resumed.load_state_dict(state)
            resumed.step(batch_of(policy, seed=1))
        with pytest.raises(InputError, match="this monitor is closed"):
            monitor.step(batch_of(policy))
    assert [step for step, _ in FileSink.read(tmp_path / "log.csv")["attr.observation"]] == [80, 160]
    assert len(list((tmp_path / "media" / "bars.observation.0").iterdir())) == 1  # the schedule goes on as well


def csv_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TorchRL's CSV logger has written, by name."""
    lines = {str(path.relative_to(folder).with_suffix("")): path.read_text().split() for path in folder.rglob("*.csv")}
    return {name: [(int(a), float(b)) for a, b in (one.split(",") for one in text)] for name, text in lines.items()}


@pytest.mark.parametrize("background", [True, False])
def test_torchrls_logger_monitor_polls_it(background: bool, tmp_path: Path) -> None:
    logger = CSVLogger("run", log_dir=str(tmp_path))
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path / "local") as monitor:
        watching = LoggerMonitor(logger, background=background, poll_interval=0.01, on_error="raise")
        watching.watch(monitor, name="seen", step="frames", schedule=Every.counter("frames", 160), log_on_start=False)
        means = {}
        with watching:
            for seed in range(5):
                found = monitor.step(batch_of(policy, seed=seed))
                assert found is not None
                means[monitor.frames] = found["attr.observation"]
                if background:
                    time.sleep(0.1)
                else:
                    watching.step()
    polled = csv_of(tmp_path / "run" / "scalars")["seen/attr.observation"]
    assert {160, 320} <= {step for step, _ in polled} <= set(means)
    assert all(value == pytest.approx(means[step], rel=1e-6) for step, value in polled)


def test_an_evaluator_takes_its_numbers_and_the_monitor_the_evaluators(tmp_path: Path) -> None:
    actor = make_actor()
    with METHOD.prepare(actor) as policy, Monitor(policy, tmp_path) as monitor:
        monitor.step(batch_of(policy))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchRL's
            evaluator = Evaluator(
                CueCorners(batch_size=[4], seed=0), policy, num_trajectories=4, max_steps=20,
                metrics_fn=monitor.metrics_fn,
            )  # fmt: skip
            try:
                found = evaluator.evaluate(actor)
            finally:
                evaluator.shutdown()
        monitor.log({name: value for name, value in found.items() if isinstance(value, float)})
    curves = FileSink.read(tmp_path / "log.csv")
    assert curves["eval/attr.observation"] == [(80, found["eval/attr.observation"])]
    assert found["eval/attr.observation"] > 0
    assert found["eval/computed.attr"] == 1.0
    assert "eval/reward" in curves


OTHERS: dict[str, Callable[[Any], Any]] = {
    "another target": lambda actor: Saliency(target=targets.logit(1)).prepare(actor, return_context=False),
    "another method": lambda actor: IntegratedGradients(baseline=0.0).prepare(actor, return_context=False),
    "a critic": lambda actor: Saliency().prepare(make_critic(), return_context=False),
    "each step": lambda actor: Saliency(target=targets.logit(1), when="step").prepare(actor, return_context=False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_results_of_another_policy_are_not_taken_for_this_ones(name: str, tmp_path: Path) -> None:
    """Two monitors look at a batch that the policy of one has annotated: each logs what its own policy finds."""
    actor = make_actor()
    other = OTHERS[name](actor)
    policy = METHOD.prepare(actor, return_context=False)
    monitors = [Monitor(one, tmp_path / str(number)) for number, one in enumerate((policy, other))]
    found = []
    for seed in range(2):
        plain = CueCorners(batch_size=[4], seed=seed).rollout(5, actor, break_when_any_done=False).detach()
        batch = policy.annotate(plain)
        for monitor in monitors:
            expected = summarise(monitor.policy.annotate(plain), [("attr", "observation")])["attr.observation"]
            found.append(expected)
            assert monitor.step(batch)["attr.observation"] == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():  # as by an update
            actor.module[0].module[0].weight.mul_(1.1)
    for monitor in monitors:
        monitor.close()
    assert len(set(found)) == 4

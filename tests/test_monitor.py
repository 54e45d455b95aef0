"""``Monitor``: what it logs is what the batches hold, training stays what it was, and nothing stops it."""

from __future__ import annotations

import copy
import json
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image as Pillow
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import Compose as TransformSequence
from torchrl.envs import GymEnv, InitTracker, TransformedEnv
from torchrl.modules import GRUModule, ProbabilisticActor, QValueActor, TanhNormal
from torchrl.record.loggers.csv import CSVLogger

from tdhook_rl import ActivationCaching, Compose, ControlRecord, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import PerturbationSaliency
from tdhook_rl.envs import CueCorners, KeyDoor, TMaze
from tdhook_rl.errors import InputError, MissingKeyError, PreparationError
from tdhook_rl.examples.agent import FC2, PPO, make_actor, make_critic
from tdhook_rl.latent import SteeringVector
from tdhook_rl.metrics import relevance_mass
from tdhook_rl.report import Budgets, DataTable, FileSink, Monitor, open_wandb
from tdhook_rl.report.episodes import episodes
from tdhook_rl.report.pictures import bars, overlays
from tdhook_rl.rollout import GroupSplit, NetworkDiagnostics, OnlineProbe
from tests.wandb_reader import finished, records

QUIET = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
METHOD = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))


def batch_of(policy: Any, steps: int = 10, envs: int = 8, seed: int = 0) -> TensorDictBase:
    env = CueCorners(batch_size=[envs], seed=seed)
    collector = Collector(
        env, policy, frames_per_batch=steps * envs, total_frames=-1, auto_register_policy_transforms=False
    )
    data = next(iter(collector))
    collector.shutdown()
    return data


@contextmanager
def said() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield told


# ------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """PPO for a few batches, with everything on."""
    folder = tmp_path_factory.mktemp("monitor")
    run = wandb.init(mode="offline", dir=str(folder), project="p", settings=QUIET)
    torch.manual_seed(0)
    actor = make_actor()
    ppo, lights = PPO(actor, make_critic()), CueCorners.light_features().tolist()
    names = [f"light {lights.index(place)}" if place in lights else f"cell/{place}" for place in range(90)]
    probe = OnlineProbe(features=("cache", FC2), label=("concept", "xor"), split=GroupSplit(held_out=0.3), decay=0.5)
    logged: list[tuple[int, dict[str, float]]] = []
    batches = []
    with ActivationCaching(FC2).prepare(copy.deepcopy(actor)) as untrained, METHOD.prepare(actor) as policy:
        monitor = Monitor(
            policy,
            run,
            media_every=2,
            table_every=2,
            feature_names=names,
            groups={"needed": lights[:2], "unneeded": lights[2:]},
            probes={"xor": probe},
            untrained=untrained,
            diagnostics=NetworkDiagnostics(actor, sites=[FC2]),
            seed=7,
            experiment="cues",
            config={"lr": 1e-3},
        )
        collector = Collector(
            CueCorners(batch_size=[32], seed=0), policy, frames_per_batch=640, total_frames=3200,
            postproc=policy.annotate, auto_register_policy_transforms=False,
        )  # fmt: skip
        for data in collector:
            found = monitor.step(data)
            assert found is not None
            logged.append((monitor.frames, found))
            batches.append(data.clone())
            ppo.update(data)
        collector.shutdown()
        monitor.close()
        monitor.close()  # a second time does nothing
    return {"rows": finished(run), "run": run, "folder": monitor.folder, "logged": logged, "batches": batches}


def test_every_number_is_in_wandb_and_in_the_folder(trained: dict[str, Any]) -> None:
    rows = [row for row in trained["rows"] if "interp/attr.observation" in row]
    assert (
        [row["interp/step"] for row in rows]
        == [step for step, _ in trained["logged"]]
        == [640 * n for n in range(1, 6)]
    )
    curves = FileSink.read(trained["folder"] / "log.csv")
    for row, (step, found) in zip(rows, trained["logged"], strict=True):
        for name, value in found.items():
            assert dict(curves[name])[step] == value or np.isnan(value)
            if np.isfinite(value):
                assert row[f"interp/{name.replace('/', '.')}"] == pytest.approx(value)


def test_the_numbers_are_what_the_batch_holds(trained: dict[str, Any]) -> None:
    data, (_, found) = trained["batches"][2], trained["logged"][2]
    attribution, activation = data["attr", "observation"].abs(), data["cache", FC2]
    lights = CueCorners.light_features()
    assert found["attr.observation"] == pytest.approx(float(attribution.double().mean()), rel=1e-5)
    assert found["attr.observation.light 1"] == pytest.approx(float(attribution[..., lights[1]].mean()), rel=1e-5)
    needed = torch.zeros(90, dtype=torch.bool).index_fill(0, lights[:2], True)
    share = relevance_mass(data["attr", "observation"], needed)
    assert found["mass.observation.needed"] == pytest.approx(float(share.nanmean()), rel=1e-4)
    assert found[f"cache.{FC2}.mean"] == pytest.approx(float(activation.mean()), rel=1e-4)
    assert found[f"cache.{FC2}.std"] == pytest.approx(float(activation.std()), rel=1e-3)
    assert found[f"cache.{FC2}.zero"] == pytest.approx(float((activation == 0).float().mean()))
    ended = data["next", "done"]
    assert found["episodes.ended"] == int(ended.sum())
    assert found["computed.attr"] == 1.0


def test_probes_stand_beside_their_controls(trained: dict[str, Any]) -> None:
    _, found = trained["logged"][-1]
    assert found["probe.xor.accuracy_low"] <= found["probe.xor.accuracy"] <= found["probe.xor.accuracy_high"]
    assert found["probe.xor.groups"] >= 2
    assert all(0 <= found[f"probe.xor.accuracy.{name}"] <= 1 for name in ("input", "shuffled", "untrained"))
    # Before training the network is the untrained one, bit for bit.
    first = trained["logged"][0][1]
    assert first["probe.xor.accuracy"] == pytest.approx(first["probe.xor.accuracy.untrained"], abs=1e-6)
    assert found[f"dormant.{FC2}"] >= 0
    saved = trained["folder"] / "artifacts" / "probe.xor" / "000003200"
    assert json.loads((saved / "artifact.json").read_text())["facts"]["frames"] == 3200
    from tdhook_rl import LinearProbe

    assert LinearProbe.load(saved / "probe.xor").path == FC2


def test_media_are_where_the_rows_say(trained: dict[str, Any]) -> None:
    files = Path(trained["run"].settings.sync_dir) / "files"
    shown = [row for row in trained["rows"] if "interp/bars.observation.0/path" in row]
    assert [row["interp/step"] for row in shown] == [640, 1920, 3200]
    for row in shown:
        with Pillow.open(files / row["interp/bars.observation.3/path"]) as picture:
            assert picture.width == 420
        values = row[f"interp/hist.cache.{FC2}/values"]
        assert len(values) == 64
        assert 2048 < sum(values) <= 4096
        table = json.loads((files / row["interp/episodes/path"]).read_text())
        assert table["columns"][:6] == ["frames", "rank", "episode", "return", "steps", "ended"]
        worst = [line[3] for line in table["data"] if line[1] == "worst"]
        best = [line[3] for line in table["data"] if line[1] == "best"]
        assert worst == sorted(worst)
        assert best == sorted(best, reverse=True)
        assert worst[0] <= best[0]
    lines = [json.loads(line) for line in (trained["folder"] / "histograms.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == {f"hist.cache.{FC2}", "hist.attr.observation"}


def test_the_run_says_what_it_is(trained: dict[str, Any]) -> None:
    facts = json.loads((trained["folder"] / "config.json").read_text())
    (path,) = Path(trained["run"].settings.sync_dir).glob("*.wandb")
    configs = [record.config for record in records(path) if record.WhichOneof("record_type") == "config"]
    updates = {one.key or "/".join(one.nested_key): one.value_json for config in configs for one in config.update}
    assert json.loads(updates["interp"]) == facts
    assert (facts["seed"], facts["experiment"], facts["config"]) == (7, "cues", {"lr": 1e-3})
    assert facts["targets"] == ["chosen_logit"]
    assert facts["sites"] == [FC2]
    assert facts["versions"]["torch"] == torch.__version__
    summary = json.loads((trained["folder"] / "summary.json").read_text())
    assert summary["frames"] == 3200
    assert summary["attr.observation"] == trained["logged"][-1][1]["attr.observation"]


def train(watch: Callable[[Any], Any] | None) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    """A seeded run, with whatever watches it; the weights, and where all generators are."""
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    actor = make_actor()
    ppo = PPO(actor, make_critic(), epochs=2)
    with METHOD.prepare(actor) as policy:
        step = watch(policy) if watch else lambda data: None
        collector = Collector(
            CueCorners(batch_size=[16], seed=1), policy, frames_per_batch=320, total_frames=960,
            auto_register_policy_transforms=False,
        )  # fmt: skip
        for data in collector:
            step(data)
            assert not any(key[0] == "attr" for key in data.keys(True) if isinstance(key, tuple))
            ppo.update(data)
        collector.shutdown()
    states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return [value.clone() for value in actor.state_dict().values()], states


def test_training_stays_bit_identical(tmp_path: Path) -> None:
    monitors = []

    def watch(policy: Any) -> Callable[[Any], Any]:
        run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
        probe = OnlineProbe(features=("cache", FC2), label=("concept", "xor"))
        diagnostics = NetworkDiagnostics(make_actor_of(policy), sites=[FC2])
        monitor = Monitor(
            policy, [run, CSVLogger("csv", log_dir=str(tmp_path))], folder=tmp_path / "local", media_every=1,
            probes={"xor": probe}, diagnostics=diagnostics,
        )  # fmt: skip
        monitors.append((monitor, run))
        return monitor.step

    with said():  # that nobody annotates
        plain, generators = train(None)
    with said():
        watched, after = train(watch)
        monitors[0][0].close()
    monitors[0][1].finish()
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    assert generators == after
    assert len(FileSink.read(tmp_path / "local" / "log.csv")["attr.observation"]) == 3


def make_actor_of(policy: Any) -> Any:
    with policy.disable_context() as original:
        return original


# ------------------------------------------------------------------ frames


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, stride=4)
        self.out = nn.Linear(4 * 8 * 8, KeyDoor.n_actions)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        batch = pixels.shape[:-3]
        hidden = self.conv(pixels.reshape(-1, *pixels.shape[-3:]).float() / 255).relu()
        return self.out(hidden.flatten(1)).reshape(*batch, -1)


def pixel_actor() -> ProbabilisticActor:
    torch.manual_seed(0)
    net = TensorDictModule(Net(), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=torch.distributions.Categorical)


@pytest.mark.parametrize("method", [Saliency(), PerturbationSaliency()], ids=lambda one: type(one).__name__)
def test_pixels_are_shown_under_their_attribution(method: Any, tmp_path: Path) -> None:
    with method.prepare(pixel_actor()) as policy, Monitor(policy, tmp_path, budgets=Budgets(images=2)) as monitor:
        monitor.step(KeyDoor(batch_size=[2], max_steps=6).rollout(9, policy, break_when_any_done=False))
    media = tmp_path / "media"
    assert {path.name for path in media.iterdir()} == {
        "overlay.observation.0", "overlay.observation.1", "episode.observation", "episodes"
    }  # fmt: skip
    with Pillow.open(media / "episode.observation" / "000000018.gif") as episode:
        assert episode.n_frames == 6  # an episode, not the nine steps around it
    with Pillow.open(media / "overlay.observation.0" / "000000018.png") as picture:
        assert (picture.width, picture.height) == (180 + 8 + 180, 18 + 180 + 22)


def test_an_outlier_does_not_darken_the_rest() -> None:
    attribution = torch.zeros(2, 20, 20)
    attribution[:, 5:15, 5:15] = 0.003
    attribution[0, 0, 0] = -100.0
    left, right = overlays(np.zeros((2, 20, 20)), attribution)[:, :160].astype(int)
    assert right[80, 168 + 80].tolist() == pytest.approx([213 * 0.9 + 6, 94 * 0.9 + 6, 6], abs=2)  # full colour
    assert left[80, 168 + 80].tolist() == right[80, 168 + 80].tolist()  # on one scale
    assert left[4, 168 + 4, 2] > left[4, 168 + 4, 0]  # and what is negative is blue
    assert right[4, 168 + 4].tolist() == [60, 60, 60]


def test_bars_are_as_long_as_their_values() -> None:
    picture = bars([1.0, -0.5, 0.25, float("nan")], ["a", "b", "c", "d"]).astype(int)
    red = (picture == [213, 94, 0]).all(-1).sum(1)
    blue = (picture == [0, 114, 178]).all(-1).sum(1)
    assert red[9] == pytest.approx(2 * blue[27], abs=3)
    assert red[9] == pytest.approx(4 * red[45], abs=5)


# ------------------------------------------------------------------ ways of use


def test_frames_are_counted_without_padding(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path, every=2) as monitor:
        data = batch_of(policy)
        padded = data.clone()
        padded["collector", "mask"] = torch.ones(8, 10, dtype=torch.bool)
        padded["collector", "mask"][:, 7:] = False
        assert monitor.step(data) is not None
        assert monitor.step(padded) is None  # not due, and counted
        found = monitor.step(padded)
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


def test_what_a_logger_cannot_show_is_said_at_the_callers_line(tmp_path: Path) -> None:
    logger = CSVLogger("run", log_dir=str(tmp_path))
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, logger) as monitor:
        data = batch_of(policy)
        with said() as told:
            monitor.step(data)
            monitor.step(data)
    assert len(told) == 3
    assert {one.filename for one in told} == {__file__}


def test_more_is_logged_on_the_same_axis(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path) as monitor:
        monitor.step(batch_of(policy))
        monitor.log({"loss": torch.tensor(0.5), "dose": DataTable(["alpha", "rate"], [[0.0, 0.1], [1.0, 0.9]])})
        with pytest.raises(InputError, match="the metric 'several'"):
            monitor.log({"several": torch.zeros(3)})
    assert FileSink.read(tmp_path / "log.csv")["loss"] == [(80, 0.5)]
    assert (tmp_path / "media" / "dose" / "000000080.csv").read_text() == "alpha,rate\n0.0,0.1\n1.0,0.9\n"


def test_values_that_carry_gradients(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path) as monitor:
        data = policy.annotate(batch_of(policy))
        for key in ("state_value", "observation", ("attr", "observation"), ("next", "reward")):
            value = torch.randn(8, 10, 1) if key == "state_value" else data[key]
            data[key] = value.detach().clone().requires_grad_()
        assert monitor.step(data) is not None


def test_a_vector_is_kept_as_an_artifact(tmp_path: Path) -> None:
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    vector = SteeringVector(vector=torch.ones(64), path=FC2)
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, run) as monitor:
        monitor.step(batch_of(policy))
        place = monitor.save("corner a", vector, {"effect": 0.9})
    assert SteeringVector.load(place / "corner_a").path == FC2
    run.finish()
    (path,) = Path(run.settings.sync_dir).glob("*.wandb")
    finished(run)
    saved = [record.artifact for record in records(path) if record.WhichOneof("record_type") == "artifact"]
    (kept,) = [one for one in saved if one.type == "SteeringVector"]
    assert (kept.name, json.loads(kept.metadata)["effect"]) == ("interp-corner-a", 0.9)
    assert set(kept.aliases) == {"latest", "f80"}


@pytest.mark.slow
def test_workers_log_into_one_run_in_the_main_process(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path) as monitor:
        collector = MultiSyncCollector(
            [CueCorners] * 2, policy, frames_per_batch=40, total_frames=80, cat_results=0, postproc=policy.annotate
        )
        for data in collector:
            monitor.step(data)
        collector.shutdown()
    assert [step for step, _ in FileSink.read(tmp_path / "log.csv")["attr.observation"]] == [40, 80]


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


def test_a_script_that_ends_its_run_before_the_monitor(tmp_path: Path) -> None:
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    with METHOD.prepare(make_actor()) as policy:
        monitor = Monitor(policy, run)
        data = batch_of(policy)
        monitor.step(data)
        run.finish()
        start = time.monotonic()
        with said() as told:
            monitor.step(data)
            monitor.step(data)
            monitor.close()
    assert time.monotonic() - start < 10
    assert len(told) == 1
    assert "Run failed (UsageError" in str(told[0].message)
    assert len(FileSink.read(monitor.folder / "log.csv")["attr.observation"]) == 3


def test_a_run_that_is_opened_for_it_ends_with_it(tmp_path: Path) -> None:
    sink = open_wandb(tmp_path, "cues", {"lr": 1e-3}, group="seeds")
    assert sink is not None
    assert sink.logger.group == "seeds"
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, sink) as monitor:
        monitor.step(batch_of(policy))
    with pytest.raises(wandb.errors.UsageError, match="is finished"):
        sink.logger.log({"a": 1})
    assert [row["interp/step"] for row in finished(sink.logger) if "interp/attr.observation" in row] == [80]
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


def test_a_logger_monitor_and_an_evaluator_take_it(tmp_path: Path) -> None:
    from torchrl.record.loggers.monitoring import LoggerMonitor

    logger = CSVLogger("run", log_dir=str(tmp_path))
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path / "local") as monitor:
        watching = LoggerMonitor(logger, background=False)
        watching.watch(monitor, name="seen", step="frames")
        data = batch_of(policy)
        found = monitor.step(data)
        logged = watching.step()["seen"]
        assert found is not None
        assert logged["seen/attr.observation"] == found["attr.observation"]
        assert monitor.metrics_fn(data)["attr.observation"] == pytest.approx(found["attr.observation"])


# ------------------------------------------------------------------ what goes wrong


def test_nothing_stops_training_after_the_first_batch(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path, media_every=1) as monitor:
        good = batch_of(policy)
        monitor.step(good)
        with said() as told:
            for _ in range(3):
                assert monitor.step(good.select("action", "next")) is None  # no observation in it
        assert len(told) == 1
        assert "Monitor could not log a batch (MissingKeyError" in str(told[0].message)
        assert monitor.step(good) is not None
    assert len(FileSink.read(tmp_path / "log.csv")["attr.observation"]) == 2


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def label(data: TensorDictBase) -> torch.Tensor:
        if "bad" in data.keys():
            raise RuntimeError("no label today")
        return data["concept", "xor"]

    probe = OnlineProbe(features=("cache", FC2), label=label)
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path, probes={"xor": probe}) as monitor:
        data = batch_of(policy, envs=32)
        monitor.step(data)
        with said() as told:
            found = monitor.step(data.clone().set("bad", torch.ones(32, 10)))
        assert [str(one.message) for one in told] == [
            "Monitor could not log the probe 'xor' (RuntimeError: no label today); training goes on"
        ]
        assert found is not None
        assert "attr.observation" in found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_out_and_its_share_said(value: float, tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path) as monitor:
        data = batch_of(policy).select("observation", "action", "next", "collector")
        data["observation"][:2] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # annotate says that these rows have no results
            found = monitor.step(data)
        assert found is not None
        assert found["computed.attr"] == 0.75
        assert found["attr.observation"] == found["attr.observation"]


def test_a_batch_of_nothing_and_one_of_one_row(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path) as monitor:
        data = batch_of(policy)
        assert monitor.step(data[:0]) is None
        assert monitor.step(data[:1, :1]) is not None
        assert monitor.step(data[0, 0]) is not None
    assert monitor.frames == 2


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "every": ({"every": 0}, "every= is a whole number from 1 on"),
    "a prefix of two levels": ({"prefix": "a/b"}, "names have two levels"),
    "too few names": ({"feature_names": ["a", "b"]}, "feature_names= has 2 names"),
    "names twice": ({"feature_names": ["a"] * 90}, "all different"),
    "a group beyond": ({"groups": {"lights": [90]}}, "names feature 90 of 'observation', which has 90"),
    "a group of floats": ({"groups": {"lights": [0.5]}}, "is a list of indices, or a mask"),
    "frames that are not there": ({"frames_key": "pixels"}, "frames_key= names 'pixels', which the batch lacks"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_show_at_once(name: str, tmp_path: Path) -> None:
    options, message = MISTAKES[name]
    with METHOD.prepare(make_actor()) as policy:
        data = batch_of(policy)
        with (
            pytest.raises((InputError, MissingKeyError), match=message),
            Monitor(policy, tmp_path, **options) as monitor,
        ):
            monitor.step(data)


def test_a_plain_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreparationError, match="Monitor takes a hooked policy, got a plain ProbabilisticActor"):
        Monitor(make_actor(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_whose_features_are_many_stays_within_the_budget(tmp_path: Path) -> None:
    net = TensorDictModule(nn.Linear(3000, 1), in_keys=["x"], out_keys=["y"])
    data = TensorDict({"x": torch.randn(4, 3000)}, batch_size=4)
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    with (
        Saliency(target=targets.output_sum()).prepare(net) as policy,
        Monitor(policy, run, feature_names=[f"concept {n}" for n in range(3000)], budgets=Budgets(keys=100)) as monitor,
    ):
        with pytest.warns(UserWarning, match=r"more than 100 names to log \(budget\)"):
            monitor.step(data)
        monitor.step(data)
    assert len(FileSink.read(monitor.folder / "log.csv")) > 3000
    rows = finished(run)
    assert len({name for row in rows for name in row if name.startswith("interp/") and name.count("/") == 1}) <= 101


# ------------------------------------------------------------------ episodes


def test_episodes_are_found_by_number_by_end_and_without_padding() -> None:
    done = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)[..., None]
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])[..., None]
    data = TensorDict({"next": {"reward": reward, "done": done}}, batch_size=[2, 4])
    assert [(one.places.tolist(), one.ended, one.total) for one in episodes(data)] == [
        ([0, 1], True, 3.0), ([2, 3], False, 12.0), ([4, 5, 6, 7], True, 240.0)
    ]  # fmt: skip
    data["collector", "traj_ids"] = torch.tensor([[5, 5, 9, 9], [7, 7, 7, 7]])
    data["collector", "mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert [(one.number, one.places.tolist()) for one in episodes(data)] == [
        (5, [0, 1]), (7, [4, 5, 6, 7]), (9, [2])
    ]  # fmt: skip
    data["next", "episode_reward"] = torch.full((2, 4, 1), 0.5)
    assert {one.total for one in episodes(data)} == {0.5}

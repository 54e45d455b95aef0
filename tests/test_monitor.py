"""``Monitor`` in a training run: what it logs is what the batches hold, and training stays what it was."""

from __future__ import annotations

import copy
import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image as Pillow
from torchrl.collectors import Collector
from torchrl.record.loggers.csv import CSVLogger

from tdhook_rl import ActivationCaching
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import FC2, PPO, make_actor, make_critic
from tdhook_rl.metrics import relevance_mass
from tdhook_rl.report import FileSink, Monitor
from tdhook_rl.rollout import GroupSplit, NetworkDiagnostics, OnlineProbe
from tests.monitoring import METHOD, QUIET, said
from tests.wandb_reader import finished, records


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
    with (trained["folder"] / "media" / "probes" / "000003200.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["probe"], line["site"], line["concept"], line["score"]) == ("xor", FC2, "concept.xor", "accuracy")
    assert float(line["trained"]) == found["probe.xor.accuracy"]
    assert float(line["trained_low"]) == found["probe.xor.accuracy_low"]
    for control in ("input", "shuffled", "untrained"):
        assert float(line[control]) == found[f"probe.xor.accuracy.{control}"]
        assert line[f"{control}_low"]
    assert float(line["groups"]) == found["probe.xor.groups"]
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
    last = {
        one.key or "/".join(one.nested_key): json.loads(one.value_json)
        for record in records(path)
        if record.WhichOneof("record_type") == "summary"
        for one in record.summary.update
    }
    for name in ("attr.observation", "probe.xor.accuracy", f"dormant.{FC2}"):
        assert last[f"interp/{name}"] == pytest.approx(trained["logged"][-1][1][name])
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

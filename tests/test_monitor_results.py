"""What a ``Monitor`` keeps beside the batches: tables of results and probes, figures, artifacts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from PIL import Image as Pillow
from tensordict import TensorDict

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.artifacts import load_artifact
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent import SteeringVector
from tdhook_rl.latent.probing import ClassStatistics
from tdhook_rl.probes.probe_table import ProbeCell, ProbeTable
from tdhook_rl.report import DataTable, FileSink, Monitor
from tdhook_rl.report.contents.names import masses_of
from tdhook_rl.report.figures import lines
from tdhook_rl.report.readings import Features, Readings
from tdhook_rl.rollout import GroupSplit, OnlineProbe, ProbeSuite
from tdhook_rl.statistics import Interval, grouped_mean
from tdhook_rl.sweeps import Condition, SweepResult
from tests.monitoring import METHOD, QUIET, batch_of
from tests.wandb_reader import finished, records


def rows_in(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_more_is_logged_on_the_same_axis(tmp_path: Path) -> None:
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path) as monitor:
        monitor.step(batch_of(policy))
        monitor.log({"loss": torch.tensor(0.5), "dose": DataTable(["alpha", "rate"], [[0.0, 0.1], [1.0, 0.9]])})
        for wrong in (torch.zeros(3), [1.0, 2.0], [], {"a": 1.0}, "text", object()):
            with pytest.raises(InputError, match="the metric 'several'"):
                monitor.log({"several": wrong})
    assert FileSink.read(tmp_path / "log.csv")["loss"] == [(80, 0.5)]
    assert (tmp_path / "media" / "dose" / "000000080.csv").read_text() == "alpha,rate\n0.0,0.1\n1.0,0.9\n"


def test_results_become_tables_and_figures_pictures(tmp_path: Path) -> None:
    """Into the folder and W&B: a sweep, a table of probes, dataclasses with intervals, a figure."""
    from matplotlib.figure import Figure

    played = [Condition(), Condition(draw=1), Condition("to A", 1.0)]
    played += [Condition("to A", 1.0, "random", draw) for draw in range(2)]
    shares = torch.tensor([0.25, 0.25, 0.75, 0.25, 0.5])
    reached = (torch.arange(40) < 40 * shares[:, None]).double()
    one = Interval(estimate=0.9, low=0.8, high=0.95, confidence=0.95, method="t", groups=20, rows=400)
    cells = ProbeTable([ProbeCell(site="fc2", concept="door", score="accuracy", trained=one, chance=0.5)])
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, run, folder=tmp_path / "local") as monitor:
        monitor.log(
            {
                "dose": SweepResult(conditions=played, values={"reached": reached}), "probes": cells,
                "cells": [cells[0]], "figure": Figure(figsize=(3, 2)),
            }
        )  # fmt: skip
    (row,) = [one for one in finished(run) if "interp/dose/path" in one]
    dose = rows_in(tmp_path / "local" / "media" / "dose" / "000000000.csv")
    (line,) = dose
    names = ("alpha", "baseline", "mean", "effect", "random", "random_low", "random_high")
    assert [float(line[name]) for name in names] == [1.0, 0.25, 0.75, 0.5, 0.125, 0.0, 0.25]
    assert (line["vector"], line["outcome"]) == ("to A", "reached")
    assert float(line["effect_low"]) < 0.5 < float(line["effect_high"])
    for name in ("probes", "cells"):
        (line,) = rows_in(tmp_path / "local" / "media" / name / "000000000.csv")
        assert (line["site"], line["concept"], float(line["trained_low"])) == ("fc2", "door", 0.8)
        table = json.loads((Path(run.settings.sync_dir) / "files" / row[f"interp/{name}/path"]).read_text())
        assert table["data"][0][table["columns"].index("trained")] == 0.9
    with Pillow.open(tmp_path / "local" / "media" / "figure" / "000000000.png") as picture:
        assert picture.size == (300, 200)


@pytest.mark.parametrize("units", [4, 64, 90])
@pytest.mark.parametrize(("envs", "steps"), [(4, 8), (32, 32), (64, 128), (7, 300)])
def test_histograms_are_of_all_units_and_of_all_steps(units: int, envs: int, steps: int) -> None:
    """A part of many values is drawn so that no regular pattern in them is missed."""
    for along in (2, 1, 0):
        place = torch.arange((envs, steps, units)[along]) % 2
        values = (place * 1.0).reshape([-1 if dim == along else 1 for dim in range(3)]).expand(envs, steps, units)
        data = TensorDict({"cache": {FC2: values}, "attr": {"observation": values}}, [envs, steps])
        with METHOD.prepare(make_actor()) as policy:
            found = Readings(policy, data, Features()).histograms()
        assert len(found) == 2
        for one in found.values():
            assert one.counts[-1] / one.counts.sum() == pytest.approx(float(place.double().mean()), abs=0.05)


@pytest.mark.parametrize("every", [1, 2])
def test_a_suite_of_probes_sees_all_batches_and_is_one_table(every: int, tmp_path: Path) -> None:
    actor = make_actor()
    method = ActivationCaching([FC2, "module.0.module.1"])
    concepts = {"light/1": lambda data: data["concept", "bits"][..., 0], "xor": ("concept", "xor")}
    split = GroupSplit([("concept", "cell"), ("concept", "bits")])
    made = [
        ProbeSuite(actor, sites=[FC2, "module.0.module.1"], concepts=concepts, split=split) for _ in range(2)
    ]  # fmt: skip
    with (
        method.prepare(actor) as policy,
        Monitor(policy, tmp_path, every=every, table_every=1, probes=made[0]) as monitor,
    ):
        for seed in range(3):
            batch = batch_of(policy, steps=20, envs=32, seed=seed)
            monitor.step(batch)
            made[1].update(policy.annotate(batch))
    expected = made[1].table()[FC2, "light/1"]
    curves = FileSink.read(tmp_path / "log.csv")
    name = f"probe.light/1.{FC2}.accuracy"
    assert [step for step, _ in curves[name]] == [640, 1280, 1920][::every]
    assert curves[name][-1][1] == expected.trained.estimate
    assert curves[f"{name}_low"][-1][1] == expected.trained.low
    assert curves[f"{name}.shuffled"][-1][1] == expected.shuffled.estimate
    lines = rows_in(tmp_path / "media" / "probes" / "000001920.csv")
    assert {(line["site"], line["concept"]) for line in lines} == {
        (site, concept) for site in (FC2, "module.0.module.1") for concept in concepts
    }
    assert all(line["untrained_low"] and line["shuffled_high"] and line["groups"] for line in lines)
    assert len(list((tmp_path / "artifacts").iterdir())) == 4


@pytest.mark.parametrize("table_every", [0, 1, 2, 20])
def test_the_last_table_of_probes_is_of_the_end(table_every: int, tmp_path: Path) -> None:
    probe = OnlineProbe(features=("cache", FC2), label=("concept", "xor"), split=GroupSplit(("concept", "cell")))
    with (
        METHOD.prepare(make_actor()) as policy,
        Monitor(policy, tmp_path, table_every=table_every, probes={"xor": probe}) as monitor,
    ):
        for seed in range(2):
            found = monitor.step(batch_of(policy, steps=20, envs=32, seed=seed))
            assert found is not None
    made = sorted(path.name for path in (tmp_path / "media" / "probes").iterdir())
    assert made == ["000000640.csv"] * bool(table_every) + ["000001280.csv"]
    (line,) = rows_in(tmp_path / "media" / "probes" / "000001280.csv")
    assert float(line["trained"]) == found["probe.xor.accuracy"]
    assert float(line["rows"]) == found["probe.xor.rows"]


def test_our_own_intervals_and_drawings_are_logged(tmp_path: Path) -> None:
    monitor = Monitor(folder=tmp_path)
    monitor.log({"return": grouped_mean([1.0, 2.0, 6.0]), "map": lines({"a": [(0, 1.0), (1, 2.0)]}, unit="share")})
    monitor.close()
    found = FileSink.read(tmp_path / "log.csv")
    assert found["return"] == [(0, 3.0)]
    assert found["return_low"][0][1] < 3.0 < found["return_high"][0][1]
    assert (tmp_path / "media" / "map" / "000000000.png").is_file()
    with pytest.raises(InputError, match="is closed"):
        monitor.log({"return": 1.0})


def test_whatever_holds_tensors_is_kept(tmp_path: Path) -> None:
    statistics = ClassStatistics(features=2, classes=2)
    statistics.add(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1]))
    (tmp_path / "notes.md").write_text("seen")
    things: dict[str, Any] = {
        "sums": statistics, "by name": {"x": torch.ones(3)}, "nested": TensorDict({"a": {"b": torch.zeros(2)}}, []),
        "notes": tmp_path / "notes.md", "net": torch.nn.Linear(2, 3),
    }  # fmt: skip
    with METHOD.prepare(make_actor()) as policy, Monitor(policy, tmp_path / "seen") as monitor:
        monitor.step(batch_of(policy))
        kept = {name: monitor.save(name, thing, {"seed": 3}) for name, thing in things.items()}
        for wrong in (3.0, object(), {"a": 1}, torch.nn.Identity()):
            with pytest.raises(InputError, match=r"'odd' is a .*, which cannot be kept: give something with save"):
                monitor.save("odd", wrong)
    tensors, facts = load_artifact(kept["sums"] / "sums", "ClassStatistics")
    assert tensors["count"].tolist() == [1.0, 1.0]
    assert torch.equal(tensors["moment"], statistics.moment)
    assert facts == {"seed": 3}
    assert load_artifact(kept["by name"] / "by_name", "dict")[0]["x"].tolist() == [1.0] * 3
    assert list(load_artifact(kept["nested"] / "nested", "TensorDict")[0]) == ["a.b"]
    assert list(load_artifact(kept["net"] / "net", "Linear")[0]) == ["bias", "weight"]
    assert (kept["notes"] / "notes.md").read_text() == "seen"
    for place in kept.values():
        assert json.loads((place / "artifact.json").read_text())["facts"] == {"seed": 3}


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


def test_several_methods_that_explain_one_input_are_all_shown(tmp_path: Path) -> None:
    """Pictures, shares of groups, and columns of the table of episodes have names of their own."""
    other = Saliency(target=targets.logit(1), attribution_key="other")
    method, groups = Compose(Saliency(target=targets.logit(0)), other), {"some": [0, 1], "a.b": [2]}
    with method.prepare(make_actor()) as policy, Monitor(policy, tmp_path, groups=groups, table_every=1) as monitor:
        data = CueCorners(batch_size=[2], max_steps=4, seed=0).rollout(9, policy, break_when_any_done=False)
        found = monitor.step(data)
        data = policy.annotate(data)
    for root in ("attr", "other"):
        sizes = data[root, "observation"].abs()
        expected = float((sizes[..., :2].sum(-1) / sizes.sum(-1)).mean())
        assert found[f"mass.{root}.observation.some"] == pytest.approx(expected, rel=1e-4)
        assert (tmp_path / "media" / f"bars.{root}.observation.0").is_dir()
    (table,) = (tmp_path / "media" / "episodes").iterdir()
    columns = table.read_text().splitlines()[0].split(",")
    assert {"mass.attr.observation.some", "mass.other.observation.some"} <= set(columns)
    shares = masses_of({name: [(0, value)] for name, value in found.items()})
    assert {head: set(one) for head, one in shares.items()} == {
        f"{root}.observation": {"some", "a.b"} for root in ("attr", "other")
    }

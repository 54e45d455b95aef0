"""What a report takes for an answer, whatever inputs, groups, features and modules are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook_rl import ActivationCaching, Compose, Saliency
from tdhook_rl.report import FileSink, FolderSink, Monitor, read_run
from tdhook_rl.report.contents.answer import findings_of
from tdhook_rl.report.contents.cautions import cautions_of
from tdhook_rl.report.contents.panels import panels_of
from tdhook_rl.report.contents.several import findings_over


@pytest.mark.parametrize(
    ("name", "root", "features"),
    [("reward", "attr", 2), ("lidar.front", "attr", 5), ("state/score", "relevance", 4), ("success rate", "attr", 4),
     ("return", "relevance", 2)],
)  # fmt: skip
def test_names_of_the_users_are_no_answers(name: str, root: str, features: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    attribute = f"{name.replace('.', '_')}_net"
    net = nn.Sequential()
    net.add_module(attribute, nn.Linear(features, 8))
    net.add_module("tanh", nn.Tanh())
    policy = TensorDictModule(net, in_keys=[name], out_keys=["out"])
    method = Compose(ActivationCaching(f"module.{attribute}"), Saliency(attribution_key=root))
    groups = {f"{name}.left": [0], "right": list(range(1, features))}
    options = {"groups": {name: groups}, "media_every": 0, "table_every": 0, "animation_every": 0}
    with method.prepare(policy) as hooked, Monitor(hooked, tmp_path / "run", **options) as monitor:
        for _ in range(6):
            done = torch.tensor([False, True] * 5)[:, None]
            after = {"reward": torch.rand(10, 1), "done": done, "terminated": done}
            monitor.step(hooked(TensorDict({name: 2 * torch.randn(10, features), "next": after}, batch_size=10)))
    run, logged = read_run(tmp_path / "run"), FileSink.read(tmp_path / "run" / "log.csv")
    found = findings_of(run)
    assert [one.measured for one in found if "achieve" in one.question] == ["episodes.return, at the end"]
    (share,) = (one for one in found if one.measured.startswith(f"share of the attribution of {name} in "))
    assert set(groups) == {share.measured.split(" in ", 1)[1].removesuffix(", at the end"), *share.beside} - {
        "at first"
    }
    assert float(share.value) + sum(share.beside[group] for group in groups if group in share.beside) == pytest.approx(
        1
    )
    drawn = [one.title for one in panels_of(run.series) if one.subject == "What it achieves"]
    assert drawn == ["episodes.return"]
    if root == "attr":
        _require_features(next(one for one in found if "its largest feature" in one.measured), logged, name, features)


def _require_features(found: object, logged: dict[str, list[tuple[int, float]]], name: str, features: int) -> None:
    """Against the log by hand: what the largest, the others and the median are at the end, all of the same batches."""
    last = {one: np.mean([value for _, value in logged[f"attr.{name}.{one}"][-3:]]) for one in range(features)}
    ranked = sorted(last, key=lambda one: -last[one])
    expected = {f"feature {one}": last[one] for one in ranked[1:3]}
    expected |= {f"the median of {features} features": np.median([*last.values()])} if features > 2 else {}
    assert found.words == f"the largest is feature {ranked[0]}"
    assert found.beside == pytest.approx(expected)
    assert float(found.value) == pytest.approx(last[ranked[0]])


@pytest.mark.parametrize(("odd", "share"), [(float("nan"), 0.25), (float("inf"), 0.5)])
def test_rewards_that_are_not_finite_are_said(odd: float, share: float, tmp_path: Path) -> None:
    """Their episodes have no return: without a word a run of them had none at all."""
    policy = TensorDictModule(nn.Linear(2, 3), in_keys=["observation"], out_keys=["out"])
    with Saliency().prepare(policy) as hooked, Monitor(hooked, tmp_path / "run", media_every=0) as monitor:
        reward = torch.ones(8, 1)
        reward[: int(8 * share)] = odd
        done = torch.ones(8, 1, dtype=torch.bool)
        after = {"reward": reward, "done": done, "terminated": done}
        assert (
            monitor.step(TensorDict({"observation": torch.randn(8, 2), "next": after}, 8))["nonfinite.reward"] == share
        )
        after["reward"] = torch.ones(8, 1)
        assert "nonfinite.reward" not in monitor.step(TensorDict({"observation": torch.randn(8, 2), "next": after}, 8))
    assert any(f"Of 'reward' up to {share:.1%} of the rows" in one for one in cautions_of(read_run(tmp_path / "run")))


@pytest.mark.parametrize("largest", [[0, 1], [0, 0, 1, 1, 2]])
def test_answers_of_several_runs_say_of_which_runs_they_are(largest: list[int], tmp_path: Path) -> None:
    """The largest feature of one run stands beside that of another: whose it is was left out."""
    folders = []
    for run, at in enumerate(largest):
        sink = FolderSink(tmp_path / f"run {run}")
        for step in range(3):
            sink.log({"attr.x": 1.0} | {f"attr.x.{one}": 5.0 if one == at else 1.0 + one for one in range(3)}, step)
        sink.close()
        folders.append(sink.path)
    (found,) = findings_over([read_run(one) for one in folders]).found
    for at in set(largest):
        beside = len(largest) - largest.count(at)
        assert f"the largest is feature {at} ({largest.count(at)} of {len(largest)} runs)" in found.words
        assert f"feature {at} (in {beside} of {len(largest)} runs)" in found.beside or beside == 0

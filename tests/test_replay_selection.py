"""Some of the entries of a buffer analysed, a time budget, and the bar on a terminal."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, Compose, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import ArtifactError, InputError, MissingKeyError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.reading.reader import Reader
from tdhook_rl.replay import analyze, load_results
from tests.test_buffer_transforms import LENGTHS, recurrent, stream

ROWS = 120
METHOD = Compose(ActivationCaching(FC2), Saliency(target=targets.chosen_logit()))
KEYS = [("cache", FC2), ("attr", "observation"), ("computed", "cache"), ("computed", "attr")]


@pytest.fixture(scope="module")
def actor() -> ProbabilisticActor:
    torch.manual_seed(0)
    return make_actor()


@pytest.fixture(scope="module")
def data(actor: ProbabilisticActor) -> TensorDict:
    return CueCorners(batch_size=[6], seed=0).rollout(20, actor, break_when_any_done=False).detach()


@pytest.fixture(scope="module")
def buffer(data: TensorDict) -> ReplayBuffer:
    made = ReplayBuffer(storage=LazyTensorStorage(ROWS))
    made.extend(data.reshape(-1))
    return made


@pytest.fixture(scope="module")
def whole(actor: ProbabilisticActor, data: TensorDict) -> TensorDict:
    with METHOD.prepare(actor) as policy:
        return policy.annotate(data.reshape(-1))


def run(actor: ProbabilisticActor, buffer: Any, folder: Path, **options: Any) -> TensorDict:
    with METHOD.prepare(actor) as policy:
        return analyze(policy, buffer, folder, **{"batch_size": 16, **options})


MASK = torch.arange(ROWS) % 7 == 3

#: What is asked, and which entries that is.
CHOICES: dict[str, tuple[dict[str, Any], Callable[[TensorDict], Any]]] = {
    "a slice": ({"rows": slice(10, None, 3)}, lambda data: range(10, ROWS, 3)),
    "a slice backwards": ({"rows": slice(None, None, -1)}, lambda data: range(ROWS)),
    "a range": ({"rows": range(5, 60)}, lambda data: range(5, 60)),
    "numbers": ({"rows": [7, 3, 3, -1]}, lambda data: [3, 7, ROWS - 1]),
    "one entry": ({"rows": torch.tensor([50])}, lambda data: [50]),
    "an array": ({"rows": np.arange(90, 95)}, lambda data: range(90, 95)),
    "a mask": ({"rows": MASK}, lambda data: MASK.nonzero().flatten()),
    "a predicate": (
        {"where": lambda batch: batch["concept", "xor"] == 1},
        lambda data: (data["concept", "xor"].reshape(-1) == 1).nonzero().flatten(),
    ),
    "a predicate of a column": (
        {"where": lambda batch: batch["next", "done"]},
        lambda data: data["next", "done"].reshape(-1).nonzero().flatten(),
    ),
    "all there is": ({"rows": slice(None)}, lambda data: range(ROWS)),
}


def stopping(after: int) -> Callable[[int, int], None]:
    def stop(done: int, size: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("choice", CHOICES)
def test_results_of_some_are_those_of_all(
    choice: str, actor: ProbabilisticActor, buffer: ReplayBuffer, data: TensorDict, whole: TensorDict, tmp_path: Path
) -> None:
    options, expected = CHOICES[choice]
    entries = torch.as_tensor(list(expected(data)))
    with pytest.raises(KeyboardInterrupt):
        run(actor, buffer, tmp_path, progress=stopping(1), **options)
    found = run(actor, buffer, tmp_path, **options)
    assert found["index"].tolist() == entries.tolist()
    for key in KEYS:
        torch.testing.assert_close(found[key], whole[key][entries])
    assert (load_results(tmp_path, verify=True) == found).all()
    manifest = json.loads((tmp_path / "analysis.json").read_text())
    assert (manifest["format"], manifest["selection"]["of"]) == ("tdhook_rl.analysis/3", ROWS)


@pytest.mark.parametrize("shape", [(30, 4), (11, 11), (5, 3, 2), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 1000])
def test_some_entries_that_have_several_rows(batch_size: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    """The number of its entry stands beside each row."""
    net = nn.Linear(2, 2)
    rows = TensorDict({"x": torch.randn(*shape, 2)}, shape)
    chosen = torch.tensor([0, shape[0] - 1])
    method = Saliency(target=targets.Target("square", lambda run: run.outputs["logits"].square().sum(-1)))
    with method.prepare(net, in_keys=["x"], out_keys=["logits"]) as hooked:
        found = analyze(hooked, rows, tmp_path, rows=chosen, batch_size=batch_size)
        expected = hooked.annotate(rows)["attr", "x"]
    assert found.batch_size == (2, *shape[1:])
    assert torch.equal(found["index"], chosen.reshape(-1, *[1] * (len(shape) - 1)).expand(2, *shape[1:]))
    torch.testing.assert_close(found["attr", "x"], expected[chosen])


def test_choices_are_made_one_after_the_other(
    actor: ProbabilisticActor, buffer: ReplayBuffer, data: TensorDict, tmp_path: Path
) -> None:
    asked = {"rows": slice(60), "where": lambda batch: batch["concept", "xor"] == 0, "fraction": 0.5}
    found = run(actor, buffer, tmp_path / "0", **asked)
    able = (data["concept", "xor"].reshape(-1)[:60] == 0).nonzero().flatten()
    assert len(found) == round(0.5 * len(able))
    assert set(found["index"].tolist()) < set(able.tolist())
    assert found["index"].diff().min() > 0
    other = run(actor, buffer, tmp_path / "1", seed=1, **asked)
    assert not torch.equal(other["index"], found["index"])


def test_another_choice_is_another_analysis(actor: ProbabilisticActor, buffer: ReplayBuffer, tmp_path: Path) -> None:
    run(actor, buffer, tmp_path / "some", fraction=0.5)
    run(actor, buffer, tmp_path / "all")
    for options in ({}, {"fraction": 0.5, "seed": 1}, {"fraction": 0.4}, {"rows": slice(60)}):
        with pytest.raises(ArtifactError, match=r"is of 60 of 120 entries \(fraction=0.5, seed=0\), and this one of"):
            run(actor, buffer, tmp_path / "some", **options)
    with pytest.raises(ArtifactError, match="is of all of 120 entries, and this one of 60 of 120 entries"):
        run(actor, buffer, tmp_path / "all", rows=slice(60))
    where, rows = (lambda batch: batch["concept", "xor"] == 1), slice(None, None, 4)
    run(actor, buffer, tmp_path / "asked", where=where, rows=rows)
    with pytest.raises(ArtifactError, match=r"entries \(rows=slice\(None, None, 4\), where=.*lambda.*\), and this one"):
        run(actor, buffer, tmp_path / "asked")
    # What was chosen is what counts, not how.
    again = run(actor, buffer, tmp_path / "some", rows=load_results(tmp_path / "some")["index"])
    assert len(again) == 60


def test_what_was_damaged_is_computed_again(
    actor: ProbabilisticActor, buffer: ReplayBuffer, whole: TensorDict, tmp_path: Path
) -> None:
    rows = torch.arange(1, ROWS, 2)
    run(actor, buffer, tmp_path, rows=rows)
    for name in (f"cache/{FC2}.memmap", "index.memmap"):
        content = bytearray((tmp_path / name).read_bytes())
        content[100:140] = bytes(range(40))
        (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match="are computed again"):
        found = run(actor, buffer, tmp_path, rows=rows)
    assert torch.equal(found["index"], rows)
    torch.testing.assert_close(found["cache", FC2], whole["cache", FC2][rows])


def test_whole_trajectories_are_read_for_some_of_their_rows(tmp_path: Path) -> None:
    """An explanation through time is of the trajectory, whichever of its rows are asked for."""
    actor, rows = recurrent(stream())
    method = Saliency(target=targets.chosen_logit(), inputs=["observation"], horizon="trajectory")
    with method.prepare(actor) as policy:
        every = analyze(policy, rows, tmp_path / "all")
        chosen = torch.arange(len(rows))[2::5]
        for chunk in (1, 7, 1000):
            some = analyze(policy, rows, tmp_path / str(chunk), batch_size=chunk, rows=chosen)
            assert torch.equal(some["index"], chosen)
            torch.testing.assert_close(some["attr", "observation"], every["attr", "observation"][chosen])


def test_a_list_of_trajectories_is_explained_through_time(tmp_path: Path) -> None:
    actor, rows = recurrent(stream())
    pieces = [one.exclude("next", "trajectory", "step_count") for one in rows.split(LENGTHS)]
    method = Saliency(target=targets.chosen_logit(), inputs=["observation"], horizon="trajectory")
    with method.prepare(actor) as policy:
        expected = torch.cat([policy.annotate(one)["attr", "observation"] for one in pieces])
        for chunk in (1, 50):
            found = analyze(policy, lambda: iter(pieces), tmp_path / str(chunk), batch_size=chunk)
            torch.testing.assert_close(found["attr", "observation"], expected)


def test_time_is_over(actor: ProbabilisticActor, buffer: ReplayBuffer, whole: TensorDict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="time_budget= is a number of seconds, got -1"):
        run(actor, buffer, tmp_path, fraction=0.5, time_budget=-1.0)
    with pytest.warns(UserWarning, match="seconds of time_budget= are over: 16 of 60 entries are done"):
        first = run(actor, buffer, tmp_path, fraction=0.5, time_budget=0.0)
    assert len(first) == 16
    with pytest.raises(ArtifactError, match="has reached 16 of 60"):
        load_results(tmp_path)
    part = load_results(tmp_path, partial=True, verify=True)
    assert (part == first).all()
    with pytest.warns(UserWarning, match="32 of 60"):
        run(actor, buffer, tmp_path, fraction=0.5, time_budget=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(actor, buffer, tmp_path, fraction=0.5, time_budget=600.0)
    assert len(found) == 60
    torch.testing.assert_close(found["cache", FC2], whole["cache", FC2][found["index"]])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"rows": []}, "^rows= leaves none of 120 entries"),
    "nothing is true": ({"where": lambda batch: batch["action"] > 9}, "^where= leaves none of 120"),
    "a mask of another length": ({"rows": MASK[:5]}, r"a mask of shape \(5,\), where there are 120 entries"),
    "an entry that is not there": ({"rows": [3, 120]}, "names entry 120, and there are 120: 0 to 119"),
    "a mask of ones": ({"rows": MASK.int()}, r"a 0 or a 1 for each of 120 entries, .* rows\.bool\(\)"),
    "an array of ones": ({"rows": MASK.numpy().astype(np.uint8)}, "a 0 or a 1 for each of 120 entries"),
    "a list of ones": ({"rows": [*map(int, MASK)]}, "a 0 or a 1 for each of 120 entries"),
    "floats": ({"rows": torch.zeros(3)}, "numbers of entries; got"),
    "a table": ({"rows": torch.zeros(3, 2).long()}, "numbers of entries; got"),
    "no share": ({"fraction": 0.0}, "fraction= is a share above 0"),
    "more than all": ({"fraction": 1.5}, "fraction= is a share above 0"),
    "a predicate of numbers": ({"where": lambda batch: batch["action"]}, r"it returned \(16,\) torch.int64"),
    "a predicate of all": ({"where": lambda batch: torch.tensor(True)}, r"it returned \(\) torch.bool"),
    "a predicate of nothing": ({"where": lambda batch: None}, "returns a truth value for each"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_choices(kind: str, actor: ProbabilisticActor, buffer: ReplayBuffer, tmp_path: Path) -> None:
    options, message = WRONG[kind]
    with pytest.raises(InputError, match=message):
        run(actor, buffer, tmp_path / "new", **options)
    with pytest.raises(MissingKeyError, match=r"^where= is a function that reads 'actions', which is not there"):
        run(actor, buffer, tmp_path / "new", where=lambda batch: batch["actions"])
    assert not (tmp_path / "new").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("progress", "terminal", "drawn"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_a_bar_where_somebody_looks(
    progress: bool | None,
    terminal: bool,
    drawn: bool,
    actor: ProbabilisticActor,
    buffer: ReplayBuffer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    run(actor, buffer, tmp_path, progress=progress)
    assert ("120/120" in screen.getvalue()) == drawn
    assert ("left" in screen.getvalue()) == drawn


@pytest.mark.parametrize(("features", "expected"), [(1, 8192), (1000, 4194), (100_000, 1024)])
def test_as_many_rows_at_once_as_take_some_megabytes(features: int, expected: int) -> None:
    rows = TensorDict({"observation": torch.zeros(1, 1).expand(10, features)}, batch_size=10)
    assert Reader(rows).batch_size() == expected
    assert Reader(rows.reshape(2, 5)).batch_size() == expected

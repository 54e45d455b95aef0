"""What `analysis.json` may say and says, and results of every type beside it."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import Saliency, targets
from tdhook_rl.errors import ArtifactError
from tdhook_rl.replay.manifest import (
    OF_SOME,
    WITHOUT_CHECKSUMS,
    Manifest,
    described,
    facts_of,
    read_manifest,
    write_manifest,
)
from tdhook_rl.replay.results import Results
from tdhook_rl.rollout import GroupSplit


def _manifest(**fields: Any) -> Manifest:
    keys = [{"key": ["attr", "x"], "shape": [4, 2], "dtype": "float32"}]
    return Manifest(**{"entries": 4, "done": 4, "batch_size": [4], "keys": keys, "facts": {}, "block": 256,
                       "checksums": [[0]], **fields})  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keys": [], "checksums": []}, "keys is empty"),
        ({"format": OF_SOME, "selection": {"of": 9}}, "selection is \"{'of': 9}\""),
        ({"format": OF_SOME, "selection": {"of": 3, "digest": "x"}}, "selection is 4 of '3' entries"),
        ({"format": OF_SOME, "selection": {"digest": "x"}}, "selection is 4 of 'None' entries"),
        ({"batch_size": []}, "batch_size is [], of 4 entries"),
        ({"batch_size": [3]}, "batch_size is [3], of 4 entries"),
        ({"keys": [{"key": ["", "x"], "shape": [4], "dtype": "float32"}]}, "is no key"),
        ({"keys": [{"key": [3], "shape": [4], "dtype": "float32"}]}, "is no key"),
        ({"keys": [{"key": ["x"], "shape": [4], "dtype": "float31"}]}, "the dtype of ['x'] is 'float31'"),
        ({"keys": [{"key": ["x"], "shape": [4, 1 << 60], "dtype": "int8"}]}, "more than any disk holds"),
        ({"block": 0}, "block is '0'"),
        ({"checksums": [[1 << 32]]}, "checksums is"),
        ({"checksums": [[-1]]}, "checksums is"),
        ({"checksums": [[0, 0]]}, "checksums is not one number for each block"),
    ],
)
def test_manifests_that_are_none(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, _manifest())
    assert read_manifest(tmp_path) == _manifest()
    # Others read it, and later versions.
    assert json.loads((tmp_path / "analysis.json").read_text())["format"] == "tdhook_rl.analysis/2"
    write_manifest(tmp_path, _manifest(**fields))
    with pytest.raises(ArtifactError) as error:
        read_manifest(tmp_path)
    assert words in str(error.value)


def test_a_manifest_without_checksums_has_no_blocks(tmp_path: Path) -> None:
    write_manifest(tmp_path, _manifest(format=WITHOUT_CHECKSUMS))
    assert not {"block", "checksums", "selection"} & json.loads((tmp_path / "analysis.json").read_text()).keys()
    assert not read_manifest(tmp_path).has_checksums


@dataclass
class _Options:
    rate: float
    inner: Any = None


class _Plain:
    def __init__(self) -> None:
        self.rate = 1.0


def _nested() -> GroupSplit:
    """One whose grouping goes deeper than is told."""
    found = GroupSplit.__new__(GroupSplit)
    found.__dict__["groupings"] = [[[[[[[1]]]]]]]
    return found


X = torch.arange(6).reshape(2, 3)
DESCRIBED: dict[str, tuple[Any, Any]] = {
    "nothing": (None, None),
    "a truth": (True, True),
    "a count": (7, 7),
    "a number": (0.1, "0.1"),
    "a number that JSON lacks": (float("inf"), "inf"),
    "a long text": ("x" * 300, "x" * 200 + "... #"),
    "the longest text": ("x" * 200, "x" * 200),
    "a tensor": (X, {"shape": [2, 3], "dtype": "torch.int64", "content": described(X.clone())["content"]}),
    "a list as it lies": ([3, "b", None, "a"], [3, "b", None, "a"]),
    "a long list": (list(range(300)), [*range(200), "... #"]),
    "the longest list": (list(range(200)), [*range(200)]),
    "a set in order": ({"b", "a"}, ["a", "b"]),
    "a mapping": ({1: {"a": 2}}, {"1": {"a": 2}}),
    "a long mapping": (dict.fromkeys(range(201), 1), {**{str(one): 1 for one in range(200)}, "...": "... #"}),
    "options": (_Options(0.5, [1]), {"method": "_Options", "rate": "0.5", "inner": [1]}),
    "a class of options": (_Options, f"{__name__}._Options #"),
    "a function": (torch.nn.functional.relu, "torch.nn.functional.relu #"),
    "a function of ours": (read_manifest, "tdhook_rl.replay.manifest.read_manifest #"),
    "an object of others": (_Plain(), f"{__name__}._Plain #"),
    "an object of ours": (
        GroupSplit("episode", held_out=0.5),
        {"method": "GroupSplit", "groupings": [["episode"]], "held_out": "0.5", "seed": 0},
    ),
    "what is nested": ([[[[[[[[1]]]]]]]], [[[[[["list #"]]]]]]),
    "sets that are nested": (reduce(lambda one, _: frozenset({one}), range(8), 1), [[[[[["frozenset #"]]]]]]),
    "an object of ours that is nested": (_nested(), {"method": "GroupSplit", "groupings": [[[[["list #"]]]]]}),
    "options that are nested": (
        _Options(1.0, _Options(1.0, {"a": [{"b": [[1]]}]})),
        {"method": "_Options", "rate": "1.0", "inner": {
            "method": "_Options", "rate": "1.0", "inner": {"a": [{"b": ["list #"]}]}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DESCRIBED)
def test_how_the_manifest_describes(kind: str) -> None:
    """So that another option is another analysis, and the same one the same in every process."""
    value, expected = DESCRIBED[kind]
    # What is cut, or has code, ends with a number of all of it.
    assert json.loads(re.sub(r" [0-9a-f]{16}\"", ' #"', json.dumps(described(value)))) == expected


def test_tensors_are_described_by_what_they_hold() -> None:
    assert len({described(one)["content"] for one in (X, X + 1, X.float() + 0.5)}) == 3
    assert len(described(X)["content"]) == 16


NAMES = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
    "float64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", NAMES)
def test_results_of_every_dtype_are_found_again(name: str, tmp_path: Path) -> None:
    value = torch.arange(8).reshape(4, 2).to(getattr(torch, name))
    results = Results.create(tmp_path, TensorDict({"x": value[:1]}, [1]), 4, {})
    results.write(0, TensorDict({"x": value}, [4]))
    results.sync()
    found = Results.find(tmp_path)
    assert found is not None
    assert found.data["x"].dtype == value.dtype
    assert torch.equal(found.data["x"].view(torch.uint8), value.view(torch.uint8))
    assert found.damaged() == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"x": torch.zeros(2, 3)}, r"is (2, 3) torch.float32, where (2, 2) torch.float32 is kept"),
        ({"x": torch.zeros(2, 2).double()}, r"is (2, 2) torch.float64, where (2, 2) torch.float32 is kept"),
        ({"y": torch.zeros(2, 2)}, "of the entries from 2 on is absent, where"),
    ],
)
def test_results_keep_one_shape(found: dict[str, Any], words: str, tmp_path: Path) -> None:
    results = Results.create(tmp_path, TensorDict({"x": torch.zeros(2, 2)}, [2]), 4, {})
    results.write(0, TensorDict({"x": torch.ones(2, 2)}, [2]))
    with pytest.raises(ArtifactError) as error:
        results.write(2, TensorDict(found, [2]))
    assert words in str(error.value)


def test_files_that_are_cut_while_they_are_read(tmp_path: Path) -> None:
    results = Results.create(tmp_path, TensorDict({"x": torch.zeros(2, 2)}, [2]), 4, {})
    results.write(0, TensorDict({"x": torch.ones(4, 2)}, [4]))
    results.sync()
    assert results.damaged() == []
    (tmp_path / "x.memmap").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"cannot read .*x.memmap: it is cut"):
        results.damaged()


def test_the_manifest_says_what_computed_the_results() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with Saliency(target=targets.logit(0)).prepare(net, in_keys=["x"], out_keys=["logits"]) as hooked:
        facts = facts_of(hooked)
    assert facts["policy"] == "TensorDictModule"
    assert facts["parameters"] == 3 * 2 + 2 + 2 + 2
    assert [one["method"] for one in facts["methods"]] == ["Saliency"]
    assert facts["versions"].keys() == {"tdhook_rl", "torch", "torchrl", "tensordict"}
    then = datetime.strptime(facts["time"], "%Y-%m-%dT%H:%M:%S%z")
    assert abs((datetime.now(UTC) - then).total_seconds()) < 60
    assert facts.keys() == {"policy", "parameters", "methods", "weights", "settings", "versions", "time"}


def test_nothing_is_left_of_files_for_which_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep they lie: the same folder can be used again."""
    like = TensorDict({"attr": {"agents": {"x": torch.zeros(1, 2)}, "y": torch.zeros(1)}, "z": torch.zeros(1)}, [1])

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "new").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("tdhook_rl.replay.results.reserve", full)
        with pytest.raises(ArtifactError, match="No space left on device"):
            Results.create(tmp_path / "new", like, 4, {})
    assert not list((tmp_path / "new").iterdir())
    Results.create(tmp_path / "new", like, 4, {})

"""Artifacts that somebody else has written: every field is looked at, and nothing hangs."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tdhook_rl import LinearProbe, ProbeReadout
from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import ArgumentError, ArtifactError, InputError
from tdhook_rl.experiments import checkpoints
from tdhook_rl.files import durable
from tdhook_rl.files.checkpoints import state_of
from tdhook_rl.files.stored import module_path
from tdhook_rl.report.player.players import Player
from tdhook_rl.report.sinks.file import FileSink
from tdhook_rl.sweeps import Circuit, SteeringVector
from tdhook_rl.sweeps.sweep_result import SweepResult

VECTOR = {"vector": torch.ones(3)}
PROBE = {"weight": torch.eye(2, 3), "bias": torch.zeros(2)}
FACTS = {"probe_kind": "lda", "module_path": "1"}


#: What hangs is an error.
pytestmark = pytest.mark.limit(10)


def written(folder: Path, tensors: dict[str, torch.Tensor], document: Any) -> Path:
    text = document if isinstance(document, str) else json.dumps({"format": "tdhook_rl/1"} | document)
    save_file(tensors, folder / "saved.safetensors", metadata={"tdhook_rl": text})
    return folder / "saved"


DOCUMENTS: dict[str, Any] = {
    "no format": json.dumps({"kind": "KIND", "facts": FACTS}),
    "an older format": {"format": "tdhook_rl/0", "kind": "KIND", "facts": FACTS},
    "a format that is a number": {"format": 1, "kind": "KIND", "facts": FACTS},
    "a format that is a list": {"format": ["tdhook_rl/1"], "kind": "KIND", "facts": FACTS},
    "no kind": {"facts": FACTS},
    "a kind that is a list": {"kind": ["KIND"], "facts": FACTS},
    "another kind": {"kind": "policy", "facts": FACTS},
    "no facts": {"kind": "KIND"},
    "facts are null": {"kind": "KIND", "facts": None},
    "facts are a list": {"kind": "KIND", "facts": ["module_path"]},
    "facts are a number": {"kind": "KIND", "facts": 3},
    "no module path": {"kind": "KIND", "facts": {"probe_kind": "lda"}},
    "a path that is a number": {"kind": "KIND", "facts": FACTS | {"module_path": 5}},
    "a path that is a list": {"kind": "KIND", "facts": FACTS | {"module_path": ["1"]}},
    "a path that is true": {"kind": "KIND", "facts": FACTS | {"module_path": True}},
    "a path that is null": {"kind": "KIND", "facts": FACTS | {"module_path": None}},
    "a path without an end": {"kind": "KIND", "facts": FACTS | {"module_path": "a." * 10_000}},
    "deep JSON": "[" * 100_000,
    "deep JSON that closes": "[" * 100_000 + "]" * 100_000,
    "deep mappings": '{"facts":' * 50_000,
    "a number of a million digits": '{"format":' + "1" * 1_000_000 + "}",
    "no JSON": "{",
    "a list": "[]",
    "a text": '"tdhook_rl/1"',
    "empty": "",
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("kind", [LinearProbe, SteeringVector])
def test_documents(kind: Any, name: str, tmp_path: Path) -> None:
    word, tensors = ("linear_probe", PROBE) if kind is LinearProbe else ("steering_vector", VECTOR)
    document = DOCUMENTS[name]
    text = document if isinstance(document, str) else json.dumps({"format": "tdhook_rl/1"} | document)
    path = written(tmp_path, tensors, text.replace("KIND", word))
    with pytest.raises(ArtifactError):
        kind.load(path)


TENSORS: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "none": (SteeringVector, {}),
    "another": (SteeringVector, PROBE),
    "one more": (SteeringVector, VECTOR | {"bias": torch.zeros(1)}),
    "a number": (SteeringVector, {"vector": torch.tensor(1.0)}),
    "integers": (SteeringVector, {"vector": torch.ones(3, dtype=torch.long)}),
    "booleans": (SteeringVector, {"vector": torch.ones(3, dtype=torch.bool)}),
    "nothing in it": (SteeringVector, {"vector": torch.ones(0)}),
    "NaN": (SteeringVector, {"vector": torch.tensor([1.0, float("nan")])}),
    "infinite": (SteeringVector, {"vector": torch.tensor([1.0, float("inf")])}),
    "no bias": (LinearProbe, {"weight": PROBE["weight"]}),
    "another bias": (LinearProbe, PROBE | {"bias": torch.zeros(3)}),
    "a flat weight": (LinearProbe, PROBE | {"weight": torch.zeros(3)}),
    "a weight of integers": (LinearProbe, PROBE | {"weight": torch.eye(2, 3, dtype=torch.long)}),
    "no class": (LinearProbe, {"weight": torch.zeros(0, 3), "bias": torch.zeros(0)}),
    "no feature": (LinearProbe, PROBE | {"weight": torch.zeros(2, 0)}),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str, tmp_path: Path) -> None:
    kind, tensors = TENSORS[name]
    word = "linear_probe" if kind is LinearProbe else "steering_vector"
    path = written(tmp_path, tensors, {"kind": word, "facts": FACTS})
    with pytest.raises(ArtifactError):
        kind.load(path)


@pytest.mark.parametrize("change", [{"probe_kind": "LDA"}, {"probe_kind": 3}, {"probe_kind": ["lda"]},
                                    {"probe_concept": "x"}, {"probe_concept": ["values"]}])  # fmt: skip
def test_facts_of_probes(change: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, PROBE, {"kind": "linear_probe", "facts": FACTS | change})
    with pytest.raises(ArtifactError):
        LinearProbe.load(path)


#: Each takes minutes or more to fail on a name of forty letters, or ends the interpreter's stack.
PATHOLOGICAL = [
    r"(([a-z0-9]|\.)+)+!$", r"(e+)+!", r"(e*)*!", r"(e|e)*!", r"(e|ee)+!", r"(e?){40}e{40}!", r"(.*)*!", r"(?:e+e+)+!",
    r"((e{1,40}){1,40}){1,40}!", r"(?:){999999999}", r"(?=(e+)+!)", r"(e+)\1+!", r".*.*.*.*.*.*.*.*!",
    "(" * 5000 + ")" * 5000,
    r"(?:(?:(?:){999}){999}){999}", r"(e{20}|e)+!",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATHOLOGICAL, ids=range(len(PATHOLOGICAL)))
@pytest.mark.parametrize("kind", [LinearProbe, SteeringVector])
def test_pathological_paths(kind: Any, pattern: str, tmp_path: Path) -> None:
    word, tensors = ("linear_probe", PROBE) if kind is LinearProbe else ("steering_vector", VECTOR)
    path = written(tmp_path, tensors, {"kind": word, "facts": FACTS | {"module_path": pattern}})
    with pytest.raises(ArtifactError, match=r"may take for ever|characters"):
        kind.load(path)


@pytest.mark.parametrize(
    "path",
    ["1", "module.0.module.1", "layers[-1].mlp", "net['a key']", "<odd (name)>", "act@0", "act@-1",
     r"module\.0\.(1|3)$", r".*fc\d+$", r"(actor|critic)\.\d+\.mlp", "[", "(", "", "weights*",
     r"layers\.\d+\.mlp\.[02]"],
)  # fmt: skip
def test_paths_that_are_stored_come_back(path: str, tmp_path: Path) -> None:
    assert module_path("x", {"module_path": path}) == path
    LinearProbe(weight=torch.eye(2, 3), bias=torch.zeros(2), path=path).save(tmp_path / "probe")
    assert LinearProbe.load(tmp_path / "probe").path == path


def test_round_trips_and_their_use(tmp_path: Path) -> None:
    probe = LinearProbe(weight=torch.randn(2, 3), bias=torch.randn(2), path="1", facts={"rows": 4, "kept": None})
    probe.save(tmp_path / "probe")
    found = LinearProbe.load(tmp_path / "probe")
    assert torch.equal(found.weight, probe.weight)
    assert found.facts == {"rows": 4, "kept": None}
    ProbeReadout({"x": found}).prepare(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), return_context=False).restore()
    vector = SteeringVector(vector=torch.randn(2, 3), path="1", facts={"norm": 1.5})
    vector.save(tmp_path / "vector")
    again = SteeringVector.load(tmp_path / "vector")
    assert torch.equal(again.vector, vector.vector)
    assert again.facts == {"norm": 1.5}


KEPT: dict[str, Any] = {
    "of NumPy": (np.int64(3), 3), "a share of NumPy": (np.float32(0.5), 0.5), "yes of NumPy": (np.bool_(True), True),
    "a tensor": (torch.tensor(3), 3), "a pair": ((1, 2), [1, 2]), "within": ({"at": np.int64(3)}, {"at": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_facts_that_are_numbers_come_back(name: str, tmp_path: Path) -> None:
    given, expected = KEPT[name]
    probe = LinearProbe(weight=torch.eye(2, 3), bias=torch.zeros(2), path="1", facts={"frames": given})
    assert LinearProbe.load(probe.save(tmp_path / "probe")).facts == {"frames": expected}
    vector = SteeringVector.from_tensor(nn.Sequential(nn.Linear(2, 3)), "0", torch.ones(3), facts={"frames": given})
    assert SteeringVector.load(vector.save(tmp_path / "vector")).facts["frames"] == expected


TAKEN = {LinearProbe: ("probe_kind", "module_path", "probe_concept"), SteeringVector: ("module_path", "entry")}


@pytest.mark.parametrize("name", ["probe_kind", "module_path", "probe_concept", "entry"])
@pytest.mark.parametrize("kind", TAKEN)
def test_no_fact_is_lost_to_what_the_file_says_itself(kind: Any, name: str, tmp_path: Path) -> None:
    given = {"path": "1", "facts": {name: "mine"}, **(PROBE if kind is LinearProbe else VECTOR)}
    if name in TAKEN[kind]:
        with pytest.raises(InputError, match=f"facts= has '{name}'"):
            kind(**given)
    else:
        assert kind.load(kind(**given).save(tmp_path / "saved")).facts == {name: "mine"}


@pytest.mark.parametrize("value", [math.nan, math.inf, complex(math.nan, 0)])
def test_nothing_is_written_that_could_not_be_read(value: complex, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the tensor 'a' has NaN or infinite"):
        save_artifact(tmp_path / "saved", "x", {"a": torch.tensor([1, value])})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["a named pipe", "a folder", "a device", "cut", "noise", "empty", "a long header"])
def test_files_that_are_none(what: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    SteeringVector(vector=torch.ones(3), path="1").save(path)
    content = path.read_bytes()
    path.unlink()
    makers: dict[str, Callable[[], object]] = {
        "a named pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a device": lambda: path.symlink_to("/dev/zero"),
        "cut": lambda: path.write_bytes(content[:-4]),
        "noise": lambda: path.write_bytes(bytes(range(256)) * 16),
        "empty": lambda: path.write_bytes(b""),
        "a long header": lambda: path.write_bytes((1 << 62).to_bytes(8, "little") + content[8:]),
    }
    makers[what]()
    with pytest.raises(ArtifactError):
        SteeringVector.load(path)


def test_checkpoints_of_experiments(tmp_path: Path) -> None:
    for number, facts in enumerate(({}, {"snapshots": 3}, {"snapshots": ["x"]}, {"snapshots": [True]})):
        save_artifact(tmp_path / f"known_value_{number}", checkpoints.KIND, PROBE, facts)
        with pytest.raises(ArtifactError, match="names its snapshots"):
            checkpoints.load("known_value", number, tmp_path)


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_artifact(tmp_path / "saved", "x", VECTOR, {"which": "old"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(durable, "fcntl", None)
    with pytest.raises(ArtifactError, match="No space left"):
        save_artifact(tmp_path / "saved", "x", {"vector": torch.zeros(3)}, {"which": "new"})
    tensors, facts = load_artifact(tmp_path / "saved", "x")
    assert torch.equal(tensors["vector"], VECTOR["vector"])
    assert facts == {"which": "old"}


# ------------------------------------------------------------------ what a disk has changed


@pytest.mark.parametrize("bit", range(0, 8 * 60, 37))
def test_a_bit_of_a_number_or_a_fact_that_has_changed_is_noticed(bit: int, tmp_path: Path) -> None:
    path = save_artifact(tmp_path / "a", "kind", {"x": torch.arange(15.0)}, {"rows": 12})
    before = path.read_bytes()
    content = bytearray(before)
    content[-1 - bit // 8] ^= 1 << bit % 8  # the numbers come last
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"is not what was written|NaN or infinite"):
        load_artifact(tmp_path / "a", "kind")
    assert b'\\"rows\\": 12' in before
    path.write_bytes(before.replace(b'\\"rows\\": 12', b'\\"rows\\": 13'))
    with pytest.raises(ArtifactError, match="is not what was written"):
        load_artifact(tmp_path / "a", "kind")


def test_a_key_that_stands_twice_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"entries": 3, "entries": 4}')
    with pytest.raises(ArtifactError, match="names a key twice"):
        durable.read_json(tmp_path / "a.json", "a manifest")


def test_a_checkpoint_that_unfolds_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(ArtifactError, match="compressed, which no checkpoint of torch is"):
        state_of(tmp_path / "w.pt")


READS = [LinearProbe.load, SteeringVector.load, SweepResult.load, Circuit.load, Player.load, FileSink.read]
WRITES = [LinearProbe(weight=torch.zeros(2, 3), bias=torch.zeros(2), path="1").save]


@pytest.mark.parametrize("call", [*READS, *WRITES], ids=lambda call: call.__qualname__)
@pytest.mark.parametrize("path", [None, 3, 1.5, [], torch.ones(1)], ids=str)
def test_what_is_no_path(call: Any, path: Any) -> None:
    with pytest.raises(ArgumentError, match=r"takes str \| Path, got "):
        call(path)

"""The manifest of an analysis, ``analysis.json``: what computed it, what the files beside it are, and how sound."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.errors import ArtifactError
from tdhook_rl.files.digests import content_of, digest_of
from tdhook_rl.files.durable import read_json, write_text
from tdhook_rl.files.functions import named_function, number_of
from tdhook_rl.files.versions import versions
from tdhook_rl.internals.torch_names import held_buffers, held_parameters
from tdhook_rl.reading.folders import MANIFEST
from tdhook_rl.replaying.policy_settings import policy_settings

#: Longer texts and longer lists are cut.
LONGEST = 200


def facts_of(hooked: Any) -> dict[str, Any]:
    """The methods and their options, the policy, its options and a fingerprint of its tensors, versions, the time."""
    methods = hooked._hooked.runtime.methods
    return {
        "policy": type(hooked)._base.__name__,
        "parameters": sum(parameter.numel() for parameter in held_parameters(hooked).values()),
        "methods": None if methods is None else [described(one) for one in methods],
        "weights": fingerprint(hooked),
        "settings": policy_settings(hooked),
        "versions": versions("tdhook_rl", "torch", "torchrl", "tensordict"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def fingerprint(hooked: Any) -> str:
    """A number of the parameters, buffers and controls of a hooked policy, to the last bit."""
    return digest_of([*held_parameters(hooked).items(), *held_buffers(hooked).items(), *hooked.controls.items()])


def described(value: Any, depth: int = 6) -> Any:
    """A method, or an option of one, in JSON; the same in every process.

    Example:
        >>> from tdhook_rl import ActivationCaching
        >>> described(ActivationCaching("fc1"))["method"]
        'ActivationCaching'
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value if isinstance(value, (bool, int)) or value is None else repr(value)
    if isinstance(value, str):
        return value if len(value) <= LONGEST else f"{value[:LONGEST]}... {number_of(value)}"
    if isinstance(value, Tensor):
        number = hashlib.blake2b(content_of(value), digest_size=8).hexdigest()
        return {"shape": list(value.shape), "dtype": str(value.dtype), "content": number}
    if depth == 0:
        return f"{type(value).__name__} {number_of(value)}"
    more = [] if not isinstance(value, Collection) or len(value) <= LONGEST else [f"... {number_of(value)}"]
    if isinstance(value, Mapping):
        shown = {str(key)[:LONGEST]: described(one, depth - 1) for key, one in list(value.items())[:LONGEST]}
        return shown | {"...": more[0]} if more else shown
    if isinstance(value, (Sequence, set, frozenset)):
        if isinstance(value, Sequence):
            return [described(one, depth - 1) for one in value[:LONGEST]] + more
        return sorted((described(one, depth - 1) for one in value), key=str)[:LONGEST] + more
    if is_dataclass(value) and not isinstance(value, type):
        options = {one.name: described(getattr(value, one.name, None), depth - 1) for one in fields(value)}
        return {"method": type(value).__name__, **options}
    if getattr(value, "__qualname__", None) is None and type(value).__module__.startswith("tdhook_rl"):
        held = {str(key): described(one, depth - 1) for key, one in sorted(getattr(value, "__dict__", {}).items())}
        return {"method": type(value).__name__, **held}
    return named_function(value)


#: How sums of rows are written.
_HEX = re.compile("[0-9a-f]{16}")
FORMAT = "tdhook_rl.analysis/2"
#: Of some of the entries of a source, which it names.
OF_SOME = "tdhook_rl.analysis/3"
#: Formats of earlier versions: finished analyses in them are read.
WITHOUT_CHECKSUMS = "tdhook_rl.analysis/1"

#: An analysis has about so many blocks, and blocks at least so many entries.
BLOCKS, SMALLEST = 1024, 256

DTYPES = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
    "float64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


@dataclass
class Manifest:
    """What ``analysis.json`` says."""

    entries: int  # along the first dimension
    done: int  # entries whose results are on the disk
    batch_size: list[int]  # of the results
    keys: list[dict[str, Any]]  # of each tensor its key, its shape and its dtype
    facts: dict[str, Any]  # what computed them
    block: int = 0  # entries of one checksum; 0 where there are none
    checksums: list[list[int]] = field(default_factory=list)  # of each tensor, block by block up to `done`, CRC-32
    format: str = FORMAT
    selection: dict[str, Any] | None = None  # by what entries were chosen, of how many, and a digest of their numbers

    @property
    def has_checksums(self) -> bool:
        return self.format != WITHOUT_CHECKSUMS

    def read_sums(self) -> dict[str, int]:
        """The sums of the rows that were read up to ``done``, where it says them."""
        told = self.facts.get("rows")
        named = told.items() if isinstance(told, dict) else ()
        return {name: int(one, 16) for name, one in named if isinstance(one, str) and _HEX.fullmatch(one)}

    def set_read_sums(self, sums: Mapping[str, int]) -> None:
        """Say them."""
        self.facts["rows"] = {name: f"{one:016x}" for name, one in sorted(sums.items())}

    def blocks(self) -> int:
        """How many blocks the entries that are done have."""
        return -(-self.done // self.block)


def block_of(entries: int) -> int:
    """The entries of one checksum.

    Example:
        >>> block_of(1000), block_of(10_000_000)
        (256, 9766)
    """
    return max(SMALLEST, -(-entries // BLOCKS))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest at once; when this returns it is on the disk.

    Raises:
        OSError: if it cannot be written.
    """
    document = asdict(manifest)
    if not manifest.has_checksums:
        del document["block"], document["checksums"]
    if manifest.selection is None:
        del document["selection"]
    write_text(folder / MANIFEST, json.dumps(document, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, every field of it as it must be.

    Raises:
        ArtifactError: if it is not.
    """
    path = folder / MANIFEST
    document = read_json(path, "the manifest of an analysis")
    try:
        if not isinstance(document, dict):
            raise ValueError("it is no mapping")
        known = document.get("format")
        if known not in (FORMAT, OF_SOME, WITHOUT_CHECKSUMS):
            raise ValueError(f"its format is {known!r}, not {FORMAT!r}")
        manifest = _checked(document)
    except ValueError as error:
        raise ArtifactError(f"{path} is not the manifest of an analysis: {error}") from error
    return manifest


def _checked(document: dict[str, Any]) -> Manifest:
    old = document["format"] == WITHOUT_CHECKSUMS
    names = {"entries", "done", "batch_size", "keys", "facts", "format"} | (set() if old else {"block", "checksums"})
    names |= {"selection"} if document["format"] == OF_SOME else set()
    if document.keys() != names:
        odd = sorted(document.keys() ^ names)
        raise ValueError(f"it lacks, or has besides what belongs there, {', '.join(map(repr, odd))}")
    entries = _count(document, "entries", at_least=1)
    done = _count(document, "done", at_most=entries)
    size = _list(document, "batch_size", _is_count)
    if not size or size[0] != entries:
        raise ValueError(f"batch_size is {size}, of {entries} entries")
    if not isinstance(document["facts"], dict):
        raise ValueError(f"facts is {document['facts']!r}")
    keys = _list(document, "keys", lambda entry: isinstance(entry, dict) and entry.keys() == {"key", "shape", "dtype"})
    if not keys:
        raise ValueError("keys is empty")
    for entry in keys:
        _check_key(entry, size)
    if len({tuple(entry["key"]) for entry in keys}) != len(keys):
        raise ValueError("two of its keys are the same")
    manifest = Manifest(entries, done, size, keys, document["facts"], format=document["format"])
    if not old:
        manifest.block = _count(document, "block", at_least=1)
        manifest.checksums = _list(document, "checksums", lambda one: isinstance(one, list) and all(map(_is_crc, one)))
        manifest.selection = _selection(document, entries) if manifest.format == OF_SOME else None
        if [len(one) for one in manifest.checksums] != [manifest.blocks()] * len(keys):
            raise ValueError("checksums is not one number for each block of each key")
    return manifest


def _selection(document: dict[str, Any], entries: int) -> dict[str, Any]:
    found = document["selection"]
    if not isinstance(found, dict) or not isinstance(found.get("digest"), str):
        raise ValueError(f"selection is {str(found)[:80]!r}")
    if not _is_count(found.get("of")) or found["of"] < entries:
        raise ValueError(f"selection is {entries} of {str(found.get('of'))[:40]!r} entries")
    return found


def _check_key(entry: dict[str, Any], size: list[int]) -> None:
    key, shape, dtype = entry["key"], entry["shape"], entry["dtype"]
    if not isinstance(key, list) or not key or not all(isinstance(part, str) and part for part in key):
        raise ValueError(f"{key!r} is no key")
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or shape[: len(size)] != size:
        raise ValueError(f"the shape of {key} is {shape!r}, which does not begin with {size}")
    if dtype not in DTYPES or not hasattr(torch, dtype):
        raise ValueError(f"the dtype of {key} is {dtype!r}")
    if math.prod(shape) * 16 >= 1 << 63:
        raise ValueError(f"the shape of {key} is {shape}, more than any disk holds")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_crc(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def _count(document: dict[str, Any], name: str, at_least: int = 0, at_most: int = 1 << 62) -> int:
    value = document[name]
    if not _is_count(value) or not at_least <= value <= at_most:
        raise ValueError(f"{name} is {str(value)[:40]!r}")
    return int(value)


def _list(document: dict[str, Any], name: str, each: Callable[[Any], bool]) -> list[Any]:
    value = document[name]
    if not isinstance(value, list) or not all(map(each, value)):
        raise ValueError(f"{name} is {str(value)[:80]!r}")
    return value

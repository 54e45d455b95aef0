"""The manifest of an analysis, ``analysis.json``: what the files beside it are, and how far they can be relied on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tdhook_rl.errors import ArtifactError
from tdhook_rl.files.durable import read_json, write_text

MANIFEST = "analysis.json"
FORMAT = "tdhook_rl.analysis/2"
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

    @property
    def has_checksums(self) -> bool:
        return self.format != WITHOUT_CHECKSUMS

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
        if known not in (FORMAT, WITHOUT_CHECKSUMS):
            raise ValueError(f"its format is {known!r}, not {FORMAT!r}")
        manifest = _checked(document)
    except ValueError as error:
        raise ArtifactError(f"{path} is not the manifest of an analysis: {error}") from error
    return manifest


def _checked(document: dict[str, Any]) -> Manifest:
    old = document["format"] == WITHOUT_CHECKSUMS
    names = {"entries", "done", "batch_size", "keys", "facts", "format"} | (set() if old else {"block", "checksums"})
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
        if [len(one) for one in manifest.checksums] != [manifest.blocks()] * len(keys):
            raise ValueError("checksums is not one number for each block of each key")
    return manifest


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

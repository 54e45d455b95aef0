"""Saved artifacts: tensors in safetensors and facts in JSON, never code; loading never unpickles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.errors import ArtifactError
from tdhook_rl.files.digests import digest_of
from tdhook_rl.files.durable import parse_json, put, require_file_name
from tdhook_rl.files.stored import as_stored

__all__ = ["load_artifact", "save_artifact"]

FORMAT = "tdhook_rl/1"


def save_artifact(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
) -> Path:
    """Write ``<path>.safetensors`` and, for people, the same facts as ``<path>.json``.

    Args:
        path: where to write; a ``.safetensors`` ending may be given or left out.
        kind: what it is, such as ``"linear_probe"``; loading checks it.
        tensors: the tensors by name.
        facts: JSON-able facts: where it was fitted, on how much data, how well it did. Numbers of NumPy and tensors
            of one number are written as numbers.

    Returns:
        the path of the safetensors file.

    Raises:
        ArtifactError: if the folder cannot be written, a fact is not JSON, or a tensor has NaN or infinite entries,
            with which it could not be loaded.
    """
    from safetensors.torch import save

    path = _with_ending(path)
    tensors = {name: tensor.detach().to_dense().cpu().contiguous().clone() for name, tensor in tensors.items()}
    _require_finite(path, tensors)
    try:
        document = {"format": FORMAT, "kind": kind, "facts": as_stored(facts or {})}
        document["digest"] = _digest(document["facts"], tensors)
        text = json.dumps(document, indent=2)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the facts of {path.name!r} are not JSON: {error}") from None
    # Not save_file, which says of a full disk that something could not be serialized.
    put(path, save(tensors, metadata={"tdhook_rl": json.dumps(document)}))
    put(path.with_suffix(".json"), text + "\n")
    return path


def load_artifact(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an artifact of the expected kind.

    Returns:
        its tensors and its facts.

    Raises:
        ArtifactError: if the file is absent, corrupt, was changed, holds NaN, or is something else.
    """
    from safetensors import SafetensorError, safe_open

    path = _with_ending(path)
    if not path.is_file():
        if path.exists():
            raise ArtifactError(f"{path} is no regular file, so it is no artifact")
        near = sorted(found.name for found in path.parent.glob("*.safetensors")) if path.parent.is_dir() else []
        raise ArtifactError(f"there is no artifact {path}; in that folder: {', '.join(near) or 'none'}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("tdhook_rl", "null")
            document = parse_json(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except RecursionError:
        raise ArtifactError(f"{path} has a header that is nested too deeply") from None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        if not isinstance(document, dict):
            raise ArtifactError(f"{path} was not written by this library: its header does not say what it holds")
        raise ArtifactError(
            f"{path} was not written by this version of the library (the format in its header is "
            f"{str(document.get('format'))[:80]!r}, not {FORMAT!r})"
        )
    facts = document.get("facts")
    if not isinstance(document.get("kind"), str) or not isinstance(facts, dict):
        raise ArtifactError(f"{path} lacks its kind or its facts, which every artifact has")
    if document["kind"] != kind:
        raise ArtifactError(f"{path} holds a {document['kind'][:80]!r}, not a {kind!r}")
    if "digest" in document and document["digest"] != _digest(facts, tensors):
        raise ArtifactError(f"{path} is not what was written: its tensors or facts have changed since")
    _require_finite(path, tensors)
    return tensors, facts


def _require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{path}: the tensor {name!r} has NaN or infinite entries")


def _digest(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """By which bytes are known that have changed on a disk."""
    told = json.dumps(json.loads(json.dumps(facts)), sort_keys=True).encode()
    return hashlib.blake2b(told + digest_of(tensors.items()).encode(), digest_size=16).hexdigest()


def _with_ending(path: str | Path) -> Path:
    path = Path(path)
    require_file_name(path)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
        require_file_name(path)
    return path

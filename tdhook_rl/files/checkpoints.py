"""The weights of a checkpoint, whatever it is kept as; nothing is unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdhook_rl.errors import ArtifactError, InputError


def state_of(checkpoint: Any, name: str = "checkpoint") -> dict[str, Any]:
    """A state dict.

    Args:
        checkpoint: a state dict, a module, or the path of a ``.safetensors`` file or of one that ``torch.save`` wrote
            (read with ``weights_only=True``).
        name: what it is called in messages.

    Raises:
        ArtifactError: if a file is absent, corrupt, or holds anything but tensors.
        InputError: for anything else.
    """
    if isinstance(checkpoint, nn.Module):
        return dict(checkpoint.state_dict())
    if isinstance(checkpoint, Mapping):
        return dict(checkpoint)
    if not isinstance(checkpoint, str | Path):
        raise InputError(
            f"{name!r} is a {type(checkpoint).__name__}: give a state dict, a module, or the path of a .safetensors or "
            "torch.save file"
        )
    path = Path(checkpoint)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        _require_stored(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ArtifactError(f"there is no file {path} for {name!r}") from error
    except Exception as error:  # whatever a file that is none makes a reader raise
        raise ArtifactError(f"{path} holds no weights that can be read without running code: {error}") from error
    if not isinstance(found, Mapping):
        raise ArtifactError(f"{path} holds a {type(found).__name__}, not a state dict")
    return dict(found)


def _require_stored(path: Path) -> None:
    """Raise ``ValueError`` for a file that unfolds to more than it has: ``torch.save`` never compresses."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise ValueError("it is compressed, which no checkpoint of torch is")


def load_into(module: nn.Module, checkpoint: Any, name: str = "checkpoint") -> None:
    """Give a module the weights of a checkpoint, in place.

    Raises:
        ArtifactError, InputError: as of :func:`state_of`; and if they are not the module's.
    """
    state = state_of(checkpoint, name)
    try:
        module.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name!r} has not the weights of {type(module).__name__}: {error}") from error

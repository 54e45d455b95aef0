"""Results beside a buffer: memory-mapped tensors, and a page in JSON that says what they are and how far they go.

Nothing here is unpickled: the page names each tensor's shape and type, and a file of another size is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import MemoryMappedTensor, TensorDict, TensorDictBase

from tdhook_rl.errors import ArtifactError

__all__ = ["Results", "load_results"]

PAGE = "analysis.json"
FORMAT = "tdhook_rl.analysis/1"


@dataclass
class Page:
    """What ``analysis.json`` says."""

    entries: int  # along the first dimension
    done: int  # entries whose results are written
    batch_size: list[int]  # of the results
    keys: list[dict[str, Any]]  # of each tensor its key, its shape and its dtype
    facts: dict[str, Any]  # what computed them, for people
    format: str = FORMAT


class Results:
    """The results in a folder, and how far they go."""

    def __init__(self, folder: Path, page: Page, data: TensorDict) -> None:
        self.folder = folder
        self.page = page
        self.data = data

    @classmethod
    def create(cls, folder: Path, like: TensorDictBase, entries: int, facts: dict[str, Any]) -> Results:
        """New files for ``entries`` times what the first entry of ``like`` has.

        Raises:
            ArtifactError: if the folder cannot be written.
        """
        keys = [
            {
                "key": [key] if isinstance(key, str) else list(key),
                "shape": [entries, *value.shape[1:]],
                "dtype": _name(value),
            }
            for key, value in like.items(True, True)
        ]
        page = Page(entries, 0, [entries, *like.batch_size[1:]], keys, facts)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Before the files: whoever is killed between leaves a folder that is known for an analysis.
            _write_page(folder, page)
            data = like[0].expand(*page.batch_size).memmap_like(folder)
        except OSError as error:
            raise ArtifactError(f"cannot write {folder}: {error.strerror or error}") from error
        return cls(folder, page, data)

    @classmethod
    def find(cls, folder: Path) -> Results | None:
        """The results in a folder, or ``None`` where none is written yet.

        Raises:
            ArtifactError: if it holds something else, or a file is missing, of another size or not readable.
        """
        if (folder / PAGE).exists():
            page = _read_page(folder)
            return cls(folder, page, _map(folder, page)) if page.done else None
        if folder.is_dir() and any(folder.iterdir()):
            raise ArtifactError(f"{folder} is not empty and holds no {PAGE}: name a new folder, or that of an analysis")
        return None

    def write(self, first: int, found: TensorDictBase) -> None:
        """Write the results of some entries, and then that they are there.

        Raises:
            ArtifactError: if their keys, shapes or types are not those of the first ones.
        """
        for entry in self.page.keys:
            key = tuple(entry["key"])
            value = found.get(key, None)
            shape = [len(found), *entry["shape"][1:]]
            if value is None or list(value.shape) != shape or _name(value) != entry["dtype"]:
                seen = "absent" if value is None else f"{tuple(value.shape)} {value.dtype}"
                raise ArtifactError(
                    f"{key!r} of the entries from {first} on is {seen}, where {tuple(shape)} torch.{entry['dtype']} is "
                    f"kept in {self.folder}: results have one shape for a whole buffer"
                )
            self.data.get(key)[first : first + len(found)] = value
        self.page.done = first + len(found)
        _write_page(self.folder, self.page)


def load_results(folder: str | Path) -> TensorDict:
    """The finished results that :func:`tdhook_rl.replay.analyze` has written, memory-mapped; nothing is unpickled.

    Raises:
        ArtifactError: if there are none, they are not finished, or a file was damaged.
    """
    folder = Path(folder)
    if not (folder / PAGE).is_file():
        raise ArtifactError(f"{folder} holds no analysis: there is no {PAGE} in it")
    page = _read_page(folder)
    if page.done < page.entries:
        raise ArtifactError(
            f"the analysis in {folder} has reached {page.done} of {page.entries} entries: call analyze() with the "
            "same policy, buffer and folder, which goes on from there"
        )
    return _map(folder, page)


def _write_page(folder: Path, page: Page) -> None:
    """Replace the page at once, so that whoever is killed meanwhile leaves the old one or the new one."""
    path = folder / f"{PAGE}.new"
    path.write_text(json.dumps(asdict(page), indent=2) + "\n")
    path.replace(folder / PAGE)


def _read_page(folder: Path) -> Page:
    try:
        page = Page(**json.loads((folder / PAGE).read_text()))
        if page.format != FORMAT:
            raise ValueError(f"its format is {page.format!r}, not {FORMAT!r}")
    except (ValueError, TypeError, OSError) as error:
        raise ArtifactError(f"{folder / PAGE} is not the page of an analysis: {error}") from error
    return page


def _map(folder: Path, page: Page) -> TensorDict:
    try:
        data = TensorDict({}, batch_size=page.batch_size)
        for entry in page.keys:
            data.set(tuple(entry["key"]), _mapped(folder, entry))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
        raise ArtifactError(f"{folder / PAGE} does not describe the files beside it: {error}") from error
    return data


def _mapped(folder: Path, entry: dict[str, Any]) -> MemoryMappedTensor:
    *roots, name = entry["key"]
    path = folder.joinpath(*roots, f"{name}.memmap")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is outside {folder}")
    dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
    size, expected = path.stat().st_size, shape.numel() * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, expected {expected}")
    return MemoryMappedTensor.from_filename(path, dtype=dtype, shape=shape)


def _name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")

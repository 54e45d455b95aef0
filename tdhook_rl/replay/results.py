"""Results beside a buffer: memory-mapped tensors, and a manifest in JSON that says what they are and how far they go.

Nothing here is unpickled: the manifest names each tensor's shape and type, and a file of another size is refused. What
it says is done is on the disk before it says so, with a checksum for each block of entries.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import MemoryMappedTensor, TensorDict, TensorDictBase

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import ArtifactError, listed
from tdhook_rl.files.digests import content_of
from tdhook_rl.files.durable import require_space, reserve, sync
from tdhook_rl.internals.tensordict_names import file_stem
from tdhook_rl.replay.manifest import MANIFEST, OF_SOME, Manifest, block_of, read_manifest, write_manifest
from tdhook_rl.replay.read_rows import Sums

#: Results are brought to the disk when that has taken no more than this share of the time, and after so many seconds
#: at the latest: the most that a loss of power, or a kill, can take.
SHARE, LATEST = 0.02, 10.0
#: Where results of some entries say which these are.
INDEX = "index"
#: Bytes that are read at once for a checksum.
PIECE = 8 << 20


class Results:
    """The results in a folder, and how far they go.

    Attributes:
        done: entries that are written; ``manifest.done`` of them are on the disk.
        read: sums of the rows that these are of, see :mod:`tdhook_rl.replay.read_rows`.
        data: the results, memory-mapped.
    """

    def __init__(self, folder: Path, manifest: Manifest, data: TensorDict) -> None:
        self.folder = folder
        self.manifest = manifest
        self.data = data
        # Together, so that whoever is interrupted never says of one that it is of the other.
        self._progress: tuple[int, Sums] = manifest.done, manifest.read_sums()
        self._sums = [list(one) for one in manifest.checksums]
        self._paths = [_path(folder, entry) for entry in manifest.keys]
        self._synced, self._cost, self._dirty = time.monotonic(), 0.0, False

    @classmethod
    def create(
        cls,
        folder: Path,
        like: TensorDictBase,
        entries: int,
        facts: dict[str, Any],
        selection: dict[str, Any] | None = None,
    ) -> Results:
        """New files for ``entries`` times what the first entry of ``like`` has, with all the room that they need.

        Raises:
            ArtifactError: if the folder cannot be written, or the disk has no room.
        """
        keys = [
            {
                "key": [key] if isinstance(key, str) else list(key),
                "shape": [entries, *value.shape[1:]],
                "dtype": _name(value),
            }
            for key, value in like.items(True, True)
        ]
        block = block_of(entries)
        manifest = Manifest(entries, 0, [entries, *like.batch_size[1:]], keys, facts, block, [[] for _ in keys])
        if selection is not None:
            manifest.format, manifest.selection = OF_SOME, selection
        require_space(folder, sum(_size(entry) for entry in keys))
        try:
            # Before the files: whoever is killed between leaves a folder that is known for an analysis.
            write_manifest(folder, manifest)
            data = like[0].expand(manifest.batch_size).memmap_like(folder)
            for entry in keys:
                reserve(_path(folder, entry), _size(entry))
            sync(dict.fromkeys([*(_path(folder, entry).parent for entry in keys), folder, folder.parent]))
        except (OSError, RuntimeError) as error:
            _remove(folder, manifest)
            reason = getattr(error, "strerror", None) or error
            raise ArtifactError(f"cannot write {folder}: {reason}") from error
        return cls(folder, manifest, data)

    @classmethod
    def find(cls, folder: Path) -> Results | None:
        """The results in a folder, or ``None`` where none is written yet.

        Raises:
            ArtifactError: if it holds something else, or a file is missing, of another size or not readable.
        """
        if os.path.lexists(folder / MANIFEST):
            manifest = read_manifest(folder)
            return cls(folder, manifest, _map(folder, manifest)) if manifest.done else None
        if folder.is_dir() and any(one.name != f"{MANIFEST}.new" for one in folder.iterdir()):
            raise ArtifactError(
                f"{folder} is not empty and holds no {MANIFEST}: name a new folder, or that of an analysis"
            )
        return None

    @property
    def done(self) -> int:
        return self._progress[0]

    @property
    def read(self) -> Sums:
        return self._progress[1]

    def known(self, read: Sums) -> None:
        """Of what rows these are; an analysis of an earlier version does not say it."""
        self._progress = self.done, read

    # ------------------------------------------------------------------ writing

    def write(self, first: int, found: TensorDictBase, read: Sums | None = None) -> None:
        """Write the results of the entries from ``first`` on; :meth:`sync` says that they are there.

        Entries are written in order, or anew from the beginning of a block.

        Args:
            first: the first of them.
            found: their results.
            read: the sums of all rows up to the last of them; as they were unless given.

        Raises:
            ArtifactError: if their keys, shapes or types are not those of the first ones, or they cannot be written.
        """
        for number, entry in enumerate(self.manifest.keys):
            key = tuple(entry["key"])
            value = found.get(key, None)
            shape = [len(found), *entry["shape"][1:]]
            if value is None or list(value.shape) != shape or _name(value) != entry["dtype"]:
                seen = "absent" if value is None else f"{tuple(value.shape)} {value.dtype}"
                raise ArtifactError(
                    f"{key!r} of the entries from {first} on is {seen}, where {tuple(shape)} torch.{entry['dtype']} is "
                    f"kept in {self.folder}: results have one shape for a whole buffer"
                )
            content = content_of(value)
            # Not through the mapping: an error of the disk's would end the process there.
            self._put(self._paths[number], content, first * _size(entry) // self.manifest.entries)
            self._count(number, first, len(found), content)
        self._progress = max(self.done, first + len(found)), self.read if read is None else read
        self._dirty = True

    def sync_now_and_then(self) -> None:
        """Bring what was written to the disk if it is time."""
        since = time.monotonic() - self._synced
        if since >= min(LATEST, self._cost / SHARE):
            self.sync()

    def sync(self) -> None:
        """Bring what was written to the disk, and then say so on the manifest.

        Raises:
            ArtifactError: if it does not get there.
        """
        if not self._dirty:
            return
        start = time.monotonic()
        try:
            sync(self._paths)
            self.manifest.done, read = self._progress
            self.manifest.set_read_sums(read)
            self.manifest.checksums = [list(one) for one in self._sums]
            write_manifest(self.folder, self.manifest)
        except OSError as error:
            raise ArtifactError(f"cannot write {self.folder}: {error.strerror or error}") from error
        self._synced, self._dirty = time.monotonic(), False
        self._cost = self._synced - start

    def _put(self, path: Path, content: memoryview, where: int) -> None:
        try:
            descriptor = os.open(path, os.O_WRONLY)
            try:
                while len(content):
                    written = os.pwrite(descriptor, content, where)
                    content, where = content[written:], where + written
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error

    def _count(self, number: int, first: int, rows: int, content: memoryview) -> None:
        """Carry the checksums of one tensor on over some entries."""
        sums, block, size = self._sums[number], self.manifest.block, len(content) // rows
        start = first
        while start < first + rows:
            stop = min(first + rows, (start // block + 1) * block)
            piece = content[(start - first) * size : (stop - first) * size]
            at = start // block
            if at == len(sums):
                sums.append(0)
            sums[at] = zlib.crc32(piece, 0 if start % block == 0 else sums[at])
            start = stop

    # ------------------------------------------------------------------ looking

    def damaged(self) -> list[tuple[int, int]]:
        """The ranges of entries that are not what was written, though the manifest says that they are done.

        Raises:
            ArtifactError: if a file cannot be read.
        """
        found = sorted({block for number in range(len(self._paths)) for block in self._wrong_blocks(number)})
        block = self.manifest.block
        return [(at * block, min((at + 1) * block, self.manifest.done)) for at in found]

    def _wrong_blocks(self, number: int) -> Iterator[int]:
        entry, block = self.manifest.keys[number], self.manifest.block
        size = _size(entry) // self.manifest.entries
        try:
            with self._paths[number].open("rb") as file:
                for at, expected in enumerate(self.manifest.checksums[number]):
                    left = (min((at + 1) * block, self.manifest.done) - at * block) * size
                    found = 0
                    while left:
                        piece = file.read(min(left, PIECE))
                        if not piece:
                            raise OSError("it is cut")
                        found, left = zlib.crc32(piece, found), left - len(piece)
                    if found != expected:
                        yield at
        except OSError as error:
            raise ArtifactError(f"cannot read {self._paths[number]}: {error.strerror or error}") from error


@checked
def load_results(folder: str | Path, *, verify: bool = False, partial: bool = False) -> TensorDict:
    """The finished results that :func:`tdhook_rl.replay.analyze` has written, memory-mapped; nothing is unpickled.

    Args:
        folder: the folder of the analysis.
        verify: read everything and compare the checksums; without it, only the manifest and the sizes are looked at.
        partial: of an analysis that is not finished, what is done.

    Returns:
        entry ``i`` for entry ``i`` of what was analysed; where a part of it was chosen, ``"index"`` says which.

    Raises:
        ArtifactError: if there are none, they are not finished, or a file was damaged.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / MANIFEST):
        raise ArtifactError(f"{folder} holds no analysis: there is no {MANIFEST} in it")
    manifest = read_manifest(folder)
    if manifest.done < (1 if partial else manifest.entries):
        raise ArtifactError(
            f"the analysis in {folder} has reached {manifest.done} of {manifest.entries} entries: call analyze() with "
            "the same policy, buffer and folder, which goes on from there"
        )
    data = _map(folder, manifest)
    if verify:
        if not manifest.has_checksums:
            raise ArtifactError(
                f"the analysis in {folder} has no checksums: an earlier version ({manifest.format}) wrote it"
            )
        wrong = Results(folder, manifest, data).damaged()
        if wrong:
            raise ArtifactError(
                f"{ranges(wrong)} of the results in {folder} are not what was written: call analyze() with the same "
                "policy, buffer and folder, which computes them again"
            )
    return data if manifest.done == manifest.entries else data[: manifest.done]


def ranges(found: list[tuple[int, int]]) -> str:
    """Ranges of entries in words.

    Example:
        >>> ranges([(0, 4), (8, 12)])
        'the entries 0 to 3, 8 to 11'
    """
    return f"the entries {listed((f'{start} to {stop - 1}' for start, stop in found), 8, 'and {} more ranges')}"


def _map(folder: Path, manifest: Manifest) -> TensorDict:
    try:
        data = TensorDict({}, batch_size=manifest.batch_size)
        for entry in manifest.keys:
            data.set(tuple(entry["key"]), _mapped(folder, entry))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
        raise ArtifactError(f"{folder / MANIFEST} does not describe the files beside it: {error}") from error
    return data


def _mapped(folder: Path, entry: dict[str, Any]) -> MemoryMappedTensor:
    path = _path(folder, entry)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is outside {folder}")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file")
    if status.st_size != _size(entry):
        raise ValueError(f"{path} has {status.st_size} bytes, expected {_size(entry)}")
    return MemoryMappedTensor.from_filename(
        path, dtype=getattr(torch, entry["dtype"]), shape=torch.Size(entry["shape"])
    )


def _path(folder: Path, entry: dict[str, Any]) -> Path:
    *roots, name = map(file_stem, entry["key"])
    return folder.joinpath(*roots, f"{name}.memmap")


def _size(entry: dict[str, Any]) -> int:
    return torch.Size(entry["shape"]).numel() * getattr(torch, entry["dtype"]).itemsize


def _name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _remove(folder: Path, manifest: Manifest) -> None:
    """Take away what was begun, so that the room is free again and the folder can be used."""
    paths = [_path(folder, entry) for entry in manifest.keys]
    parents = {parent for path in paths for parent in path.parents if folder in parent.parents}
    for path in (
        *paths,
        *(one / "meta.json" for one in (*parents, folder)),
        folder / MANIFEST,
        folder / f"{MANIFEST}.new",
    ):
        with contextlib.suppress(OSError):
            path.unlink()
    for parent in sorted(parents, key=lambda one: -len(one.parts)):
        with contextlib.suppress(OSError):
            parent.rmdir()

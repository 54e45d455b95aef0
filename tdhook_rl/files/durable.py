"""Files that survive a loss of power, folders that one process at a time writes, and reading files of unknown origin.

What a reader of files meets here is a regular file of a sensible size or an :class:`~tdhook_rl.errors.ArtifactError`:
no named pipe that is waited at, no nesting that ends the interpreter, no number that is none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tdhook_rl.errors import ArtifactError

try:
    import fcntl
except ImportError:  # pragma: no cover  (not on Windows, which has no locks of this kind)
    fcntl = None  # type: ignore[assignment]

#: Documents of this library are far smaller.
LARGEST = 64 << 20
#: Texts of JSON, which may hold anything, and brackets outside of them.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
#: No document of ours is nested more deeply.
_DEEPEST = 100


def read_json(path: Path, what: str) -> Any:
    """The document in a file; ``what`` it is expected to be is for messages (``"the manifest of an analysis"``).

    Raises:
        ArtifactError: if it is no regular file, larger than any such document, or not JSON with finite numbers.
    """
    try:
        # A named pipe would be waited at, and a device read for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is no regular file")
            if status.st_size > LARGEST:
                raise ValueError(f"it has {status.st_size} bytes")
            text = file.read(LARGEST).decode()
        return parse_json(text, parse_constant=_refuse)
    except (ValueError, OSError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ArtifactError(f"{path} is not {what}: {reason}") from error


def parse_json(text: str, **options: Any) -> Any:
    """What ``json.loads`` gives, of a text of unknown origin.

    Nesting is counted before: what the garbage collector ends while the parser is out of stack cannot end in order.
    (Memory that processes share was found damaged so, by another object's finalizer that was cut short.)

    Raises:
        ValueError: if it is no JSON, nested too deeply, or names a key twice.
    """
    depth = 0
    for part in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0], 0)
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
    return json.loads(text, object_pairs_hook=_once, **options)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names a key twice")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: whoever loses power meanwhile has the old one or the new one, whole.

    Raises:
        OSError: if it cannot be written; the old one is there then.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As :func:`write_text`.

    Raises:
        OSError: if it cannot be written; the old one is there then.
    """
    new = path.with_name(f"{path.name}.new")
    # What a kill has left; or a pipe, which would be waited at, or a link to another file, which would be written over.
    new.unlink(missing_ok=True)
    try:
        with new.open("xb") as file:
            file.write(content)
            file.flush()
            _sync(file.fileno())
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    sync([path.parent])


def require_file_name(path: Path) -> None:
    """Raise :class:`ArtifactError` for a path that names no file: that of the folder one is in, or one too long."""
    if path.name in ("", ".."):
        raise ArtifactError(f"{str(path)!r} names a folder, and no file in it: name one")
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # a name that is too long, a character that no name has, no permission
        raise ArtifactError(
            f"no file can be at {str(path)[:80]!r}: {getattr(error, 'strerror', None) or error}"
        ) from error


def put(path: Path, content: str | bytes) -> Path:
    """As :func:`write_bytes`, of a text too, in a folder that is made.

    Raises:
        ArtifactError: if it names no file, or cannot be written; the old one is there then.
    """
    require_file_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def sync(paths: Iterable[Path]) -> None:
    """Wait until what was written to files, or which files a folder holds, is on the disk.

    Raises:
        OSError: if it does not get there.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _sync(descriptor)
        except OSError as error:
            if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF):  # some file systems have no such
                raise
        finally:
            os.close(descriptor)


def _sync(descriptor: int) -> None:
    if fcntl is not None and hasattr(fcntl, "F_FULLFSYNC"):  # where fsync leaves it to the disk's own memory
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def require_space(folder: Path, size: int) -> None:
    """Raise :class:`ArtifactError` if the disk of a folder has less room than that."""
    try:
        status = os.statvfs(folder)
    except (OSError, AttributeError):  # not known everywhere; reserving will tell
        return
    free = status.f_bavail * status.f_frsize
    if size > free:
        raise ArtifactError(
            f"the results take {_amount(size)}, and there is room for {_amount(free)} in {folder}: name a folder on "
            "another disk, compute less (inputs=, fewer modules), or make room"
        )


def _amount(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def reserve(path: Path, size: int) -> None:
    """Give a file its blocks, so that no later write can find the disk full.

    Raises:
        OSError: if there is no room.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        elif size:  # pragma: no cover  (macOS)
            block = bytes(1 << 20)
            for start in range(0, size, len(block)):
                os.pwrite(descriptor, block[: size - start], start)
    finally:
        os.close(descriptor)


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderInUse(ArtifactError):
    """Another is under way in a folder."""


class FolderLock:
    """A folder for one at a time, across threads and processes; it is free again when its holder dies.

    The folder is made if it is not there, and removed again if nothing was put into it. ``what`` is done in it, and
    what ends that, are for messages (``"analysis"``).

    Raises:
        FolderInUse: if another is under way in it.
        ArtifactError: if it cannot be made.
    """

    def __init__(self, folder: Path, what: str, end: str = "wait for its end") -> None:
        self._folder = folder
        self._what, self._end = what, end
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> FolderLock:
        try:
            missing = _missing(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._made = missing
            self._descriptor = os.open(self._folder, os.O_RDONLY)
        except OSError as error:
            raise ArtifactError(f"cannot write {self._folder}: {error.strerror or error}") from error
        _locks.add(self)
        try:
            if fcntl is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self._made = []
                self._close()
                raise FolderInUse(
                    f"another {self._what} is under way in {self._folder}, in this process or another: {self._end}, "
                    "or name another folder"
                ) from None
            # Some network file systems know no such lock: there, nothing tells two apart.
        return self

    def __exit__(self, *exception: object) -> None:
        _remove_empty(self._made)
        if fcntl is not None and self._descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


@contextlib.contextmanager
def tidied(folder: Path, alone: str = "") -> Iterator[None]:
    """A block that makes this folder: if it ends without anything in it, the folder is as little there as before.

    Args:
        folder: which may be there already, and then stays.
        alone: a file that says nothing where nothing is beside it.
    """
    missing = _missing(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if alone and [one.name for one in folder.iterdir()] == [alone]:
                (folder / alone).unlink()
        _remove_empty(missing)


def _missing(folder: Path) -> list[Path]:
    try:
        return [one for one in (folder, *folder.parents) if not one.exists()]
    except OSError:  # of a name that no system takes; who makes it says so
        return []


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # something was put into it
            folder.rmdir()


def _in_child() -> None:
    # A child that lives longer than this process would go on holding the lock.
    for lock in list(_locks):
        with contextlib.suppress(OSError):
            lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

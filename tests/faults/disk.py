"""A disk that notes every operation that changes it, and fails one of them.

What Python code does is met where it calls ``os`` or opens a file. Of what libraries write by themselves the calls are
met that do so (``memmap_like``, writers of Parquet), and what they leave is noted as files that were not there.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tensordict import TensorDict

#: How an operation may fail: nothing of it is done; or half of a write is, and then there is no room; or half, and
#: only what is returned says so, as a system may.
WAYS = ("ENOSPC", "EIO", "half", "short")


@dataclass(frozen=True)
class Operation:
    """Something that was done to a file below the folder."""

    kind: str
    path: str
    content: bytes = b""
    start: int = 0
    target: str = ""


class Disk:
    """While it is entered, operations below a folder are counted, and the one of a number fails.

    Args:
        folder: what lies on it.
        fail: the number of the operation, from 0 on; ``None``: none.
        way: of :data:`WAYS`.

    Attributes:
        done: the operations, in order, with files that appeared by themselves.
        counted: those that may fail.
        failed: what did not succeed.
    """

    def __init__(self, folder: Path, fail: int | None = None, way: str = "ENOSPC") -> None:
        self.folder = folder.resolve()
        self.done: list[Operation] = []
        self.counted: list[Operation] = []
        self.failed: Operation | None = None
        self._fail, self._way = fail, way
        self._paths: dict[int, str] = {}
        self._known: set[str] = set()
        self._patches: list[Any] = []
        self._writers: weakref.WeakSet[Any] = weakref.WeakSet()

    # ------------------------------------------------------------------ operations

    def _name(self, path: Any) -> str | None:
        """A path relative to the folder; ``None`` where it is elsewhere."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        found = Path(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100  (links stay what they are)
        return str(found.relative_to(self.folder)) if found.is_relative_to(self.folder) else None

    def _operate(self, operation: Operation, do: Callable[[bytes], Any], returns: bool = False) -> Any:
        """Do an operation, or fail in it. ``do`` gets the bytes that are written; ``returns``: their number."""
        self._notice_others()
        number = len(self.counted)
        self.counted.append(operation)
        if number != self._fail or (self._way == "short" and not returns):
            found = do(operation.content)
            self.done.append(operation)
            self._known_again()
            return found
        self.failed = operation
        content, half = operation.content, operation.content[: len(operation.content) // 2]
        if self._way == "short" and len(content) > 1:
            return do(half)
        if self._way == "half" and len(content) > 1:
            do(half)
        code = errno.EIO if self._way == "EIO" else errno.ENOSPC
        raise OSError(code, os.strerror(code), str(self.folder / operation.path))

    def native(self, what: str, call: Callable[[], Any], error: Callable[[str], Exception]) -> Any:
        """A call into a library that writes by itself: it fails before, or (``"half"``) when all is written."""
        self._notice_others()
        number = len(self.counted)
        self.counted.append(Operation("native", what))
        if number != self._fail or self._way == "short":
            found = call()
            self._notice_others()
            return found
        self.failed = self.counted[-1]
        if self._way == "half":
            call()
        raise error(os.strerror(errno.EIO if self._way == "EIO" else errno.ENOSPC))

    def _files(self) -> set[str]:
        found = (Path(top, name) for top, folders, names in os.walk(self.folder) for name in [*folders, *names])
        return {str(path.relative_to(self.folder)) for path in found}

    def _notice_others(self) -> None:
        """Note what appeared by itself."""
        for name in sorted(self._files() - self._known):
            path = self.folder / name
            if path.is_dir():
                self.done.append(Operation("mkdir", name))
            else:
                with self._open(path, "rb") as file:
                    self.done.append(Operation("appear", name, file.read()))
        self._known_again()

    def _known_again(self) -> None:
        self._known = self._files()

    # ------------------------------------------------------------------ what is patched

    def __enter__(self) -> Disk:
        self._open = io.open
        self._known_again()
        patches: list[tuple[Any, str, Any]] = [
            (os, "open", self._os_open), (os, "pwrite", self._pwrite), (os, "write", self._write),
            (io, "open", self._io_open), (builtins, "open", self._io_open), (os, "close", self._close),
            (TensorDict, "memmap_like", lambda data, *given, **named: self._memmap_like(data, *given, **named)),
        ]  # fmt: skip
        try:
            from pyarrow.parquet import ParquetWriter
        except ImportError:  # then nothing writes Parquet
            pass
        else:
            for name in ("__init__", "write_table", "close"):
                patches.append((ParquetWriter, name, self._of_parquet(name, getattr(ParquetWriter, name))))
        for name in ("fsync", "posix_fallocate", "ftruncate"):
            patches.append((os, name, self._on_descriptor(name, getattr(os, name))))
        for name in ("mkdir", "unlink", "remove", "rmdir", "replace", "rename"):
            patches.append((os, name, self._on_path(name, getattr(os, name))))
        patches.append((os, "sendfile", self._sendfile))
        self._real = {(where, name): getattr(where, name) for where, name, _ in patches}
        for where, name, new in patches:
            patch = mock.patch.object(where, name, new)
            patch.start()
            self._patches.append(patch)
        return self

    def __exit__(self, *exception: object) -> None:
        for patch in reversed(self._patches):
            patch.stop()
        self._patches.clear()
        self._notice_others()

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        real = self._real[os, "open"]
        name = self._name(path) if dir_fd is None else None
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if name is None:
            return real(path, flags, mode, dir_fd=dir_fd)
        kind = "create" if (flags & os.O_CREAT and not os.path.lexists(path)) or flags & os.O_TRUNC else "open"
        descriptor = (
            self._operate(Operation(kind, name), lambda _: real(path, flags, mode))
            if writes
            else real(path, flags, mode)
        )
        self._paths[descriptor] = name
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        self._real[os, "close"](descriptor)

    def _pwrite(self, descriptor: int, content: Any, start: int) -> int:
        real, name = self._real[os, "pwrite"], self._paths.get(descriptor)
        if name is None:
            return real(descriptor, content, start)
        operation = Operation("write", name, bytes(content), start)
        return self._operate(operation, lambda part: real(descriptor, part, start), returns=True)

    def _write(self, descriptor: int, content: Any) -> int:
        real, name = self._real[os, "write"], self._paths.get(descriptor)
        if name is None:
            return real(descriptor, content)
        operation = Operation("write", name, bytes(content), os.lseek(descriptor, 0, os.SEEK_CUR))
        return self._operate(operation, lambda part: real(descriptor, part), returns=True)

    def _sendfile(self, out: int, *arguments: Any) -> int:
        # Copies are made through Python then, where they are met.
        raise OSError(errno.ENOTSOCK, "not here")

    def _on_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *arguments: Any) -> Any:
            path = self._paths.get(descriptor)
            if path is None:
                return real(descriptor, *arguments)
            size = arguments[-1] if arguments else 0
            return self._operate(Operation(name, path, start=size), lambda _: real(descriptor, *arguments))

        return call

    def _on_path(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            name = None if options.get("dir_fd") is not None else self._name(path)
            if name is None or (kind == "mkdir" and os.path.lexists(path)) or (
                kind in ("unlink", "remove", "rmdir") and not os.path.lexists(path)
            ):  # fmt: skip
                return real(path, *arguments, **options)
            target = self._name(arguments[0]) if kind in ("replace", "rename") else None
            return self._operate(
                Operation(kind, name, target=target or ""), lambda _: real(path, *arguments, **options)
            )

        return call

    def _io_open(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        real = self._open
        if not any(letter in mode for letter in "wax+"):
            return real(file, mode, buffering, *arguments, **options)
        name = self._paths.get(file) if isinstance(file, int) else self._name(file)
        if name is None:
            return real(file, mode, buffering, *arguments, **options)
        kind = "create" if "w" in mode or "x" in mode else "open"
        opened = self._operate(Operation(kind, name), lambda _: real(file, mode, buffering, *arguments, **options))
        self._paths[opened.fileno()] = name
        return _File(self, opened, name)

    def _of_parquet(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def error(reason: str) -> OSError:
            return OSError(errno.ENOSPC, f"Error writing bytes to file. Detail: {reason}")

        def call(writer: Any, *arguments: Any, **options: Any) -> Any:
            if name == "__init__":
                self._writers.add(writer)
            # One that an earlier fault has left open closes whenever it is collected.
            if name == "close" and not (writer.is_open and writer in self._writers):
                return real(writer)
            return self.native(f"ParquetWriter.{name}", lambda: real(writer, *arguments, **options), error)

        return call

    def _memmap_like(self, data: Any, *arguments: Any, **options: Any) -> Any:
        real = self._real[TensorDict, "memmap_like"]

        def error(reason: str) -> RuntimeError:  # as torch raises it
            return RuntimeError(f"unable to resize file <x.memmap> to the right size: {reason}")

        return self.native("memmap_like", lambda: real(data, *arguments, **options), error)


class _File:
    """A file that is written: each write is one operation, and so is closing it."""

    def __init__(self, disk: Disk, file: Any, name: str) -> None:
        self._disk, self._file, self._name = disk, file, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def write(self, content: Any) -> int:
        file = self._file
        text = isinstance(content, str)
        raw = content.encode() if text else bytes(content)
        file.flush()
        start = os.fstat(file.fileno()).st_size if "a" in file.mode else file.tell()

        def put(part: bytes) -> int:
            count = file.write(part.decode(errors="ignore") if text else part)
            file.flush()
            return count

        unbuffered = isinstance(file, io.RawIOBase)
        return self._disk._operate(Operation("write", self._name, raw, start), put, returns=unbuffered)

    def truncate(self, size: int | None = None) -> int:
        size = self._file.tell() if size is None else size
        return self._disk._operate(Operation("ftruncate", self._name, start=size), lambda _: self._file.truncate(size))

    def close(self) -> None:
        if self._file.closed:
            return
        self._disk._paths.pop(self._file.fileno(), None)
        try:
            self._disk._operate(Operation("close", self._name), lambda _: None)
        finally:
            self._file.close()


def rebuilt(operations: list[Operation], base: Path, folder: Path, *, lost: bool = False) -> None:
    """The folder as it is after so many operations.

    Args:
        operations: what was done.
        base: the folder as it was before.
        folder: where to.
        lost: as a loss of power may leave it: what no ``fsync`` of its file has followed is zeros, and what was put in
            the place of another without one of its folder is not there yet.
    """
    shutil.copytree(base, folder)
    safe = _synced(operations) if lost else set(range(len(operations)))
    for number, one in enumerate(operations):
        path = folder / one.path
        if one.kind == "mkdir":
            path.mkdir(parents=True, exist_ok=True)
        elif one.kind == "appear":
            path.write_bytes(one.content)
        elif one.kind == "create":
            path.write_bytes(b"")
        elif one.kind == "write":
            with path.open("r+b") as file:
                file.seek(one.start)
                file.write(one.content if number in safe else bytes(len(one.content)))
        elif one.kind in ("unlink", "remove"):
            path.unlink(missing_ok=True)
        elif one.kind == "rmdir":
            path.rmdir()
        elif one.kind in ("replace", "rename") and number in safe:
            path.replace(folder / one.target)
        elif one.kind in ("posix_fallocate", "ftruncate"):
            size = max(one.start, path.stat().st_size) if one.kind == "posix_fallocate" else one.start
            os.truncate(path, size)


def _synced(operations: list[Operation]) -> set[int]:
    """The writes that a later ``fsync`` of their file has brought to the disk, and the renames that one of a folder."""
    safe, waiting = set(), dict[str, list[int]]()
    renamed: dict[str, list[int]] = {}
    for number, one in enumerate(operations):
        if one.kind == "write":
            waiting.setdefault(one.path, []).append(number)
        elif one.kind == "fsync":
            safe |= {*waiting.pop(one.path, []), *renamed.pop(one.path, [])}
        elif one.kind in ("replace", "rename"):
            waiting[one.target] = waiting.pop(one.path, [])
            renamed.setdefault(str(Path(one.target).parent), []).append(number)
        elif one.kind == "create":
            waiting.pop(one.path, None)
    return safe

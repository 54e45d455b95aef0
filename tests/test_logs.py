"""Logs: what is no number, full disks, and files that were cut."""

from __future__ import annotations

import math
import os
import resource
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.report import FileSink, LoggerSink, Sinks


class Logger:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))


# ------------------------------------------------------------------ numbers

NUMBERS: dict[str, tuple[Any, float]] = {
    "a number": (0.25, 0.25),
    "an integer": (3, 3.0),
    "true": (True, 1.0),
    "a fraction": (Fraction(1, 4), 0.25),
    "a tensor": (torch.tensor(0.25), 0.25),
    "a tensor of a row": (torch.tensor([[0.25]]), 0.25),
    "with a gradient": (torch.tensor(0.25, requires_grad=True) * 1, 0.25),
    "bfloat16": (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
    "a tensor of integers": (torch.tensor(7), 7.0),
    "a tensor of booleans": (torch.tensor(True), 1.0),
    "of numpy": (np.float32(0.25), 0.25),
    "an integer of numpy": (np.int64(7), 7.0),
    "an array": (np.array([0.25]), 0.25),
    "NaN": (float("nan"), float("nan")),
    "infinite": (torch.tensor(-math.inf), -math.inf),
    "tiny": (1.5e-310, 1.5e-310),
    "large": (10**30, 1e30),
    "many digits": (0.1 + 0.2, 0.1 + 0.2),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in sinks"])
def test_numbers_read_back(name: str, wrapped: bool, tmp_path: Path) -> None:
    value, right = NUMBERS[name]
    logger = Logger()
    file = FileSink(tmp_path / "log.csv")
    sink = Sinks(file, LoggerSink(logger)) if wrapped else file
    sink.log({"before": 1.0, 'a, "name"': value}, torch.tensor(5))
    sink.close()
    found = FileSink.read(tmp_path / "log.csv")
    assert found["before"] == [(5, 1.0)]
    ((step, number),) = found['a, "name"']
    assert step == 5
    assert number == right or (math.isnan(number) and math.isnan(right))
    if wrapped:
        assert set(logger.logged[0][1]) == {f"interp/{key}" for key, one in (("before", 1.0), ("a, \"name\"", right))
                                            if math.isfinite(one)}  # fmt: skip


NONE: dict[str, Any] = {
    "several": torch.zeros(3), "none": torch.zeros(0), "an array of several": np.zeros(2), "complex": 1j,
    "a complex tensor": torch.tensor(1j), "a word": "0.25", "nothing": None, "a list": [0.25], "a mapping": {"a": 1},
    "larger than any float": 10**400, "a function": len, "masked": np.ma.masked,
    "a masked array": np.ma.array([1.0], mask=True), "without data": torch.zeros((), device="meta"),
    "a time": np.timedelta64(1, "s"),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE)
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in sinks"])
def test_what_is_no_number_is_refused_by_name(name: str, wrapped: bool, tmp_path: Path) -> None:
    file = FileSink(tmp_path / "log.csv")
    sink = Sinks(LoggerSink(Logger()), file) if wrapped else file
    sink.log({"loss": 0.5}, 1)
    with pytest.raises(InputError, match="the metric 'loss'"):
        sink.log({"other": 0.1, "loss": NONE[name]}, 2)
    sink.log({"loss": 0.3}, 3)
    sink.close()
    assert FileSink.read(tmp_path / "log.csv") == {"loss": [(1, 0.5), (3, 0.3)]}  # nothing of the call in between


@pytest.mark.parametrize("step", [0.5, "1", None, torch.zeros(2), float("nan"), float("inf")], ids=str)
def test_steps(step: Any, tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "log.csv")
    with pytest.raises(InputError, match="the step"):
        sink.log({"loss": 0.5}, step)
    sink.close()


@pytest.mark.parametrize("name", ["", "a\nb", "a\rb", "a\0b", "a\udc80", 3, None])
def test_names(name: Any, tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "log.csv")
    with pytest.raises(InputError, match="a metric is named by"):
        sink.log({name: 0.5}, 1)
    sink.close()


def test_nothing_is_written_over_and_nothing_after_the_end(tmp_path: Path) -> None:
    first = FileSink(tmp_path / "log.csv")
    first.log({"loss": 0.5}, 1)
    second = FileSink(tmp_path / "log.csv", resume=True)  # the first was never closed
    for step, sink in enumerate((second, first, first, second), start=2):
        sink.log({"loss": 0.5}, step)
    first.close()
    second.close()
    assert FileSink.read(tmp_path / "log.csv") == {"loss": [(step, 0.5) for step in range(1, 6)]}
    with pytest.raises(InputError, match="is closed"):
        first.log({"loss": 0.5}, 6)


# ------------------------------------------------------------------ files that were cut

WHOLE = "step,name,value\n1,loss,0.5\n2,loss,0.75\n3,loss,0.625\n"
ROWS = [(1, 0.5), (2, 0.75), (3, 0.625)]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["now", "of earlier versions"])
def test_a_log_may_be_cut_anywhere(end: str, tmp_path: Path) -> None:
    """At each byte: what is read was logged, and only the line that was cut is missing."""
    path = tmp_path / "log.csv"
    content = WHOLE.replace("\n", end).encode()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\r" if end == "\r\n" else b"\n")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = FileSink.read(path)
        assert found.get("loss", []) == ROWS[: max(0, whole - 1)]
        cut = bool(content[:length]) and not content[:length].endswith((b"\n", b"\r"))
        assert len(told) == cut
        assert not cut or f"line {whole + 1} was cut" in str(told[0].message)


LINES = ["3,lo", "3,loss,", "3,loss", "x,loss,1.0", "3,loss,x", "3,loss,0.5,4", "3,lo4,loss,0.5", "", ",,", "3,,1.0",
         '3,"loss,1.0', "3,loss,1_0", "3,loss, 1.0", "\0\0\0", "3.5,loss,1", "٣,loss,1.0", "3,loss,0x1"]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_lines_that_are_none(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"step,name,value\n1,loss,0.5\n{line}\n4,loss,0.75\n")
    with pytest.warns(UserWarning, match="line 3 was cut and left out; the rest is read"):
        assert FileSink.read(path) == {"loss": [(1, 0.5), (4, 0.75)]}


def test_bytes_that_are_no_text_are_said_once(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"step,name,value\n1,loss,0.5\n" + b"\xff\xfe\n" * 9 + b"4,loss,0.75\n")
    with pytest.warns(UserWarning, match=r"9 lines \(3, 4, 5, 6, 7, ...\) were cut") as told:
        assert FileSink.read(path) == {"loss": [(1, 0.5), (4, 0.75)]}
    assert len(told) == 1


NO_LOGS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "another table": lambda path: path.write_text("a,b\n1,2\n"),
    "a picture": lambda path: path.write_bytes(bytes(range(256))),
}


@pytest.mark.parametrize("name", NO_LOGS)
def test_what_is_no_log(name: str, tmp_path: Path) -> None:
    NO_LOGS[name](tmp_path / "log.csv")
    with pytest.raises(ArtifactError):
        FileSink.read(tmp_path / "log.csv")


# ------------------------------------------------------------------ full disks


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in sinks"])
def test_a_full_disk_is_said_once_and_the_log_goes_on(wrapped: bool, tmp_path: Path) -> None:
    """No line is cut, and what is measured after there is room again is there."""
    path, logger = tmp_path / "log.csv", Logger()
    file = FileSink(path)
    sink = Sinks(file, LoggerSink(logger)) if wrapped else file
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            for step in range(20):
                sink.log({"loss": step / 7, "return": step / 3}, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sink.log({"loss": 0.5}, 20)
        sink.close()
    assert [str(one.message).split(" on is")[0] for one in told] == [
        f"{path} cannot be written (File too large): what is measured from step 2"
    ]
    assert FileSink.read(path) == {
        "loss": [(0, 0.0), (1, 1 / 7), (20, 0.5)], "return": [(0, 0.0), (1, 1 / 3)]
    }  # fmt: skip
    assert not wrapped or len(logger.logged) == 21


def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
    try:
        with pytest.raises(ArtifactError, match="cannot write"):
            FileSink(tmp_path / "log.csv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []

"""Runs tests in forks of a process in which everything is imported and the tests are collected.

The changed function is given its new code there. What runs when a module is imported is changed in forks of a process
that has imported torch, but nothing of the package.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

from tests.mutation.mutators import Mutant
from tests.mutation.plan import QUICK, ROOT, Group

#: Imported once; what the package or a test imports besides costs time in every fork.
HEAVY = ("torch", "tensordict", "torchrl.collectors", "torchrl.data", "torchrl.envs", "torchrl.modules",
         "torchrl.objectives", "torchrl.record", "torch._dynamo", "hypothesis", "scipy.stats", "pandas",
         "pyarrow.parquet", "sklearn.linear_model", "sklearn.discriminant_analysis", "captum.attr", "PIL.Image",
         "safetensors.torch", "gymnasium", "cloudpickle")  # fmt: skip
#: Seconds of tests, by what they took once, that are run for one change at the most, unless given: those first that
#: noticed changes nearby, then the shortest of those that run its line.
MOST = 15.0
#: Seconds of the processor that a change may take beyond several times that before it counts as noticed, as a program
#: that never ends.
PATIENCE = 10.0
#: Seconds by the clock for each of the processor: a machine may be busy, and what only waits takes none of these.
BUSY = 6.0


def warm_up() -> None:
    """Import what is the same for every fork."""
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def in_fork(run: Callable[[], int], seconds: float, log: Path | None = None) -> int | None:
    """The exit code of a function in a fork that ends with all its children; ``None`` where it took too long.

    Args:
        seconds: of the processor.
    """
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            if seconds < float("inf"):
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
            out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = run()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + BUSY * seconds
    status = None
    while status is None and time.monotonic() < end:
        found, word = os.waitpid(child, os.WNOHANG)
        status = word if found else None
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return None
    code = os.waitstatus_to_exitcode(status)
    return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code


def _pytest(arguments: list[str], plugins: list[Any] | None = None) -> int:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    early = "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"
    with tempfile.TemporaryDirectory() as folder:
        own = ["-q", "-p", "no:cacheprovider", "-W", early, "--basetemp", f"{folder}/tests"]
        return int(pytest.main([*own, *arguments], plugins=plugins))


# ------------------------------------------------------------------ which test runs which line


class _Noting:
    """Notes which lines each test runs, and how long it takes. What a fixture for several tests runs counts for all."""

    def __init__(self, files: list[str], into: Path) -> None:
        from coverage import Coverage

        self.coverage = Coverage(include=[str(ROOT / one) for one in files], data_file=None)
        self.into, self.files = into, files
        self.passed: dict[str, float] = {}
        self.coverage.start()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(f"setup {item.nodeid}")
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed:
            self.passed[report.nodeid] = self.passed.get(report.nodeid, 0.0) + report.duration
        elif report.failed or report.skipped:
            self.passed[report.nodeid] = float("inf")

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines: dict[str, dict[int, list[str]]] = {}
        for path in self.files:
            found = data.contexts_by_lineno(str(ROOT / path))
            lines[path] = {line: sorted(set(contexts) - {""}) for line, contexts in found.items()}
        self.into.write_text(json.dumps({"seconds": self.passed, "lines": lines}))


def note(group: Group, into: Path) -> None:
    """Run a group's tests once and write which lines each of them runs.

    Raises:
        RuntimeError: if they cannot be run.
    """
    code = in_fork(lambda: _pytest(group.arguments(), [_Noting(group.files(), into)]), 3600, into.with_suffix(".log"))
    if code not in (0, 1):  # those that fail are left out
        raise RuntimeError(f"the tests of {group.folder} ended with {code}: see {into.with_suffix('.log')}")


class Noticing:
    """Which tests have noticed changes of a place: they are likely to notice others there."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, ...], list[str]] = defaultdict(list)

    def add(self, name: str, test: str) -> None:
        """Of a change, by name."""
        path, rest = name.split(" ", 1)
        for place in ((path, rest.split(": ", 1)[0]), (path,)):
            known = self._of[place]
            if test in known:
                known.remove(test)
            known.insert(0, test)

    def first(self, mutant: Mutant) -> list[str]:
        """The last that noticed a change of its function, and then of its file."""
        return [*self._of[mutant.path, mutant.where], *self._of[mutant.path,]]


class Noted:
    """Which tests run a line, those first that noticed changes nearby, and then the shortest."""

    files: Sequence[str] = ()

    def __init__(self, path: Path, most: float = MOST) -> None:
        found = json.loads(path.read_text())
        self.most = most
        self.seconds = {test: seconds for test, seconds in found["seconds"].items() if seconds < most}
        self.lines = {file: {int(line): names for line, names in lines.items()}
                      for file, lines in found["lines"].items()}  # fmt: skip
        self.noticing = Noticing()
        self._of_file: dict[str, list[str]] = defaultdict(list)
        for test in self.seconds:
            self._of_file[test.split("::")[0]].append(test)

    def tests(self, mutant: Mutant) -> list[str]:
        """Those for a change, as many as there is time for."""
        lines = self.lines[mutant.path]
        wanted = lines if mutant.lines is None else range(mutant.lines[0], mutant.lines[1] + 1)
        names: set[str] = set()
        for line in wanted:
            for one in lines.get(line, []):
                names.update(self._of_file[one[6:].split("::")[0]] if one.startswith("setup ") else [one])
        order = {name: -number for number, name in enumerate(reversed(self.noticing.first(mutant)), 1)}
        chosen, total = [], 0.0
        for name in sorted(names & self.seconds.keys(), key=lambda one: (order.get(one, 0), self.seconds[one])):
            total += self.seconds[name]
            if total > self.most:
                break
            chosen.append(name)
        return chosen


class AllOf(Noted):
    """All tests of some files, whatever they run."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files, self.seconds, self.noticing = files, dict.fromkeys(files, 60.0), Noticing()

    def tests(self, mutant: Mutant) -> list[str]:
        return list(self.files)


# ------------------------------------------------------------------ one change

#: Functions that were made from a file, by qualified name and line.
Functions = dict[tuple[str, int], list[types.FunctionType]]
#: What is told of a change: what it came to, and which test noticed it.
Told = Callable[[Mutant, str, str], None]


def outcomes(group: Group, mutants: list[Mutant], noted: Noted, tell: Told) -> None:
    """Try changes, and tell what each came to: ``"killed"``, ``"timeout"`` (noticed, too), ``"survived"``, or ``"not
    run"`` by any test."""
    unseen = [one for one in mutants if not noted.tests(one)]
    for mutant in unseen:
        tell(mutant, "not run", "")
    rest = [one for one in mutants if one not in unseen]
    inside = [one for one in rest if not one.at_import]
    with tempfile.TemporaryDirectory() as folder:
        word = Path(folder) / "noticed_by"
        if inside:
            arguments = ["-s", *([*noted.files, "-m", QUICK] if noted.files else group.arguments())]
            trying = _Trying(inside, noted, tell, word)
            code = in_fork(lambda: _pytest(arguments, [trying]), float("inf"))
            if code:
                raise RuntimeError(f"the tests of {group.folder} cannot be collected: {code}")
        for mutant in rest:
            if mutant.at_import:
                _tell(mutant, _at_import(mutant, noted, word), noted, tell, word)


def _tell(mutant: Mutant, code: int | None, noted: Noted, tell: Told, word: Path) -> None:
    test = word.read_text() if word.exists() else ""
    word.unlink(missing_ok=True)
    if test:
        noted.noticing.add(mutant.name, test)
    tell(mutant, {None: "timeout", 0: "survived", 70: "error"}.get(code, "killed"), test)


def _seconds(tests: list[str], noted: Noted) -> float:
    return PATIENCE + 4 * sum(noted.seconds[one] for one in tests)


class _Trying:
    """Instead of running the collected tests once, runs those that may notice, for each change."""

    def __init__(self, mutants: list[Mutant], noted: Noted, tell: Told, word: Path) -> None:
        self.mutants, self.noted, self.tell, self.word = mutants, noted, tell, word
        self.sound: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        functions = _functions({mutant.path for mutant in self.mutants})
        # What is here is not looked at again by the collector in every fork, which would copy it.
        gc.collect()
        gc.freeze()
        for mutant in self.mutants:
            code = self._code(mutant, session, items, functions[mutant.path])
            _tell(mutant, code, self.noted, self.tell, self.word)
        return True

    def _code(
        self, mutant: Mutant, session: pytest.Session, items: dict[str, pytest.Item], functions: Functions
    ) -> int | None:
        """The exit code of the tests with a change; those that fail without it, too, are not asked any more."""
        names = self.noted.tests(mutant)
        chosen = session.items if self.noted.files else [items[name] for name in names if name in items]

        def run(changed: bool) -> int:
            if changed:
                _swap(mutant, functions)
            for item, after in zip(chosen, [*chosen[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                if session.testsfailed:
                    self.word.write_text(item.nodeid)
                    return 1
            return 0

        seconds = _seconds(names, self.noted)
        code = in_fork(lambda: run(True), seconds)
        test = self.word.read_text() if self.word.exists() else ""
        if not test or test in self.sound:
            return code
        self.word.unlink()
        last = next(number for number, item in enumerate(chosen) if item.nodeid == test)
        chosen = chosen[: last + 1]
        if in_fork(lambda: run(False), seconds) == 0:
            self.sound.add(test)
            self.word.write_text(test)
            return code
        failing = self.word.read_text() if self.word.exists() else test
        self.word.unlink(missing_ok=True)
        print(f"fails without a change: {failing}", file=sys.stderr, flush=True)
        self.noted.seconds.pop(failing, None)
        items.pop(failing, None)
        return self._code(mutant, session, items, functions)


def _functions(paths: set[str]) -> dict[str, Functions]:
    """All functions that were made from files, by where they are there."""
    for path in paths:
        importlib.import_module(_module(path))
    found: dict[str, Functions] = {path: defaultdict(list) for path in paths}
    names = {str(ROOT / path): path for path in paths}
    for one in gc.get_objects():
        if type(one) is types.FunctionType and one.__code__.co_filename in names:
            code = one.__code__
            found[names[code.co_filename]][code.co_qualname, code.co_firstlineno].append(one)
    return found


def _swap(mutant: Mutant, functions: Functions) -> None:
    """Give the function that is changed, and all that are made from the same code, the new code."""
    path = str(ROOT / mutant.path)
    before = _codes(compile(ast.parse((ROOT / mutant.path).read_text()), path, "exec", dont_inherit=True))
    after = _codes(compile(mutant.tree(ROOT), path, "exec", dont_inherit=True))
    changed = {key for key, code in after.items() if before.get(key) != code and "<module>" not in key}
    found = [(one, after[key]) for key in changed for one in functions.get(key, [])]
    if not found:
        raise LookupError(f"no function holds the code of {mutant.name}")
    for one, code in found:
        one.__code__ = code


def _module(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def _codes(code: types.CodeType) -> dict[tuple[str, int], types.CodeType]:
    """All functions of a module, by qualified name and line."""
    found = {(code.co_qualname, code.co_firstlineno): code}
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            found |= _codes(one)
    return found


def _at_import(mutant: Mutant, noted: Noted, word: Path) -> int | None:
    tests = noted.tests(mutant)

    class First:
        """Says which test failed first."""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not word.exists():
                word.write_text(report.nodeid)

    def run() -> int:
        _change(mutant, mutant.tree(ROOT))
        return _pytest(["-x", "-o", "addopts=--strict-markers", "-m", QUICK, *tests], [First()])

    return in_fork(run, 20 + _seconds(tests, noted))


def _change(mutant: Mutant, tree: ast.Module) -> None:
    """Have the module be the changed one when it is imported."""
    name, path = _module(mutant.path), str(ROOT / mutant.path)
    get_code = SourceFileLoader.get_code

    def changed(self: SourceFileLoader, fullname: str) -> Any:
        if fullname == name:
            return compile(tree, path, "exec", dont_inherit=True)
        return get_code(self, fullname)

    SourceFileLoader.get_code = changed  # type: ignore[method-assign]

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
import signal
import sys
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
#: Seconds of tests, by what they took once, that are run for one change at the most: the shortest ones of those that
#: run its line.
MOST = 40.0
#: What a change may take beyond that before it counts as noticed, as a program that hangs.
PATIENCE = 15.0


def warm_up() -> None:
    """Import what is the same for every fork."""
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def in_fork(run: Callable[[], int], seconds: float, log: Path | None = None) -> int | None:
    """The exit code of a function in a fork that ends with all its children; ``None`` where it took too long."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = run()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    status = None
    while status is None and time.monotonic() < end:
        found, word = os.waitpid(child, os.WNOHANG)
        status = word if found else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def _pytest(arguments: list[str], plugins: list[Any] | None = None) -> int:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    early = "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-W", early, *arguments], plugins=plugins))


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


class Noted:
    """Which tests run a line, shortest first."""

    files: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        found = json.loads(path.read_text())
        self.seconds = {test: seconds for test, seconds in found["seconds"].items() if seconds < MOST}
        self.lines = {file: {int(line): names for line, names in lines.items()}
                      for file, lines in found["lines"].items()}  # fmt: skip
        self._of_file: dict[str, list[str]] = defaultdict(list)
        for test in self.seconds:
            self._of_file[test.split("::")[0]].append(test)

    def tests(self, mutant: Mutant) -> list[str]:
        """Those for a change, as many as take :data:`MOST` seconds."""
        lines = self.lines[mutant.path]
        wanted = lines if mutant.lines is None else range(mutant.lines[0], mutant.lines[1] + 1)
        names: set[str] = set()
        for line in wanted:
            for one in lines.get(line, []):
                names.update(self._of_file[one[6:].split("::")[0]] if one.startswith("setup ") else [one])
        chosen, total = [], 0.0
        for name in sorted(names & self.seconds.keys(), key=lambda one: self.seconds[one]):
            total += self.seconds[name]
            if total > MOST:
                break
            chosen.append(name)
        return chosen


class _All(Noted):
    """All tests of some files, whatever they run."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files, self.seconds = files, dict.fromkeys(files, 60.0)

    def tests(self, mutant: Mutant) -> list[str]:
        return list(self.files)


# ------------------------------------------------------------------ one change

Told = Callable[[Mutant, str], None]


def outcomes(group: Group, mutants: list[Mutant], noted: Noted, tell: Told, files: Sequence[str] = ()) -> None:
    """Try changes, and tell what each came to: ``"killed"``, ``"timeout"`` (noticed, too), ``"survived"``, or ``"not
    run"`` by any test.

    Args:
        files: all tests of these, instead of those that are known to run the line.
    """
    if files:
        noted = _All(files)
    unseen = [one for one in mutants if not noted.tests(one)]
    for mutant in unseen:
        tell(mutant, "not run")
    rest = [one for one in mutants if one not in unseen]
    inside = [one for one in rest if not one.at_import]
    if inside:
        arguments = [*files, "-m", QUICK] if files else group.arguments()
        code = in_fork(lambda: _pytest(["-s", *arguments], [_Trying(inside, noted, tell)]), float("inf"))
        if code:
            raise RuntimeError(f"the tests of {group.folder} cannot be collected: {code}")
    for mutant in rest:
        if mutant.at_import:
            tell(mutant, _at_import(mutant, noted))


def _seconds(tests: list[str], noted: Noted) -> float:
    return PATIENCE + 5 * sum(noted.seconds[one] for one in tests)


class _Trying:
    """Instead of running the collected tests once, runs those that may notice, for each change."""

    def __init__(self, mutants: list[Mutant], noted: Noted, tell: Told) -> None:
        self.mutants, self.noted, self.tell = mutants, noted, tell

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for mutant in self.mutants:
            names = self.noted.tests(mutant)
            chosen = session.items if self.noted.files else [items[name] for name in names if name in items]

            def run(mutant: Mutant = mutant, chosen: list[pytest.Item] = chosen) -> int:
                _swap(mutant)
                for item, after in zip(chosen, [*chosen[1:], None], strict=True):
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                    if session.testsfailed:
                        return 1
                return 0

            self.tell(mutant, _word(in_fork(run, _seconds(names, self.noted))))
        return True


def _word(code: int | None) -> str:
    return {None: "timeout", 0: "survived", 70: "error"}.get(code, "killed")


def _swap(mutant: Mutant) -> None:
    """Give the function that is changed, and all that are made from the same code, the new code."""
    path = str(ROOT / mutant.path)
    importlib.import_module(mutant.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
    before = _codes(compile(ast.parse((ROOT / mutant.path).read_text()), path, "exec", dont_inherit=True))
    after = _codes(compile(mutant.tree(ROOT), path, "exec", dont_inherit=True))
    changed = {key for key, code in after.items() if before.get(key) != code}
    if not changed:
        raise LookupError(f"no code differs for {mutant.name}")
    found = 0
    for one in gc.get_objects():
        if type(one) is types.FunctionType and one.__code__.co_filename == path:
            key = (one.__code__.co_qualname, one.__code__.co_firstlineno)
            if key in changed and "<module>" not in key:
                one.__code__ = after[key]
                found += 1
    if not found:
        raise LookupError(f"no function holds the code of {mutant.name}")


def _codes(code: types.CodeType) -> dict[tuple[str, int], types.CodeType]:
    """All functions of a module, by qualified name and line."""
    found = {(code.co_qualname, code.co_firstlineno): code}
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            found |= _codes(one)
    return found


def _at_import(mutant: Mutant, noted: Noted) -> str:
    tests = noted.tests(mutant)

    def run() -> int:
        _change(mutant, mutant.tree(ROOT))
        return _pytest(["-x", "-o", "addopts=--strict-markers", "-m", QUICK, *tests])

    return _word(in_fork(run, 20 + _seconds(tests, noted)))


def _change(mutant: Mutant, tree: ast.Module) -> None:
    """Have the module be the changed one when it is imported."""
    name, path = mutant.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"), str(ROOT / mutant.path)
    get_code = SourceFileLoader.get_code

    def changed(self: SourceFileLoader, fullname: str) -> Any:
        if fullname == name:
            return compile(tree, path, "exec", dont_inherit=True)
        return get_code(self, fullname)

    SourceFileLoader.get_code = changed  # type: ignore[method-assign]

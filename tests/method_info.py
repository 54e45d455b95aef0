"""What the project says of a method, and tries with it: one row of :mod:`tests.method_table`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tensordict import TensorDict

from benchmarks.comparison import Row
from tdhook_rl.method import Method
from tests.policies import POLICIES, Case

__all__ = ["PAGE", "MethodInfo", "Sample", "page"]


@dataclass(frozen=True)
class Sample:
    """A configuration of a method.

    Attributes:
        make: the method for a policy.
        policies: names of the policies that it is for; all by default.
        second: roots under which it reads a second set of inputs.
        waive: checks of the conformance kit that do not hold, each with the reason.
    """

    make: Callable[[Case], Method]
    policies: Sequence[str] = tuple(POLICIES)
    second: Sequence[str] = ()
    waive: Mapping[str, str] = field(default_factory=dict)

    @property
    def usual(self) -> str:
        """One policy that it is for."""
        return self.policies[0]

    @property
    def observes(self) -> bool:
        return self.make(POLICIES[self.usual]).observes

    @property
    def by_row(self) -> bool:
        return self.make(POLICIES[self.usual]).by_row

    def data(self, case: Case, *batch: int) -> TensorDict:
        """What the policy reads, and what the method reads beside it."""
        data = case.data(*batch)
        for root in self.second:
            data[root] = case.data(*batch)
        return data


@dataclass(frozen=True)
class MethodInfo:
    """A public method.

    Attributes:
        cls: its class; the package that it is in is its family.
        does: what it does, in a line of docs/methods.md.
        writes: the keys that it writes, in words of what stands in their place: ``in_key``, ``out_key``, ``path`` (of
            a module) or ``name``.
        oracles: rows of the oracle table: what it is held against.
        samples: configurations by name; the name of the first may be empty.
        bad: configurations that must be refused, by a pattern of what is said.
        effect: what comes of it beside keys, for docs/methods.md.
    """

    cls: type[Method]
    does: str
    writes: Sequence[tuple[str, ...]]
    oracles: Sequence[Row]
    samples: Mapping[str, Sample]
    bad: Mapping[str, Callable[[Case], Method]]
    effect: str = ""

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def family(self) -> str:
        return self.cls.__module__.split(".")[1]

    @property
    def sample(self) -> Sample:
        """The first configuration."""
        return next(iter(self.samples.values()))

    def named_samples(self) -> Iterator[tuple[str, Sample]]:
        for name, sample in self.samples.items():
            yield f"{self.name} {name}".strip(), sample


PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
START, END = "<!-- written by python -m tests.method_table -->\n\n", "\n<!-- up to here -->"


def page(methods: Sequence[MethodInfo]) -> str:
    """docs/methods.md, with its table as it should be."""
    lines = ["| method | what it does | writes | held against |", "|---|---|---|---|"]
    for info in methods:
        keys = ", ".join(f'`("{key[0]}", {key[1]})`' if len(key) > 1 else f'`"{key[0]}"`' for key in info.writes)
        written = "; ".join(filter(None, [keys, info.effect]))
        lines.append(f"| `{info.name}` | {info.does} | {written} | {info.oracles[0].oracle} |")
    before, rest = PAGE.read_text().split(START)
    return before + START + "\n".join(lines) + "\n" + END + rest.split(END)[1]

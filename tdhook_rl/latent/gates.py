"""Conditions of interventions: in which rows they act, by an entry, a function, a time step or a probe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import Checked
from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing.linear_probe import LinearProbe, probe_columns, read_columns
from tdhook_rl.method import Binder
from tdhook_rl.replaying.batching import row_vectors
from tdhook_rl.sites.inner_calls import batch_at
from tdhook_rl.sites.row_values import keep
from tdhook_rl.sites.rows import rows_of, with_batch
from tdhook_rl.sites.runtime import Runtime


@dataclass(frozen=True, eq=False)
class RowFunction(metaclass=Checked):
    """A function of the rows, and what it reads: its entries become ``in_keys`` of the hooked policy.

    ``when=`` and ``alpha=`` take functions as they are. This is for those whose policy is called with its ``in_keys``
    only, as some losses and inference servers do.

    Args:
        function: given a TensorDict with these entries, a value for each row.
        reads: the entries.

    Example:
        >>> from tensordict import TensorDict
        >>> from tdhook_rl import SteeringVectors
        >>> late = RowFunction(lambda rows: rows["step_count"] > 10, reads=["step_count"])
        >>> with SteeringVectors({"0": torch.ones(2)}, when=late).prepare(nn.Sequential(nn.Linear(4, 2))) as hooked:
        ...     hooked.in_keys
        ['input', 'step_count']
    """

    function: Callable[[TensorDictBase], Tensor]
    reads: Sequence[NestedKey]

    def __post_init__(self) -> None:
        if len(self.reads) == 0:
            raise InputError("RowFunction names the entries that the function reads: reads=[...] is empty")


@dataclass(frozen=True, eq=False)
class AtSteps(metaclass=Checked):
    """Open at some steps of an episode.

    Args:
        steps: which, counted from 0: a set, a list or a range.
        key: the entry that counts them: that of TorchRL's ``StepCounter``, or one of the environment's own.

    Raises:
        InputError: without steps.

    Example:
        >>> from tensordict import TensorDict
        >>> from tdhook_rl import SteeringVectors
        >>> data = TensorDict({"input": torch.zeros(3, 4), "step_count": torch.tensor([[3], [4], [5]])}, batch_size=3)
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> with SteeringVectors({"0": torch.ones(2)}, when=AtSteps({0, 4, 8})).prepare(net) as hooked:
        ...     hooked(data)["steered", "steering"]
        tensor([False,  True, False])
    """

    steps: Collection[int]
    key: NestedKey = "step_count"

    def __post_init__(self) -> None:
        if len(self.steps) == 0 or min(self.steps) < 0:
            raise InputError(f"AtSteps takes the numbers of steps, counted from 0, got {self.steps!r:.80}")

    @property
    def reads(self) -> tuple[NestedKey, ...]:
        return (self.key,)

    def __call__(self, rows: TensorDictBase) -> Tensor:
        now, steps = rows[self.key], self.steps
        if isinstance(steps, range) and steps.step == 1:
            return (now >= steps.start) & (now < steps.stop)
        return torch.isin(now, torch.tensor(sorted(steps), dtype=now.dtype, device=now.device))


@dataclass(frozen=True, eq=False)
class ProbeGate(metaclass=Checked):
    """Open where a fitted probe, read in the same forward, is above or below a value.

    Args:
        probe: reads a module that runs before the one that is changed, or the same one, there before it is changed. Of
            a multi-agent net it reads the features of all agents of a row.
        above: open where the probability of the label (or the value, of a probe of numbers) is larger.
        below: open where it is smaller. With both, in between.
        label: which class, label or number; may be left out where there is one, or one and its contrary (class 1).

    The probe and its limits become the controls ``"<name>.gate.weight"``, ``".bias"``, ``".kind"``, ``".above"`` and
    ``".below"`` of the intervention.

    Raises:
        InputError: without a limit, or where it is not said which of several labels is meant.

    Example:
        >>> from tensordict import TensorDict
        >>> from tdhook_rl import SteeringVectors
        >>> probe = LinearProbe(weight=torch.eye(2), bias=torch.zeros(2), path="0")
        >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
        >>> data = TensorDict({"input": torch.tensor([[3.0, 0.0], [0.0, 3.0]])}, batch_size=2)
        >>> with SteeringVectors({"1": torch.ones(2)}, when=ProbeGate(probe, above=0.9)).prepare(net) as hooked:
        ...     hooked(data)["steered", "steering"]
        tensor([False,  True])
    """

    probe: LinearProbe
    above: float | None = None
    below: float | None = None
    label: int | None = None

    def __post_init__(self) -> None:
        columns = len(self.probe.bias)
        if not self.probe.path:
            raise InputError("the probe of a ProbeGate does not say which module it reads: fit it with path=")
        if self.above is None and self.below is None:
            raise InputError("ProbeGate opens above= or below= a value: give one, or both")
        if self.above is not None and self.below is not None and not self.above < self.below:
            raise InputError(
                f"ProbeGate opens between above={self.above:g} and below={self.below:g}, where nothing is: above= is "
                "the smaller of the two"
            )
        if self.label is None and columns > 1 and (columns > 2 or self.probe.concept != "classes"):
            raise InputError(
                f"the probe of {self.probe.path!r} reads {columns} {self.probe.concept}: say which, label="
            )
        if self.label is not None and not 0 <= self.label < columns:
            raise InputError(f"label={self.label}, but the probe of {self.probe.path!r} has {columns}, counted from 0")

    @property
    def column(self) -> int:
        """Of what the probe reads, what is compared."""
        return len(self.probe.bias) - 1 if self.label is None else self.label


def place_probe(binder: Binder, gate: ProbeGate, name: str, found: str) -> str:
    """Read a probe in every forward; returns the slot in which interventions find what it says.

    Args:
        binder: of the policy.
        gate: the condition.
        name: the prefix of its controls.
        found: the slot of the record that stands in its place where a call is explained.
    """
    site = binder.site(gate.probe.path, runs=True)
    controls = {}
    for control, value in gate.probe.controls(name).items():
        part = control.rpartition(".")[2]
        controls[part] = binder.control(control, value if part == "kind" else value.double())
    for part, limit, default in (("above", gate.above, -torch.inf), ("below", gate.below, torch.inf)):
        number = torch.tensor(default if limit is None else float(limit), dtype=torch.float64)
        controls[part] = binder.control(f"{name}.{part}", number)
    slot = binder.slot(site)
    hook = ProbeGateHook(binder.runtime, site.name, slot, found, controls, gate.column)
    binder.on_output(site, hook, observes=True)
    return slot


class ProbeGateHook:
    """Forward hook that finds in which rows a probe is between its limits."""

    def __init__(
        self, runtime: Runtime, site: str, slot: str, found: str, controls: dict[str, str], column: int
    ) -> None:
        self.runtime = runtime
        self.site = site
        self.slot = slot
        self.found = found
        self.controls = controls
        self.column = column

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        runtime = self.runtime
        runtime.require_open()
        if runtime.decided is None or self.found in runtime.decided:
            return
        value, _ = rows_of(output, module, self.site, runtime)
        batch = batch_at(runtime, self.site)
        if batch is None:
            raise InputError(
                f"a gate reads a probe of {self.site!r} in each row, but the policy was called with tensors: call it "
                "with a TensorDict"
            )
        features = row_vectors(with_batch(value.detach(), batch, self.site), batch)
        weight, bias, kind, above, below = (
            runtime.held[self.controls[part]] for part in ("weight", "bias", "kind", "above", "below")
        )
        read = read_columns(probe_columns(features, weight, bias, self.site), kind)[..., self.column]
        runtime.decided[self.slot] = opened = (read > above.to(read)) & (read < below.to(read))
        keep(runtime, self.slot, opened, self.site)

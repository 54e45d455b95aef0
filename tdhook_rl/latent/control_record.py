"""A record, in the data, of the controls that were in force when each row was computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import InputError, MissingKeyError, nearest
from tdhook_rl.method import Binder, Method
from tdhook_rl.sites.runtime import Runtime


@dataclass(frozen=True, eq=False)
class ControlRecord(Method):
    """Write what interventions and probes were set to, beside the action.

    Controls may change while a policy runs, in workers between two of their steps; only the data can tell what was
    active in a row. A call reads them when it begins.

    Args:
        names: the controls to record; all that the methods before this one in a ``Compose`` have, by default.
        control_key: the root of the result keys.

    Writes ``(control_key, name)``, batch-shaped: the value of a control that is one number (such as
    ``"steering.alpha"``), and the version of a vector or weight, which counts how often it was set (int64).

    Raises:
        InputError: if there is no control to record.
        MissingKeyError: if a name is no control.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdhook_rl import Compose, SteeringVectors
        >>> method = Compose(SteeringVectors({"0": torch.ones(2)}, alpha=0.5), ControlRecord())
        >>> with method.prepare(torch.nn.Sequential(torch.nn.Linear(4, 2))) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        >>> data["control", "steering.alpha"], data["control", "steering.0"]
        (tensor([0.5000, 0.5000, 0.5000]), tensor([0, 0, 0]))
    """

    names: Sequence[str] | None = None
    control_key: str = "control"

    def bind(self, binder: Binder) -> _BoundRecord:
        controls = binder.runtime.controls
        names = list(controls) if self.names is None else list(self.names)
        if not names:
            raise InputError(
                "ControlRecord found no control: place it after the interventions and probes of its Compose"
            )
        unknown = [name for name in names if name not in controls]
        if unknown:
            raise MissingKeyError(
                f"ControlRecord names {unknown[0]!r}, which no method before it has; {nearest(unknown[0], controls)}"
            )
        return _BoundRecord(binder.runtime, self.control_key, names)


class _BoundRecord(BoundMethod):
    # What was in force when a batch was collected cannot be found out afterwards.
    only_in_forward = True

    def __init__(self, runtime: Runtime, root: str, names: Sequence[str]) -> None:
        self._runtime = runtime
        self._names = {(root, name): name for name in names}
        self.result_keys = tuple(self._names)

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        controls = self._runtime.held
        results: dict[tuple[str, ...], Tensor] = {}
        for key, name in self._names.items():
            value = controls[name]
            value = value.reshape(()) if value.numel() == 1 else controls.version(name)
            # A copy in the shape of the batch: the control itself goes on changing.
            results[key] = value.to(call.data.device or value.device).expand(call.batch_size).clone()
        return results

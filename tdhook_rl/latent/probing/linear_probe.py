"""A linear probe: a fitted linear read-out of one module's output, and its inline use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.hooks import Runtime
from tdhook_rl.method import Binder, Method
from tdhook_rl.passes import Call

__all__ = ["LinearProbe", "ProbeReadout"]


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearProbe:
    """Scores ``weight @ features + bias``; classes by softmax (lda), or least-squares scores (ridge).

    Args:
        weight: ``(classes, features)``.
        bias: ``(classes,)``.
        kind: how it was fitted.
        path: the module whose output it reads.
        facts: what is known of it (rows, accuracy, frames), saved with it.

    Reference: Alain & Bengio 2017.

    Example:
        >>> probe = LinearProbe(weight=torch.eye(2), bias=torch.zeros(2), kind="lda", path="1")
        >>> probe.predict(torch.tensor([[3.0, 0.0], [0.0, 3.0]])).tolist()
        [0, 1]
    """

    weight: Tensor
    bias: Tensor
    kind: Literal["lda", "ridge"] = "lda"
    path: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def scores(self, features: Tensor) -> Tensor:
        """``(..., classes)`` from ``(..., features)``."""
        return _scores(features, self.weight, self.bias, self.path)

    def probabilities(self, features: Tensor) -> Tensor:
        """``(..., classes)``: softmax for lda; scores clipped to [0, 1] and normalised for ridge."""
        return _probabilities(self.scores(features), self.kind)

    def predict(self, features: Tensor) -> Tensor:
        """The class of each row, ``(...)``."""
        return self.scores(features).argmax(-1)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Balanced accuracy: the mean over classes of the share of their rows that are right."""
        right = (self.predict(features).reshape(-1) == labels.reshape(-1)).double()
        labels = labels.reshape(-1).long()
        shares = [right[labels == label].mean() for label in labels.unique()]
        if not shares:
            raise InputError("no rows to score the probe on")
        return float(torch.stack(shares).mean())

    def direction(self, positive: int = 1, negative: int = 0) -> Tensor:
        """The unit vector that raises one class against another, ``(features,)``."""
        difference = self.weight[positive] - self.weight[negative]
        return difference / difference.norm()

    def save(self, path: str | Path) -> Path:
        """Write safetensors and JSON (see :func:`tdhook_rl.artifacts.save_artifact`)."""
        facts = {**self.facts, "probe_kind": self.kind, "module_path": self.path}
        return save_artifact(path, "linear_probe", {"weight": self.weight, "bias": self.bias}, facts)

    @classmethod
    def load(cls, path: str | Path) -> LinearProbe:
        """Read a saved probe.

        Raises:
            ArtifactError: if the file is absent, corrupt or not a probe.
        """
        tensors, facts = load_artifact(path, "linear_probe")
        try:
            weight, bias = tensors["weight"], tensors["bias"]
            kind, module = facts.pop("probe_kind"), facts.pop("module_path")
        except KeyError as error:
            raise ArtifactError(f"{path} lacks {error}, which a probe has") from None
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ArtifactError(f"{path}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} are no probe")
        return cls(weight=weight, bias=bias, kind=kind, path=module, facts=facts)


@dataclass(frozen=True, eq=False)
class ProbeReadout(Method):
    """Read fitted probes at every forward, beside the action.

    Args:
        probes: for each name a fitted probe, whose ``path`` says which module it reads.
        probe_key: the root of the result keys.
        name: the prefix of the controls ``"<name>.<probe>.weight"`` and ``".bias"``: write them to replace a
            probe in running workers.

    Writes ``(probe_key, name)``: batch + classes, probabilities.

    Example:
        >>> from tensordict import TensorDict
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> probe = LinearProbe(weight=torch.randn(2, 3), bias=torch.zeros(2), path="1")
        >>> with ProbeReadout({"door": probe}).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(5, 4)}, batch_size=5))
        >>> data["probe", "door"].shape
        torch.Size([5, 2])
    """

    probes: Mapping[str, LinearProbe]
    probe_key: str = "probe"
    name: str = "probe"

    def __post_init__(self) -> None:
        if not self.probes:
            raise InputError("ProbeReadout needs at least one probe")
        for name, probe in self.probes.items():
            if not isinstance(probe, LinearProbe):
                raise InputError(f"probe {name!r} is a {type(probe).__name__}, not a fitted LinearProbe")
            if not probe.path:
                raise InputError(f"probe {name!r} does not say which module it reads: fit it with path=")

    def bind(self, binder: Binder) -> _BoundReadout:
        readings = {}
        for name, probe in self.probes.items():
            site = binder.site(probe.path, runs=True)
            weight = binder.control(f"{self.name}.{name}.weight", probe.weight)
            bias = binder.control(f"{self.name}.{name}.bias", probe.bias)
            readings[self.probe_key, name] = (binder.capture(site), site.name, weight, bias, probe.kind)
        return _BoundReadout(binder.runtime, readings)


class _BoundReadout:
    when = "step"
    reads_forward = True
    replays = False

    def __init__(self, runtime: Runtime, readings: dict[tuple[str, str], tuple[str, str, str, str, str]]) -> None:
        self._runtime = runtime
        self._readings = readings
        self.result_keys = tuple(readings)

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        controls = self._runtime.controls
        results: dict[tuple[str, ...], Tensor] = {}
        for key, (slot, site, weight, bias, kind) in self._readings.items():
            value = call.captured(slot, site)
            features = value.reshape(*call.batch_size, -1)
            scores = _scores(features, controls[weight].to(value.device), controls[bias].to(value.device), site)
            results[key] = _probabilities(scores, kind)
        return results


def _scores(features: Tensor, weight: Tensor, bias: Tensor, path: str) -> Tensor:
    if features.shape[-1] != weight.shape[1]:
        raise InputError(
            f"the probe of {path!r} reads {weight.shape[1]} features, but got {features.shape[-1]}: "
            "it was fitted on another module or network"
        )
    return torch.nn.functional.linear(features, weight.to(features.dtype), bias.to(features.dtype))


def _probabilities(scores: Tensor, kind: str) -> Tensor:
    if kind == "lda":
        return scores.softmax(-1)
    clipped = scores.clamp(0, 1)
    return clipped / clipped.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)

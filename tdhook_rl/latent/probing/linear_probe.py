"""A linear probe: a fitted linear read-out of one module's output, and its inline use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import Checked, checked, shown
from tdhook_rl.arguments.tensors import numbers
from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import ArtifactError, InputError, nearest
from tdhook_rl.files.stored import module_path, require_free, tensors_named, text
from tdhook_rl.method import Binder, Method
from tdhook_rl.replaying.batching import row_vectors
from tdhook_rl.sites.runtime import Runtime

Kind = Literal["lda", "ridge"]
Concept = Literal["classes", "labels", "values"]

#: The names under which a file says what the probe itself is.
_TAKEN = ("probe_kind", "module_path", "probe_concept")
_KINDS: tuple[Kind, ...] = ("lda", "ridge")
_CONCEPTS: tuple[Concept, ...] = ("classes", "labels", "values")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class LinearProbe(metaclass=Checked):
    """Scores ``weight @ features + bias``; classes by softmax (lda), or least-squares scores (ridge).

    Scores are computed in float64, where the device has it: features far from zero cost a float32 sum its last digits.

    Args:
        weight: ``(classes, features)``; a row for each label or number where the concept is not one class of several.
        bias: ``(classes,)``.
        kind: how it was fitted: ``"lda"`` or ``"ridge"``.
        path: the module whose output it reads.
        facts: what is known of it (rows, accuracy, frames), saved with it.
        concept: ``"classes"``: one of several; ``"labels"``: yes or no for each row of the weight; ``"values"``:
            numbers (ridge).

    Raises:
        InputError: for another kind or concept, or shapes that do not fit.

    Reference: Alain & Bengio 2017.

    Example:
        >>> probe = LinearProbe(weight=torch.eye(2), bias=torch.zeros(2), kind="lda", path="1")
        >>> probe
        LinearProbe(2 classes of 2 features at '1', lda)
        >>> probe.predict(torch.tensor([[3.0, 0.0], [0.0, 3.0]])).tolist()
        [0, 1]
    """

    weight: Tensor
    bias: Tensor
    kind: Kind = "lda"
    path: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    concept: Concept = "classes"

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.concept not in _CONCEPTS:
            raise InputError(f"a probe is of 'classes', 'labels' or 'values', got {self.concept!r}")
        if self.concept == "values" and self.kind != "ridge":
            raise InputError(f"a probe of numbers is of the kind 'ridge', got {self.kind!r}")
        require_free(self.facts, _TAKEN)
        for name in ("weight", "bias"):
            if not isinstance(getattr(self, name), Tensor):
                raise InputError(f"the {name} of a probe is a tensor, got {shown(getattr(self, name))}")
            numbers(getattr(self, name), f"the {name} of a probe")
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1]:
            raise InputError(
                f"a probe has a weight (classes, features) and a bias (classes,), got {tuple(self.weight.shape)} and "
                f"{tuple(self.bias.shape)}"
            )

    def __repr__(self) -> str:
        outputs, features = self.weight.shape
        return f"LinearProbe({outputs} {self.concept} of {features} features at {self.path!r}, {self.kind})"

    def scores(self, features: Tensor) -> Tensor:
        """``(..., classes)`` from ``(..., features)``."""
        return _cast(probe_columns(features, self.weight, self.bias, self.path), features)

    def probabilities(self, features: Tensor) -> Tensor:
        """``(..., classes)``: softmax for lda; scores clipped to [0, 1] and normalised for ridge. Of labels: the
        logistic function for lda, scores clipped to [0, 1] for ridge.

        Raises:
            InputError: for a probe of numbers, which have none.
        """
        if self.concept == "values":
            raise InputError("a probe of numbers has no probabilities: ask for predict(features)")
        return _cast(
            _read(probe_columns(features, self.weight, self.bias, self.path), self.kind, self.concept), features
        )

    def predict(self, features: Tensor) -> Tensor:
        """The class of each row, ``(...)``; of labels 0 or 1, of numbers their values, ``(..., targets)``."""
        scores = probe_columns(features, self.weight, self.bias, self.path)
        if self.concept == "values":
            return _cast(scores, features)
        if self.concept == "labels":
            return (scores > (0.0 if self.kind == "lda" else 0.5)).long()
        return scores.argmax(-1)

    def controls(self, name: str) -> dict[str, Tensor]:
        """What makes a :class:`ProbeReadout` read this probe, kind included, by the names of its controls.

        Args:
            name: their prefix, ``"probe.<name of the probe>"``.

        Example:
            >>> probe = LinearProbe(weight=torch.eye(2), bias=torch.zeros(2), path="1")
            >>> sorted(probe.controls("probe.door"))
            ['probe.door.bias', 'probe.door.kind', 'probe.door.weight']
        """
        code = torch.tensor(_CONCEPTS.index(self.concept) * len(_KINDS) + _KINDS.index(self.kind))
        return {f"{name}.weight": self.weight, f"{name}.bias": self.bias, f"{name}.kind": code}

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Balanced accuracy: the mean over classes of the share of their rows that are right.

        Raises:
            InputError: without rows, or for a probe that does not choose among classes.
        """
        if self.concept != "classes":
            raise InputError(
                f"accuracy is of classes, and this is a probe of {self.concept}: compare predict(features)"
            )
        right = (self.predict(features).reshape(-1) == labels.reshape(-1)).double()
        labels = labels.reshape(-1).long()
        shares = [right[labels == label].mean() for label in labels.unique()]
        if not shares:
            raise InputError("no rows to score the probe on")
        return float(torch.stack(shares).mean())

    def direction(self, positive: int = 1, negative: int = 0) -> Tensor:
        """The unit vector that raises one class against another, ``(features,)``.

        Raises:
            InputError: if the probe does not tell the two apart (of constant features, say), or there is no such class.
        """
        outputs = len(self.weight)
        for name, one in (("positive", positive), ("negative", negative)):
            if not -outputs <= one < outputs:
                raise InputError(f"{name}= is one of {outputs} outputs of the probe, 0 to {outputs - 1}; got {one}")
        difference = (self.weight[positive] - self.weight[negative]).double()
        size = difference.norm()
        if not bool(size > 0) or not bool(size.isfinite()):
            raise InputError(
                f"the weights of the outputs {positive} and {negative} of this probe of {self.path!r} are "
                "the same, so that no direction leads from one to the other: it found nothing there (a constant "
                "activation, say)"
            )
        return (difference / size).to(self.weight.dtype)

    @checked
    def save(self, path: str | Path) -> Path:
        """Write safetensors and JSON (see :func:`tdhook_rl.artifacts.save_artifact`)."""
        facts = {**self.facts, "probe_kind": self.kind, "module_path": self.path, "probe_concept": self.concept}
        return save_artifact(path, "linear_probe", {"weight": self.weight, "bias": self.bias}, facts)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> LinearProbe:
        """Read a saved probe.

        Raises:
            ArtifactError: if the file is absent, corrupt or not a probe.
        """
        tensors, facts = load_artifact(path, "linear_probe")
        weight, bias = tensors_named(path, tensors, weight=2, bias=1)
        kind, module = text(path, facts, "probe_kind"), module_path(path, facts)
        concept = facts.get("probe_concept", "classes")
        facts = {name: facts[name] for name in facts if name not in _TAKEN}
        try:
            return cls(weight=weight, bias=bias, kind=kind, path=module, facts=facts, concept=concept)
        except InputError as error:
            raise ArtifactError(f"{path} is no probe: {error}") from None


@dataclass(frozen=True, eq=False)
class ProbeReadout(Method):
    """Read fitted probes at every forward, beside the action.

    Args:
        probes: for each name a fitted probe, whose ``path`` says which module it reads.
        probe_key: the root of the result keys.
        name: the prefix of the controls ``"<name>.<probe>.weight"``, ``".bias"`` and ``".kind"``: write
            :meth:`LinearProbe.controls` of another probe to replace one in running workers.

    Writes ``(probe_key, name)``: batch + classes, probabilities; batch + targets for a probe of numbers.

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
        modules = dict(binder.root.named_modules(remove_duplicate=False))
        for name, probe in self.probes.items():
            site = binder.site(probe.path, runs=True)
            names = {part: f"{self.name}.{name}.{part}" for part in ("weight", "bias", "kind")}
            same = [path for path, module in modules.items() if module is site.module]
            binder.runtime.controls.place(f"{self.name}.{name}", site.name, same, modules)
            values = probe.controls(f"{self.name}.{name}")
            for part, control in names.items():
                value = values[control]
                # float64, so that what is pushed later keeps its digits
                binder.control(control, value if part == "kind" else value.double())
            readings[self.probe_key, name] = _Reading(binder.capture(site), site.name, **names)
        return _BoundReadout(binder.runtime, readings)


@dataclass(frozen=True)
class _Reading:
    slot: str
    site: str
    weight: str
    bias: str
    kind: str


class _BoundReadout(BoundMethod):
    reads_forward = True

    def __init__(self, runtime: Runtime, readings: dict[tuple[str, str], _Reading]) -> None:
        self._runtime = runtime
        self._readings = readings
        self.result_keys = tuple(readings)

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        controls = self._runtime.held
        results: dict[tuple[str, ...], Tensor] = {}
        for key, one in self._readings.items():
            value = call.captured(one.slot, one.site)
            features = row_vectors(value, call.batch_size)
            scores = probe_columns(features, controls[one.weight], controls[one.bias], one.site)
            results[key] = _cast(read_columns(scores, controls[one.kind]), features)
        return results


def check_kind(kind: str) -> None:
    """Raise an ``InputError`` unless it is ``"lda"`` or ``"ridge"``."""
    if kind not in _KINDS:
        raise InputError(f"a probe is 'lda' or 'ridge', got {kind!r}; {nearest(str(kind).lower(), _KINDS, count=1)}")


def probe_columns(features: Tensor, weight: Tensor, bias: Tensor, path: str) -> Tensor:
    """The scores of a probe with these weights, ``(..., classes)``, in float64 where the device has it."""
    if features.shape[-1] != weight.shape[1]:
        raise InputError(
            f"the probe of {path!r} reads {weight.shape[1]} features, but got {features.shape[-1]}: "
            "it was fitted on another module or network"
        )
    # Apple's devices have no float64.
    dtype = torch.float32 if features.device.type == "mps" else torch.float64
    return torch.nn.functional.linear(
        features.to(dtype), weight.to(features.device, dtype), bias.to(features.device, dtype)
    )


def _cast(scores: Tensor, features: Tensor) -> Tensor:
    return scores.to(features.dtype if features.is_floating_point() else torch.float32)


def _read(scores: Tensor, kind: str, concept: str) -> Tensor:
    """What a probe says: probabilities, or values."""
    if concept == "values":
        return scores
    if concept == "labels":
        return scores.sigmoid() if kind == "lda" else scores.clamp(0, 1)
    if kind == "lda":
        return scores.softmax(-1)
    clipped = scores.clamp(0, 1)
    return clipped / clipped.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def read_columns(scores: Tensor, code: Tensor) -> Tensor:
    """:func:`_read` by the number of concept and kind, which another process may change at any time."""
    if not torch.compiler.is_compiling():
        concept, kind = divmod(int(code), len(_KINDS))
        return _read(scores, _KINDS[kind], _CONCEPTS[concept])
    found = scores  # a branch on a tensor's value would break the graph
    for number in range(len(_CONCEPTS) * len(_KINDS)):
        concept, kind = divmod(number, len(_KINDS))
        found = torch.where(code.to(scores.device) == number, _read(scores, _KINDS[kind], _CONCEPTS[concept]), found)
    return found

"""A sweep as it grows: what is played, what is missing, and the file from which the same call goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import ArtifactError, InputError, warn
from tdhook_rl.files.digests import digest_of
from tdhook_rl.files.functions import untold_in
from tdhook_rl.files.versions import versions
from tdhook_rl.internals.torch_names import held_buffers, held_parameters
from tdhook_rl.replaying.policy_settings import policy_settings
from tdhook_rl.sweeps.conditions import BASELINE, REPEATED, Condition, Direction

KIND = "steering_sweep"
#: The name of the file in its folder.
FILE = "sweep"
#: Seconds between two writes while conditions are played.
BETWEEN = 5.0
#: What else to do where the sweep in a folder has another fact.
_REMEDIES = {
    "environment_state": ", with the transforms and workers of env= (running statistics, counters, buffers) as they "
    "were when the sweep began, by their load_state_dict",
    "streams": ", by the release that began it: random numbers followed from a seed in another way",
}
_NAMES = {
    "settings": "environment, which was made with other arguments",
    "policy": "policy, of modules of other kinds or with other options",
}
#: Beside the outcomes: whether an episode was cut at the longest that it may last. No outcome is called so.
UNFINISHED = ""


class Kept:
    """The values of the conditions played so far.

    Args:
        folder: where they are kept; ``None``: in memory only.
        conditions: all of the sweep.
        facts: what was asked, in JSON.
        policy: the policy.
        directions: the vectors and controls.

    Raises:
        InputError: if the folder holds another sweep.
    """

    def __init__(
        self,
        folder: str | Path | None,
        conditions: Sequence[Condition],
        facts: Mapping[str, Any],
        policy: nn.Module,
        directions: Mapping[str, Direction],
    ) -> None:
        self.conditions = list(conditions)
        self.layout = ""
        self.values: dict[str, Tensor] = {}
        told = {} if folder is None else {"policy": policy_settings(policy)}
        self._facts = {**facts, **told, "digest": _digest(policy, directions)}
        self._path = None if folder is None else Path(folder) / FILE
        self._done = torch.zeros(len(self.conditions), dtype=torch.bool)
        self._written = time.monotonic()
        if self._path is not None and self._path.with_suffix(".safetensors").exists():
            self._resume()

    def missing(self) -> list[Condition]:
        """The conditions that are not played yet."""
        return [one for one, done in zip(self.conditions, self._done.tolist(), strict=True) if not done]

    def done(self) -> tuple[int, int]:
        """How many conditions are played, and all."""
        return int(self._done.sum()), len(self.conditions)

    def add(self, conditions: Sequence[Condition], values: Mapping[str, Tensor], layout: str) -> None:
        """Take ``(conditions, episodes)`` of each outcome in."""
        self.layout = layout
        if self.values and self.values.keys() != values.keys():
            raise InputError(
                f"the outcomes are {sorted(values)} now and were {sorted(self.values)}: functions must give the same "
                "names every time"
            )
        place = {one: number for number, one in enumerate(self.conditions)}
        rows = torch.tensor([place[one] for one in conditions])
        for name, found in values.items():
            full = self.values.setdefault(name, torch.zeros(len(self.conditions), found.shape[1], dtype=torch.float64))
            full[rows] = found
        self._done[rows] = True
        if time.monotonic() - self._written > BETWEEN:
            self.write()

    def repeated(self) -> bool:
        """Whether alpha 0 gave the same twice."""
        first, again = (self.conditions.index(one) for one in (BASELINE, REPEATED))
        return all(torch.equal(values[first], values[again]) for values in self.values.values())

    def forget(self) -> None:
        """Begin again."""
        self.values.clear()
        self._done[:] = False
        self.layout = ""

    def write(self) -> None:
        """Write what is there, if there is a folder."""
        if self._path is not None and self.values:
            write_sweep(self._path, self.conditions, self.values, {**self._facts, "layout": self.layout}, self._done)
            self._written = time.monotonic()

    def facts(self) -> dict[str, Any]:
        """What the result says of itself."""
        cut = self.values[UNFINISHED]
        found = {"versions": _versions(), **self._facts, "layout": self.layout, "unfinished": float(cut.mean())}
        found["paired"] = self.repeated()
        if cut.any():
            warn(
                f"{int(cut.sum())} of {cut.numel()} episodes did not end within max_steps={found['max_steps']}; they "
                "count as they were then"
            )
        if not found["paired"]:
            warn(
                "alpha 0 played twice from the same seeds differs: the environment draws by itself, or holds something "
                "from episode to episode, so that conditions are not paired and intervals are wider"
            )
        return found

    def _resume(self) -> None:
        assert self._path is not None
        conditions, values, facts, done, runs = read_sweep(self._path)
        if runs is not None:
            raise InputError(
                f"{self._path.parent} holds sweeps of several runs together, which are over: give another folder="
            )
        for name, asked in self._facts.items():
            known = facts.get(name)
            if known != asked:
                known, asked = _differing(known, asked)
                raise InputError(
                    f"{self._path.parent} holds a sweep with another {_NAMES.get(name, name)} ({known!r:.80}, asked "
                    f"{asked!r:.80}): give another folder=, or ask for the same{_REMEDIES.get(name, '')}"
                )
        for said in untold_in(self._facts):
            warn(f"{self._path.parent} holds a sweep that goes on as the same: {said}")
        if conditions != self.conditions:
            raise InputError(f"{self._path.parent} holds a sweep of other conditions: give another folder=")
        if UNFINISHED not in values:
            raise InputError(
                f"{self._path.parent} holds a sweep that does not say which episodes were cut, as another release or "
                "SweepResult.save() writes one: give another folder="
            )
        self.values, self._done, self.layout = values, done, str(facts.get("layout", ""))


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two mappings the entries in which they differ."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return one, other
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return {key: one.get(key) for key in keys}, {key: other.get(key) for key in keys}


def write_sweep(
    path: Path,
    conditions: Sequence[Condition],
    values: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    done: Tensor,
    runs: Tensor | None = None,
) -> Path:
    """Write a sweep, or what is there of it, as safetensors and JSON; ``runs`` are those of its episodes, if known."""
    tensors = {f"outcome/{name}": found for name, found in values.items()} | {"done": done}
    tensors |= {} if runs is None else {"runs": runs.long()}
    document = {
        "versions": _versions(),
        **facts,
        "conditions": [list(astuple(one)) for one in conditions],
        "outcomes": list(values),
    }
    return save_artifact(path, KIND, tensors, document)


def read_sweep(path: Path) -> tuple[list[Condition], dict[str, Tensor], dict[str, Any], Tensor, Tensor | None]:
    """The conditions, outcomes and facts of a file, which conditions are played, and the runs of the episodes.

    Raises:
        ArtifactError: if it is no sweep.
    """
    tensors, facts = load_artifact(path, KIND)
    conditions = _conditions(path, facts.pop("conditions", None))
    values, done = _values(path, tensors, facts.pop("outcomes", None), len(conditions))
    return conditions, values, facts, done, _runs(path, tensors.get("runs"), next(iter(values.values())).shape[1])


def _runs(path: Path, runs: Tensor | None, episodes: int) -> Tensor | None:
    if runs is not None and (runs.shape != (episodes,) or runs.dtype != torch.int64):
        raise ArtifactError(f"{path} does not say of each of {episodes} episodes which run it is of")
    return runs


def _conditions(path: Path, rows: Any) -> list[Condition]:
    found = []
    for row in rows if isinstance(rows, list) else []:
        kinds = (str, (int, float), str, int)
        if not isinstance(row, list) or len(row) != len(kinds) or not all(map(isinstance, row, kinds)):
            raise ArtifactError(f"{path} has a condition that is none: {row!r:.80}")
        found.append(Condition(row[0], float(row[1]), row[2], row[3]))
    if not {BASELINE, REPEATED} <= set(found):
        raise ArtifactError(f"{path} lacks the conditions of a sweep, of which two are alpha 0")
    return found


def _values(path: Path, tensors: Mapping[str, Tensor], names: Any, conditions: int) -> tuple[dict[str, Tensor], Tensor]:
    done = tensors.get("done")
    if not isinstance(names, list) or not isinstance(done, Tensor) or done.shape != (conditions,):
        raise ArtifactError(f"{path} lacks its outcomes, or which of {conditions} conditions are played")
    found = {}
    for name in names:
        values = tensors.get(f"outcome/{name}")
        if values is None or values.ndim != 2 or len(values) != conditions or values.dtype != torch.float64:
            raise ArtifactError(f"{path} lacks the outcome {str(name)[:80]!r} of {conditions} conditions")
        found[str(name)] = values
    if len({values.shape for values in found.values()}) != 1:
        raise ArtifactError(f"{path} has no outcome, or outcomes of different numbers of episodes")
    return found, done.bool()


def _versions() -> dict[str, str | None]:
    return versions("tdhook_rl", "torch", "torchrl", "tensordict")


def _digest(policy: nn.Module, directions: Mapping[str, Direction]) -> str:
    """Of the weights and of every vector, to the last bit."""
    tensors = [*held_parameters(policy).items(), *held_buffers(policy).items()]
    for one in directions.values():
        for kind, parts in {"": one.parts, **one.controls}.items():
            tensors += [(f"{one.name} {kind} {place}", part) for place, part in parts.items()]
    return digest_of(tensors)

"""What a rollout holds that can be played: one track for each thing that is shown, a row for each step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.calls.real_rows import row_mask
from tdhook_rl.errors import MissingKeyError, nearest
from tdhook_rl.report.frames import as_array
from tdhook_rl.report.known_env import KnownEnv, known_of
from tdhook_rl.report.readings import Features, Readings, input_of

Key = tuple[str, ...]
#: Roots under which nothing is that a policy reads or puts out.
RESULTS = (
    "attr",
    "cache",
    "computed",
    "concept",
    "control",
    "collector",
    "next",
    "patched",
    "probe",
    "steer",
    "steered",
)
VALUE = re.compile(r"(^|_)value(_\d+)?$")
#: Vectors with more entries are not listed one by one, and of sites with more units some are left out.
MOST = 512
#: More agents than this are not looked at one by one.
AGENTS = 16


@dataclass(eq=False)
class Track:
    """Something that is shown, at every step.

    Args:
        kind: what is drawn of it.
        name: what it is called.
        values: ``(rows, ...)``; NaN where nothing was computed.
        agent: whose it is, of several agents.
        facts: what the page has to know of it, JSON-able.
    """

    kind: str
    name: str
    values: np.ndarray
    agent: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Options:
    """What is asked for, beside the data."""

    policy: Any = None
    env: Any = None
    sites: Sequence[NestedKey] | None = None
    frames_key: NestedKey | None = None
    features: Features = field(default_factory=Features)
    action_names: Any = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def known(self) -> KnownEnv:
        """What the environment says of itself."""
        return KnownEnv() if self.env is None else known_of(self.env)

    def note(self, text: str) -> None:
        """Say once what is not shown."""
        if text not in self.notes:
            self.notes.append(text)


class Rows:
    """The steps of a rollout that are shown, in their order.

    Args:
        data: the rollout.
        places: which of its rows, counted through all dimensions of the batch.
        options: what is asked for.
    """

    def __init__(self, data: TensorDictBase, places: np.ndarray, options: Options) -> None:
        self.data, self.places, self.options = data, torch.from_numpy(places), options
        leaves = [key_parts(key) for key in data.keys(True, True)]
        tensors = {key: value for key in leaves if isinstance(value := data.get(key), Tensor) and value.numel()}
        for key in [key for key, value in tensors.items() if value.is_complex()]:
            options.note(f"{'.'.join(key)!r} is complex: it is not shown")
        self.keys: list[Key] = [key for key, value in tensors.items() if not value.is_complex()]
        self.attributions, self.activations = self._results()
        roots = {key[0] for key in (*self.attributions, *self.activations)}
        self.plain = [key for key in self.keys if key[0] not in (*RESULTS, *roots)]
        self.groups = self._groups()

    def of(self, key: NestedKey) -> np.ndarray:
        """The rows of an entry: ``(rows, *features)``."""
        value = self.data.get(key).detach()
        rows = value.reshape(self.data.numel(), *value.shape[self.data.ndim :])
        return as_array(rows[self.places.to(value.device)])

    def result(self, key: Key) -> np.ndarray:
        """The rows of a result as floats, NaN where it was not computed."""
        values = self.of(key).astype(np.float32)
        mask = row_mask(self.data, ("computed", key[0]))
        if mask is not None:
            values[~mask.reshape(-1).cpu()[self.places].numpy()] = np.nan
        return values

    def source(self, key: Key) -> Key | None:
        """The input that an attribution is about."""
        if self.options.policy is not None and hasattr(self.options.policy, "policy_in_keys"):
            found = input_of(self.options.policy, key)
            return None if found is None else key_parts(found)
        ends = [key[start:] for start in range(1, len(key))]
        return next((end for end in ends if end in self.keys), None)

    def name(self, key: Key) -> str:
        """What an entry is called; the name of the only group of agents is left out."""
        return ".".join(key[1:] if len(self.groups) == 1 and key[0] in self.groups else key)

    def agents(self, key: Key, values: np.ndarray) -> Iterator[tuple[int | None, np.ndarray]]:
        """The rows of each agent, if the entry is of several: ``None`` and all rows if not."""
        count = next((count for group, count in self.groups.items() if group in key), 0)
        if not count and key[0] not in self.groups and len(self.groups) == 1 and key not in self.plain:
            (several,) = self.groups.values()  # sites and probes have the agents where their network has them
            count = several if values.ndim > 2 and values.shape[1] == several else 0
        if not count or values.ndim < 2 or values.shape[1] != count:
            yield None, values
            return
        if count > AGENTS:
            self.options.note(f"of {count} agents the first {AGENTS} are shown")
        for agent in range(min(count, AGENTS)):
            yield agent, values[:, agent]

    # ------------------------------------------------------------------ inner

    def _results(self) -> tuple[list[Key], list[Key]]:
        policy = self.options.policy
        if policy is not None and hasattr(policy, "_hooked"):
            found = Readings(policy, self.data, self.options.features)
            return found.attributions, found.activations
        attributions = [key for key in self.keys if key[0] == "attr" or key[0].startswith("attr_")]
        return attributions, [key for key in self.keys if key[0] == "cache"]

    def _groups(self) -> dict[str, int]:
        """Of groups of agents, how many they are: all entries of a group have that dimension after the batch."""
        found: dict[str, int] = {}
        batch = self.data.ndim
        for group in {key[0] for key in self.plain if len(key) > 1}:
            shapes = [self.data.get(key).shape[batch:] for key in self.plain if key[0] == group]
            names = {key[-1] for key in self.plain if key[0] == group}
            sizes = {shape[0] if len(shape) else 0 for shape in shapes}
            if len(sizes) == 1 and sizes != {0} and names & {"action", "observation", "logits", "loc"}:
                found[group] = sizes.pop()
        return found


def result_tracks(rows: Rows) -> list[Track]:
    """Probes, controls, steering, labels and activations."""
    found = []
    for key in rows.keys:
        name = ".".join(key[1:])
        if key[0] == "probe":
            for agent, values in rows.agents(key, rows.result(key)):
                flat = values.reshape(len(values), -1)
                if flat.shape[1] <= 32:
                    found.append(Track("probe", name, flat, agent))
                else:
                    rows.options.note(f"probe {name} has {flat.shape[1]} entries: not shown")
        elif key[0] in ("control", "steered"):
            values = rows.result(key) if key[0] == "steered" else rows.of(key).astype(np.float32)
            flat = values.reshape(len(values), -1)
            counts = key[0] == "control" and not rows.data.get(key).is_floating_point()  # how often a vector was set
            if flat.shape[1] == 1 and not (counts and (flat == flat[:1]).all()):
                found.append(Track("number", name, flat[:, 0], None, {"role": key[0]}))
        elif key[0] == "concept":
            flat = rows.of(key).astype(np.float32).reshape(len(rows.places), -1)
            if flat.shape[1] <= 8:
                found.append(Track("label", name, flat))
    return found + list(_activations(rows))


def _activations(rows: Rows) -> Iterator[Track]:
    """The chosen sites, each with one number for each unit or channel."""
    names = {".".join(key[1:]) or key[0]: key for key in rows.activations}
    chosen = list(names)
    if rows.options.sites is not None:
        chosen = [".".join(key_parts(site)).removeprefix("cache.") for site in _listed(rows.options.sites)]
        absent = next((name for name in chosen if name not in names), None)
        if absent is not None:
            raise MissingKeyError(
                f"sites= names {absent!r}, whose activations the rollout lacks; {nearest(absent, names)}: cache it "
                "with ActivationCaching"
            )
    for name in chosen:
        for agent, values in rows.agents(names[name], rows.result(names[name])):
            units = values.reshape(len(values), -1)
            note = ""
            if values.ndim == 4 and units.shape[1] > 64:
                units, note = values.mean((2, 3), dtype=np.float64), f"means of {values.shape[1]} channels"
            if units.shape[1] > MOST:
                every = -(-units.shape[1] // MOST)
                units, note = units[:, ::every], f"every {every}th of {units.shape[1]} units"
            if units.shape[1]:
                yield Track("activation", name, units, agent, {"note": note})


def number_tracks(rows: Rows) -> list[Track]:
    """Reward and estimated values."""
    found = []
    for key in rows.keys:
        if key[0] == "next" and key[-1] == "reward":
            kept = (*key[:-1], "original_reward")  # beside the sums of several steps of MultiStep
            given = rows.of(kept if kept in rows.keys else key)
            for agent, values in rows.agents(key[1:], given.astype(np.float32)):
                flat = values.reshape(len(values), -1)
                if flat.shape[1] > 1:
                    rows.options.note(f"the reward of {flat.shape[1]} parts is shown as their sum")
                found.append(Track("number", "reward", flat.astype(np.float64).sum(1), agent, {"role": "reward"}))
    for key in rows.plain:
        if VALUE.search(key[-1]) and key[-1] != "action_value":
            for agent, values in rows.agents(key, rows.of(key).astype(np.float32)):
                flat = values.reshape(len(values), -1)
                if flat.shape[1] == 1:
                    found.append(Track("number", key[-1], flat[:, 0], agent, {"role": "value"}))
    return found


def named(given: Any, key: Key, count: int) -> list[str] | None:
    """Names that were given for all entries, or for this one by its key; ``None`` where there are none that fit."""
    if isinstance(given, Mapping):
        given = next((one for name, one in given.items() if key_parts(unravel_key(name)) == key), None)
    names = None if given is None else [str(one) for one in given]
    return names if names is not None and len(names) == count else None


def _listed(sites: Any) -> list[NestedKey]:
    return [sites] if isinstance(sites, str) else list(sites)

"""Checking an environment that declares concepts: ours, and those of users.

The protocol, each part of which is checked if it is there and reported as skipped if not:

====================  ================================================================================
``concepts``          the declared labels by name (:class:`~tdhook_rl.envs.Concept`), under ``("concept", name)``
``variables``         where the state variables lie in the TensorDict, by name
``describe_slowly``   called with the variables of one state as Python numbers; returns its labels by name,
                      and, if it likes, ``"observation"``. Written independently of the environment's own code
``paired``            ``paired(name, index=...)`` returns states and the same states with one concept changed
``gymnasium_id``      the name under which ``gymnasium.make`` finds the environment
====================  ================================================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch
from gymnasium.utils.env_checker import check_env
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from tdhook_rl.errors import EnvCheckError, InputError


@dataclass(frozen=True)
class Report:
    """What was checked: ``(check, "passed" | "skipped" | "failed", detail)`` for each part."""

    name: str
    rows: tuple[tuple[str, str, str], ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(check for check, outcome, _ in self.rows if outcome == "failed")

    def __str__(self) -> str:
        width = max(len(check) for check, _, _ in self.rows)
        lines = [f"  {check:{width}}  {outcome:7}  {detail}".rstrip() for check, outcome, detail in self.rows]
        return "\n".join([self.name, *lines])


class _Skip(Exception):
    pass


def check_concept_env(env: EnvBase, *, steps: int = 40, rows: int = 200, seed: int = 0) -> Report:
    """Check specs, labels, pairs, determinism and the Gymnasium face of an environment.

    Args:
        env: any TorchRL environment; its seed is set.
        steps: of the random rollout whose labels are checked.
        rows: how many of its states, and of each set of pairs, are described slowly.
        seed: of the rollouts.

    Returns:
        the report, in which nothing failed.

    Raises:
        EnvCheckError: with the report, if anything failed.
        InputError: if the environment is not a TorchRL environment.

    Example:
        >>> from tdhook_rl.envs import TMaze
        >>> print(check_concept_env(TMaze(batch_size=[4])))
        TMaze
          specs              passed
          declared labels    passed   5 concepts
          determinism        passed   40 steps
          slow reference     passed   176 states
          pairs              passed   4 changes
          Gymnasium's check  passed   tdhook_rl/TMaze-v0
    """
    if not isinstance(env, EnvBase):
        raise InputError(f"check_concept_env checks TorchRL environments, got {type(env).__name__}")
    checks: dict[str, Callable[[], str]] = {
        "specs": lambda: _specs(env, seed),
        "declared labels": lambda: _labels(env, steps, seed),
        "determinism": lambda: _determinism(env, steps, seed),
        "slow reference": lambda: _reference(env, steps, rows, seed),
        "pairs": lambda: _pairs(env, rows),
        "Gymnasium's check": lambda: _gymnasium(env),
    }
    found = []
    for name, check in checks.items():
        try:
            found.append((name, "passed", check()))
        except _Skip as skip:
            found.append((name, "skipped", str(skip)))
        except Exception as error:  # a report shows every failure, of whatever kind
            found.append((name, "failed", _one_line(error)))
    report = Report(type(env).__name__, tuple(found))
    if report.failed:
        raise EnvCheckError(str(report))
    return report


def _one_line(error: Exception, longest: int = 600) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    half = longest // 2  # checks of specs begin with the whole spec, and say at the end what is wrong
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def _part(env: EnvBase, name: str) -> Any:
    part = getattr(env, name, None)
    if part is None:
        raise _Skip(f"the environment has no {name}")
    return part


def _rollout(env: EnvBase, steps: int, seed: int) -> TensorDictBase:
    env.set_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return env.rollout(steps, break_when_any_done=False)


def _specs(env: EnvBase, seed: int) -> str:
    check_env_specs(env, seed=seed)
    return ""


def _labels(env: EnvBase, steps: int, seed: int) -> str:
    concepts = _part(env, "concepts")
    data = _rollout(env, steps, seed)
    if "concept" not in data.keys():
        raise AssertionError("the TensorDict holds no labels under 'concept'")
    there = set(data["concept"].keys())
    if there != set(concepts):
        raise AssertionError(
            f"declared but absent: {sorted(set(concepts) - there)}, present but not declared: "
            f"{sorted(there - set(concepts))}"
        )
    for name, concept in concepts.items():
        for root, values in (("", data["concept", name]), ("next ", data["next", "concept", name])):
            expected = concept.spec(data.batch_size)
            if values.shape != expected.shape or values.dtype != expected.dtype:
                raise AssertionError(
                    f"{root}{name} is {tuple(values.shape)} {values.dtype}, declared as {tuple(expected.shape)} "
                    f"{expected.dtype}"
                )
            concept.check(name, values)
    return f"{len(concepts)} concepts"


def _determinism(env: EnvBase, steps: int, seed: int) -> str:
    first = _rollout(env, steps, seed)
    actions = iter(first.select(*env.action_keys).unbind(-1))

    def replay(tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.update(next(actions))

    env.set_seed(seed)
    with torch.random.fork_rng(devices=[]):
        # Another global generator: the seed of the environment alone decides.
        torch.manual_seed(seed + 1)
        second = env.rollout(steps, replay, break_when_any_done=False)
    for key in first.keys(True, True):
        if isinstance(first[key], Tensor) and not _equal(first[key], second[key]):
            raise AssertionError(f"two rollouts with seed {seed} and the same actions differ in {key!r}")
    return f"{steps} steps"


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, NaN being one."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _reference(env: EnvBase, steps: int, rows: int, seed: int) -> str:
    describe, variables = _part(env, "describe_slowly"), _part(env, "variables")
    data = _rollout(env, steps, seed).reshape(-1)
    # The states after a step count as well: in the last step of an episode nothing else shows them.
    ended = data["next"][data["next", "done"].squeeze(-1)]
    chosen = [data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:rows]], ended[:rows]]
    for states in chosen:
        _compare(states, describe, variables)
    return f"{sum(map(len, chosen))} states"


def _compare(states: TensorDictBase, describe: Callable[..., dict[str, Any]], variables: dict[str, Any]) -> None:
    for row in states.unbind(0):
        at = {name: row[key].tolist() for name, key in variables.items()}
        described, declared = describe(**at), set(row["concept"].keys())
        if not isinstance(described, Mapping):
            raise AssertionError(f"describe_slowly returns a dictionary of labels by name, got {described!r:.80}")
        absent, others = declared - described.keys(), described.keys() - declared - {"observation"}
        if absent or others:
            raise AssertionError(
                f"describe_slowly leaves out {sorted(absent)} and describes {sorted(others)}, which are no concepts: "
                "its dictionary has each declared concept, and may have 'observation'"
            )
        for name, expected in described.items():
            value = row["observation"] if name == "observation" else row["concept", name]
            wanted = torch.as_tensor(expected, dtype=torch.float64)
            close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
            if value.shape != wanted.shape or not torch.allclose(value.double(), wanted, **close):  # type: ignore[arg-type]
                raise AssertionError(f"{name} is {value.tolist()}, described as {expected} in the state {at}")


def _pairs(env: EnvBase, rows: int) -> str:
    concepts, paired = _part(env, "concepts"), _part(env, "paired")
    variables = getattr(env, "variables", {})
    changes = [
        (name, index)
        for name, concept in concepts.items()
        if concept.moves
        for index in ([None] if concept.size is None else range(concept.size))
    ]
    if not changes:
        raise _Skip("no concept is declared to be changed alone")
    for name, index in changes:
        before, after = paired(name, index=index)
        label = name if index is None else f"{name}[{index}]"
        if not len(before) or before.batch_size != after.batch_size:
            raise AssertionError(f"{label}: {len(before)} states are paired with {len(after)}")
        concept = concepts[name]
        one, other = before["concept", name], after["concept", name]
        if index is not None:
            others = [element for element in range(concept.size) if element != index]
            if not torch.equal(one[..., others], other[..., others]):
                raise AssertionError(f"{label}: other elements of {name} change with it")
            one, other = one[..., index], other[..., index]
        if bool((one == other).any()):
            raise AssertionError(f"{label} is the same in {int((one == other).sum())} of {len(before)} pairs")
        for key in set(concepts) - {name, *concept.follows}:
            if not torch.equal(before["concept", key], after["concept", key]):
                raise AssertionError(f"{label}: {key} changes with it and is not declared to follow")
        for variable, key in variables.items():
            if variable not in concept.moves and not torch.equal(before[key], after[key]):
                raise AssertionError(f"{label}: the state variable {variable} changes with it and is not declared to")
        if getattr(env, "describe_slowly", None) is not None and variables:
            _compare(after[:rows], env.describe_slowly, variables)
    return f"{len(changes)} changes"


def _gymnasium(env: EnvBase) -> str:
    name = _part(env, "gymnasium_id")
    face = gymnasium.make(name, render_mode="rgb_array").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(face)
    face.close()
    return name

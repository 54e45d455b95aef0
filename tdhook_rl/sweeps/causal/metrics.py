"""What an intervention is measured by: one number for each state, from what the policy puts out.

No key is wanted by name: decisions are found where they are, in discrete and continuous policies, in those of several
agents and in Q-networks. Nothing is sampled; the actions that targets read are the greedy ones of the clean run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torch.distributions import Distribution

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.calls.decisions import (
    action_of,
    critic_keys,
    drawn_decisions,
    keys_named,
    outputs_named,
    undrawn_keys,
)
from tdhook_rl.calls.passes import Pass
from tdhook_rl.calls.target_values import per_row
from tdhook_rl.errors import InputError
from tdhook_rl.replaying.batching import row_vectors
from tdhook_rl.replaying.samples import Drawn, components, is_point
from tdhook_rl.sweeps.causal.bench import Ran
from tdhook_rl.targets import Target, chosen_q, output_sum, state_value, taken_action_log_prob

#: None for the difference of the two runs' actions; a target; a function of the outputs; the key of an output.
Metric: TypeAlias = Target | Callable[[TensorDictBase], Tensor] | NestedKey | None


class Reading:
    """Reads a metric from passes over the same states.

    Args:
        metric: what is measured.
        clean, corrupt: the passes on clean and on corrupt states.
        actions: what was stored as actions of the clean states; targets read these, and where there are none the greedy
            ones of the clean run.

    Attributes:
        words: what is measured.
        dtype: float64 where the policy reads and gives that alone, else float32.
    """

    def __init__(self, metric: Metric, clean: Pass, corrupt: Pass, actions: TensorDictBase | None = None) -> None:
        self._clean, self._corrupt = _reference(clean), _reference(corrupt)
        self._function, self.words = self._chosen(metric)
        if copies := clean.outputs.batch_size[:-1].numel() * (clean.outputs.ndim > 1):
            self.words += f", the sum of {copies} copies"
        dtypes = {one.dtype for one in clean.outputs.values(True, True) if _is_float(one)}
        self.dtype = torch.float64 if dtypes == {torch.float64} else torch.float32
        if metric is not None and actions is not None and len(list(actions.keys())):
            for key, value in actions.items(True, True):
                self._clean[key] = value

    def __call__(self, ran: Ran) -> Tensor:
        """``(copies * states,)``: the metric of each row, with its graph if there is one."""
        value = self._function(ran.result, ran.copies)
        batch = ran.result.outputs.batch_size
        if isinstance(value, Tensor) and value.shape[: len(batch)] != batch:
            batch = batch[-1:]  # of an ensemble, whose copies stand before the states, their sum is one number too
        if not isinstance(value, Tensor) or value.shape[: len(batch)] != batch:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"metric= gives a number for each of {batch[-1]} states, got {got}")
        value = value if value.is_floating_point() else value.double()
        value = per_row(value, batch, self.words)
        return value.sum(tuple(range(value.ndim - 1))) if value.ndim > 1 else value

    def read(self, ran: Ran) -> Tensor:
        """``(copies, states)`` in float64, on the CPU."""
        with torch.no_grad():
            return self(ran).detach().double().cpu().reshape(ran.copies, -1)

    def _chosen(self, metric: Metric) -> tuple[Callable[[Pass, int], Tensor], str]:
        if metric is None:
            return self._contrast()
        if isinstance(metric, Target):
            return lambda run, copies: metric(_deciding(run, self._clean, copies).lent()), str(metric.name)
        if callable(metric):
            name = getattr(metric, "__name__", type(metric).__name__)
            return lambda run, copies: asked(metric, run.outputs, what=f"metric= ({name})", reads_only=True), name
        return lambda run, copies: _entry(run, metric), f"{metric}"

    def _contrast(self) -> tuple[Callable[[Pass, int], Tensor], str]:
        """How much more the policy is for what it does in the clean run than for what it does in the corrupt one."""
        run = self._clean.seen
        q_keys = [
            key for key in keys_named(run.outputs, "action_value") if action_of(self._clean.decided(), key) is not None
        ]
        if drawn_decisions(run):
            target, words = taken_action_log_prob(), "log-probability of the clean run's action minus the corrupt run's"
        elif q_keys:
            target, words = (
                chosen_q(q_keys[0] if len(q_keys) == 1 else "action_value"),
                ("Q-value of the clean run's action minus that of the corrupt run's"),
            )
        else:
            return self._movement()
        return (
            lambda run, copies: (
                target(_deciding(run, self._clean, copies)) - target(_deciding(run, self._corrupt, copies))
            ),
            words,
        )

    def _movement(self) -> tuple[Callable[[Pass, int], Tensor], str]:
        """Of what is decided without drawing: its component from the corrupt run's towards the clean run's."""
        run = self._clean.seen
        actions = [key for key in undrawn_keys(run) if _is_float(run.outputs.get(key, None))]
        if not actions:
            critics = [key for key in critic_keys(run) if _is_float(run.outputs.get(key, None)) and key in run.out_keys]
            if critics:
                targets = [state_value(key) for key in dict.fromkeys(critics)]
                return lambda run, copies: torch.stack([one(run) for one in targets]).sum(0), " + ".join(
                    map(str, dict.fromkeys(critics))
                )
            target = output_sum()
            return lambda run, copies: target(run), "sum of the outputs"
        ways = {key: (run.outputs.get(key) - self._corrupt.seen.outputs.get(key)).detach() for key in actions}

        def moved(run: Pass, copies: int) -> Tensor:
            batch = run.outputs.batch_size
            terms = [
                row_vectors(run.outputs.get(key) * copied(way, copies, run), batch).sum(-1) for key, way in ways.items()
            ]
            return torch.stack(terms).sum(0)

        return moved, "component of the action along the difference of the two runs'"


def _entry(run: Pass, key: NestedKey) -> Tensor:
    """An output as one number for each row: the sum of its features, and of several of this name.

    Raises:
        TargetError: if there is none.
        InputError: if it consists of anything but real numbers.
    """
    batch, what, terms = run.outputs.batch_size, f"metric={key!r}", []
    for one, value in outputs_named(run, key, what=what):
        if not value.is_floating_point():
            raise InputError(
                f"{what} is {value.dtype}, of which sums and differences say little: leave metric= out for what the "
                "policy decides, name what it decides by, such as its logits, or give a function that makes a number "
                f"of it, such as lambda outputs: outputs[{one!r}] == 1"
            )
        terms.append(per_row(value, batch, what))
    return torch.stack(terms).sum(0)


def greedy_actions(run: Pass) -> dict[NestedKey, Tensor]:
    """The greedy actions of a run, by key."""
    return _reference(run)


class _Reference(dict[NestedKey, Tensor]):
    """The greedy actions of a run, by key, and the run."""

    seen: Pass

    def decided(self) -> Pass:
        return _deciding(self.seen, self, 1)


def _reference(run: Pass) -> _Reference:
    found = _Reference()
    found.seen = run
    for key in keys_named(run.outputs, "action"):
        found[key] = run.outputs.get(key).detach()
    for key, _ in run.actions.values():
        if (value := run.outputs.get(key, None)) is not None:
            found[key] = value.detach()
    for drawn in run.distributions:
        for key, part in components(drawn.module, drawn.distribution).items():
            value = None if is_point(part) else _greedy(part)
            value = run.outputs.get(key, None) if value is None else value
            if value is not None:
                found[key] = value.detach()
    return found


def _deciding(run: Pass, actions: _Reference, copies: int) -> Pass:
    """The same pass as if these actions had been taken in it."""
    given = {key: copied(value, copies, run) for key, value in actions.items()}
    distributions = [
        Drawn(one.module, one.distribution, {key: given.get(key) for key in components(one.module, one.distribution)})
        for one in run.distributions
    ]
    stored = run.outputs.copy()
    for key, value in given.items():
        stored.set(key, value)
    return replace(run, stored=stored, distributions=distributions, slots={})


def copied(value: Tensor, copies: int, run: Pass) -> Tensor:
    """What there is of each state, for as many copies of the states as a pass was over."""
    if copies == 1:
        return value
    before = run.outputs.ndim - 1  # the copies of an ensemble
    return value.repeat(*(1,) * before, copies, *(1,) * (value.ndim - before - 1))


def _greedy(distribution: Distribution) -> Tensor | None:
    for name in ("deterministic_sample", "mode"):
        try:
            found: Any = getattr(distribution, name)
        except (AttributeError, NotImplementedError, RuntimeError):
            continue
        if isinstance(found, Tensor):
            return found
    return None


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()

"""What a check finds in a rollout that was made step by step, and in its batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import OneHot
from torchrl.modules.utils import get_primers_from_module

from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.doctor.findings import Finding
from tdhook_rl.doctor.recorded_rollout import Key, RecordedRollout, as_tuple, leaves
from tdhook_rl.errors import listed


def input_findings(rollout: RecordedRollout) -> Iterator[Finding]:
    """Whether the environment gives what the policy reads."""
    if not rollout.missing:
        yield Finding.ok("inputs", f"the environment gives {_list(rollout.policy.in_keys)}")
        return
    missing = set(rollout.missing)
    primer = get_primers_from_module(rollout.policy, warn=False, strict=False)
    hidden = {key for key in missing if primer is not None and key in _primed(primer)}
    starts = {key for key in missing - hidden if key[-1] == "is_init"}
    reads = {as_tuple(key) for key in rollout.policy.in_keys} - {as_tuple(key) for key in rollout.policy.policy_in_keys}
    for keys, remedy in (
        (
            hidden,
            "append a TensorDictPrimer: env.append_transform(get_primers_from_module(policy)), or pass "
            "auto_register_policy_transforms=True to the collector",
        ),
        (starts, "append InitTracker() to the environment, or pass auto_register_policy_transforms=True"),
        (
            missing & reads,
            "an intervention reads it at every step: append a TensorDictPrimer with a spec for it, or give "
            "a number in place of the key",
        ),
    ):
        if keys:
            yield Finding.error(
                "inputs", f"the policy reads {_list(keys)}, which the environment does not give", remedy
            )
    if rest := missing - hidden - starts - reads:
        given = sorted(str(key) for key in rollout.env.full_observation_spec.keys(True, True))
        yield Finding.error(
            "inputs",
            f"the policy reads {_list(rest)}, which the environment does not give",
            f"rename the policy's in_keys or add a transform; the environment gives {', '.join(given)}",
        )


def collision_findings(rollout: RecordedRollout, data: TensorDictBase) -> Iterator[Finding]:
    """Whether results would be written over what the environment writes."""
    env = rollout.env
    specs = (
        env.full_observation_spec,
        env.full_state_spec,
        env.full_action_spec,
        env.full_reward_spec,
        env.full_done_spec,
    )
    taken = {key for key, _ in leaves(data)} | {as_tuple(key) for spec in specs for key in spec.keys(True, True)}
    for key in map(as_tuple, rollout.policy.result_keys):
        clash = next((other for other in sorted(taken) if other == key[: len(other)] or key == other[: len(key)]), None)
        if clash is not None:
            yield Finding.error(
                "names",
                f"the result {key} collides with {clash}, which the environment writes",
                "give the method another root (attribution_key=, cache_key=, probe_key=)",
            )
            return


def rollout_findings(rollout: RecordedRollout) -> Iterator[Finding]:
    """Findings on what was written when, in what shape, and with which values."""
    if rollout.sites is not None:
        yield from _sites(rollout)
    if not rollout.steps:
        return
    yield from _keys(rollout)
    yield from _env_keys(rollout)
    yield from _shapes(rollout)
    yield from _actions(rollout)
    yield from _finite(rollout)
    yield from _values(rollout)
    yield from _schedules(rollout)


def _sites(rollout: RecordedRollout) -> Iterator[Finding]:
    runs, under_vmap = rollout.sites.runs, rollout.sites.under_vmap
    never = [path for path, count in runs.items() if not count]
    if never and rollout.written:
        yield Finding.warning(
            "sites",
            f"hooked, but not run by this forward: {_list(never)}",
            "nothing is written or changed there: name modules that the policy executes when it collects",
        )
    often = {path: count for path, count in runs.items() if count > 1}
    if often:
        shown = ", ".join(f"{path!r} {count} times" for path, count in sorted(often.items())[:4])
        yield Finding.warning(
            "sites",
            f"run several times in one forward: {shown}",
            "a cached activation is that of the last run: name a module that is run once, if another is meant",
        )
    once = [path for path, count in runs.items() if count == 1]
    if once:
        vmapped = f"; under vmap, with its dimension before the features: {_list(under_vmap)}" if under_vmap else ""
        yield Finding.ok("sites", f"run once in one forward: {_list(once)}{vmapped}")


def _keys(rollout: RecordedRollout) -> Iterator[Finding]:
    results, ok = rollout.results, True
    declared = {as_tuple(key) for key in rollout.policy.out_keys}
    for key in sorted(key for key in declared if not is_stamp(key)):
        absent = [step for step, written in enumerate(rollout.written) if key not in written]
        if absent:
            ok = False
            yield Finding.error(
                "keys",
                f"{key} is declared, and was not written at step {absent[0]} ({len(absent)} of {rollout.steps})",
                "collectors repeat the last value in silence: write every out_key at every step",
            )
    undeclared: dict[Key, int] = {}
    for step, written in enumerate(rollout.written):
        for key in written - declared:
            if not any(part.startswith("_") for part in key):
                undeclared.setdefault(key, step)
    for key, step in undeclared.items():
        ok = False
        yield Finding.error(
            "keys",
            f"the policy writes {key} (first at step {step}), which is not in its out_keys",
            "add it to out_keys: collectors with a buffer, other devices or workers drop it in silence",
        )
    for key, step in rollout.in_place.items():
        yield Finding.warning(
            "keys",
            f"the policy changes its input {key} in place (first at step {step})",
            "what is stored is not what the environment gave: let the policy compute on a copy",
        )
    if ok:
        shown = ", ".join(
            f"{key} {_kind(rollout.data[0].get(key), rollout)}" for key in results if key[0] != "computed"
        )
        yield Finding.ok("keys", f"written at each of {rollout.steps} steps: {shown or 'no results, only outputs'}")


def _env_keys(rollout: RecordedRollout) -> Iterator[Finding]:
    everywhere = set.intersection(*rollout.env_keys)
    odd: dict[Key, int] = {}
    for step, keys in enumerate(rollout.env_keys):
        for key in keys - everywhere:
            odd.setdefault(key, step)
    for key, step in sorted(odd.items()):
        if ("next", *key) in odd:
            continue
        gone = next((later for later, keys in enumerate(rollout.env_keys) if later > step and key not in keys), None)
        until = "" if gone is None else f" and is absent at step {gone}"
        yield Finding.error(
            "environment keys",
            f"{key} appears at step {step}{until}",
            "collectors drop what is not there from the reset on, or stop: write it at every step, with a placeholder",
        )
    if not odd:
        yield Finding.ok("environment keys", f"the same {len(everywhere)} keys at every step")


def _shapes(rollout: RecordedRollout) -> Iterator[Finding]:
    ok, batch = True, rollout.data[0].batch_size
    for key in sorted({key for data in rollout.data for key, _ in leaves(data)}):
        kinds: dict[str, int] = {}
        for step, value in enumerate(rollout.values(key)):
            if value is not None:
                kinds.setdefault(_kind(value, rollout), step)
        if len(kinds) > 1:
            ok = False
            (first, _), (second, step), *_rest = kinds.items()
            yield Finding.error(
                "shapes",
                f"{key} is {first} first and {second} at step {step}",
                "collectors stack steps: pad to one shape, and keep one dtype",
            )
    if ok:
        yield Finding.ok("shapes", f"every entry has one shape and dtype; the batch shape is {tuple(batch)}")


def _actions(rollout: RecordedRollout) -> Iterator[Finding]:
    batch = len(rollout.env.batch_size)
    for key, spec in rollout.env.full_action_spec.items(True, True):
        value = next((value for value in rollout.values(as_tuple(key)) if value is not None), None)
        if value is None or value.shape[batch:] == spec.shape[batch:]:
            continue
        seen = f"{key!r} is {_kind(value, rollout)}, and the environment takes {tuple(spec.shape[batch:])}"
        if isinstance(spec, OneHot):
            yield Finding.error(
                "actions",
                f"{seen}, one-hot: TorchRL takes a number for the first action, whichever it is",
                "make the environment with categorical_action_encoding=True, or draw from a OneHotCategorical",
            )
        else:
            yield Finding.warning("actions", seen, "what the environment makes of it is its own: give it that shape")


def _finite(rollout: RecordedRollout) -> Iterator[Finding]:
    ok = True
    for what, keys, bad in (
        ("the environment", set.union(*rollout.env_keys), torch.isnan),
        ("the policy", {as_tuple(key) for key in rollout.policy.policy_out_keys}, torch.isnan),
    ):
        for key in sorted(keys):
            found = _first(rollout.values(key), bad)
            if found is not None:
                ok = False
                step, rows = found
                yield Finding.error(
                    "finite",
                    f"{what} gives NaN in {key} at step {step} ({rows} entries)",
                    "what is computed from such rows means nothing: correct the source, or leave the rows out",
                )
    scheduled = {key[0] for one in rollout.policy._hooked.bound if one.plan is not None for key in one.result_keys}
    for key in (key for key in rollout.results if key[0] != "computed"):
        # Rows that a schedule leaves out are NaN on purpose; no other row is.
        computed = rollout.values(("computed", key[0])) if key[0] in scheduled else None
        found = _first(rollout.values(key), lambda value: ~torch.isfinite(value), computed)
        if found is not None and ok:
            ok = False
            step, rows = found
            yield Finding.error(
                "finite",
                f"the result {key} is not finite at step {step} ({rows} entries), where it is computed",
                "look at the weights and the inputs of that step: an overflow, a division by zero, a logarithm of zero",
            )
    if ok:
        yield Finding.ok("finite", "no NaN in observations, outputs and results")


def _first(values: list[Any], bad: Any, computed: list[Any] | None = None) -> tuple[int, int] | None:
    for step, value in enumerate(values):
        if value is None or not value.is_floating_point():
            continue
        wrong = bad(value)
        mask = None if computed is None else computed[step]
        if mask is not None:
            wrong = wrong & mask.reshape((*mask.shape, *[1] * (wrong.ndim - mask.ndim)))
        if bool(wrong.any()):
            return step, int(wrong.sum())
    return None


def _computed_of_inputs(rollout: RecordedRollout) -> list[tuple[str, ...]]:
    """The results but for what only a forward can show, such as the controls that were in force."""
    shown = {key for one in rollout.policy._hooked.bound if one.only_in_forward for key in one.result_keys}
    return [key for key in rollout.results if key[0] != "computed" and key not in shown]


def _values(rollout: RecordedRollout) -> Iterator[Finding]:
    if len(rollout.data) < 2 or not any(
        _varies(rollout.values(as_tuple(key))) for key in rollout.policy.policy_in_keys
    ):
        return
    keys = [key for key in _computed_of_inputs(rollout) if rollout.selected.get(key[0])]
    same = [key for key in keys if not _varies(rollout.values(key))]
    if same:
        yield Finding.warning(
            "values",
            f"{_list(same)} has the same value at each of {len(rollout.data)} steps, while the inputs change",
            "a dead unit, an input that the target does not depend on, or something that was computed once",
        )
    elif keys:
        yield Finding.ok("values", "every result changes with the inputs")


def _varies(values: Iterable[Tensor | None]) -> bool:
    there = [value for value in values if value is not None]
    return any(value.shape != there[0].shape or not torch.equal(value, there[0]) for value in there[1:])


def _schedules(rollout: RecordedRollout) -> Iterator[Finding]:
    never = [root for root, rows in rollout.selected.items() if not rows]
    for root in never:
        yield Finding.error(
            "schedules",
            f"no row of {root!r} was computed in {rollout.steps} steps: its mask is false throughout",
            "choose a shorter period or another mask; for a period longer than this, pass steps= to the check",
        )
    if rollout.selected and not never:
        rows = rollout.steps * rollout.data[0].batch_size.numel()
        shown = ", ".join(f"{root} {count / rows:.0%}" for root, count in rollout.selected.items())
        yield Finding.ok("schedules", f"rows computed: {shown}")


def batch_findings(rollout: RecordedRollout, batch: TensorDictBase, annotated: TensorDictBase) -> Iterator[Finding]:
    """Findings on what ``annotate`` adds to a batch, and whether it repeats what was written at each step."""
    inline = _computed_of_inputs(rollout)
    added = [key for key in map(as_tuple, rollout.policy.result_keys) if key not in rollout.results]
    absent = [key for key in added if annotated.get(key, None) is None and not is_stamp(key)]
    if absent:
        yield Finding.error("annotate", f"annotate() did not write {_list(absent)}, which is declared")
        return
    ok, differs = True, []
    for key in inline:
        # A schedule may draw other rows for a batch than it drew step by step.
        mask = batch.get(("computed", key[0])) & annotated.get(("computed", key[0]))
        ours, again = batch.get(key)[mask], annotated.get(key)[mask]
        if ours.shape != again.shape:
            ok = False
            yield Finding.warning(
                "annotate",
                f"annotate() gives {key} the shape {tuple(again.shape[1:])}, each step gave {tuple(ours.shape[1:])}",
                "the module adds a batch dimension where the environment has none: name the TensorDictModule around it",
            )
        elif not torch.allclose(ours, again, rtol=1e-3, atol=1e-5, equal_nan=True):
            differs.append(f"{key} by up to {float((ours - again).abs().max()):.2g}")
    if differs:
        yield Finding.warning(
            "annotate",
            f"annotate() gives other values than each step did: {', '.join(differs)}",
            "the policy draws noise or depends on other rows (dropout, batch norm): what was stored cannot be repeated",
        )
    elif ok:
        names = [key for key in added if key[0] != "computed"]
        yield Finding.ok("annotate", f"it repeats what was written step by step, and adds {_list(names) or 'nothing'}")


def _kind(value: Tensor, rollout: RecordedRollout) -> str:
    shape = tuple(value.shape[len(rollout.env.batch_size) :])
    return f"{shape} {str(value.dtype).removeprefix('torch.')}"


def _list(keys: Iterable[Any]) -> str:
    return listed(sorted(repr(key[0] if isinstance(key, tuple) and len(key) == 1 else key) for key in keys), 6)


def _primed(primer: Any) -> set[Key]:
    transforms = primer if isinstance(primer, Iterable) else [primer]
    return {as_tuple(key) for one in transforms for key in one.primers.keys(True, True)}

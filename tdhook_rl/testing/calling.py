"""Checks of single calls: what a method writes, and what it must leave as it is."""

from __future__ import annotations

import gc
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.errors import TdhookError
from tdhook_rl.testing.subject import Subject, annotated_keys, as_tuples, entries, require, same_bits

BATCHES: tuple[tuple[int, ...], ...] = ((), (1,), (5,), (3, 2), (2, 1, 3))
RTOL, ATOL = 1e-4, 1e-5
MODES: dict[str, Callable[[], Any]] = {"gradients on": torch.enable_grad, "no_grad": torch.no_grad}


def observing_is_bit_neutral(subject: Subject) -> None:
    """Outputs, and every generator afterwards, are those of the plain policy."""
    if not subject.observes:
        return
    plain = subject.new_policy()
    with subject.hooked() as hooked:
        for step, (mode, context) in enumerate(3 * [*MODES.items()]):
            data = subject.rows(5, seed=step)
            with context():
                expected, state = _seeded(plain, data, step)
                found, after = _seeded(hooked, data, step)
            same_bits(found, expected, f"with {mode}, in call {step + 1}")
            for name, value in state.items():
                equal = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
                require(equal, f"with {mode}, call {step + 1} leaves the generator of {name} elsewhere")


def gradients_are_the_policys(subject: Subject) -> None:
    """A loss of the hooked policy's outputs has the gradients of the plain policy's."""
    if not subject.observes:
        return
    found = []
    plain = subject.new_policy()
    with subject.method().prepare(plain) as hooked:
        for one in (plain, hooked):
            torch.manual_seed(3)
            outputs = one(subject.rows(5))
            floats = [outputs[key] for key in plain.out_keys if outputs[key].requires_grad]
            require(bool(floats), "no output of the policy has a gradient in the forward of a loss")
            plain.zero_grad()
            torch.stack([value.sum() for value in floats]).sum().backward()
            found.append({name: p.grad for name, p in plain.named_parameters()})
    for name, gradient in found[0].items():
        other = found[1][name]
        equal = gradient is other or (gradient is not None and other is not None and torch.equal(gradient, other))
        require(equal, f"the gradient of {name!r} is not that of the plain policy")


def declared_keys_are_written(subject: Subject) -> None:
    """What is declared is written, and nothing else; with masks, batch-shaped, no graph, and memory of its own."""
    batch = (3, 2) if subject.takes(3, 2) else (3,)
    with subject.hooked() as hooked:
        own = as_tuples([*hooked.policy_in_keys, *hooked.policy_out_keys])
        for _ in range(2):
            data = subject.rows(*batch)
            given = as_tuples(data.keys(True, True))
            found = hooked(data)
            declared = as_tuples(hooked.out_keys) - own
            _require_entries(found, given | own, declared, "a forward")
        rows = subject.rows(*batch)
        annotated = hooked.annotate(_acted(hooked, rows))
        _require_entries(annotated, given | own, annotated_keys(hooked), "annotate()")
        for key in as_tuples(hooked.result_keys):
            require(not any(part.startswith("_") for part in key), f"{key!r} has a part that collectors drop")
            mask = ("computed", key[0])
            require(key[0] == "computed" or mask in as_tuples(hooked.result_keys), f"{key!r} has no mask {mask!r}")


def every_batch_shape(subject: Subject) -> None:
    """Results have the batch shape first, and the same features and dtype at every batch shape."""
    forms: dict[tuple[str, ...], tuple[Any, ...]] = {}
    batches = [batch for batch in BATCHES if subject.takes(*batch)]  # no more is asked than of the policy itself
    with subject.hooked() as hooked:
        for batch in batches:
            annotated = hooked.annotate(_acted(hooked, subject.rows(*batch)))
            for key in annotated_keys(hooked):
                value = annotated[key]
                require(value.shape[: len(batch)] == batch, f"{key!r} is {tuple(value.shape)} for the batch {batch}")
                form = (tuple(value.shape[len(batch) :]), value.dtype)
                require(
                    forms.setdefault(key, form) == form,
                    f"{key!r} has features {form} for the batch {batch}, and {forms[key]} for others",
                )


def batch_equals_rows(subject: Subject) -> None:
    """A row of a batch is what it is alone, and in chunks."""
    if not subject.by_row:
        return
    alone = subject.takes()  # a row without a batch dimension
    with subject.hooked() as hooked:
        rows = _acted(hooked, subject.rows(6))
        whole = hooked.annotate(rows)
        found = [hooked.annotate(rows[index] if alone else rows[index : index + 1]) for index in range(6)]
        singles: Any = torch.stack(found) if alone else torch.cat(found)
        chunked = hooked.annotate(rows, chunk_size=4)
        for key in annotated_keys(hooked):
            _require_close(singles[key], whole[key], f"{key!r} of a row alone differs from that in its batch")
            _require_close(chunked[key], whole[key], f"{key!r} differs with chunk_size=4")


def annotate_equals_inline(subject: Subject) -> None:
    """What a forward writes is what annotate() computes afterwards."""
    if not subject.by_row:
        return
    with subject.hooked() as hooked:
        rows = _acted(hooked, subject.rows(5))
        data = rows.clone()
        torch.manual_seed(3)
        inline = hooked(data)
        step = as_tuples(hooked.out_keys) - as_tuples(hooked.policy_out_keys)
        results = [key for key in hooked.result_keys if key in inline.keys(True, True)]
        later = hooked.annotate(inline.exclude(*results))
        for key in step:
            if key in as_tuples(later.keys(True, True)):
                _require_close(later[key], inline[key], f"{key!r} by annotate() is not what the forward wrote")


def dtypes_are_kept(subject: Subject) -> None:
    """A policy in float64 has results in float64."""
    policy = subject.new_policy().double()
    data = subject.rows(4).apply(lambda value: value.double() if value.is_floating_point() else value)
    try:
        policy(data.clone())
    except RuntimeError:
        return  # it makes floats of its own
    with subject.method().prepare(policy) as hooked:
        found = hooked.annotate(_acted(hooked, data))
        for key in annotated_keys(hooked):
            value = found[key]
            if value.is_floating_point() and not is_stamp(key):
                require(value.dtype == torch.float64, f"{key!r} of a float64 policy is {value.dtype}")


def empty_batches(subject: Subject) -> None:
    """A batch without rows has results without rows, of the features and dtypes that rows have, or is refused in words.

    A policy may refuse it, too.
    """
    for empty, full in (((0,), (3,)), ((2, 0), (2, 3))):
        if not (subject.takes(*empty) and subject.takes(*full)):
            continue
        with subject.hooked() as hooked:
            for call in (hooked, lambda data: hooked.annotate(_acted(hooked, data))):
                some = call(subject.rows(*full))
                try:
                    found = call(subject.rows(*empty))
                except TdhookError as error:
                    require("row" in str(error), f"a batch without rows is refused by {str(error)!r}")
                    continue
                for key in as_tuples(hooked.out_keys) if call is hooked else annotated_keys(hooked):
                    value, expected = found[key], some[key]
                    same = (value.shape[len(full) :], value.dtype) == (expected.shape[len(full) :], expected.dtype)
                    require(
                        value.shape[: len(empty)] == empty and same,
                        f"{key!r} of a batch without rows is {tuple(value.shape)} {value.dtype}, and "
                        f"{tuple(expected.shape)} {expected.dtype} with rows",
                    )


def data_is_read_only(subject: Subject) -> None:
    """annotate() adds results to a copy; nothing of the caller's data is written or asked for a gradient."""
    with subject.hooked() as hooked:
        data = _acted(hooked, subject.rows(4)).lock_()
        before = {key: (id(value), value._version, value.clone()) for key, value in entries(data).items()}
        hooked.annotate(data)
        for key, value in entries(data).items():
            require(key in before, f"annotate() has added {key!r} to the caller's data")
            same = (id(value), value._version) == before[key][:2] and torch.equal(value, before[key][2])
            require(same, f"annotate() has changed the caller's {key!r}")
            require(not value.requires_grad, f"annotate() has left requires_grad on the caller's {key!r}")


def nothing_is_kept(subject: Subject) -> None:
    """When data and results are gone, no tensor of a call is alive."""
    with subject.hooked() as hooked:
        for call in (hooked, lambda data: hooked.annotate(_acted(hooked, data))):
            data = subject.rows(4)
            found = call(data)
            alive = {key: weakref.ref(value) for key, value in entries(found).items()}
            alive |= {key: weakref.ref(value) for key, value in entries(data).items()}
            del data, found
            if any(one.last is not None for one in hooked._hooked.bound):
                call(subject.rows(4))  # what it declares to show of the last call is of this one now
            if any(reference() is not None for reference in alive.values()):
                gc.collect()  # which looks through all that the program holds; most is freed without
            kept = [key for key, reference in alive.items() if reference() is not None]
            require(not kept, f"after a call {kept[0] if kept else ''!r} is still held by something")


def second_use_equals_first(subject: Subject) -> None:
    """The same context entered again, and a second one, write the same bits."""
    policy = subject.new_policy()
    context = subject.method().prepare(policy)
    found = []
    for one in (context, context, subject.method().prepare(policy)):
        with one as hooked:
            torch.manual_seed(4)
            data = hooked(subject.rows(4))
            torch.manual_seed(4)
            found.append(hooked.annotate(_acted(hooked, subject.rows(4))).update(data.select(*hooked.policy_out_keys)))
    same_bits(found[1], found[0], "in a context that is entered again")
    same_bits(found[2], found[0], "in a second context")


CALLING: list[Callable[[Subject], None]] = [
    declared_keys_are_written, observing_is_bit_neutral, gradients_are_the_policys, every_batch_shape,
    batch_equals_rows, annotate_equals_inline, dtypes_are_kept, empty_batches, data_is_read_only,
    nothing_is_kept, second_use_equals_first,
]  # fmt: skip


def _acted(hooked: Any, data: TensorDictBase) -> TensorDictBase:
    """A batch as the policy has collected it: with its outputs, without results."""
    with torch.no_grad():
        found = hooked(data.clone())
    results = as_tuples(hooked.result_keys)
    return found.exclude(*(key for key in found.keys(True, True) if as_tuples([key]) <= results))


def _seeded(policy: Any, data: TensorDictBase, seed: int) -> tuple[TensorDictBase, dict[str, Any]]:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    found = policy(data.clone())
    numbers = pickle.dumps(np.random.get_state())
    return found, {"torch": torch.get_rng_state(), "numpy": numbers, "random": random.getstate()}


def _require_entries(
    found: TensorDictBase, known: set[tuple[str, ...]], declared: set[tuple[str, ...]], what: str
) -> None:
    written = as_tuples(found.keys(True, True))
    missing, extra = declared - written, written - known - declared
    require(not missing, f"{what} does not write {min(missing, default='')!r}, which is declared")
    require(not extra, f"{what} writes {min(extra, default='')!r}, which is not declared")
    others = {_memory(found[key]): key for key in written - declared if found[key].numel()}
    for key in declared:
        value = found[key]
        require(not value.requires_grad, f"{key!r} carries a graph out of {what}")
        require(not value.is_inference(), f"{key!r} of {what} is an inference tensor, which no loss can read: clone it")
        if value.numel() and _memory(value) in others:
            require(
                False,
                f"{key!r} of {what} has the memory of {others[_memory(value)]!r}: what writes to one changes both",
            )
        require(value.shape[: found.ndim] == found.batch_size, f"{key!r} of {what} is not batch-shaped")
        if key[0] == "computed" and len(key) == 2 and value.dtype == torch.bool:
            require(value.shape == found.batch_size, f"the mask {key!r} has shape {tuple(value.shape)}")


def _memory(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _require_close(found: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    require(found.shape == expected.shape and found.dtype == expected.dtype, message)
    if found.is_floating_point():
        # Of sums that nearly cancel, relevances for one, small values are as uncertain as large ones.
        largest = float(expected.abs().nan_to_num(0, 0, 0).max()) if expected.numel() else 0.0
        require(torch.allclose(found, expected, RTOL, ATOL * max(1.0, largest), equal_nan=True), message)
    else:
        require(torch.equal(found, expected), message)

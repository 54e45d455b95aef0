"""Inner activations as leaves of a pass: given a value or taken as computed, one for each run of their module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.calls.passes import Call, Pass
from tdhook_rl.errors import SiteError
from tdhook_rl.sites.repeats import Several, stacked
from tdhook_rl.sites.runtime import Runtime

_NO_TOTALS: Mapping[str, int] = {}


@contextmanager
def as_leaves(
    runtime: Runtime,
    leaves: Mapping[str, Tensor | None],
    added: frozenset[str] = frozenset(),
    totals: Mapping[str, int] = _NO_TOTALS,
) -> Iterator[None]:
    """Make activations leaves of the passes within.

    Args:
        leaves: by slot a value to put in the place of what is computed, or ``None`` for that itself.
        added: the slots whose value is put beside what is computed: its difference to that is added.
        totals: how often the modules of given values ran.
    """
    runtime.leaves, runtime.added, runtime.totals = dict(leaves), added, totals
    try:
        yield
    finally:
        runtime.leaves, runtime.added, runtime.totals = {}, frozenset(), _NO_TOTALS
        for slot in leaves:
            runtime.slots.pop(slot, None)


def activations(
    call: Call,
    sites: Mapping[str, str],
    inputs: Mapping[NestedKey, Tensor] | None = None,
    stored: TensorDictBase | None = None,
    offer: str = "",
) -> dict[str, Tensor]:
    """What the policy computes at sites, by slot, on the call's inputs or on others; ``offer`` as of `with_batch`.

    Raises:
        SiteError: if a module does not run, or if the runs of a site are counted and are not as many as before.
    """
    runtime = call.policy._hooked.runtime
    with torch.no_grad(), as_leaves(runtime, dict.fromkeys(sites)):
        run = call.replay(inputs, stored)
        require_fired(runtime, sites, offer)
        found = {}
        for slot, site in sites.items():
            value = runtime.slots[slot]
            if isinstance(value, Several):
                times = len(value.values)
                if call.totals.setdefault(slot, times) != times:
                    raise SiteError(
                        f"the module of {site!r} ran {call.totals[slot]} times on some inputs and {times} times on "
                        "others, so that its runs cannot be compared: count from the first, as in 'act@0'"
                    )
                value = value.chosen(run.outputs.batch_size, site)
            found[slot] = value.detach()
        return found


def in_runs(value: Tensor | Several, site: str) -> tuple[Tensor, ...]:
    """The leaves of a site: one for each of its runs that is explained."""
    return value.points(site) if isinstance(value, Several) else (value,)


def joined(kept: Tensor | Several, runs: tuple[Tensor, ...], run: Pass, site: str) -> Tensor:
    """What belongs to the leaves of a site, one for each of its runs, as one tensor."""
    return stacked(runs, run.outputs.batch_size, site) if isinstance(kept, Several) and kept.run == "all" else runs[0]


def require_fired(runtime: Runtime, sites: Mapping[str, str], offer: str = "") -> None:
    """Raise :class:`SiteError` for an explained module that did not run, with what may be done."""
    for slot, site in sites.items():
        if slot not in runtime.slots:
            raise SiteError(
                f"the module {site!r} did not run (or not so often), so its activation cannot be explained"
                f"{runtime.unhooked}{offer}"
            )

"""``annotate`` of a hooked policy, and the warning where results need it and nobody calls it."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from tensordict import TensorDict, TensorDictBase

from tdhook_rl.batches.annotation import OnMismatch
from tdhook_rl.batches.keeping import Keep
from tdhook_rl.batches.tensorclasses import annotate_fields
from tdhook_rl.calls.bound import observers
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.preconditions import require_data, require_rows
from tdhook_rl.errors import warn

#: Calls after which a policy has acted, and was not only tried.
ACTED = 2


def annotate(
    self: HookedPolicy,
    data: TensorDictBase,
    *,
    chunk_size: int | None = None,
    on_mismatch: OnMismatch = "warn",
    keep: Keep = None,
) -> TensorDict:
    """Compute what the data does not hold yet: every configured method, over a whole batch.

    An entry is kept where it is this policy's own, and that is known by the stamp beside its mask,
    ``("computed", "<root>.stamp")``: this policy (or a copy of it, in whatever process) has written it, with these
    methods, with the weights that it has now, for the observation and the action that the row holds now. What
    anything else has written under the roots of the methods is computed again, and does not stay beside the new
    results. Values are NaN (0 for integers) and ``("computed", root)`` is false in padding, and it is false in
    rows that have no result: where the observation, or the result itself, is NaN or infinite.

    The stored actions are the targets; nothing is sampled, and the generators stay as they are. A recurrent
    policy is run at the hidden state that is stored with each row; only methods with
    ``horizon="trajectory"`` are given whole trajectories, of which the last batch dimension is time (each by itself,
    where several lie one after the other in it). The result can be a collector's ``postproc``.

    Args:
        data: a batch as collected or read from a buffer, of any batch shape; it is not modified and
            may be locked or memory-mapped.
        chunk_size: rows per pass; by default the whole batch, and for convolutional nets as many as stay fast
            (64 for frames of 3 x 64 x 64).
        on_mismatch: what to do where the stored outputs are not what the policy computes now, because the
            weights have changed since, noise or interventions differ: ``"warn"`` once, ``"raise"``, or
            ``"ignore"``.
        keep: the results that go on with the batch, by key (``("attr", "observation")``) or all under a root
            (``"attr"``): these are there, with their masks, and no others, also none that the batch brings. Others are
            not computed. A replay buffer keeps the keys of its first rows, so keep the same in all batches, as in
            ``buffer.extend(policy.annotate(batch, keep=["attr"]))``; ``[]`` leaves a batch without results.

    Returns:
        a new TensorDict with the entries of ``data`` (the same tensors) and the results.

    Raises:
        MissingKeyError: if an input of the policy is absent.
        InputError: for an empty batch; for a key to keep that is no result.
        MismatchError: with ``on_mismatch="raise"``.
    """
    return annotate_part(self, data, "", chunk_size=chunk_size, on_mismatch=on_mismatch, keep=keep)


def annotate_part(
    policy: HookedPolicy,
    data: Any,
    laid_out: str,
    *,
    chunk_size: int | None = None,
    on_mismatch: OnMismatch = "warn",
    keep: Keep = None,
) -> TensorDict:
    """As :func:`annotate`, of some of the rows of a whole, which must not be read together.

    Args:
        policy: the hooked policy.
        data: the rows.
        laid_out: how they come, for the message; empty for rows that are a whole.
    """
    policy._hooked.runtime.require_active()
    policy._hooked.runtime.taken = True
    require_data(data, "annotate")
    require_rows(chunk_size, "chunk_size")
    try:
        return annotate_fields(policy, data, chunk_size, on_mismatch, keep, laid_out)
    except Exception as error:
        policy._explain((data,), {}, error)
        raise


def only_by_annotate(policy: Any) -> list[Any]:
    """The results that no step writes, but only ``annotate``."""
    steps = {key for one in policy._hooked.steps for key in one.result_keys}
    return [key for one in observers(policy._hooked.bound) for key in one.result_keys if key not in steps]


class AnnotatingMixin(HookedPolicy):
    """The part of a hooked policy that has :func:`annotate`."""

    @property
    def annotate(self) -> Callable[..., TensorDict]:
        self._hooked.runtime.taken = True  # as a collector's postproc, say
        return MethodType(annotate, self)

    def _say_if_nothing_was_annotated(self) -> None:
        """Warn, once, if the policy has acted and results are missing that only ``annotate`` would have written."""
        runtime = self._hooked.runtime
        lacking = only_by_annotate(self)
        if runtime.taken or runtime.calls < ACTED or not lacking:
            return
        runtime.taken = True
        warn(
            f"the policy was called {runtime.calls} times, but {', '.join(map(repr, lacking))} "
            f"{'is' if len(lacking) == 1 else 'are'} written by annotate only, which was never used: give it to the "
            "collector as postproc=hooked.annotate, call hooked.annotate(batch), or compute at every step with "
            "when='step'"
        )

    def __repr__(self) -> str:
        lacking = only_by_annotate(self)
        steps = [key for one in self._hooked.steps for key in one.result_keys]  # type: ignore[attr-defined]
        parts = [f"each step writes {', '.join(map(repr, steps))}"] if steps else []
        parts += [f"annotate(batch) writes {', '.join(map(repr, lacking))}"] if lacking else []
        return f"{super().__repr__()}\n(hooked: {'; '.join(parts) or 'no results'})"


AnnotatingMixin.annotate.__doc__ = annotate.__doc__

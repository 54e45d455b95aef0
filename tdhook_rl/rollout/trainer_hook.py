"""Annotated batches in a TorchRL ``Trainer``."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase, is_tensor_collection
from torchrl.trainers import TrainerHookBase

from tdhook_rl.arguments.checked import checked, require_counts
from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.batches.annotation import OnMismatch
from tdhook_rl.batches.blank import Forms, forms_of, known_forms, without_results
from tdhook_rl.batches.keeping import Keep, kept_keys, only_kept
from tdhook_rl.calls.preconditions import require_hooked
from tdhook_rl.errors import InputError
from tdhook_rl.internals.torchrl_names import batch_operations, fixed_keys, modules_of, storages_of
from tdhook_rl.policies.outside import names_in, read_cell
from tdhook_rl.rollout.newest_rows import NewestRows
from tdhook_rl.rollout.summary import summarise
from tdhook_rl.rollout.trainer_policy import policy_of_trainer

if TYPE_CHECKING:
    from torchrl.trainers import Trainer

__all__ = ["AnnotateHook"]

#: By which methods a buffer is filled.
_FILLS = frozenset(("extend", "add"))


class AnnotateHook(TrainerHookBase):
    """A ``Trainer`` hook: what a hooked policy's methods find in each batch, written into it and logged.

    Where the trainer is handed batches, each is annotated before it reaches the losses and the replay buffer. Where
    batches go straight to the buffer (asynchronous collection, ``replay_buffer=`` of the collector), the newest rows
    of the buffer are annotated instead; they stay as they are, and the result is at hand as ``last``.

    Args:
        policy: the hooked policy (the losses go on using the plain one); the trainer's at :meth:`register`, where a
            hooked policy acts in its collector, unless one is given.
        every: every how many batches.
        rows: how many elements of a buffer are explained at once (along the first dimension of its storage).
        prefix: of the names in the log, ``"<prefix>/attr.observation"``.
        keep: the results that go on with the batch, to losses and buffer, as of ``annotate``; all unless given. The
            log, ``last`` and a ``Monitor`` of the same trainer have the others too.
        on_mismatch: as of ``annotate``. Rows of a buffer were often collected by older weights, which is what
            ``"warn"`` would say at every training run; they are explained by the policy as it is now.

    Attributes:
        last: the batch annotated last.

    Example:
        >>> from tdhook_rl import Saliency
        >>> from tdhook_rl.examples.agent import make_actor
        >>> policy = Saliency().prepare(make_actor(), return_context=False)
        >>> hook = AnnotateHook(policy, every=2)
        >>> hook.state_dict()
        {'batches': 0, 'written': 0}
    """

    @checked
    def __init__(
        self,
        policy: Any = None,
        *,
        every: int = 1,
        rows: int = 1024,
        prefix: str = "interp",
        on_mismatch: OnMismatch = "ignore",
        keep: Keep = None,
    ) -> None:
        require_counts(every=every, rows=rows)
        if policy is not None:
            require_hooked(policy, "AnnotateHook")
            kept_keys(policy, keep)
        self.policy = policy
        self.every = every
        self.rows = rows
        self.prefix = prefix
        self.on_mismatch: OnMismatch = on_mismatch
        self.keep = keep
        self.last: TensorDictBase | None = None
        self._trainer: Trainer | None = None
        self._batches = self._first = 0
        self._newest = NewestRows(rows)
        self._forms: Forms | None = None

    def register(self, trainer: Trainer, name: str = "annotate") -> None:
        """Join a trainer.

        Raises:
            PreparationError: for a hook made without a policy, if the trainer has no hooked one; it says what it has.
        """
        if self.policy is None:
            self.policy = policy_of_trainer(trainer, "AnnotateHook")
            kept_keys(self.policy, self.keep)
        self._trainer = trainer
        trainer.register_op("batch_process", self.annotate_batch)
        trainer.register_op("pre_steps_log", self.log)
        trainer.register_module(name, self)

    @checked
    def annotate_batch(self, batch: TensorDictBase) -> TensorDictBase:
        """The batch with the results to keep; off the schedule of ``every`` with the same keys, NaN and false masks.

        Raises:
            InputError: if the trainer's replay buffer has rows without these results, which would not take them, or
                with others, which would stay beside new rows.
        """
        require_hooked(self.policy, "AnnotateHook")
        due = self._batches % self.every == 0
        if self._batches == self._first:
            self._require_room(batch)
        self._batches += 1
        if not due:
            self.last = None
            return self.without_results(batch)
        self.last = self.policy.annotate(batch, on_mismatch=self.on_mismatch)
        self._forms = known_forms(self.policy, self.last)
        return only_kept(self.policy, self.last, self.keep)

    @checked
    def without_results(self, batch: TensorDictBase) -> TensorDictBase:
        """Rows with the keys of results to keep, not computed: NaN (0 for integers), and false masks.

        Rows that were collected before there was this hook go on in a new buffer as
        ``new.extend(hook.without_results(old[:]))``.
        """
        if self._forms is None:
            self._forms = forms_of(self.policy, batch)
        return only_kept(self.policy, without_results(self.policy, batch, self._forms), self.keep)

    def _require_room(self, batch: TensorDictBase) -> None:
        """Refuse a buffer whose rows fix keys that leave the results out; what would happen depends on the storage."""
        trainer = self._trainer
        if trainer is None:
            return
        hooks = [found for one in batch_operations(trainer) for found in _reached(one)]
        # A buffer of the trainer, of one of its hooks, or one whose `extend` is registered or called by what is.
        held = [getattr(one, "replay_buffer", None) for one in (trainer, *hooks, *modules_of(trainer).values())]
        buffers = [one for one in (*held, *hooks) if getattr(one, "storage", None) is not None]
        for storage in {id(one): one for buffer in buffers for one in storages_of(buffer.storage)}.values():
            known = _known_keys(storage)
            if known is None:
                continue
            kept = kept_keys(self.policy, self.keep)
            rows = f"{len(storage)} rows" if len(storage) else "no rows now, but room for those of before,"
            lost = [key for key in kept if key not in known]
            if lost:
                raise InputError(
                    f"the replay buffer holds {rows} without {lost[0]!r}, and a storage keeps the keys of "
                    "its first rows: new ones would be dropped, or old ones show what memory holds. Fill a new buffer, "
                    "new.extend(hook.without_results(old[:])), or write results beside the buffer with "
                    "tdhook_rl.replay.analyze"
                )
            left = [key for key in kept_keys(self.policy, None) if key not in kept and key in known]
            if left:
                raise InputError(
                    f"the replay buffer holds {rows} with {left[0]!r}, which keep= leaves out: new rows "
                    "would stand beside results of old ones. Keep the same results all through a run, or fill a new "
                    f"buffer, new.extend(policy.annotate(old[:], keep={self.keep!r}))"
                )

    def log(self, batch: TensorDictBase | None) -> dict[str, float] | None:
        """The summary of what was annotated last; reads the buffer where no batch is handed over."""
        if batch is None:
            require_hooked(self.policy, "AnnotateHook")
            due = self._batches % self.every == 0
            self._batches += 1
            rows = self._newest_rows() if due else None
            self.last = None if rows is None else self.policy.annotate(rows, on_mismatch=self.on_mismatch)
        if self.last is None:
            return None
        summary = summarise(self.last, self.policy.result_keys)
        return {f"{self.prefix}/{name}": value for name, value in summary.items()}

    def _newest_rows(self) -> TensorDictBase | None:
        buffer = getattr(self._trainer, "replay_buffer", None)
        if buffer is None:
            raise InputError(
                "the trainer hands over no batches (they go straight to a replay buffer), and it knows no buffer to "
                "read them from: give it one, Trainer(replay_buffer=...)"
            )
        return self._newest.take(buffer)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches, "written": self._newest.written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = self._first = state_dict["batches"]
        self._newest.written = state_dict["written"]


def _known_keys(storage: Any) -> set[tuple[str, ...]] | None:
    """The keys of what a storage holds, or of what it once held where it takes no others; ``None`` if it takes any."""
    if not len(storage):
        keys = fixed_keys(storage)
    else:
        row = storage.get(0)
        keys = row.keys(True, True) if is_tensor_collection(row) else None
    return None if keys is None else {key_parts(key) for key in keys}


def _reached(operation: Any) -> list[Any]:
    """The objects to which what is registered at a trainer may hand a batch: it wraps each to take its time.

    The owner of a method, the arguments of a partial, and what a function that fills something names.
    """
    found: list[Any] = []
    waiting, seen = [operation], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, functools.partial):
            waiting += [one.func, *one.args, *one.keywords.values()]
        elif hasattr(one, "__self__"):
            found.append(one.__self__)
        elif hasattr(one, "__wrapped__"):
            waiting.append(one.__wrapped__)
        elif isinstance(one, types.FunctionType):
            named, scope = names_in(one.__code__)[0], one.__globals__
            held = [value for cell in one.__closure__ or () for value in read_cell(cell)]
            held += [scope[name] for name in named if name in scope]
            fills = not named.isdisjoint(_FILLS)
            waiting += [value for value in held if fills or getattr(value, "__name__", None) in _FILLS]
        else:
            found.append(one)
    return found

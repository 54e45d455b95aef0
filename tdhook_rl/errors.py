"""The errors and warnings of tdhook_rl: each says what was asked, what was found and what to do.

All derive from :class:`TdhookError` and from the built-in error that a caller would expect, so that
``except KeyError`` around a missing key goes on working.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "ArtifactError",
    "CheckError",
    "ConceptError",
    "ConformanceError",
    "ContextError",
    "EnvCheckError",
    "InPlaceError",
    "InactiveError",
    "InputError",
    "KeyCollisionError",
    "MismatchError",
    "MissingKeyError",
    "PreparationError",
    "SiteError",
    "TargetError",
    "TdhookError",
    "TieError",
    "WorkerError",
    "nearest",
    "own_cause",
    "warn",
]


class TdhookError(Exception):
    """Base of every error that tdhook_rl raises on purpose.

    What to do: read the message, which says what was asked, what was found, and what to do; catch this class for
    all.
    """


class SiteError(TdhookError, LookupError):
    """A module path or pattern names nothing, or names a module that never ran.

    What to do: ``hooked.sites(data)`` lists every path, with what it puts out and how often it runs in a call; the
    message names the nearest. Paths start at the policy that was prepared. A module that is there and never runs is
    called by another way (a function, or ``child.forward``), or not in this mode.
    """


class TargetError(TdhookError, ValueError):
    """The scalar to explain cannot be computed, or no gradient reaches it.

    What to do: choose a target that the policy has (``targets.chosen_logit()`` needs logits, ``state_value()`` a
    critic) and that depends on what is explained: nothing may be detached, rounded or sampled in between.
    Perturbations (``Occlusion``) need no gradient.
    """


class InputError(TdhookError, ValueError):
    """A tensor has a shape, dtype or value that the method cannot use.

    What to do: the message names the argument or the key, what it takes and what it got. Indices and tokens have no
    gradient: explain what an embedding puts out, with ``input_modules=``.
    """


class ArgumentError(InputError, TypeError):
    """An argument has a name or a type that the function does not take.

    What to do: the message names the nearest argument, what it takes, and for names of tdhook what stands in their
    place.
    """


class InPlaceError(InputError, RuntimeError):
    """A forward changes in place what its derivatives need, so that no gradient can be taken.

    What to do: write the layer that the message is about with ``inplace=False``, or the statement as one that makes
    a new tensor.
    """


class KeyCollisionError(TdhookError, ValueError):
    """A result key is already a key of the policy or of another method.

    What to do: give the method another root (``attribution_key=``, ``cache_key=``, ``probe_key=``), or an
    intervention another ``name=``.
    """


class MissingKeyError(TdhookError, KeyError):
    """A TensorDict lacks a key that a configured method reads.

    What to do: put the key into the data, or have the environment or collector write it; the message names the
    nearest key that there is. A baseline, a label, a strength by row, a stored action and a hidden state are such
    keys.
    """

    # KeyError prints the repr of its argument, which would show the message in quotes.
    __str__ = Exception.__str__


class PreparationError(TdhookError, RuntimeError):
    """The module cannot be hooked as it is (compiled, lazy, scripted, not copyable).

    What to do: prepare it before ``torch.compile``, and after lazy layers have seen data; write a scripted module
    as Python. What cannot be copied is named: keep it outside of the policy, or build the policy in the worker
    (``policy_factory``).
    """


class ContextError(PreparationError, AttributeError):
    """A context was used as the hooked policy that it gives when it is entered.

    What to do: ``with method.prepare(policy) as hooked:`` and use ``hooked``; or ``prepare(policy,
    return_context=False)``.
    """


class TieError(TdhookError, RuntimeError):
    """The hooked policy and the user's policy no longer hold the same tensors.

    What to do: load, move and cast the plain policy before it is prepared, or prepare it again:
    ``load_state_dict(assign=True)`` and ``.to(...)`` replace tensors.
    """


class InactiveError(TdhookError, RuntimeError):
    """A hooked policy was called after its context had ended.

    What to do: keep the ``with`` block open as long as a collector runs, or prepare with ``return_context=False``
    and call ``.restore()`` at the end.
    """


class MismatchError(TdhookError, RuntimeError):
    """A batch would be explained by another policy than the one that collected it.

    What to do: annotate a batch before the update, with the interventions that were on; or say
    ``on_mismatch="ignore"`` where the present policy is what you ask about.
    """


class CheckError(TdhookError, RuntimeError):
    """A dry run of a hooked policy found what would fail, or be wrong in silence, in training.

    What to do: each line of the message has its remedy; ``print(report)`` shows what was looked at.
    """


class WorkerError(TdhookError, RuntimeError):
    """A worker of a collector died, does not answer in time, or cannot be reached.

    What to do: the message says how it ended. Where memory ran out, fewer workers or smaller batches; where it
    hangs, ``Guarded(collector, timeout=...)`` ends the wait; where it takes no controls, give the collector the
    hooked policy instead of ``policy_factory``.
    """


class ArtifactError(TdhookError, ValueError):
    """A saved probe, vector or result cannot be read or written.

    What to do: the message names the file and what is wrong with it: damaged, of another kind, or of other data,
    weights or methods. An analysis goes on only in a folder that it began: take another one.
    """


class ConceptError(TdhookError, LookupError):
    """An environment has no concept of this name, or the concept cannot be changed alone.

    What to do: ``env.concepts`` has the names; what can be changed alone has ``moves``.
    """


class ConformanceError(TdhookError, AssertionError):
    """A method or a hooked policy does not keep what the library promises; ``check`` names what failed.

    What to do: run that one check (``check_method(factory, only=...)``); a check that cannot hold is waived by
    name, with the reason.
    """

    def __init__(self, message: str, check: str = "") -> None:
        super().__init__(message)
        self.check = check


class EnvCheckError(TdhookError, AssertionError):
    """An environment's specs, labels, pairs or Gymnasium face are not what it declares.

    What to do: the report in the message names the part, and the first state in which it differs.
    """


def nearest(asked: object, known: Iterable[object], count: int = 3) -> str:
    """A clause that lists the closest known names, for the end of an error message.

    Of paths, those that end alike come first: what is before them depends on how a policy is wrapped.

    Example:
        >>> nearest("fc3", ["fc1", "fc2"])
        "nearest: 'fc2', 'fc1'"
        >>> nearest("module.0.module.3", ["module.0.module", "module.0.module.0", "module.0.module.0.module.3"], 1)
        "nearest: 'module.0.module.0.module.3'"
    """
    names = list(dict.fromkeys(str(name) for name in known))
    if not names:
        return "there is none"
    asked = str(asked)
    alike = {name: ending for name in names if (ending := _common_ending(asked, name))}
    close = sorted(alike, key=lambda name: (-alike[name], -difflib.SequenceMatcher(None, asked, name).ratio()))[:count]
    close += [name for name in difflib.get_close_matches(asked, names, n=count, cutoff=0.3) if name not in close]
    close = close[:count] or names[:count]
    return "nearest: " + ", ".join(repr(name) for name in close)


def _common_ending(asked: str, name: str) -> int:
    """How many of the last parts of two dotted paths are the same; 0 where one has no parts, or only a number is."""
    ours, theirs = re.sub(r"[\\^$]", "", asked).split("@")[0].split("."), name.split(".")
    if len(ours) < 2 and len(theirs) < 2:
        return 0
    count = 0
    while count < min(len(ours), len(theirs)) and ours[-1 - count] == theirs[-1 - count]:
        count += 1
    return 0 if count == 1 and ours[-1].isdigit() and len(ours) > 1 else count


def listed(names: Iterable[object], most: int, more: str = "and {} more") -> str:
    """Names in a message: the first ones, and how many there are beside them.

    Example:
        >>> listed(["fc1", "fc2", "fc3", "fc4"], 2)
        'fc1, fc2 and 2 more'
    """
    shown = [str(name) for name in names]
    return ", ".join(shown[:most]) + (f" {more.format(len(shown) - most)}" if len(shown) > most else "")


def own_cause(error: BaseException) -> TdhookError | None:
    """The error of this library that another one only passes on.

    Sequences of tensordict that draw in several places put a ``RuntimeError`` around whatever is raised in them, which
    says no more than the number of a module.
    """
    cause = None if isinstance(error, TdhookError) else error.__cause__
    while isinstance(cause, RuntimeError) and not isinstance(cause, TdhookError):
        cause = cause.__cause__
    return cause if isinstance(cause, TdhookError) else None


#: Modules that stand between a warning of ours and the line that it is about.
_BETWEEN = ("tdhook_rl.", "torch.nn.modules.module.", "tensordict.nn.", "contextlib.", "functools.")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the caller's line: the first outside of this package and of what calls modules."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)

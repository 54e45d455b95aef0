"""``check_method``: whether a method keeps what every method of the library promises."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from tdhook_rl.errors import ConformanceError, InputError, nearest
from tdhook_rl.method import Method
from tdhook_rl.testing.calling import CALLING, declared_keys_are_written
from tdhook_rl.testing.restoring import RESTORING
from tdhook_rl.testing.subject import Subject, sample_data, sample_policy
from tdhook_rl.testing.travelling import TRAVELLING

#: Every check by its name.
CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check for check in (declared_keys_are_written, *RESTORING, *CALLING, *TRAVELLING)
}


def check_method(
    method_factory: Callable[[], Method],
    *,
    policy: Callable[[], TensorDictModuleBase] = sample_policy,
    data: Callable[..., TensorDict] = sample_data,
    only: Iterable[str] | None = None,
    waive: Mapping[str, str] | None = None,
) -> None:
    """Check that a method keeps what every method of the library promises, in a few seconds.

    Args:
        method_factory: gives the method to check, such as ``lambda: Scale("module.0.module.1", 2.0)``; it is called
            anew for each check.
        policy: gives the policy that the method is put on; by default a categorical actor
            (:func:`tdhook_rl.testing.sample_policy`), whose sites are :data:`tdhook_rl.testing.SITES`.
        data: gives what the policy and the method read, of a batch shape: called as ``data()``, ``data(5)``,
            ``data(3, 2)``.
        only: names of the checks to run; all of :data:`CHECKS` by default.
        waive: for names of checks that are not run, the reason.

    A method that intervenes declares ``observes = False``, one whose results of a row depend on other rows
    ``by_row = False``; checks that would not apply are passed over.

    Raises:
        ConformanceError: names the check that failed, and says what was found.
        InputError: for a name that is no check's, or a waiver without a reason.

    Example:
        >>> from tdhook_rl import ActivationCaching
        >>> check_method(lambda: ActivationCaching("module.0.module.1"), only=["pickles", "batch_equals_rows"])
    """
    waived = dict(waive or {})
    for name in (*(only or ()), *waived):
        if name not in CHECKS:
            raise InputError(f"no check is named {name!r}; {nearest(name, CHECKS)}")
    empty = [name for name, reason in waived.items() if not isinstance(reason, str) or not reason.strip()]
    if empty:
        raise InputError(f"the waiver of {empty[0]!r} gives no reason: write why the check does not hold")
    subject = Subject(method_factory, policy, data)
    for name in CHECKS if only is None else only:
        if name not in waived:
            run_check(name, subject)


def run_check(name: str, subject: Subject) -> None:
    """Run one check; what fails says its name. Warnings of the method are not the check's, and are left out."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            CHECKS[name](subject)
        except ConformanceError as error:
            raise ConformanceError(f"{name}: {error}", check=name) from error
        except Exception as error:
            raise ConformanceError(f"{name}: raised {type(error).__name__}: {error}", check=name) from error


def parametrize_with_checks(
    method_factories: Iterable[Callable[[], Method]] | Mapping[str, Callable[[], Method]], **options: Any
) -> Any:
    """A pytest decorator: one test for each method and each check.

    Args:
        method_factories: as of :func:`check_method`; a mapping gives the tests their names.
        **options: the other arguments of :func:`check_method`. Checks that are waived are skipped with their reason.

    The test takes ``method_factory`` and ``check``; its body is ``check(method_factory)``::

        @parametrize_with_checks({"scale": lambda: Scale("module.0.module.1", 2.0)})
        def test_conformance(method_factory, check):
            check(method_factory)
    """
    import pytest

    waived = dict(options.pop("waive", None) or {})
    only = options.pop("only", None)
    named = method_factories if isinstance(method_factories, Mapping) else {
        f"{type(make()).__name__}{index}": make for index, make in enumerate(method_factories)
    }  # fmt: skip
    cases = [
        pytest.param(
            make,
            _Check(name, options),
            id=f"{title}-{name}",
            marks=[pytest.mark.skip(reason=waived[name])] if name in waived else [],
        )
        for title, make in named.items()
        for name in (CHECKS if only is None else only)
    ]
    return pytest.mark.parametrize(("method_factory", "check"), cases)


class _Check:
    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        self._options = options

    def __call__(self, method_factory: Callable[[], Method]) -> None:
        check_method(method_factory, only=[self.name], **self._options)

    def __repr__(self) -> str:
        return self.name

"""Which attribution of a hooked policy, and which of its targets, a metric scores."""

from __future__ import annotations

from typing import Any

from tdhook_rl.attribution.base import BoundAttribution
from tdhook_rl.errors import InputError, TargetError, nearest
from tdhook_rl.hooking.hooked import HookedMixin

__all__ = ["find_attribution", "target_name"]


def find_attribution(hooked: Any, attribution_key: str | None) -> BoundAttribution:
    """The attribution method of a hooked policy.

    Raises:
        InputError: if there is none, or several and none is named.
    """
    if not isinstance(hooked, HookedMixin):
        raise InputError(
            f"a metric takes a hooked policy, got a {type(hooked).__name__}: "
            "`with Saliency().prepare(policy) as hooked:`"
        )
    if not hooked._hooked.runtime.active:
        hooked._hooked.runtime.refuse()
    found: list[Any] = [one for one in hooked._hooked.bound if isinstance(one, BoundAttribution)]
    if not found:
        raise InputError(
            "a metric scores an attribution, and this policy is hooked without one: prepare it with "
            "Compose(..., Saliency()), say"
        )
    roots = [one.root for one in found]
    if attribution_key is None:
        if len(found) > 1:
            raise InputError(
                f"this policy is hooked with {len(found)} attributions, under {roots}: say which is scored with "
                "attribution_key="
            )
        return found[0]
    if roots.count(attribution_key) == 1:
        return found[roots.index(attribution_key)]
    if attribution_key in roots:
        raise InputError(
            f"several attributions write under {attribution_key!r}: give each an attribution_key= of its own"
        )
    raise InputError(
        f"no attribution of this policy writes under {attribution_key!r}; {nearest(attribution_key, roots)}"
    )


def target_name(bound: BoundAttribution, target: str | None) -> str | None:
    """The name of the scored target, ``None`` where the method explains a single one.

    Raises:
        TargetError: if there are several and none is named, or there is none of that name.
    """
    names = [name for name in bound.names if name is not None]
    if not names:
        if target is not None:
            raise TargetError(
                f"target={target!r} was asked, but the attribution {bound.root!r} has one, unnamed target"
            )
        return None
    if target is None and len(names) == 1:
        return names[0]
    if target is None:
        raise TargetError(
            f"the attribution {bound.root!r} explains {len(names)} targets: say which with target=, of {names}"
        )
    if target not in names:
        raise TargetError(f"no target of the attribution {bound.root!r} is named {target!r}; {nearest(target, names)}")
    return target

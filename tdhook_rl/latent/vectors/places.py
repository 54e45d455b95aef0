"""Where a direction lives: the output of a module, or an entry that it writes."""

from __future__ import annotations

from typing import Any

from tensordict import NestedKey
from tensordict.utils import unravel_key

from tdhook_rl.errors import InputError, SiteError, nearest
from tdhook_rl.sites.paths import Site
from tdhook_rl.sites.states import state_names

#: A module path, or a pair of a path and the key of an entry that the module writes.
Place = str | tuple[str, NestedKey]


def path_and_entry(place: Any, what: str) -> tuple[str, NestedKey | None]:
    """The module path of a place, and the key of the entry there, if it is one.

    Args:
        place: a :data:`Place`.
        what: the argument, for messages (``"vectors= names"``).

    Raises:
        InputError: for something else.

    Example:
        >>> path_and_entry("1", "path= is"), path_and_entry(("0", ("next", "hidden")), "path= is")
        (('1', None), ('0', ('next', 'hidden')))
    """
    if isinstance(place, str):
        return place, None
    if isinstance(place, tuple) and len(place) == 2 and isinstance(place[0], str):
        path, entry = place
        parts = entry if isinstance(entry, tuple) else (entry,)
        if parts and all(isinstance(part, str) and part for part in parts):
            return path, entry
    raise InputError(
        f"{what} {place!r:.200}: it takes a module path, or a pair of a path and a TensorDict key such as "
        '("module.0", ("next", "recurrent_state"))'
    )


def place_name(path: str, entry: NestedKey | None) -> str:
    """A place as one word.

    Example:
        >>> place_name("0", ("next", "hidden"))
        '0:next.hidden'
    """
    return path if entry is None else f"{path}:{entry if isinstance(entry, str) else '.'.join(entry)}"


def written_entry(site: Site, key: NestedKey) -> NestedKey:
    """The key as the module at a site writes it.

    Raises:
        SiteError: if the module is not TensorDict-level, or writes no such entry.
    """
    if key in state_names(site.module):
        layout = getattr(site.module, "_hooked_layout", None)
        if layout is not None and layout.recurrent:  # type: ignore[union-attr]
            raise SiteError(
                f"{site.name!r} is the core of a recurrent module, whose state is an entry of the TensorDict: give the "
                "path of that module and the key of the state"
            )
        return key
    written = getattr(site.module, "out_keys", None)
    if written is None:
        raise SiteError(
            f"{site.name!r} is a {type(site.module).__name__}, which writes no entries of a TensorDict: give its path "
            "alone to steer what it returns, or the path of the TensorDictModule around it"
        )
    key = unravel_key(key)
    if key not in [unravel_key(one) for one in written]:
        raise SiteError(f"{site.name!r} does not write {key!r}; {nearest(key, written)}")
    return key

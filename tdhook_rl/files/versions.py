"""Which versions of libraries made a file."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions(*names: str) -> dict[str, str | None]:
    """The version of each distribution; ``None`` for one that is not installed.

    Example:
        >>> versions("torch", "no such distribution")["no such distribution"] is None
        True
    """
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

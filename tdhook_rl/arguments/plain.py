"""What configuration files give: lists and mappings of OmegaConf, as Hydra hands on, as lists and dicts; and keys."""

from __future__ import annotations

from typing import Any

__all__ = ["is_config", "plain", "with_keys"]


def is_config(value: Any) -> bool:
    """Whether a value is a container of OmegaConf, which is not imported for that."""
    return type(value).__module__.partition(".")[0] == "omegaconf"


def plain(value: Any) -> Any:
    """The value with dicts and lists in the place of such containers."""
    if not is_config(value):
        return value
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=True)


def with_keys(value: list[Any]) -> list[Any]:
    """A list in which lists of strings are tuples: a file has no tuples, which nested keys are.

    Example:
        >>> with_keys(["reward", ["agents", "observation"]])
        ['reward', ('agents', 'observation')]
    """
    return [tuple(one) if isinstance(one, list) and all(isinstance(a, str) for a in one) else one for one in value]

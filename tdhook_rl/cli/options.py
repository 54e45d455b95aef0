"""Options as flags, or in a file; and what is warned of while a command runs, in a line each."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdhook_rl.errors import InputError, nearest

#: How what begins with a minus goes on where it is a value: ``-1,1``, ``-1e-3``, ``-100:``. No flag does.
_VALUE = re.compile(r"-(\d|\.\d|inf|nan)")


def with_values(arguments: Sequence[str]) -> list[str]:
    """The same, with values that begin with a minus behind their flags: argparse takes all but plain numbers for flags.

    Example:
        >>> with_values(["steer", "--alphas", "-1,1", "--sampled"])
        ['steer', '--alphas=-1,1', '--sampled']
    """
    found: list[str] = []
    for one in arguments:
        if _VALUE.match(one) and found and found[-1].startswith("--") and "=" not in found[-1] and found[-1] != "--":
            found[-1] += f"={one}"
        else:
            found.append(one)
    return found


def named(text: str) -> tuple[str, str]:
    """``NAME=TEXT`` as both; of a text alone the name is empty."""
    name, sign, rest = text.partition("=")
    return (name, rest) if sign else ("", text)


def named_file(text: str) -> tuple[str, str]:
    """``NAME=FILE`` as both; of a file alone the name is empty, also where a folder of its path is called ``lr=0.1``.

    Example:
        >>> named_file("up=vectors/up"), named_file("runs/lr=0.1/up")
        (('up', 'vectors/up'), ('', 'runs/lr=0.1/up'))
    """
    there = any(Path(f"{text}{ending}").exists() for ending in ("", ".safetensors", ".json"))
    found = named(text)
    return ("", text) if there or len(Path(found[0]).parts) > 1 else found


def chosen_options(
    options: argparse.Namespace, defaults: Mapping[str, Any], numbers: Mapping[str, type]
) -> dict[str, Any]:
    """What flags say, or the config file, or nobody.

    Args:
        options: as parsed; what nobody has given is ``None``.
        defaults: by name what holds where nobody says anything; a file may have these names and no others.
        numbers: of those that are numbers whether they are whole (``int``) or not (``float``).

    Raises:
        InputError: for a file that is no config, another name, or what is no number.
    """
    told = {} if options.config is None else _config(options.config)
    for name in told:
        if name not in defaults:
            raise InputError(f"{options.config} has no option {name!r}; {nearest(name, defaults)}")
    given = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    chosen = {**defaults, **told, **given}
    for name, kind in numbers.items():
        value = chosen[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | kind)):
            raise InputError(f"{name} is a number, got {value!r}")
    return chosen


@contextmanager
def printed_warnings() -> Iterator[None]:
    """What the package warns of is printed once it is over, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for line in dict.fromkeys(str(one.message) for one in caught if not _of_others(one.filename)):
        print(f"tdhook-rl: {line}")


def _of_others(file: str) -> bool:
    return not {"torch", "torchrl", "tensordict"}.isdisjoint(Path(file).parts)


def _config(path: Path) -> dict[str, Any]:
    from tdhook_rl.files.durable import read_json

    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            found = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path} is no config in YAML: {error}") from error
    else:
        found = read_json(path, "a config in JSON")
    if not isinstance(found, Mapping):
        raise InputError(f"{path} is no config: it has no options by name, but {found!r:.60}")
    return {str(name).replace("-", "_"): value for name, value in found.items()}

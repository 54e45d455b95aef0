"""Whether the installed wheel holds every listed package with all its files, and each of them imports.

Run where the wheel is installed, from outside of the checkout: ``python CHECKOUT/.ci/wheel.py``.
"""

import importlib
import sys
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SETUP = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]


def data_files(package: str, source: Path) -> set[Path]:
    return {file for pattern in SETUP["package-data"].get(package, ()) for file in source.glob(pattern)}


def lacking(package: str) -> list[str]:
    """The files of a package that its installed copy lacks; imports each of its modules."""
    source = CHECKOUT / SETUP["package-dir"].get(package, package.replace(".", "/"))
    home = Path(importlib.import_module(package).__file__ or "").resolve().parent
    if home == source.resolve():
        raise SystemExit(f"{package} was imported from the checkout, not from an installed wheel")
    modules = set(source.glob("*.py"))
    for module in modules - {source / "__init__.py"}:
        importlib.import_module(f"{package}.{module.stem}")
    files = modules | data_files(package, source)
    return [str(file.relative_to(source)) for file in sorted(files) if not (home / file.relative_to(source)).is_file()]


if __name__ == "__main__":
    found = {package: lacking(package) for package in SETUP["packages"]}
    for package, files in found.items():
        print(f"{package}: {'lacks ' + ', '.join(files) if files else 'complete'}")
    sys.exit(any(found.values()))

"""Private names of other libraries: each is used as its library has it now, and from one room of the package only."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import platform
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from tensordict.nn import TensorDictModule
from torch import nn

import tdhook_rl
import tests.contracts_sb3
import tests.contracts_torch
import tests.contracts_torchrl
from tdhook_rl import internals
from tdhook_rl.internals.attributes import IN_PLACE, OVERRIDDEN
from tdhook_rl.sites.classes import Swapped
from tests.contracts import CONTRACTS

pytestmark = pytest.mark.limit(150)

PACKAGE = Path(tdhook_rl.__file__).parent
ROOM = Path(internals.__file__).parent
ROOM_FILES = sorted(path.stem for path in ROOM.glob("*.py") if path.stem != "__init__")
LIBRARIES = {
    "python_names": (),
    "torch_names": ("torch",),
    "functorch_names": ("torch",),
    "dynamo_names": ("torch",),
    "tensordict_names": ("tensordict",),
    "torchrl_names": ("torchrl",),
    "sb3_names": ("stable_baselines3",),
    "attributes": ("torch", "tensordict", "torchrl"),
}
#: Strings with an underscore that are pieces of our own names; and a module whose objects are no state.
PIECES = {"_input", "_grad", "_grad_output", "_Bound", "_io", "_low", "_high"} | {"_type", "_wandb"}

#: What a callback of Stable-Baselines3 is made of, as its guide tells users to.
CALLBACK = {"_on_training_start", "_on_rollout_end", "_on_step", "_on_training_end"}


@functools.cache
def sources() -> dict[str, ast.Module]:
    """The files of the package outside the room, by their path in it."""
    paths = [path for path in sorted(walked(PACKAGE)) if ROOM not in path.parents]
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in paths}


def walked(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():  # the environments are a linked folder, which rglob leaves out
        if path.is_dir():
            yield from walked(path)
        elif path.suffix == ".py":
            yield path


# ---------------------------------------------------------------------- contracts


def names_of(file: str) -> list[str]:
    """What a file of the room offers: what it lists, or else what it defines."""
    if file == "attributes":
        return [*IN_PLACE, *OVERRIDDEN]
    module = importlib.import_module(f"{internals.__name__}.{file}")
    statements = ast.parse(inspect.getsource(module)).body
    defined = [one.name for one in statements if isinstance(one, ast.FunctionDef)]
    defined += [to.id for one in statements if isinstance(one, ast.Assign) for to in one.targets if hasattr(to, "id")]
    return getattr(module, "__all__", [name for name in defined if not name.startswith("_")])


@functools.cache
def uses() -> dict[tuple[str, str], list[str]]:
    """By home and name the files that import a name from the room; by ``""`` and name those that speak of one."""
    found: dict[tuple[str, str], list[str]] = {}
    for path, tree in sources().items():
        keys: set[tuple[str, str]] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                keys |= {(node.module, alias.name) for alias in node.names}
            named = [getattr(node, one, None) for one in ("attr", "name", "id", "value")]
            keys |= {("", one) for one in named if isinstance(one, str)}
        for key in keys:
            found.setdefault(key, []).append(path)
    return found


def users_of(file: str, name: str) -> list[str]:
    """The files that import a name from the room, or use the attribute."""
    return uses().get(("" if file == "attributes" else f"{internals.__name__}.{file}", name), [])


def sentence_of(file: str, name: str) -> str:
    """What the room says of a name: its docstring, the comment above it, or its entry in a table."""
    if file == "attributes":
        return {**IN_PLACE, **OVERRIDDEN}[name]
    module = importlib.import_module(f"{internals.__name__}.{file}")
    source = inspect.getsource(module)
    value = getattr(module, name)
    if inspect.isfunction(value) and value.__module__ == module.__name__:
        return inspect.getdoc(value) or ""
    above = re.search(rf"((?:^#:.*\n)+){name}\b.* = ", source, re.MULTILINE)
    if above is not None:
        return re.sub(r"^#: ?", "", above[1], flags=re.MULTILINE).strip()
    # What is only imported is told of in the comment below the imports.
    told = " ".join(line[2:] for line in source.splitlines() if re.match(r"# [^-]", line))
    kind = name if f"`{name}" in told else f"...{re.sub(r'^[A-Z][a-z]*', '', name)}"
    return told if f"`{kind}" in told else ""


ENTRIES = [(file, name) for file in ROOM_FILES for name in names_of(file)]


@pytest.mark.parametrize("contract", dict.fromkeys(CONTRACTS.values()), ids=lambda one: one.__name__)
def test_others_are_as_expected(contract) -> None:
    held = [key for key, one in CONTRACTS.items() if one is contract]
    try:
        contract()
    except Exception as error:
        pytest.fail(broken(held, error))


def broken(held: list[tuple[str, str]], error: Exception) -> str:
    """Which names, of which library, are not what they were, and who uses them."""
    file = held[0][0]
    library = ", ".join(f"{one} {version(one)}" for one in LIBRARIES[file]) or f"Python {platform.python_version()}"
    users = sorted({user for key in held for user in users_of(*key)})
    return (
        f"{library} has changed what is behind {', '.join(name for _, name in held)} (tdhook_rl/internals/{file}.py), "
        f"used by {', '.join(users)}: {type(error).__name__} {error}"
    )


def test_a_name_that_has_changed_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in nn.Conv2d.__mro__[:2]:
        monkeypatch.delattr(kind, "_conv_forward")
    with pytest.raises(pytest.fail.Exception) as told:
        test_others_are_as_expected(tests.contracts_torch.convolutions)
    pattern = r"torch \d\S* has changed what is behind convolved \(tdhook_rl/internals/torch_names.py\), used by "
    assert re.match(pattern + "attribution/lrp_rules.py: AttributeError .*_conv_forward", str(told.value.msg))


@pytest.mark.parametrize(("file", "name"), ENTRIES)
def test_each_name_has_a_sentence_a_contract_and_a_user(file: str, name: str) -> None:
    assert len(sentence_of(file, name).split()) > 5, f"say of {name} what it is and why it is used"
    assert (file, name) in CONTRACTS, f"{name} has no contract in tests/contracts.py"
    assert users_of(file, name), f"nothing uses {name}: remove it"


def test_there_is_no_contract_for_what_is_gone() -> None:
    assert set(CONTRACTS) == set(ENTRIES)


# ---------------------------------------------------------------------- the scan


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def own_names(tree: ast.AST) -> set[str]:
    """What a file defines: functions, classes, variables of classes, attributes of ``self`` and keys of a namespace."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Call) and called(node).rstrip("_").endswith("setattr"):
            found |= {one.value for one in node.args if isinstance(getattr(one, "value", None), str)}
    return found


def called(node: ast.Call) -> str:
    """The name of what a call calls, without where it is from."""
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def private_uses(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """The lines that use a private attribute, module or string, the name, and whether it is one of ``self``."""
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.lineno, node.attr, isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            if is_private(node.value) and node.value not in PIECES:
                yield node.lineno, node.value, False
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            home = getattr(node, "module", None) or ""
            if home.split(".")[0] != PACKAGE.name:
                steps = [step for alias in node.names for step in (*home.split("."), *alias.name.split("."))]
                yield from ((node.lineno, step, False) for step in steps if is_private(step))


def of_others(trees: dict[str, ast.AST], taken: set[str]) -> list[str]:
    """The uses of private names that the package does not define.

    A name that the room uses of others may be one of ours as well (``_policy``): then it must be of ``self``, in a file
    that defines it.
    """
    defined = {path: own_names(tree) for path, tree in trees.items()}
    ours = set().union(*defined.values())
    found = []
    for path, tree in trees.items():
        for line, name, of_self in private_uses(tree):
            own = (of_self and name in defined[path]) if name in taken else name in ours
            if not own and name not in IN_PLACE and name not in OVERRIDDEN and not name.startswith("_hooked"):
                found.append(f"{path}:{line} {name}")
    return found


def taken_names() -> set[str]:
    return {name for path in ROOM.glob("*_names.py") for _, name, _ in private_uses(ast.parse(path.read_text()))}


def test_private_names_of_others_are_used_in_one_room() -> None:
    found = of_others(sources(), taken_names())
    assert not found, f"reach these by a function of tdhook_rl/internals: {found}"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("torch._C._nn.gelu(x)", "_C"),
        ("def f(collector): return collector._never_heard_of", "_never_heard_of"),
        ("def f(collector): return getattr(collector, '_never_heard_of', None)", "_never_heard_of"),
        ("def f(collector): return [getattr(collector, one) for one in ('_policy',)]", "_policy"),
        ("class Ours:\n    def f(self, collector): self._policy = collector._policy", "_policy"),
        ("class Theirs(Collector):\n    def f(self): return self._policy", "_policy"),
        ("from torch._dynamo import config", "_dynamo"),
        ("from torch.nn.modules.conv import _ConvNd as Conv", "_ConvNd"),
        ("import torch._functorch.vmap", "_functorch"),
    ],
)
def test_the_scan_sees(line: str, name: str) -> None:
    [found] = {one.split()[1] for one in of_others({"new.py": ast.parse(line)}, taken_names())} - {"_nn"}
    assert found == name


@pytest.mark.parametrize(
    "line",
    [
        "class Ours:\n    def f(self, other): self._seen = other._seen",
        "class Ours:\n    def f(self): self._policy = 1; return self._policy",
        "def f(module): return module._parameters, module._hooked_layout, f'{module}_orig'",
        "from tdhook_rl.attribution.saliency import _BoundSaliency",
        "def _f(x): return x.__dict__",
    ],
)
def test_the_scan_lets_be(line: str) -> None:
    assert of_others({"new.py": ast.parse(line)}, taken_names()) == []


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(tdhook_rl.__path__, f"{PACKAGE.name}."):
        yield importlib.import_module(found.name)


def test_what_is_overridden_of_others_is_listed() -> None:
    found = set()
    for module in modules():
        trees = {
            node.name: node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.ClassDef)
        }
        for name, kind in vars(module).items():
            if isinstance(kind, type) and kind.__module__ == module.__name__ and name in trees:
                # Mixins are put over a policy's class.
                bases = [*kind.__mro__[1:], *(TensorDictModule.__mro__ if issubclass(kind, Swapped) else ())]
                others = [base for base in bases if base.__module__.split(".")[0] != PACKAGE.name]
                own = own_names(ast.Module(trees[name].body, []))
                found |= {one for one in own if is_private(one) and any(one in vars(base) for base in others)}
    assert found - CALLBACK == set(OVERRIDDEN)

"""The modules of a policy, and whether torch finds every one: a class may have its own ``named_modules``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tdhook_rl.errors import PreparationError

_OF_TORCH = nn.Module.named_modules, nn.Module.modules


def named_modules(policy: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``policy.named_modules()`` lists, without its nested generators: a preparation asks for it often."""
    found: list[tuple[str, nn.Module]] = []
    _list(policy, "", set(), found)
    return found


def modules(policy: nn.Module) -> list[nn.Module]:
    """What ``policy.modules()`` lists."""
    if type(policy).modules is not nn.Module.modules:
        return list(policy.modules())
    return [module for _, module in named_modules(policy)]


def _list(module: nn.Module, path: str, seen: set[nn.Module], found: list[tuple[str, nn.Module]]) -> None:
    if type(module).named_modules is not nn.Module.named_modules:
        found += module.named_modules(seen, path, True)
        return
    if module in seen:
        return
    seen.add(module)
    found.append((path, module))
    for name, child in module._modules.items():
        if child is not None:
            _list(child, f"{path}.{name}" if path else name, seen, found)


def require_listed(policy: nn.Module) -> None:
    """Raise :class:`PreparationError` where a module hides some of its own, or takes the arguments of an older torch.

    Hooks, paths and copies go by that list, and so does ``parameters()``.
    """
    for path, module in _walked(policy, "", set()):
        kind = type(module)
        if (kind.named_modules, kind.modules) == _OF_TORCH or kind.__module__.startswith(("torch", "tensordict")):
            continue
        try:
            found = {id(child) for _, child in module.named_modules(set(), "", True)} & set(map(id, module.modules()))
            hidden = next((name for name, child in _walked(module, "", set()) if id(child) not in found), None)
            wrong = "" if hidden is None else f"leaves out {hidden!r}"
        except TypeError as error:
            wrong = f"does not take what torch gives it ({error})"
        if wrong:
            where = f"submodule {path!r} of the policy" if path else "the policy"
            raise PreparationError(
                f"{where} ({kind.__name__}) has a named_modules() or modules() of its own, which {wrong}. Hooks go by "
                "it, and torch's parameters() too: take it out, or let it list all modules and take "
                "(memo=None, prefix='', remove_duplicate=True)"
            )


def _walked(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """What ``named_modules`` of torch lists."""
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walked(child, f"{path}.{name}" if path else name, seen)

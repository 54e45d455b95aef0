"""Whether torch finds every module of a policy: a class may have its own ``named_modules``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tdhook_rl.errors import PreparationError

_OF_TORCH = nn.Module.named_modules, nn.Module.modules


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

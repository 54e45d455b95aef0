"""What may change while a hooked policy runs: vectors, alphas, probe weights.

They live in shared-memory tensors outside the module tree, so that writing one in the main process is
seen by every worker at once, ``state_dict`` and weight sync never meet them, and a device copy of the
policy goes on sharing them.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.arguments.dense import require_dense
from tdhook_rl.errors import InactiveError, InputError, KeyCollisionError, MissingKeyError, nearest
from tdhook_rl.sites.numbers import holding


def as_value(name: str, value: Any) -> Tensor:
    """What a control is set to, as a tensor; a number with all its places.

    Raises:
        InputError: for what is no tensor and no numbers.
    """
    try:
        found = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None).detach()
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"control {name!r} is set to numbers or a tensor, got {value!r}: {error}") from error
    require_dense(found, f"control {name!r}")
    return found


def _held(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a control in its dtype, which loses none of them altogether."""
    return holding(value, dtype, f"control {name!r}", f"it is {dtype}", "give numbers that it holds", factor=True)


class Controls(MutableMapping[str, Tensor]):
    """Named shared-memory tensors that are written in place.

    Example:
        >>> controls = Controls()
        >>> _ = controls.add("steering.alpha", 0.0)
        >>> controls["steering.alpha"] = 0.5
        >>> controls["steering.alpha"]
        tensor(0.5000)
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._versions: dict[str, Tensor] = {}
        self._places: dict[str, tuple[str, frozenset[str], frozenset[str]]] = {}
        # How many writings have begun, and ended, ``(2,)``: in between, what is read may be half of what was set.
        self.writings = torch.zeros(2, dtype=torch.int64)
        self.ended = False  # the policy that reads them is hooked no more
        self.readers: weakref.WeakSet[Any] = weakref.WeakSet()  # what calls of this process read

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, readers=weakref.WeakSet())

    def add(self, name: str, value: Any) -> Tensor:
        """Create a control; its shape and dtype stay what they are here."""
        if name in self._tensors:
            raise KeyCollisionError(f"there are two controls named {name!r}: give one of the methods another name=")
        given = as_value(name, value)
        given = _held(name, given, torch.get_default_dtype()) if isinstance(value, float) else given
        tensor = given.to("cpu", copy=True).contiguous()
        if not self._tensors:
            self.writings.share_memory_()
        self._tensors[name] = tensor.share_memory_()
        self._versions[name] = torch.zeros((), dtype=torch.int64).share_memory_()
        return self._tensors[name]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All of them, by name."""
        return self._tensors

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise MissingKeyError(f"no control is named {name!r}; {nearest(name, self._tensors)}") from None

    def __setitem__(self, name: str, value: Any) -> None:
        self._write({name: self._checked(name, value)})

    def _write(self, values: Mapping[str, Tensor]) -> None:
        self.writings[0] += 1
        try:
            for name, value in values.items():
                self[name].copy_(value)
                self._versions[name] += 1
        finally:
            self.writings[1] += 1
        for reader in list(self.readers):
            reader.were_set()

    def _checked(self, name: str, value: Any) -> Tensor:
        tensor = self[name]
        if self.ended:
            raise InactiveError(
                f"the control {name!r} was set after the context of its hooked policy had ended, so nothing reads it: "
                "keep the `with` block open, or use prepare(..., return_context=False) and .restore() at the end"
            )
        value = as_value(name, value)
        if value.shape != tensor.shape:
            raise InputError(
                f"control {name!r} has shape {tuple(tensor.shape)}, got {tuple(value.shape)}: "
                "a control keeps its shape, because running workers share its memory"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"control {name!r} was given NaN or infinite values")
        return _held(name, value, tensor.dtype)

    def place(self, prefix: str, site: str, same: Collection[str], modules: Collection[str]) -> None:
        """Note of which site the controls under a prefix are, with all paths of its module and of the policy."""
        self._places[prefix] = site, frozenset(same), frozenset(modules)

    def require_place(self, prefix: str, path: str) -> None:
        """Raise if what is about to be written belongs to another module, or another run of it.

        Names of no module of the policy are not known to be another's.

        Raises:
            InputError: that names both.
        """
        site, same, modules = self._places.get(prefix, (path, frozenset(), frozenset()))
        base, _, run = path.partition("@")
        other_module = base in modules and base not in same
        other_run = base in same and "" not in (run, site.partition("@")[2]) and run != site.partition("@")[2]
        if path != site and (other_module or other_run):
            raise InputError(
                f"{prefix!r} reads {site!r}, and this is of {path!r}: equal widths do not make it fit. Prepare a "
                "readout of that site, or fit what is pushed on the site that is read"
            )

    def version(self, name: str) -> Tensor:
        """How often a control was set since it was made, ``()``, int64; shared like the control itself."""
        self[name]
        return self._versions[name]

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"control {name!r} cannot be deleted: running workers share its memory")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Controls({', '.join(f'{name}: {tuple(value.shape)}' for name, value in self._tensors.items())})"

    def update_(self, values: Mapping[str, Any]) -> None:
        """Write several controls in place, all or (where one is refused) none."""
        self._write({name: self._checked(name, value) for name, value in values.items()})

    def __deepcopy__(self, memo: dict) -> Controls:
        return self

"""One noise for all conditions: what is drawn inside the block is drawn once for each episode.

Conditions that differ in nothing else then differ by the steering alone (common random numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Functions that draw a tensor of a given shape, and those that draw one like another.
_MAKE = (torch.rand, torch.randn, torch.randint)
_LIKE = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
_FILL = tuple(
    getattr(Tensor, name)
    for name in ("cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_")
)


class SharedDraws(TorchFunctionMode):
    """Inside, tensors of noise with a row for each row of the batch hold that of the row's episode.

    A row's noise depends on its episode and the seed, not on which other rows there are: rows may leave. What
    is drawn by a method of its own (Dirichlet, Gamma) or by an operator (dropout) stays as torch draws it.

    Args:
        episodes: how many episodes there are.

    Example:
        >>> shared = SharedDraws(episodes=2)
        >>> shared.rows_of(torch.tensor([0, 1, 0, 1]))
        >>> with shared.seeded(0):
        ...     noise = torch.randn(4, 3)
        >>> torch.equal(noise[:2], noise[2:]), torch.equal(noise[0], noise[1])
        (True, False)
    """

    def __init__(self, episodes: int) -> None:
        super().__init__()
        self._episodes = episodes
        self._of_row: Tensor | None = None
        self._rows = episodes
        self._seed = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def rows_of(self, episodes: Tensor | None) -> None:
        """Which episode each row is of; ``None``: each row is its own."""
        self._of_row = episodes
        self._rows = self._episodes if episodes is None else len(episodes)

    def seeded(self, seed: int) -> SharedDraws:
        """What is drawn from now on follows from this number."""
        self._seed = seed
        self._generators.clear()
        return self

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        draw = _DRAWS.get(func)
        if draw is not None:
            found = draw(self, func, args, given)
            if found is not None:
                return found
        return func(*args, **given)

    def _apart(self, shape: Sequence[int]) -> int | None:
        """How many draws a row has on the first dimension; ``None`` if that is not about rows."""
        if not shape or not self._rows or shape[0] % self._rows:
            return None
        return shape[0] // self._rows

    def _spread(self, noise: Tensor, each: int) -> Tensor:
        """Noise of the episodes, ``(episodes * each, ...)``, given to their rows."""
        if self._of_row is None:
            return noise
        index = self._of_row.to(noise.device)
        apart = noise.reshape(self._episodes, each, *noise.shape[1:])
        return apart[index].reshape(len(index) * each, *noise.shape[1:])

    def _generator(self, device: torch.device | str | None) -> torch.Generator:
        place = torch.device(device) if device is not None else torch.get_default_device()
        if place not in self._generators:
            self._generators[place] = torch.Generator(place).manual_seed(self._seed)
        return self._generators[place]


def _made(mode: SharedDraws, func: Callable, args: Sequence, given: dict[str, Any]) -> Tensor | None:
    """``torch.rand(4, 3)``, ``torch.rand((4, 3))``, ``torch.randint(0, 5, (4,))``."""
    if given.get("out") is not None:
        return None
    bounds: tuple = ()
    if func is torch.randint:
        if "size" in given:
            bounds, shape = tuple(args), given.pop("size")
        elif args and isinstance(args[-1], Sequence):
            bounds, shape = tuple(args[:-1]), args[-1]
        else:
            return None
    else:
        shape = given.pop("size") if "size" in given else (args[0] if args and not isinstance(args[0], int) else args)
    each = mode._apart(tuple(shape))
    if each is None:
        return func(*bounds, tuple(shape), **given)
    generator = given.pop("generator", None) or mode._generator(given.get("device"))
    return mode._spread(func(*bounds, (mode._episodes * each, *shape[1:]), generator=generator, **given), each)


def _made_like(mode: SharedDraws, func: Callable, args: Sequence, given: dict[str, Any]) -> Tensor | None:
    like = args[0] if args else given["input"]
    each = mode._apart(like.shape)
    if each is None or not set(given) <= {"input", "dtype", "device"}:
        return None
    device, dtype = given.get("device") or like.device, given.get("dtype") or like.dtype
    shape = (mode._episodes * each, *like.shape[1:])
    return mode._spread(_LIKE[func](shape, dtype=dtype, device=device, generator=mode._generator(device)), each)


def _filled(mode: SharedDraws, func: Callable, args: Sequence, given: dict[str, Any]) -> Tensor | None:
    """``tensor.exponential_()`` and the like."""
    into, *options = args
    each = mode._apart(into.shape)
    if each is None:
        return None
    generator = given.pop("generator", None) or mode._generator(into.device)
    noise = func(into.new_empty((mode._episodes * each, *into.shape[1:])), *options, generator=generator, **given)
    return into.copy_(mode._spread(noise, each))


def _normal(mode: SharedDraws, func: Callable, args: Sequence, given: dict[str, Any]) -> Tensor | None:
    """``torch.normal(mean, std)``."""
    mean, std = (
        given.get(name, args[place] if len(args) > place else None) for place, name in ((0, "mean"), (1, "std"))
    )
    tensor = next((one for one in (mean, std) if isinstance(one, Tensor)), None)
    if tensor is None or given.get("out") is not None:
        return None
    shape = torch.broadcast_shapes(*(one.shape for one in (mean, std) if isinstance(one, Tensor)))
    each = mode._apart(shape)
    if each is None:
        return None
    generator = given.get("generator") or mode._generator(tensor.device)
    noise = torch.randn(
        (mode._episodes * each, *shape[1:]), dtype=tensor.dtype, device=tensor.device, generator=generator
    )
    return (0.0 if mean is None else mean) + (1.0 if std is None else std) * mode._spread(noise, each)


def _bernoulli(mode: SharedDraws, func: Callable, args: Sequence, given: dict[str, Any]) -> Tensor | None:
    chances = args[0] if args else given["input"]
    each = mode._apart(chances.shape)
    if each is None or len(args) > 1 or not set(given) <= {"input", "generator"}:
        return None
    generator = given.get("generator") or mode._generator(chances.device)
    shape = (mode._episodes * each, *chances.shape[1:])
    noise = torch.rand(shape, dtype=torch.float64, device=chances.device, generator=generator)
    return (mode._spread(noise, each) < chances).to(chances.dtype)


def _multinomial(mode: SharedDraws, func: Callable, args: Sequence, given: dict[str, Any]) -> Tensor | None:
    """A race of exponentials: the class that arrives first, of which torch's own draw of one sample is a case."""
    names = ("input", "num_samples", "replacement")
    options = dict(zip(names, args, strict=False)) | {name: given[name] for name in names if name in given}
    weights, count = options["input"], options["num_samples"]
    each = mode._apart(weights.shape[:1]) if weights.ndim == 2 else None
    if each is None or given.get("out") is not None:
        return None
    generator = given.get("generator") or mode._generator(weights.device)
    races = count if options.get("replacement", False) else 1
    noise = torch.empty(
        (mode._episodes * each, races, weights.shape[-1]), dtype=torch.float64, device=weights.device
    ).exponential_(generator=generator)
    first = weights[:, None].double() / mode._spread(noise, each)
    return first.argmax(-1) if races == count else first[:, 0].topk(count, -1).indices


_Draw = Callable[[SharedDraws, Callable, Sequence, dict[str, Any]], Tensor | None]
_DRAWS: dict[Callable, _Draw] = {
    **dict.fromkeys(_MAKE, _made),
    **dict.fromkeys(_LIKE, _made_like),
    **dict.fromkeys(_FILL, _filled),
    torch.normal: _normal,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    torch.multinomial: _multinomial,
    Tensor.multinomial: _multinomial,
}

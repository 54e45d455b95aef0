"""Where a policy draws, a replay of a call hands on what was drawn in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, set_interaction_type
from torch import Tensor, nn

from tdhook_rl.arguments.keys import is_tensordict
from tdhook_rl.errors import InputError
from tdhook_rl.policies.draws import Draw, sample_keys
from tdhook_rl.policies.undecorated import undecorated
from tdhook_rl.replaying.samples import Drawn, Replay, components, decided_action, is_point, latent_samples, samples
from tdhook_rl.replaying.start import Start
from tdhook_rl.sites.classes import Swapped
from tdhook_rl.sites.runtime import Runtime


class ReplayMixin(Swapped):
    """A module that draws: in a replay it hands on the stored sample and draws nothing."""

    _hooked_own_forward: Callable[..., Any]
    _hooked_runtime: Runtime
    _hooked_draw: Draw

    _hooked_lent: tuple[Any, Any] | None = None  # data, and the distribution that was made of it

    @classmethod
    def _namespace(cls, base: type[nn.Module]) -> dict[str, Any]:
        own = {"_hooked_own_forward": base.forward}
        if base in _as_they_are():
            own["get_dist"] = _lent_or(base.get_dist)  # type: ignore[attr-defined]
        return own

    def _hooked_draws(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        return undecorated(type(self)._hooked_own_forward, args)(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        runtime, draw = self._hooked_runtime, self._hooked_draw
        replay: Replay | None = runtime.replay
        data = args[0] if args else kwargs.get("tensordict")
        start: Start | None = runtime.start
        if replay is None or not is_tensordict(data):
            output = self._hooked_draws(args, kwargs)
            if start is not None:
                start.note_draw(self)
            if draw.slots and runtime.recording:
                note_samples(runtime, draw, output)
            return output
        output = self._hand_on(replay, data, args, kwargs)
        if start is not None:
            start.skip_draw(self)
        return output

    def _hand_on(self, replay: Replay, data: TensorDictBase, args: tuple, kwargs: dict[str, Any]) -> Any:
        draw = self._hooked_draw
        if isinstance(self, ProbabilisticTensorDictModule):
            distribution = self.get_dist(data)
            if any(one.module is self for one in replay.distributions) and not is_point(distribution):
                raise InputError(_several_draws(self, distribution))
            stored = samples(self, draw, distribution, data, replay)
            _require_own_shape(stored, components(self, distribution))
            replay.distributions.append(Drawn(self, distribution, stored))
            if draw.latent:
                again = latent_samples(self, draw, components(self, distribution), stored, replay)
                if again is None:
                    return self._hooked_draws(args, kwargs)
                stored = again
        else:
            stored = {key: replay.stored.get(draw.slots.get(key, key), None) for key in sample_keys(self)}
            replay.decided.update({key: data.get(key) for key in stored if data.get(key).is_floating_point()})
        if any(value is None for value in stored.values()):
            with set_interaction_type(InteractionType.DETERMINISTIC), self._lends(data, replay):
                data = self._hooked_draws(args, kwargs)
        else:
            for key, value in stored.items():
                # What comes after it may write over it in place, and what was drawn is read again.
                data.set(key, value.clone() if draw.slots else value)
        return data

    @contextmanager
    def _lends(self, data: TensorDictBase, replay: Replay) -> Iterator[None]:
        """A block in which the module does not make again the distribution that it has just made of this data."""
        made = replay.distributions[-1] if replay.distributions else None
        if made is None or made.module is not self or torch.compiler.is_compiling():
            yield
            return
        self.__dict__["_hooked_lent"] = data, made.distribution
        try:
            yield
        finally:
            del self.__dict__["_hooked_lent"]


@functools.cache
def _as_they_are() -> frozenset[type]:
    """Classes whose forward does nothing to the data before it makes a distribution of it."""
    from torchrl.modules import SafeProbabilisticModule

    return frozenset((ProbabilisticTensorDictModule, SafeProbabilisticModule))


def _lent_or(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def get_dist(self: ReplayMixin, tensordict: TensorDictBase) -> Any:
        lent = self._hooked_lent
        return lent[1] if lent is not None and lent[0] is tensordict else make(self, tensordict)

    return get_dist


class DecidedHook:
    """Forward hook of a module whose decision, which it does not draw, later modules write over."""

    def __init__(self, runtime: Runtime, draw: Draw) -> None:
        self.runtime = runtime
        self.draw = draw

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        runtime = self.runtime
        if not isinstance(output, TensorDictBase):
            return
        if runtime.replay is not None and runtime.replay.learning:
            decided_action(module, self.draw, output, runtime.replay)
        elif runtime.replay is None and runtime.recording:
            note_samples(runtime, self.draw, output)


def note_samples(runtime: Runtime, draw: Draw, output: TensorDictBase) -> None:
    """Keep, for the call under way, samples that its data may not hold in the end as they were drawn."""
    for key, slot in draw.slots.items():
        runtime.drawn[slot] = output.get(key).detach().clone()


def _several_draws(module: nn.Module, distribution: torch.distributions.Distribution) -> str:
    keys = ", ".join(repr(key) for key in sample_keys(module))
    return (
        f"one module draws {keys} (from a {type(distribution).__name__}) several times in one call of the policy, so "
        "it is not known which draw is stored, and what the others were: give each draw a module and a key of its "
        "own (the networks may be shared), or explain the module that draws by itself"
    )


def _require_own_shape(
    stored: Mapping[NestedKey, Tensor | None], parts: Mapping[NestedKey, torch.distributions.Distribution]
) -> None:
    """A stored sample of another shape would be broadcast against the distribution in silence."""
    if len(stored) != 1 or len(parts) != 1:
        return
    ((key, value),) = stored.items()
    (distribution,) = parts.values()
    if is_point(distribution):
        return
    rows, events = distribution.batch_shape, distribution.event_shape
    if value is not None and (value.shape[: len(rows)] != rows or value.ndim < len(rows) + len(events)):
        raise InputError(
            f"the stored {key!r} has shape {tuple(value.shape)}, but the policy draws it from a "
            f"{type(distribution).__name__} over {tuple(rows + events)} and changes it afterwards, so what was drawn "
            "is not known: explain a policy that stores its samples as they were drawn"
        )

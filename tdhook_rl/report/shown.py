"""Attributions as pictures: over frames, as bars where there are none, beside frames that the environment draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import reward_key
from tdhook_rl.errors import MissingKeyError, nearest
from tdhook_rl.report.episodes import Episode
from tdhook_rl.report.media import Animation, Image
from tdhook_rl.report.page.numbers import number
from tdhook_rl.report.pictures import bars, beside, is_picture, overlays, robust_scale
from tdhook_rl.report.readings import Readings, input_of, spread_out

__all__ = ["Shown"]

Key = tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """Pictures of the attributions in a batch.

    Args:
        readings: of the batch.
        step: environment frames so far, for captions.
        frames_key: frames to show attributions over; the input itself where it is a picture.
        render: draws the states of some rows, ``(rows, height, width, 3)``; they are shown beside bars.
    """

    readings: Readings
    step: int
    frames_key: NestedKey | None = None
    render: Callable[[TensorDictBase], Tensor] | None = None

    def images(self, count: int) -> dict[str, Image]:
        """For each attribution of an input the first rows of as many parts of the batch.

        Raises:
            MissingKeyError: if the batch has no such frames.
        """
        found: dict[str, Image] = {}
        for key, source in self._explained():
            rows = self.readings.rows(key)
            chosen = torch.linspace(0, len(rows.values) - 1, min(count, len(rows.values))).round().long()
            captions = [self._caption(int(place)) for place in rows.places[chosen]]
            kind, pictures = self._pictures(key, source, chosen, captions, one_order=False)
            name = self.readings.of_input(key)
            found |= {f"{kind}.{name}.{one}": Image(made, captions[one]) for one, made in enumerate(pictures)}
        return found

    def animation(self, known: Sequence[Episode], most: int = 64) -> dict[str, Animation]:
        """The longest episode in the batch, each step as a picture; none where there are no frames."""
        found = {}
        for key, source in self._explained():
            rows = self.readings.rows(key)
            if self.render is None and self._frames(source, rows.values.shape[1:]) is None:
                continue
            at = torch.full((self.readings.data.numel(),), -1)
            at[rows.places] = torch.arange(len(rows.places))
            explained = [places[at[places] >= 0] for places in (torch.from_numpy(one.places) for one in known)]
            places = max(explained, key=len, default=torch.empty(0, dtype=torch.long))[:most]
            if len(places) > 1:
                captions = [self._caption(int(place), step) for step, place in enumerate(places)]
                _, pictures = self._pictures(key, source, at[places], captions, one_order=True)
                found[f"episode.{self.readings.of_input(key)}"] = Animation(pictures, fps=6)
        return found

    # ------------------------------------------------------------------ inner

    def _explained(self) -> list[tuple[Key, NestedKey]]:
        """Attributions of an input that have rows to show, and that input."""
        found = []
        for key in self.readings.attributions:
            source, rows = input_of(self.readings.policy, key), self.readings.rows(key)
            if source is not None and len(rows.values) and rows.values.ndim >= 2:
                found.append((key, source))
        return found

    def _pictures(
        self, key: Key, source: NestedKey, chosen: Tensor, captions: Sequence[str], one_order: bool
    ) -> tuple[str, np.ndarray]:
        """A picture of one size for each chosen row of a result, on one scale; and what kind it is.

        With ``one_order`` bars stay in their places from one picture to the next.
        """
        rows = self.readings.rows(key)
        places, values = rows.places[chosen], rows.values[chosen]
        scale = robust_scale(spread_out(rows.values, 64).float().numpy())
        frames = self._frames(source, values.shape[1:])
        if frames is not None:
            return "overlay", overlays(frames[places], values, captions, scale=scale)
        drawn = None if self.render is None else self.render(self.readings.data.reshape(-1)[places])
        largest = values.flatten(1).abs().float().mean(0).argsort(descending=True, stable=True)[:10]
        order = largest.tolist() if one_order else None
        pictures = []
        for at, (place, value) in enumerate(zip(places.tolist(), values, strict=True)):
            labels = self._labels(source, place, value.shape)
            picture = bars(value, labels, captions[at], scale=scale, order=order)
            pictures.append(picture if drawn is None else beside(drawn[at], picture))
        return "bars", np.stack(pictures)

    def _frames(self, source: NestedKey, shape: torch.Size) -> Tensor | None:
        """The frames that an attribution is shown over, a row of the batch each."""
        data, batch = self.readings.data, self.readings.data.ndim
        if self.frames_key is not None:
            frames = data.get(self.frames_key, None)
            if frames is None:
                raise MissingKeyError(
                    f"frames_key= names {self.frames_key!r}, which the batch lacks; "
                    f"{nearest(str(self.frames_key), map(str, data.keys(True, True)))}"
                )
            return frames.reshape(-1, *frames.shape[batch:]) if is_picture(shape) else None
        observed = data.get(source)
        if not is_picture(observed.shape[batch:]) or len(shape) not in (2, 3):
            return None
        return observed.reshape(-1, *observed.shape[batch:])

    def _labels(self, source: NestedKey, place: int, shape: torch.Size) -> list[str]:
        """Each feature with what it was in a row."""
        data = self.readings.data
        names = self.readings.features.of(source, shape) or [str(number) for number in range(shape.numel())]
        observed = data.get(source).detach()
        seen = observed.reshape(-1, *observed.shape[data.ndim :])[place].reshape(-1)
        if len(seen) != len(names):
            return names
        return [f"{name} = {number(value)}" for name, value in zip(names, seen.tolist(), strict=True)]

    def _caption(self, place: int, step: int | None = None) -> str:
        data = self.readings.data
        words = [f"frame {self.step}" if step is None else f"step {step}"]
        for key, word in (("action", "action"), ("state_value", "value"), (reward_key(data), "reward")):
            value = data.get(key, None)
            if isinstance(value, Tensor) and value.numel() and value.numel() % data.numel() == 0:
                row = value.detach().reshape(data.numel(), -1)[place]
                if len(row) == 1:
                    words.append(f"{word} {number(float(row))}")
                elif key == "action" and not row.is_floating_point() and int(row.sum()) == 1:
                    words.append(f"{word} {int(row.long().argmax())}")
        return " · ".join(words)

"""Methods as an outsider writes them after docs/write_your_own_method.md: by public imports only, and right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook_rl import Compose, Saliency, Scheduled
from tdhook_rl.method import Binder, BoundMethod, Method
from tdhook_rl.testing import SITES, sample_data

__all__ = ["RIGHT"]

FIRST, SECOND = SITES


class Reading(BoundMethod):
    """What a function makes of the output of a site, under a key."""

    reads_forward = True

    def __init__(self, slot: str, site: str, key: tuple[str, ...], function: Callable[[Tensor], Tensor]) -> None:
        self.slot, self.site, self.function = slot, site, function
        self.result_keys = (key,)

    def compute(self, call) -> dict[tuple[str, ...], Tensor]:
        return {self.result_keys[0]: self.function(call.captured(self.slot, self.site))}


def share_of_silent(values: Tensor) -> Tensor:
    return (values.abs() < 0.1).to(values).mean(-1)


@dataclass(frozen=True, eq=False)
class Silence(Method):
    """Observes: how many units of a module are silent."""

    path: str

    def bind(self, binder: Binder) -> BoundMethod:
        site = binder.site(self.path)
        return Reading(binder.capture(site), site.name, ("silence", site.name), share_of_silent)


def loudest(values: Tensor) -> Tensor:
    return values.argmax(-1)


@dataclass(frozen=True, eq=False)
class Loudest(Method):
    """Observes, in integers, under a key of several parts that the user chooses."""

    path: str
    key: tuple[str, ...] = ("units", "of", "interest")

    def bind(self, binder: Binder) -> BoundMethod:
        site = binder.site(self.path)
        return Reading(binder.capture(site), site.name, self.key, loudest)


def length(values: Tensor) -> Tensor:
    return values.norm(dim=-1)


@dataclass(frozen=True, eq=False)
class InputLength(Method):
    """Observes what several modules are given."""

    pattern: str

    def bind(self, binder: Binder) -> BoundMethod:
        return Lengths({binder.capture_input(site): site.name for site in binder.sites(self.pattern)})


class Lengths(BoundMethod):
    reads_forward = True

    def __init__(self, sites: dict[str, str]) -> None:
        self.sites = sites
        self.result_keys = tuple(("length", site) for site in sites.values())

    def compute(self, call) -> dict[tuple[str, ...], Tensor]:
        return {("length", site): length(call.captured(slot, site)) for slot, site in self.sites.items()}


@dataclass(frozen=True, eq=False)
class Distance(Method):
    """Reads an entry of the data beside the policy's inputs."""

    key: str = "goal"

    def bind(self, binder: Binder) -> BoundMethod:
        return BoundDistance(self.key)


class BoundDistance(BoundMethod):
    replays = True  # so that it is given the inputs
    result_keys = (("distance", "goal"),)

    def __init__(self, key: str) -> None:
        self.reads = [key]

    def compute(self, call) -> dict[tuple[str, ...], Tensor]:
        return {("distance", "goal"): length(call.inputs["observation"] - call.data[self.reads[0]])}


@dataclass(frozen=True, eq=False)
class Spread(Method):
    """Explains around another method: how far its attributions differ between noisy inputs."""

    method: Method = field(default_factory=Saliency)
    samples: int = 3

    def bind(self, binder: Binder) -> BoundMethod:
        return BoundSpread(self.method.bind(binder), self.samples)


class BoundSpread(BoundMethod):
    replays = True

    def __init__(self, bound: BoundMethod, samples: int) -> None:
        self.bound, self.samples = bound, samples
        self.when, self.reads, self.result_keys = bound.when, bound.reads, bound.result_keys

    def compute(self, call) -> dict[tuple[str, ...], Tensor]:
        found = []
        for seed in range(self.samples):
            generator = torch.Generator().manual_seed(seed)
            x = call.inputs["observation"]
            noise = torch.randn(x.shape[-1:], generator=generator).to(x)
            found.append(self.bound.compute(call.given({"observation": x + 0.1 * noise})))
        return {key: torch.stack([one[key] for one in found]).std(0) for key in found[0]}


@dataclass(frozen=True, eq=False)
class Slope(Method):
    """Explains by replays of its own, for stored batches only: how each logit answers to a louder input."""

    step: float = 1e-2

    def bind(self, binder: Binder) -> BoundMethod:
        return BoundSlope(self.step)


class BoundSlope(BoundMethod):
    replays = True
    when = "batch"
    result_keys = (("slope", "logits"),)

    def __init__(self, step: float) -> None:
        self.step = step

    def compute(self, call) -> dict[tuple[str, ...], Tensor]:
        x = call.inputs["observation"]
        up, down = (self.logits(call, (1 + sign * self.step) * x) for sign in (1, -1))
        return {("slope", "logits"): (up - down) / (2 * self.step)}

    @torch.no_grad()
    def logits(self, call, x: Tensor) -> Tensor:
        return call.given({"observation": x}).replay().outputs["logits"]


@dataclass(frozen=True, eq=False)
class Rarity(Method):
    """A row is compared with the others of its batch, and it says so."""

    path: str
    by_row = False

    def bind(self, binder: Binder) -> BoundMethod:
        site = binder.site(self.path)
        return BoundRarity(binder.capture(site), site.name, ("rarity", site.name), length)


class BoundRarity(Reading):
    whole_batch = True

    def compute(self, call) -> dict[tuple[str, ...], Tensor]:
        values = call.captured(self.slot, self.site)
        rows = values.reshape(-1, values.shape[-1])
        return {self.result_keys[0]: length(values - rows.mean(0))}


@dataclass(frozen=True, eq=False)
class Damp(Method):
    """Intervenes by a number that may be changed while the policy runs."""

    path: str
    factor: float = 0.5
    observes = False

    def bind(self, binder: Binder) -> None:
        name = binder.control(f"damp.{self.path}", self.factor)
        binder.intervene(self.path, Damping(binder.controls, name))


class Damping:
    def __init__(self, controls, name: str) -> None:
        self.controls, self.name = controls, name

    def __call__(self, rows: Tensor) -> Tensor:
        return rows * self.controls[self.name].to(rows)


@dataclass(frozen=True, eq=False)
class Swap(Method):
    """Intervenes in several modules, and writes what one of them was before."""

    pattern: str
    observes = False

    def bind(self, binder: Binder) -> BoundMethod:
        first = binder.sites(self.pattern)[0]
        slot = binder.capture(first)
        binder.intervene(self.pattern, turned)
        return Reading(slot, first.name, ("before", first.name), torch.clone)


def turned(rows: Tensor) -> Tensor:
    return rows.flip(-1)


def with_more(*batch: int) -> TensorDict:
    """What the sample policy reads, a goal, and which rows are of interest."""
    data = sample_data(*batch)
    data["goal"] = torch.ones_like(data["observation"])
    data["interesting"] = data["observation"][..., 0] > 0
    return data


RIGHT: dict[str, Callable[[], Method]] = {
    "observes": lambda: Silence(FIRST),
    "observes integers under keys of its own": lambda: Loudest(SECOND),
    "observes inputs of several modules": lambda: InputLength(r"module\.0\.module\.[024]"),
    "reads the data": Distance,
    "explains around another": Spread,
    "explains batches by replays of its own": Slope,
    "looks at the whole batch": lambda: Rarity(FIRST),
    "intervenes by a control": lambda: Damp(FIRST),
    "intervenes and shows what was before": lambda: Swap("|".join(SITES).replace(".", r"\.")),
    "is scheduled": lambda: Scheduled(Silence(FIRST), where="interesting"),
    "is one of several": lambda: Compose(Damp(SECOND), Silence(SECOND), Spread()),
}

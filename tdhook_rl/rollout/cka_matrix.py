"""Checkpoints by checkpoints and sites by sites: how alike what they make of the same states is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.files.checkpoints import load_into
from tdhook_rl.latent.representation_similarity import CkaEstimator
from tdhook_rl.latent.similarity_spread import similarity_intervals
from tdhook_rl.policies.tying import whole_copy
from tdhook_rl.rollout.fixed_states import FixedStates
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.interval import none


@dataclass(frozen=True)
class CkaMatrix:
    """Debiased linear CKA of each site of each checkpoint with each other.

    Attributes:
        checkpoints: their names, C of them.
        sites: their paths, S of them.
        values: ``(C, S, C, S)``; NaN where an activation is constant, or not finite.
        states: how many states it was measured in.
        low, high: the 95% limits of the values, of the same shape; NaN where there are none.
        groups: in how many independent groups the states are: episodes, where these are known.
        words: why a value has no limits, where one has none.
    """

    checkpoints: list[str]
    sites: list[str]
    values: Tensor
    states: int
    low: Tensor | None = None
    high: Tensor | None = None
    groups: int = 0
    words: str = ""

    def interval(self, one: tuple[str, str], other: tuple[str, str]) -> Interval:
        """The similarity of a layer of a checkpoint with one of another, with its interval.

        Args:
            one, other: a checkpoint and a site.

        Raises:
            InputError: for what was not looked at.
        """
        place: list[int] = []
        for checkpoint, site in (one, other):
            place += [_place(self.checkpoints, checkpoint, "checkpoint"), _place(self.sites, site, "site")]
        shape = {"confidence": 0.95, "groups": self.groups, "rows": self.states}
        estimate = float(self.values[tuple(place)])
        low, high = (torch.nan if part is None else float(part[tuple(place)]) for part in (self.low, self.high))
        if not math.isfinite(low + high):
            return none(estimate, self.words or "none was found", **shape)
        return Interval(estimate=estimate, low=low, high=high, method="jackknife by group", **shape)

    def at(self, site: str, other: str | None = None) -> Tensor:
        """Checkpoints by checkpoints, ``(C, C)``.

        Args:
            site: of the rows.
            other: the site of the columns; the same unless given.

        Raises:
            InputError: for a site that was not looked at.
        """
        one, two = (_place(self.sites, name, "site") for name in (site, site if other is None else other))
        return self.values[:, one, :, two]

    def within(self, checkpoint: str, other: str | None = None) -> Tensor:
        """Sites by sites, ``(S, S)``.

        Args:
            checkpoint: of the rows.
            other: the checkpoint of the columns; the same unless given.

        Raises:
            InputError: for a checkpoint that was not looked at.
        """
        names = (checkpoint, checkpoint if other is None else other)
        one, two = (_place(self.checkpoints, name, "checkpoint") for name in names)
        return self.values[one, :, two]


@checked
def cka_matrix(
    policy: nn.Module,
    checkpoints: Mapping[str, Any] | Sequence[Any],
    sites: Sequence[str] | str,
    states: TensorDictBase,
    *,
    rows: int = 512,
    groups: NestedKey | None = None,
    trajectories: bool | None = None,
) -> CkaMatrix:
    """Compare the layers of checkpoints in the same states: one forward pass of each checkpoint.

    1: equal up to rotation, scale and offset; about 0, and possibly below: nothing in common (Kornblith et al. 2019,
    debiased as by Nguyen et al. 2020). A kernel matrix of states by states is held for each site of each checkpoint.

    Args:
        policy: the network whose checkpoints they are; it is copied and not touched.
        checkpoints: by name, or in a row: state dicts, modules, or files of weights.
        sites: the layers: paths or patterns.
        states: to compare them in, of any batch shape, at least 4.
        rows: how many of them are taken, evenly spread; of those that recur, the first.
        groups: the key of the group of each state; the episode, where there is one, unless given. Similarities are of
            states of different groups, as of :meth:`CkaEstimator.interval`; below four groups of all states, which is
            too high, without intervals.
        trajectories: as of :class:`NetworkDiagnostics`.

    Raises:
        InputError: for fewer than 4 states, no checkpoints, or weights that are not the network's.
        ArtifactError: for files that hold no weights.

    Example:
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import FC2, make_actor
        >>> first, second = make_actor(), make_actor()
        >>> states = CueCorners(batch_size=[8]).rollout(20, first, break_when_any_done=False)
        >>> found = cka_matrix(first, {"one": first, "again": first.state_dict(), "other": second}, [FC2], states)
        >>> found.at(FC2).shape, bool(found.at(FC2)[0, 1] > 0.999 > found.at(FC2)[0, 2])
        (torch.Size([3, 3]), True)
        >>> found.interval(("one", FC2), ("other", FC2)).known
        True
    """
    named = (
        dict(checkpoints) if isinstance(checkpoints, Mapping) else {str(n): one for n, one in enumerate(checkpoints)}
    )
    if not named:
        raise InputError("checkpoints= names what is to be compared: there is none")
    own = whole_copy(policy, "cka_matrix loads checkpoints into")
    fixed = FixedStates(own, sites, rows=rows, groups=groups, trajectories=trajectories)
    fixed.keep(states)
    clouds: list[Tensor | None] = []
    for name, checkpoint in named.items():
        load_into(own, checkpoint, name)
        outputs = fixed.run()
        if fixed.distinct is not None:
            outputs = outputs[fixed.distinct]
        if len(outputs) < 4:
            raise InputError(f"CKA without a bias needs 4 different states, and there are {len(outputs)}")
        for site in fixed.sites:
            value = outputs.get(("cache", site)).flatten(1).double()
            clouds.append(value.clone() if bool(torch.isfinite(value).all()) else None)
    count = len(outputs)
    numbers = torch.full((3, len(clouds), len(clouds)), torch.nan, dtype=torch.float64)
    usable = [place for place, cloud in enumerate(clouds) if cloud is not None]
    held, words = count, ""
    if usable:
        estimator = CkaEstimator(debiased=True)
        compared = fixed.groups
        if compared is not None and fixed.distinct is not None:
            compared = compared[fixed.distinct.to(compared.device)]
        found = similarity_intervals([estimator.kernel_matrix(clouds[place]) for place in usable], compared)  # type: ignore[arg-type]
        for row, of_row in zip(usable, found, strict=True):
            for column, one in zip(usable, of_row, strict=True):
                numbers[:, row, column] = torch.tensor([one.estimate, one.low, one.high])
        held = found[0][0].groups
        unknown = (one for of_row in found for one in of_row if math.isfinite(one.estimate) and not one.known)
        words = next((one.words for one in unknown), "")
    shape = (len(named), len(fixed.sites)) * 2
    values, low, high = (part.reshape(shape) for part in numbers)
    return CkaMatrix(list(named), fixed.sites, values, count, low=low, high=high, groups=held, words=words)


def _place(names: list[str], name: str, what: str) -> int:
    if name not in names:
        raise InputError(f"the {what} {name!r} was not looked at; {nearest(name, names)}")
    return names.index(name)

"""What single components are needed for: they are taken out, and decisions, values and returns are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torchrl.envs import EnvBase

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.arguments.tensors import plain_number
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.sites.numbers import in_dtype, is_whole
from tdhook_rl.statistics import Interval, grouped_mean, paired_difference
from tdhook_rl.statistics.cells import Cells, shown, words_of
from tdhook_rl.statistics.interval import none
from tdhook_rl.sweeps.causal.bench import Bench
from tdhook_rl.sweeps.causal.components import Components, components_of, passes
from tdhook_rl.sweeps.causal.measures import Measures
from tdhook_rl.sweeps.causal.metrics import Metric
from tdhook_rl.sweeps.causal.pairs import Pairs, pairs_of
from tdhook_rl.sweeps.causal.returns import Held, returns_of

#: What a component is replaced by: nothing, its mean over states, or what it is in another state.
Replacement = Literal["zero", "mean", "resample"]
REPLACEMENTS = ("zero", "mean", "resample")
#: The columns, in the order by which components are ranked where the policy has several.
MEASURES = ("metric", "kl", "moved", "changed", "value", "returned")


@dataclass(frozen=True, kw_only=True)
class AblationCell:
    """One component, taken out.

    Args:
        site: the path of the module.
        unit: its number there: of the unit, the channel, or the part.
        kl: the divergence of the action distribution from that of the whole policy, in nats.
        moved: how far a deterministic action of real numbers moves.
        changed: the share of states in which the greedy action is another one.
        value: the change of the value (of a Q-network: of the whole policy's greedy action).
        metric: the change of the metric that was given.
        returned: the change of the return of episodes (of agents their mean, of several rewards the sum), each beside
            its own of the whole policy.
        size: the mean size of the change that it is ranked by: 0 of one that does nothing, and never below. Of many
            components the first is also the one that these states favour.
        size_interval: the same with its interval by group of states.
    """

    site: str
    unit: int
    kl: Interval | None = None
    moved: Interval | None = None
    changed: Interval | None = None
    value: Interval | None = None
    metric: Interval | None = None
    returned: Interval | None = None
    size: float
    size_interval: Interval | None = None

    def numbers(self) -> dict[str, Any]:
        """All of it as numbers and words; intervals with their limits."""
        found: dict[str, Any] = {"site": self.site, "unit": self.unit, "size": self.size}
        for name in ("size_interval", *MEASURES):
            one: Interval | None = getattr(self, name)
            if one is not None:
                name = name.removesuffix("_interval")
                found |= {name: one.estimate, f"{name}_low": one.low, f"{name}_high": one.high}
        return found | {"words": words_of(self)}


class AblationTable(Cells[AblationCell]):
    """Components, one in each row, from the one that is needed most on.

    Args:
        cells: the rows.
        replaced: what components were replaced by.
        ranked: by what they are ranked.
        changes: by measure ``(components, states)``, in the order of ``components``.
        components: which there are.
        words: what one has to know.

    Attributes:
        replaced, ranked, changes, components, words: as given.
    """

    def __init__(
        self,
        cells: Sequence[AblationCell],
        *,
        replaced: str,
        ranked: str,
        changes: Mapping[str, Tensor],
        components: Components,
        words: str,
    ) -> None:
        self.replaced, self.ranked, self.changes = replaced, ranked, changes
        self.components, self.words = components, words
        super().__init__(sorted(cells, key=lambda cell: -cell.size))
        self._of = {(cell.site, cell.unit): cell for cell in self}

    def __getitem__(self, key: Any) -> Any:
        """The cell of ``(site, unit)``; or cells by number, from the one that is needed most on.

        Raises:
            InputError: for a component that there is not.
        """
        key = plain_number(key)
        return super().__getitem__(key) if isinstance(key, (int, slice)) else self.components.cell(self._of, key)

    def ranking(self, measure: str) -> list[AblationCell]:
        """The cells from the one that changes a measure most on, by the mean size over states (of a return: the mean).

        Raises:
            InputError: for a measure that the table does not have.
        """
        known = [name for name in MEASURES if any(getattr(cell, name) is not None for cell in self)]
        if measure not in known:
            raise InputError(f"the table has no measure {measure!r}; {nearest(measure, known)}")
        if measure == "returned":
            own = [cell for cell in self if cell.returned is not None]
            return sorted(own, key=lambda cell: -abs(float(cell.returned)))  # type: ignore[arg-type]
        sizes = dict(zip(self.components.names, self.changes[measure].abs().nanmean(-1).tolist(), strict=True))
        return sorted(self, key=lambda cell: -sizes[cell.site, cell.unit])

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """The heads, and the rows as they are shown: the first 20."""
        names = [name for name in MEASURES if any(getattr(cell, name) is not None for cell in self)]
        rows = [
            [cell.site, str(cell.unit), _size(cell), *(shown(getattr(cell, name), ".3g") for name in names)]
            for cell in self[:20]
        ]
        return ["site", "unit", "size", *names], rows

    def __str__(self) -> str:
        said = [f"one component at a time, replaced by: {self.replaced}; ranked by: {self.ranked}"]
        said += [self.words] if self.words else []
        more = [f"and {len(self) - 20} more"] if len(self) > 20 else []
        return "\n".join([*said, super().__str__(), *more])


@checked
def ablate_units(
    policy: nn.Module,
    states: TensorDictBase,
    sites: str | Sequence[str],
    *,
    by: Replacement = "mean",
    metric: Metric = None,
    parts: Mapping[str, int] | None = None,
    env: EnvBase | None = None,
    episodes: int = 8,
    most: int = 8,
    max_steps: int = 200,
    groups: NestedKey | Tensor | None = None,
    units: int | Mapping[str, int] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
) -> AblationTable:
    """Take every unit of every site out, one at a time, and rank them by what changes.

    Measured is what the policy has: the divergence of its action distribution, how far a deterministic action moves, in
    how many states the greedy one is another, the change of its value; and, with ``env``, the change of the return,
    without each of the components that rank first.

    Args:
        policy: the policy, a value or Q-network, or any module; not hooked. It is run in eval mode and not touched.
        states: of any batch shape.
        sites: module paths or patterns, of which every unit is looked at.
        by: what a unit is replaced by: ``"zero"``; ``"mean"``, over the states; ``"resample"``, what it is in another
            of the states, chosen at random.
        metric: what components are ranked by instead, as of :func:`patch_sites`: a target, a key, or a function of the
            outputs.
        parts: as of :func:`attribution_patching`: heads, say.
        env: an environment to find returns in, with the policy's greedy actions.
        episodes: how many, with the same seeds for the whole policy and without each component. Of an environment with
            a batch size each of its rows is one, and it is reset as often as it takes.
        most: how many components, from the first on.
        max_steps: the longest an episode may last.
        groups: what is drawn anew for intervals: the key of an entry of the states, or the groups.
        units: which axis holds the units of a site, where its modules do not tell.
        chunk_size: rows of one pass.
        seed: of the states at random and of the episodes.

    Returns:
        a row for each component.

    Raises:
        InputError: for a policy of which nothing can be compared without ``metric``, or a wrong number.
        SiteError, InputError: as of :func:`attribution_patching`.

    Example:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> _ = net[2].weight.data.copy_(torch.tensor([[0.0, 0.1, 5.0, 0.0]]))
        >>> critic = TensorDictModule(net, ["observation"], ["state_value"])
        >>> table = ablate_units(critic, TensorDict({"observation": torch.randn(20, 3)}, batch_size=20), "module.1")
        >>> [cell.unit for cell in table[:2]], table.ranked
        ([2, 1], 'value')
    """
    if by not in REPLACEMENTS:
        raise InputError(f"by= is 'zero', 'mean' or 'resample', got {by!r}; {nearest(str(by), REPLACEMENTS)}")
    for name, number in (("episodes", episodes), ("most", most), ("max_steps", max_steps)):
        if number < 1:
            raise InputError(f"{name}= is a number, at least 1; got {number}")
    with Bench(policy, sites, units=units, chunk_size=chunk_size) as bench:
        found = pairs_of(bench, states, states, groups)
        replacing = _Replacing(bench, found, by, parts, seed)
        changes = replacing.changes(metric)
        ranked = next(name for name in MEASURES if name in changes)
        sizes = changes[ranked].abs().nanmean(-1).nan_to_num(0.0)
        returned: dict[int, Interval] = {}
        if env is not None:
            options = {"episodes": episodes, "max_steps": max_steps, "seed": seed}
            with bench.acting({}) as whole:
                before = returns_of(whole, env, **options)
            for place in sizes.argsort(descending=True)[:most].tolist():
                with bench.acting(replacing.held(place)) as without:
                    returned[place] = paired_difference(before, returns_of(without, env, **options))
        cells = []
        for place, (site, unit) in enumerate(replacing.components.names):
            own = {name: _mean(name, values[place], found.groups) for name, values in changes.items()}
            size = float(sizes[place])
            sized = _sized(size, ranked, changes[ranked][place].abs(), found.groups)
            cells.append(
                AblationCell(site=site, unit=unit, size=size, size_interval=sized, returned=returned.get(place), **own)
            )
        return AblationTable(
            cells, replaced=by, ranked=ranked, components=replacing.components,
            words="; ".join(one for one in (replacing.words, _left_out(found, changes)) if one),
            changes={name: found.among_all(values) for name, values in changes.items()},
        )  # fmt: skip


def _left_out(states: Pairs, changes: Mapping[str, Tensor]) -> str:
    lost = int((~states.usable).sum())
    parts = [f"{lost} of {len(states.usable)} states left out: NaN, infinite, or padding"] if lost else []
    for name, values in changes.items():
        odd = int((~torch.isfinite(values)).any(0).sum())
        parts += [f"{name} is not finite in {odd} states, where it is left out"] if odd else []
    return "; ".join(parts)


def _mean(name: str, values: Tensor, groups: Tensor | None) -> Interval:
    usable = torch.isfinite(values)
    kept, own = values[usable], None if groups is None else groups[usable]
    if not len(kept):
        raise InputError(f"{name} is finite in none of the {len(values)} states: give metric=")
    return grouped_mean(kept, own, method="t", bounds=(0.0, 1.0) if name == "changed" else None)


def _sized(size: float, name: str, sizes: Tensor, groups: Tensor | None) -> Interval:
    if bool(sizes.isinf().any()):  # it is ranked first by these states, which no mean of the others tells
        return none(size, "infinite in some states", confidence=0.95, groups=len(sizes), rows=len(sizes))
    return _mean(name, sizes, groups)


def _size(cell: AblationCell) -> str:
    return f"{cell.size:.3g}" if cell.size_interval is None else shown(cell.size_interval, ".3g")


def _mean_of(value: Tensor, site: str) -> Tensor:
    """The mean over states, ``(1, ...)``, of each entry over those in which it is finite, if it is in any."""
    mean = (value.double() if is_whole(value) else value).mean(0, keepdim=True)
    finite = value.isfinite()
    if not bool(finite.all()):
        mean = torch.where(finite.any(0), value.masked_fill(~finite, 0).sum(0) / finite.sum(0), mean)
    return in_dtype(mean, value, "the mean over states (by='mean')", site)


def _differ(finite: Tensor) -> bool:
    """Whether entries are finite in some states only."""
    return bool((finite.any(0) & ~finite.all(0)).any())


class _Replacing:
    """What components are replaced by, and what changes."""

    def __init__(
        self, bench: Bench, states: Pairs, by: Replacement, parts: Mapping[str, int] | None, seed: int
    ) -> None:
        self._bench, self._states, self._by, self._seed = bench, states, by, seed
        self._rows = bench.rows_at_once(states.clean)
        kept: dict[str, list[list[Tensor]]] = {site: [] for site in bench.sites}
        for some in states.parts(self._rows):
            seen = bench.look(some.clean)
            for site in bench.sites:
                kept[site].append(list(seen.kept[site]))
        self.components = components_of(bench, seen, some.clean, parts)
        self._kept = {site: [torch.cat(values) for values in zip(*own, strict=True)] for site, own in kept.items()}
        draws = torch.Generator().manual_seed(stream_of(seed, "other states"))
        order = torch.randperm(len(states), generator=draws)
        self._other = torch.empty_like(order)
        self._other[order] = order.roll(1)  # another state for each, unless there is but one
        self.words = ""
        if by == "mean":
            odd = [site for site, own in self._kept.items() if any(_differ(one.isfinite()) for one in own)]
            where = "the mean at {} is of the states in which it is finite"
            self.words = where.format(", ".join(map(repr, odd))) if odd else ""

    def changes(self, metric: Metric) -> dict[str, Tensor]:
        """By measure ``(components, states)``."""
        parts: dict[str, list[Tensor]] = {}
        single, place = self.components.single(torch.arange(len(self.components))), 0
        for some in self._states.parts(self._rows):
            rows = slice(place, place + len(some))
            place += len(some)
            measures = Measures(self._bench.look(some.clean, []), metric, some.actions)
            instead = {site: [self._instead(value, rows, site) for value in own] for site, own in self._kept.items()}
            ran = passes(self._bench, some.clean, self.components, single, instead)
            found = [measures(one) for one in ran]
            for name in found[0]:
                parts.setdefault(name, []).append(torch.cat([one[name] for one in found]))
        return {name: torch.cat(values, -1) for name, values in parts.items()}

    def _instead(self, value: Tensor, rows: slice, site: str) -> Tensor:
        if self._by == "resample":
            return value[self._other[rows]]
        return torch.zeros_like(value[:1]) if self._by == "zero" else _mean_of(value, site)

    def held(self, place: int) -> dict[str, Held]:
        """What holds one component while the policy acts."""
        row = self.components.single(torch.tensor([place]))
        ((site, chosen),) = ((site, part) for site, part in self.components.split(row).items() if bool(part.any()))
        units = self.components.in_units(chosen, site)[0]
        values = self._kept[site]
        if self._by != "resample":
            values = [self._instead(value, slice(None), site) for value in values]
        return {site: Held(site, values, self.components.axes[site], units, self._seed)}

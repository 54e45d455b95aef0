"""What every unit of every site would bring over if it were put in: estimated by one backward pass, and measured."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.arguments.tensors import plain_number
from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.errors import InputError, TargetError
from tdhook_rl.sites.numbers import difference, first_order
from tdhook_rl.sweeps.causal.bench import Bench, Ran
from tdhook_rl.sweeps.causal.components import Components, components_of, passes
from tdhook_rl.sweeps.causal.gap import Gap
from tdhook_rl.sweeps.causal.metrics import Metric, Reading
from tdhook_rl.sweeps.causal.pairs import Pairs, Way, base_and_source, pairs_of, require_way
from tdhook_rl.sweeps.causal.unit_table import UnitTable

#: How many components are patched to see how good the estimates are: half of them the largest, half at random.
COMPARED = 32


@checked
def attribution_patching(
    policy: nn.Module,
    clean: TensorDictBase,
    corrupt: TensorDictBase,
    sites: str | Sequence[str],
    *,
    metric: Metric = None,
    way: Way = "denoising",
    compare: int | Literal["all"] = COMPARED,
    parts: Mapping[str, int] | None = None,
    groups: NestedKey | Tensor | None = None,
    units: int | Mapping[str, int] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
) -> UnitTable:
    """Attribution patching: what patching each unit would do, to first order (Nanda 2023; Syed, Rager & Conmy 2023).

    The gradient of the metric at a unit, in the run that is patched, times the difference that patching it makes there,
    summed over places and runs of the module: of all units of all sites by one forward pass of either run and one
    backward pass. Where the network is linear in the unit this is exact (unless one run of a module feeds another, and
    ``"@all"`` are named); how far it is off elsewhere is measured, by patching some of them: ``table.agreement``.

    Args:
        policy, clean, corrupt, metric, way, groups, chunk_size: as of :func:`patch_sites`; the metric has to have a
            gradient.
        sites: module paths or patterns, of which every unit is looked at.
        compare: how many components are patched as well, half of them those with the largest estimates, half at random;
            or ``"all"``.
        parts: by site, into how many components of equal size its units are divided, in order: such as the heads of an
            attention at the module that gives their values side by side. Each unit (of maps each channel) unless given.
        units: which axis holds the units of a site, where its modules do not tell.
        seed: of the choice at random.

    Returns:
        a row for each component, from the largest on.

    Raises:
        TargetError: if no gradient reaches any site from the metric.
        InputError, SiteError: as of :func:`patch_sites`; for a number of parts that does not divide the units.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> clean, corrupt = (TensorDict({"input": torch.randn(20, 3)}, batch_size=20) for _ in range(2))
        >>> table = attribution_patching(net, clean, corrupt, ["0", "1"], compare="all")
        >>> len(table), table.agreement.measured, bool(abs(table.grid("1").sum() - 1) < 1e-4)
        (16, 16, True)
    """
    compare = plain_number(compare)
    if compare != "all" and (not isinstance(compare, int) or isinstance(compare, bool) or compare < 0):
        raise InputError(f"compare= is a number of components, or 'all'; got {compare!r}")
    return _table(policy, clean, corrupt, sites, metric, way, True, compare, parts, groups, units, chunk_size, seed)


@checked
def patch_units(
    policy: nn.Module,
    clean: TensorDictBase,
    corrupt: TensorDictBase,
    sites: str | Sequence[str],
    *,
    metric: Metric = None,
    way: Way = "denoising",
    parts: Mapping[str, int] | None = None,
    groups: NestedKey | Tensor | None = None,
    units: int | Mapping[str, int] | None = None,
    chunk_size: int | None = None,
) -> UnitTable:
    """Patch every unit of every site, one at a time: as rows of batched passes, from one preparation.

    Args:
        policy, clean, corrupt, sites, metric, way, parts, groups, units, chunk_size: as of
            :func:`attribution_patching`.

    Returns:
        a row for each component, from the largest on; ``table.grid(site)`` has a site in order.

    Raises:
        InputError, SiteError: as of :func:`patch_sites`.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> clean, corrupt = (TensorDict({"input": torch.randn(20, 3)}, batch_size=20) for _ in range(2))
        >>> table = patch_units(net, clean, corrupt, "1", parts={"1": 4})
        >>> [(cell.site, cell.measured.groups) for cell in table]
        [('1', 20), ('1', 20), ('1', 20), ('1', 20)]
    """
    return _table(policy, clean, corrupt, sites, metric, way, False, "all", parts, groups, units, chunk_size, 0)


def _table(
    policy: nn.Module,
    clean: TensorDictBase,
    corrupt: TensorDictBase,
    sites: str | Sequence[str],
    metric: Metric,
    way: Way,
    estimate: bool,
    compare: int | str,
    parts: Mapping[str, int] | None,
    groups: NestedKey | Tensor | None,
    units: int | Mapping[str, int] | None,
    chunk_size: int | None,
    seed: int,
) -> UnitTable:
    require_way(way)
    with Bench(policy, sites, units=units, chunk_size=chunk_size) as bench:
        pairs = pairs_of(bench, clean, corrupt, groups)
        found = Effects(bench, pairs, metric, way, parts)
        estimates = found.estimated() if estimate else None
        chosen = _compared(estimates, found, compare, seed)
        changes = None
        if bool(chosen.any()):
            changes = torch.full((len(chosen), len(pairs)), torch.nan, dtype=torch.float64)
            changes[chosen] = found.measured(found.components.single(chosen.nonzero().squeeze(-1)))
        return UnitTable(
            found.components, found.gap, estimates, changes, pairs.groups, way=way, metric=found.metric,
            words=found.words,
        )  # fmt: skip


def _compared(estimates: Tensor | None, found: Effects, compare: int | str, seed: int) -> Tensor:
    """Which components are patched, ``(components,)``."""
    count = len(found.look().components)
    if estimates is None or compare == "all" or int(compare) >= count:
        return torch.ones(count, dtype=torch.bool)
    chosen = torch.zeros(count, dtype=torch.bool)
    if not compare:
        return chosen
    sign = torch.sign(found.gap.source - found.gap.base).to(estimates)
    largest = (estimates * sign).nansum(-1).abs().argsort(descending=True)
    chosen[largest[: int(compare) // 2].cpu()] = True
    others = (~chosen).nonzero().squeeze(-1)
    draws = torch.Generator().manual_seed(stream_of(seed, "compared"))
    chosen[others[torch.randperm(len(others), generator=draws)[: int(compare) - int(chosen.sum())]]] = True
    return chosen


class Effects:
    """What components do to the metric in the run that is patched: estimated, and measured.

    Args:
        bench: of the policy.
        pairs: the states.
        metric: what is measured.
        way: which run is patched.
        parts: as of :func:`attribution_patching`.

    Attributes:
        components: which there are, once something was looked at.
        gap: between the two runs, as well.
        metric: in words, as well.
        words: what one has to know.
    """

    components: Components
    gap: Gap
    metric: str

    def __init__(
        self, bench: Bench, pairs: Pairs, metric: Metric, way: Way, parts: Mapping[str, int] | None = None
    ) -> None:
        self.bench, self.pairs, self.way = bench, pairs, way
        self.words = ""
        self._metric, self._parts = metric, parts
        self._rows = bench.rows_at_once(pairs.clean)
        self._alone: tuple[Ran, Ran, Reading] | None = None  # of the only part, where all pairs are in one

    def look(self) -> Effects:
        """Find out which components there are, and the gap; what :meth:`estimated` does on its way."""
        if not hasattr(self, "gap"):
            ends = []
            for some in self.pairs.parts(self._rows):
                base, source, reading = self._looks(some)
                ends.append(torch.cat([reading.read(base), reading.read(source)]))
            self.gap = Gap(*torch.cat(ends, -1), dtype=reading.dtype)
        return self

    def estimated(self) -> Tensor:
        """``(components, states)``: to first order, where the policy computes."""
        parts, ends = [], []
        reached: set[str] = set()
        for some in self.pairs.parts(self._rows):
            base, source, reading = self._looks(some, graph=True)
            with torch.inference_mode(False), torch.enable_grad():
                value = reading(base)
                slopes = _slopes(value, base, self.bench.sites)
            reached |= slopes.keys()
            parts.append(self._first_order(base, source, slopes))
            ends.append(torch.stack([value.detach().double().cpu(), reading.read(source)[0]]))
        lacking = [site for site in self.bench.sites if site not in reached]
        if len(lacking) == len(self.bench.sites):
            raise TargetError(
                f"no gradient reaches {', '.join(map(repr, lacking[:4]))} from {self.metric}: the policy detaches or "
                "rounds on the way, or does not use them; patch_units measures without gradients"
            )
        if lacking:
            self.words = f"no gradient reaches {', '.join(map(repr, lacking[:4]))}, which are estimated to do nothing"
        self.gap = Gap(*torch.cat(ends, -1), dtype=reading.dtype)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).T

    def measured(self, sets: Tensor) -> Tensor:
        """``(sets, states)``: the change of the metric where sets of components are put in.

        Args:
            sets: boolean, ``(sets, components)``.
        """
        found, place = [], 0
        for some in self.pairs.parts(self._rows):
            _, source, reading = self._looks(some)
            states, _ = base_and_source(self.way, some.clean, some.corrupt)
            ran = passes(self.bench, states, self.components, sets, source.kept)
            values = torch.cat([reading.read(one) for one in ran])
            found.append(values - self.look().gap.base[place : place + len(some)])
            place += len(some)
        return torch.cat(found, -1)

    def _looks(self, some: Pairs, graph: bool = False) -> tuple[Ran, Ran, Reading]:
        """The run that is patched, the other one, and what reads the metric."""
        whole = len(some) == len(self.pairs)
        if not graph and whole and self._alone is not None:
            return self._alone
        clean_graph = graph and self.way == "noising"
        clean = self.bench.look(some.clean, graph=clean_graph)
        corrupt = self.bench.look(some.corrupt, graph=graph and not clean_graph)
        reading = Reading(self._metric, clean.result, corrupt.result, some.actions)
        base, source = base_and_source(self.way, clean, corrupt)
        if not hasattr(self, "components"):
            self.components = components_of(self.bench, source, some.clean, self._parts)
            self.metric = reading.words
        if not graph and whole:
            self._alone = base, source, reading
        return base, source, reading

    def _first_order(self, base: Ran, source: Ran, slopes: Mapping[str, Sequence[Tensor | None]]) -> Tensor:
        """``(rows, components)``: slopes times differences, summed over runs, places and the units of a component."""
        rows, components = base.result.outputs.batch_size[-1], self.components
        points = [base.kept[site][0] for site in self.bench.sites]
        dtype = functools.reduce(
            torch.promote_types, (one.abs().dtype if one.is_complex() else one.dtype for one in points)
        )
        found = torch.empty(rows, len(components), dtype=dtype, device=points[0].device)
        for site, own in components.split(found).items():
            runs = zip(slopes.get(site, ()), base.kept[site], source.kept[site], strict=False)
            known = [(slope, there, here.detach()) for slope, here, there in runs if slope is not None]
            if len(known) == 1 and known[0][0].shape == own.shape and not known[0][0].is_complex():
                slope, there, here = known[0]
                torch.sub(there, here, out=own).mul_(slope)  # where it belongs: fresh memory takes longer than the work
                if surely_finite(own):
                    continue
            own.zero_()
            for slope, there, here in known:
                product = first_order(slope, difference(there, here))
                units = product.ndim + components.axes[site]
                if others := [dim for dim in range(1, product.ndim) if dim != units]:
                    product = product.sum(others)
                own += components.of_units(product, site)
        return found


def _slopes(value: Tensor, base: Ran, sites: Sequence[str]) -> dict[str, list[Tensor | None]]:
    """By site the gradient at the activation of each of its runs, for sites that one reaches."""
    points = [(site, one) for site in sites for one in base.kept[site]]
    able = [one for _, one in points if one.requires_grad]
    if not value.requires_grad or not able:
        return {}
    found = iter(torch.autograd.grad(value.sum(), able, allow_unused=True))
    slopes: dict[str, list[Tensor | None]] = {}
    for site, one in points:
        slopes.setdefault(site, []).append(next(found) if one.requires_grad else None)
    return {site: own for site, own in slopes.items() if any(one is not None for one in own)}

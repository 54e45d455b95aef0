"""The smallest set of components that keeps what a policy does: found by attribution patching, verified by patching."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.errors import InputError
from tdhook_rl.latent.vectors.origins import origin_of, weights_of
from tdhook_rl.statistics import Interval, grouped_mean
from tdhook_rl.statistics.interval import none
from tdhook_rl.sweeps.causal.attribution import Effects
from tdhook_rl.sweeps.causal.bench import Bench
from tdhook_rl.sweeps.causal.components import Components, components_of
from tdhook_rl.sweeps.causal.found_circuit import Circuit, CurvePoint
from tdhook_rl.sweeps.causal.gap import Gap, pooled_shares
from tdhook_rl.sweeps.causal.metrics import Metric
from tdhook_rl.sweeps.causal.pairs import pairs_of

#: Sizes at which the faithfulness of the most important components is shown, and which are tried at once.
SIZES = 16
#: Of the faithfulness of a circuit in another network than its own: a later checkpoint, say.
OTHER_WEIGHTS = "the circuit was found in other weights than those that it is judged in"
#: Components that are tried one by one for whether the set does without them.
TRIED = 512


@checked
def find_circuit(
    policy: nn.Module,
    clean: TensorDictBase,
    corrupt: TensorDictBase,
    sites: str | Sequence[str],
    *,
    keep: float = 0.9,
    metric: Metric = None,
    parts: Mapping[str, int] | None = None,
    controls: int = 32,
    groups: NestedKey | Tensor | None = None,
    units: int | Mapping[str, int] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
) -> Circuit:
    """Find few components that keep a share of the behaviour (Wang et al. 2023; Syed, Rager & Conmy 2023).

    A set is judged by patching: the policy runs on the clean states, with every component outside of the set as it is
    in the run on the corrupt ones. What is left of the difference between the two runs is its faithfulness. Components
    are ordered by attribution patching (the mean of the gradients in the two runs, times the difference), the shortest
    run from the top that keeps enough is taken, and components which it can do without are taken out again, one by one,
    until none is left that it can do without. Such a set is minimal, though there may be a smaller one.

    Args:
        policy, clean, corrupt, metric, groups, units, chunk_size: as of :func:`patch_sites`; the metric has to have a
            gradient.
        sites: module paths or patterns; nested ones, and single runs (``"act@0"``), too.
        keep: the share to keep.
        parts: by site, into how many components its units are divided; each unit (channel) by itself unless given.
        controls: how many random sets, with as many components of each site, stand beside.
        seed: of the random sets.

    Returns:
        the circuit, with its faithfulness curve. It is reported on the states that it was found on: look at others with
        :func:`faithfulness`.

    Raises:
        InputError: if ``keep`` is no share, or nothing differs between the two runs.
        SiteError: where two names are of one run of a module.
        TargetError, SiteError, InputError: as of :func:`attribution_patching`.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.eye(4)), net[2].weight.copy_(torch.tensor([[0.0, 3.0, 0.0, -2.0]]))
        >>> clean, corrupt = (TensorDict({"input": torch.randn(20, 4)}, batch_size=20) for _ in range(2))
        >>> find_circuit(net, clean, corrupt, "1", keep=0.99).units
        {'1': [1, 3]}
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep= is a share of the behaviour, above 0 and up to 1; got {keep!r}")
    if controls < 0:
        raise InputError(f"controls= is a number of random sets, got {controls}")
    with Bench(policy, sites, units=units, chunk_size=chunk_size) as bench:
        pairs = pairs_of(bench, clean, corrupt, groups)
        search = _Search(Effects(bench, pairs, metric, "noising", parts), pairs.groups, controls, seed)
        importance = search.importance(Effects(bench, pairs, metric, "denoising", parts))
        bench.require_apart()
        facts = {"states": clean.batch_size.numel(), "keep": keep, "controls": controls, "seed": seed}
        return replace(search.found(importance, keep), facts={**origin_of(policy), **facts})


@checked
def faithfulness(
    policy: nn.Module,
    clean: TensorDictBase,
    corrupt: TensorDictBase,
    circuit: Circuit | Mapping[str, Sequence[int]],
    sites: str | Sequence[str] | None = None,
    *,
    metric: Metric = None,
    parts: Mapping[str, int] | None = None,
    groups: NestedKey | Tensor | None = None,
    units: int | Mapping[str, int] | None = None,
    chunk_size: int | None = None,
) -> Interval:
    """What a set of components keeps of the difference between two runs, such as a circuit on states it has not seen.

    Args:
        policy, clean, corrupt, metric, groups, units, chunk_size, parts: as of :func:`find_circuit`.
        circuit: what was found, whose components are divided as they were then; or by site their numbers.
        sites: all sites, of which the components outside of the set are as in the corrupt run; those of the circuit
            unless given.

    Returns:
        the share, whose words say where the circuit was found in other weights than those of the policy.

    Raises:
        InputError: for a component that there is not, another division than that of the circuit, or a network that
            has other numbers of units.
        SiteError: where two names are of one run of a module.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> clean, corrupt = (TensorDict({"input": torch.randn(20, 4)}, batch_size=20) for _ in range(2))
        >>> round(faithfulness(net, clean, corrupt, {"1": [0, 1, 2, 3]}), 3)
        1.0
    """
    chosen = dict(circuit.units if isinstance(circuit, Circuit) else circuit)
    if isinstance(circuit, Circuit):
        own = {site: len(one) for site, one in circuit.importance.items()}
        other = next((site for site, count in (parts or {}).items() if own.get(site, count) != count), None)
        if other is not None:
            raise InputError(
                f"parts= divides {other!r} into {(parts or {})[other]}, and the circuit was found among {own[other]} "
                "components there: leave parts= out, and they are those of the circuit"
            )
    if sites is None:
        sites = list(circuit.importance) if isinstance(circuit, Circuit) else list(chosen)
    with Bench(policy, sites, units=units, chunk_size=chunk_size) as bench:
        if isinstance(circuit, Circuit):
            parts = {site: own[site] for site in own if site in bench.sites} | dict(parts or {})
        pairs = pairs_of(bench, clean, corrupt, groups)
        if isinstance(circuit, Circuit):
            few = pairs.clean[:2]
            _require_as_wide(components_of(bench, bench.look(few), few), circuit)
        search = _Search(Effects(bench, pairs, metric, "noising", parts).look(), pairs.groups, 0, 0)
        bench.require_apart()
        found = search.interval(search.effects.measured(~_as_row(search.effects.components, chosen)[None]))
    if isinstance(circuit, Circuit) and circuit.facts.get("weights") not in (None, weights_of(policy)):
        found = replace(found, words="; ".join(one for one in (found.words, OTHER_WEIGHTS) if one))
    return found


def _require_as_wide(components: Components, circuit: Circuit) -> None:
    for site, units in components.units.items():
        if circuit.widths.get(site, units) != units:
            raise InputError(
                f"the circuit was found among {circuit.widths[site]} units of {site!r}, and this network has {units} "
                "there, so that its numbers are of other units: find the circuit of this network, or give the numbers "
                "that are meant as {site: numbers}"
            )


def _as_row(components: Components, chosen: Mapping[str, Sequence[int]]) -> Tensor:
    names = {name: place for place, name in enumerate(components.names)}
    row = torch.zeros(len(components), dtype=torch.bool)
    for site, numbers in chosen.items():
        for number in numbers:
            if (site, number) not in names:
                raise InputError(
                    f"there is no component {number!r} of {site!r}: there are "
                    f"{', '.join(f'{count} of {one!r}' for one, count in components.parts.items())}"
                )
            row[names[site, number]] = True
    return row


class _Search:
    """The search for a circuit; a set of components is a boolean row over all of them, those that are kept clean."""

    def __init__(self, effects: Effects, groups: Tensor | None, controls: int, seed: int) -> None:
        self.effects = effects
        self._groups = groups
        self._controls = controls
        self._draws = torch.Generator().manual_seed(stream_of(seed, "random sets"))

    def importance(self, other: Effects) -> Tensor:
        """``(components,)``: what each keeps, to first order, by the mean of the slopes in the two runs."""
        # Putting a corrupt activation into the clean run takes away what it keeps; a clean one into the other adds it.
        changes = (other.estimated() - self.effects.estimated()).double().cpu()
        known = self.gap.known
        if not bool(known.any()):
            told = self.gap.left_out(self.gap.source)
            if bool((self.gap.source - self.gap.base).isfinite().all()):
                raise InputError(f"nothing differs between the run on clean states and that on corrupt ones: {told}")
            raise InputError(
                "in no state is the metric finite in the run on clean states and in that on corrupt ones, and another "
                f"in the two: {told}. Where an action of the one run is closed in the other, say, its log-probability "
                "is not: name what is to be kept with metric="
            )
        along = changes[:, known] * torch.sign(other.gap.source - other.gap.base)[known]
        return along.nan_to_num(0.0).sum(-1) / (2 * self._size[known].sum())

    @property
    def gap(self) -> Gap:
        """Between the clean run, which is patched, and the corrupt one."""
        return self.effects.gap

    @property
    def _size(self) -> Tensor:
        return (self.gap.source - self.gap.base).abs()

    def kept(self, sets: Tensor) -> Tensor:
        """``(sets,)``: the faithfulness of sets."""
        known = self.gap.known
        lost = self.effects.measured(~sets)[:, known] * torch.sign(self.gap.source - self.gap.base)[known]
        return 1 - lost.sum(-1) / self._size[known].sum()

    def interval(self, changes: Tensor) -> Interval:
        """The faithfulness of one set, from how it changes the metric, ``(1, states)``."""
        # What is left is the difference minus what is lost of it.
        left = (self.gap.source - self.gap.base) - changes
        (found,) = pooled_shares(left, self.gap, self._groups)
        if found is not None and math.isfinite(found.estimate):
            return found
        known = self.gap.known
        words = f"the metric is not finite in {int((~left[0, known].isfinite()).sum())} of {int(known.sum())} states"
        return none(math.nan, words, confidence=0.95, groups=0, rows=int(known.sum()))

    def found(self, importance: Tensor, keep: float) -> Circuit:
        components = self.effects.components
        count = len(components)
        order = importance.argsort(descending=True, stable=True)
        rank = torch.empty(count, dtype=torch.long)
        rank[order] = torch.arange(count)
        chosen = self._without_needless(self._shortest(rank, keep), importance, keep)
        size = int(chosen.sum())
        several = torch.stack([chosen, ~chosen, torch.zeros_like(chosen)])
        own, without, nothing = (self.interval(one[None]) for one in self.effects.measured(~several))
        steps = torch.linspace(0, 1, SIZES // 2).tolist()
        sizes = sorted({0, size, *(round(count**step) for step in steps), *(round(count * step) for step in steps)})
        tops = torch.stack([rank < one for one in sizes])
        changes = self.effects.measured(~tops)
        curve = [
            CurvePoint(size=one, faithfulness=self.interval(change[None]), random=self._at_random(top)[0])
            for one, top, change in zip(sizes, tops, changes, strict=True)
        ]
        random, values = self._at_random(chosen)
        words = [self.effects.words, self.gap.left_out(self.gap.source)]
        if not size:
            words.append("these sites do not carry it: enough passes beside them")
        return Circuit(
            units={
                site: part.nonzero().squeeze(-1).tolist()
                for site, part in components.split(chosen).items()
                if bool(part.any())
            },
            faithfulness=own, random=random, without=without, nothing=nothing, size=size, of=count, curve=curve,
            beyond=float((values >= own.estimate).double().mean()) if len(values) else math.nan,
            importance={site: one.clone() for site, one in components.split(importance).items()},
            widths=dict(components.units),
            metric=self.effects.metric, words="; ".join(one for one in words if one),
        )  # fmt: skip

    def _shortest(self, rank: Tensor, keep: float) -> Tensor:
        """The shortest run of components from the most important on that keeps enough, found by few sizes at once."""
        low, high = -1, len(rank)  # the largest size tried that is too small, and one that is not
        while high - low > 1:
            sizes = torch.linspace(low, high, min(high - low + 1, SIZES + 2)).round().long()[1:-1].unique()
            enough = self.kept(rank[None] < sizes[:, None]) >= keep
            place = int(enough.long().argmax()) if bool(enough.any()) else len(sizes)
            high = int(sizes[place]) if place < len(sizes) else high
            low = int(sizes[place - 1]) if place else low
        return rank < high

    def _without_needless(self, chosen: Tensor, importance: Tensor, keep: float) -> Tensor:
        """The same set without components that it keeps enough without: those it misses least first."""
        while bool(chosen.any()):
            members = chosen.nonzero().squeeze(-1)
            tried = members[importance[members].abs().argsort()][:TRIED]
            fewer = chosen[None].repeat(len(tried), 1)
            fewer[torch.arange(len(tried)), tried] = False
            kept = self.kept(fewer)
            able = tried[kept.argsort(descending=True)][: int((kept >= keep).sum())]
            if not len(able):
                return chosen
            # As many of them at once as it still keeps enough without, at least the first.
            at_once = torch.tensor(sorted({1, len(able), *(2**power for power in range(10) if 2**power < len(able))}))
            taken = chosen[None].repeat(len(at_once), 1)
            for place, number in enumerate(at_once.tolist()):
                taken[place, able[:number]] = False
            enough = (self.kept(taken) >= keep).nonzero().squeeze(-1)
            chosen = taken[int(enough[-1]) if len(enough) else 0]
        return chosen

    def _at_random(self, chosen: Tensor) -> tuple[Interval | None, Tensor]:
        """The mean faithfulness of random sets with as many components of each site, and that of each."""
        if not self._controls or not bool(chosen.any()) or bool(chosen.all()):
            return None, torch.zeros(0)
        sets = torch.zeros(self._controls, len(chosen), dtype=torch.bool)
        for one in sets:
            parts = [
                torch.randperm(len(part), generator=self._draws) < int(part.sum())
                for part in self.effects.components.split(chosen).values()
            ]
            one.copy_(torch.cat(parts))
        values = self.kept(sets)
        known = values.isfinite()
        odd = int((~known).sum())
        words = f"{odd} of {len(sets)} random sets leave the metric without a number in some states"
        if odd == len(sets):
            return none(math.nan, words, confidence=0.95, groups=0, rows=0), values
        mean = grouped_mean(values[known])
        return (replace(mean, words="; ".join(one for one in (mean.words, words) if one)) if odd else mean), values

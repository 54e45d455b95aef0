"""Which sites carry the decision? Activations of one run put into another, whole, along a direction, in a subspace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.errors import InputError
from tdhook_rl.files.checkpoints import load_into
from tdhook_rl.latent.steering_vector import SteeringVector
from tdhook_rl.policies.rebinding import deep_copy
from tdhook_rl.sweeps.causal.bench import Bench, Ran
from tdhook_rl.sweeps.causal.edits import Put, PutPart
from tdhook_rl.sweeps.causal.gap import Gap
from tdhook_rl.sweeps.causal.metrics import Metric, Reading
from tdhook_rl.sweeps.causal.pairs import Pairs, Way, base_and_source, pairs_of, require_way
from tdhook_rl.sweeps.causal.patch_table import PatchCell, PatchTable, summed_up
from tdhook_rl.sweeps.causal.subspaces import (
    Moments,
    Subspace,
    along,
    directions_by_site,
    of_differences,
    outer_products,
    own_path,
)


@checked
def patch_sites(
    policy: nn.Module,
    clean: TensorDictBase,
    corrupt: TensorDictBase,
    sites: str | Sequence[str] | None = None,
    *,
    metric: Metric = None,
    way: Way = "denoising",
    direction: SteeringVector | Tensor | Mapping[str, Any] | None = None,
    rank: int | None = None,
    controls: int = 32,
    groups: NestedKey | Tensor | None = None,
    checkpoints: Mapping[str, Any] | None = None,
    units: int | Mapping[str, int] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
) -> PatchTable:
    """Activation patching: how much of the difference between two runs one site brings over (Vig et al. 2020).

    ``way="denoising"`` runs the policy on the corrupt states, with the activation of one site as it is on the clean
    ones: a share of 1 says that the site is enough to restore what the policy does. ``way="noising"`` runs it on the
    clean states with the corrupt activation: a share of 1 says that all of it passes there. The policy is run in eval
    mode, nothing is sampled, and it is not touched.

    Args:
        policy: the policy, a value or Q-network, or any module; not hooked.
        clean, corrupt: states of the same batch shape, which pair up row by row.
        sites: module paths or patterns, nested ones too; of a module that runs several times say which run
            (``"act@0"``, ``"act@-1"``, ``"act@all"``). Unless given, those of ``direction``.
        metric: what is measured in each state. Unless given, how much more the policy is for its greedy action in the
            clean run than for that in the corrupt one: their difference of logits (of log-probabilities, for continuous
            actions), of Q-values, the movement of a deterministic action; of a critic its value. Or a target of
            :mod:`tdhook_rl.targets` (the action is the stored one of the clean states, else the greedy one of the clean
            run), the key of an output, or a function of the outputs.
        way: which run is patched.
        direction: put in only the part along this: a steering vector, a tensor of the shape of the site's features (or
            channels), or one for each site.
        rank: put in only the part in the space of so many principal components of the paired differences, about zero,
            fitted on these very states.
        controls: how many random directions (subspaces) of equal dimension are put in beside.
        groups: what is drawn anew for intervals, such as the episode: the key of an entry of the clean states, or the
            groups; each state by itself unless given.
        checkpoints: weights by name (state dicts, modules, files): all of it for each of them.
        units: for ``rank``, which axis holds the units of a site, where its modules do not tell.
        chunk_size: rows of one pass.
        seed: of the random directions.

    Returns:
        a row for each site. States without a difference between the two runs, and such as are not finite, are left out
        and counted.

    Raises:
        InputError: if states do not pair up, or a direction or rank does not fit.
        SiteError: if a site names nothing, or does not run.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> clean, corrupt = (TensorDict({"input": torch.randn(20, 3)}, batch_size=20) for _ in range(2))
        >>> table = patch_sites(net, clean, corrupt, ["0", "1"], metric=lambda out: out["output"][:, 0])
        >>> table["1"].mean.estimate, table["1"].mean.groups
        (1.0, 20)
    """
    require_way(way)
    if direction is not None and rank is not None:
        raise InputError("direction= and rank= both say which part is put in: give one of them")
    if rank is not None and rank < 1:
        raise InputError(f"rank= is a number of dimensions, at least 1; got {rank}")
    if controls < 0:
        raise InputError(f"controls= is a number of random directions, got {controls}")
    if sites is None:
        if isinstance(direction, SteeringVector):
            sites = [own_path(direction)]
        elif isinstance(direction, Mapping):
            sites = list(direction)
        else:
            raise InputError("sites= names the modules to patch: give paths or patterns")
    part = _Part(direction, rank, controls, seed)
    cells, words = [], ""
    with at_checkpoints(policy, checkpoints) as (own, weights):
        with Bench(own, sites, whole=part.whole, units=units, chunk_size=chunk_size) as bench:
            pairs = pairs_of(bench, clean, corrupt, groups)
            for checkpoint in weights():
                found, words = _patched(bench, pairs, metric, way, part, checkpoint)
                cells += found
    return PatchTable(cells, way, words)


class _Part:
    """Which part of an activation is put in: all of it, or that in a subspace, with random ones beside."""

    def __init__(self, direction: Any, rank: int | None, controls: int, seed: int) -> None:
        self.direction = direction
        self.rank = rank
        self.controls = controls
        self.seed = seed

    @property
    def whole(self) -> bool:
        return self.direction is None and self.rank is None

    @property
    def words(self) -> str:
        return "all" if self.whole else "direction" if self.rank is None else f"rank {self.rank}"

    def subspaces(self, bench: Bench, pairs: Pairs, rows: int) -> dict[str, tuple[Subspace, Tensor]]:
        """By site the subspace, and the bases of it and of the random ones, ``(1 + controls, vectors, size)``."""
        if self.whole:
            return {}
        if self.rank is None:
            activations = bench.look(pairs.clean[:1]).kept
            wanted = directions_by_site(self.direction, bench.sites)
            found = {site: along(wanted[site], site, activations[site][0], bench) for site in bench.sites}
        else:
            found = self._of_differences(bench, pairs, rows)
        draws = torch.Generator().manual_seed(stream_of(self.seed, "random subspaces"))
        return {
            site: (one, torch.cat([one.basis[None], one.random_alike(self.controls, draws)]))
            for site, one in found.items()
        }

    def _of_differences(self, bench: Bench, pairs: Pairs, rows: int) -> dict[str, Subspace]:
        assert self.rank is not None
        moments: dict[str, Moments] = {}
        for some in pairs.parts(rows):
            sides = [bench.look(side).kept for side in (some.clean, some.corrupt)]
            for site in bench.sites:
                axis = bench.unit_axis(site, sides[0][site][0], some.clean)
                for one, other in zip(sides[0][site], sides[1][site], strict=True):
                    product = outer_products(one, other, axis)
                    moments[site] = product if site not in moments else moments[site] + product
        axes = {site: bench.unit_axis(site, sides[0][site][0], pairs.clean) for site in bench.sites}
        return {site: of_differences(moments[site], self.rank, axes[site]) for site in bench.sites}


def _patched(
    bench: Bench, pairs: Pairs, metric: Metric, way: Way, part: _Part, checkpoint: str
) -> tuple[list[PatchCell], str]:
    rows = bench.rows_at_once(pairs.clean)
    subspaces = part.subspaces(bench, pairs, rows)
    ends: list[Tensor] = []
    reached: dict[str, list[Tensor]] = {site: [] for site in bench.sites}
    words = ""
    for some in pairs.parts(rows):
        looks = both_runs(bench, some)
        reading = Reading(metric, looks[0].result, looks[1].result, some.actions)
        words = reading.words
        base, source = base_and_source(way, *looks)
        states, _ = base_and_source(way, some.clean, some.corrupt)
        ends.append(torch.cat([reading.read(base), reading.read(source)]))
        for site in bench.sites:
            if part.whole:
                put = Put(site, source.kept[site], source.others.get(site, ()))
                reached[site].append(reading.read(bench.run(states, {site: put})))
                continue
            subspace, bases = subspaces[site]
            parts = [
                reading.read(bench.run(states, {site: PutPart(site, source.kept[site], subspace.dims, some_bases)},
                                       copies=len(some_bases)))
                for some_bases in bases.split(max(1, rows // len(some)))
            ]  # fmt: skip
            reached[site].append(torch.cat(parts))
    gap = Gap(*torch.cat(ends, -1), dtype=reading.dtype)
    cells = []
    for site in bench.sites:
        found = torch.cat(reached[site], -1)
        cells.append(
            summed_up(
                site, part.words, gap, found[0], pairs.groups, among=pairs.among_all, checkpoint=checkpoint,
                at_random=found[1:] if len(found) > 1 else None,
                words=subspaces[site][0].said(part.rank) if subspaces else "",
            )
        )  # fmt: skip
    return cells, words


def both_runs(bench: Bench, pairs: Pairs) -> tuple[Ran, Ran]:
    """The run on clean states, and that on corrupt ones."""
    return bench.look(pairs.clean), bench.look(pairs.corrupt)


@contextmanager
def at_checkpoints(
    policy: nn.Module, checkpoints: Mapping[str, Any] | None
) -> Iterator[tuple[nn.Module, Callable[[], Iterator[str]]]]:
    """The policy, and what gives it the weights of one checkpoint after the other: on a copy, if there are any.

    Raises:
        InputError: for no checkpoint.
    """
    if checkpoints is None:
        yield policy, lambda: iter([""])
        return
    if not checkpoints:
        raise InputError("checkpoints= names weights to look at: there are none")
    own = deep_copy(policy)

    def weights() -> Iterator[str]:
        for name, one in checkpoints.items():
            load_into(own, one, name)
            yield name

    yield own, weights

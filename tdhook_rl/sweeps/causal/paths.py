"""What reaches the decision on the way from one site to another: path patching."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError
from tdhook_rl.sweeps.causal.bench import Bench
from tdhook_rl.sweeps.causal.edits import Put
from tdhook_rl.sweeps.causal.gap import Gap
from tdhook_rl.sweeps.causal.metrics import Metric, Reading
from tdhook_rl.sweeps.causal.pairs import Pairs, Way, base_and_source, pairs_of, require_way
from tdhook_rl.sweeps.causal.patch_table import PatchTable, summed_up


@checked
def patch_paths(
    policy: nn.Module,
    clean: TensorDictBase,
    corrupt: TensorDictBase,
    senders: str | Sequence[str],
    receivers: str | Sequence[str],
    *,
    held: str | Sequence[str] = (),
    metric: Metric = None,
    way: Way = "noising",
    groups: NestedKey | Tensor | None = None,
    chunk_size: int | None = None,
) -> PatchTable:
    """Path patching: what passes from a sender to the output through a receiver (Wang et al. 2023).

    The sender's activation of the other run is put in, and what the receiver computes then is kept. In a second pass
    that alone is put in at the receiver: the sender acts through it and in no other way. A share of 1 says that all of
    the difference between the two runs takes this path.

    Args:
        policy, clean, corrupt, metric, groups, chunk_size: as of :func:`patch_sites`.
        senders, receivers: module paths or patterns; every pair of them is a path.
        held: sites that stay as they are in the run that is patched while the receiver's answer is found, so that what
            passes through them on the way does not count. Hold all that lies between, and the direct path remains.
        way: ``"noising"``: the sender's corrupt activation, in the run on clean states; ``"denoising"``: its clean one,
            in the run on corrupt states.

    Returns:
        a row for each path, named ``"sender -> receiver"``.

    Raises:
        InputError: if a site is held that sends or receives, or sends to itself.
        SiteError: where two names are of one run of a module.
        SiteError, InputError: as of :func:`patch_sites`.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> clean, corrupt = (TensorDict({"input": torch.randn(20, 3)}, batch_size=20) for _ in range(2))
        >>> patch_paths(net, clean, corrupt, "0", "1")["0 -> 1"].mean.estimate
        1.0
    """
    require_way(way)
    lists = [[one] if isinstance(one, str) else list(one) for one in (senders, receivers, held)]
    if not lists[0] or not lists[1]:
        raise InputError("a path goes from a sender to a receiver: name at least one of each")
    with Bench(policy, [path for one in lists for path in one], whole=True, chunk_size=chunk_size) as bench:
        sending, receiving, holding = (bench.named(one) if one else [] for one in lists)
        paths = [(one, other) for one in sending for other in receiving if one != other]
        twice = next((one for one in holding if one in sending or one in receiving), None)
        if twice is not None or not paths:
            raise InputError(
                f"{twice!r} is held, and it is a sender or receiver: leave it out of held="
                if twice is not None
                else f"{sending[0]!r} is sender and receiver: a path goes from one site to another"
            )
        pairs = pairs_of(bench, clean, corrupt, groups)
        return _patched(bench, pairs, paths, holding, metric, way)


def _patched(
    bench: Bench, pairs: Pairs, paths: Sequence[tuple[str, str]], held: Sequence[str], metric: Metric, way: Way
) -> PatchTable:
    ends: list[Tensor] = []
    reached: dict[tuple[str, str], list[Tensor]] = {path: [] for path in paths}
    moved: set[tuple[str, str]] = set()
    words = ""
    for some in pairs.parts(bench.rows_at_once(pairs.clean)):
        looks = bench.look(some.clean), bench.look(some.corrupt)
        bench.require_apart()
        reading = Reading(metric, looks[0].result, looks[1].result, some.actions)
        words = reading.words
        base, source = base_and_source(way, *looks)
        states, _ = base_and_source(way, some.clean, some.corrupt)
        ends.append(torch.cat([reading.read(base), reading.read(source)]))
        still = {site: Put(site, base.kept[site], base.others.get(site, ())) for site in held}
        for sender in dict.fromkeys(sender for sender, _ in paths):
            receivers = [receiver for one, receiver in paths if one == sender]
            sent = Put(sender, source.kept[sender], source.others.get(sender, ()))
            answer = bench.run(states, {**still, sender: sent}, keep=frozenset(receivers))
            for receiver in receivers:
                own = answer.kept[receiver]
                put = Put(receiver, own, answer.others.get(receiver, ()))
                reached[sender, receiver].append(reading.read(bench.run(states, {receiver: put})))
                if any(not torch.equal(one, two) for one, two in zip(own, base.kept[receiver], strict=True)):
                    moved.add((sender, receiver))
    gap = Gap(*torch.cat(ends, -1), dtype=reading.dtype)
    cells = [
        summed_up(
            " -> ".join(path), "path", gap, torch.cat(values, -1)[0], pairs.groups, among=pairs.among_all,
            words="" if path in moved else "the receiver does not change with the sender",
        )
        for path, values in reached.items()
    ]  # fmt: skip
    return PatchTable(cells, way, words)

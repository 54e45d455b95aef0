"""What probes cost: fitting beside scikit-learn, a grid beside its sums by hand, a suite in a PPO loop.

python -m benchmarks.probe_cost
python -m benchmarks.probe_cost --repeats 5

Process CPU time on one thread: where other programs want the processors as well, wall time counts them in.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector

from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.pairs import measure
from benchmarks.suite_by_hand import ByHand, solved
from tdhook_rl import statistics as interval_of
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import PPO, make_actor, make_critic
from tdhook_rl.latent.probing import ClassStatistics
from tdhook_rl.replay import probe_grid
from tdhook_rl.rollout import EPISODE, GroupSplit, ProbeSuite

ENVS, BATCH = 128, 2048
SKLEARN, SUMS, PLAIN = "scikit-learn, logistic", "sums by hand", "PPO alone"
SITES = ["module.0.module.1", "module.0.module.3", "module.0.module.5"]


def classes(rows: int, features: int, count: int) -> tuple[Tensor, Tensor]:
    """Gaussian classes with a covariance that falls, as activations have."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, count, (rows,), generator=draw)
    centres = 0.09 * torch.randn(count, features, generator=draw)
    mix = torch.randn(features, features, generator=draw) / features**0.5 * torch.logspace(0, -1.5, features)
    return (torch.randn(rows, features, generator=draw) + centres[labels]) @ (mix + 0.1 * torch.eye(features)), labels


def fitting(rounds: int) -> Iterator[Figure]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = classes(130_000, 256, 5)
    (train, held), (known, wanted) = x.split([100_000, 30_000]), y.split([100_000, 30_000])

    def ours() -> float:
        sums = ClassStatistics(features=256, classes=5)
        sums.add(train, known)
        return float((sums.solve(kind="lda").predict(held) == wanted).double().mean())

    def theirs() -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        model.fit(train.numpy(), known.numpy())
        return float(model.score(held.numpy(), wanted.numpy()))

    gain = 100 * (ours() - theirs())
    found = measure({"LDA of sums": ours, SKLEARN: theirs}, rounds)
    note = f"3 times as fast; held-out accuracy {gain:+.2f} points, within .5: {'met' if gain > -0.5 else 'MISSED'}"
    yield from figures_of("fitting", "100,000 x 256, 5 classes", "LDA of sums", found, [Budget(SKLEARN, 1 / 3, note)])


def grid(rounds: int) -> Iterator[Figure]:
    """Five layers, ten concepts: the same forwards and sums written by hand."""
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(128, 128), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(128, 4))
    policy = TensorDictModule(net, ["observation"], ["action"])
    rows = 50_000
    x = torch.randn(rows, 128)
    data = TensorDict({"observation": x, "collector": {"traj_ids": torch.arange(rows) // 50}}, [rows])
    for place in range(10):
        data[f"c{place}"] = (x[:, place] + 0.5 * torch.randn(rows) > 0).long()
    sites = [f"module.{2 * place + 1}" for place in range(5)]
    split = GroupSplit(EPISODE)
    train, held = split(data)
    labels = torch.stack([data[f"c{place}"] for place in range(10)], 1)

    def ours() -> float:
        table = probe_grid(
            policy, data, sites=sites, concepts={f"c{place}": f"c{place}" for place in range(10)}, split=split,
            penalty=1e-3, untrained=untrained,
        )  # fmt: skip
        return sum(cell.trained.estimate for cell in table) / len(table)

    def by_hand() -> float:
        """Sums, one factorisation for each site and network; of held-out rows hits by group, and scores by group and
        bin, from which balanced accuracies, areas and their intervals follow. Labels of groups shuffled as well."""
        both = torch.cat([labels, labels[torch.randperm(rows)]], 1)
        groups, group = data[EPISODE].unique(return_inverse=True)
        found = []
        with torch.no_grad():
            for network in (net, untrained.module, None):
                moments: dict[int, Any] = {}
                for part in (train, held):
                    for index in part.nonzero().squeeze(-1).split(4096):
                        h, wanted = x[index], both[index] if network is net else labels[index]
                        modules = [nn.Identity()] if network is None else list(network)[:-1]
                        for place, layer in enumerate(modules):
                            h = layer(h)
                            if network is not None and place % 2 == 0:
                                continue
                            if part is train:
                                value = torch.cat([h.double(), torch.ones(len(h), 1).double()], 1)
                                hot = nn.functional.one_hot(wanted, 2).flatten(1).double()
                                moment, total = moments.get(place, (0.0, 0.0))
                                moments[place] = (moment + value.T @ value, total + hot.T @ value)
                            else:
                                weight, bias, hits, bins = moments[place]
                                scores = (h.double() @ weight + bias).reshape(len(h), -1, 2)
                                right = scores.argmax(-1) == wanted
                                hot = nn.functional.one_hot(wanted, 2).double()
                                hits.index_add_(0, group[index], torch.cat([hot * right[..., None], hot], -1))
                                if network is net:
                                    margin = (scores[:, :10, 1] - scores[:, :10, 0]).clamp(-8, 8)
                                    at = ((margin + 8) * 16).round().long() + 257 * wanted[:, :10]
                                    flat = (group[index][:, None] * 10 + torch.arange(10)) * 514 + at
                                    bins.view(-1).index_add_(0, flat.reshape(-1), torch.ones(flat.numel()))
                    if part is train:
                        moments = {
                            place: (*solved(*sums), torch.zeros(len(groups), both.shape[1] if network is net else 10, 4)
                                    .double(), torch.zeros(len(groups) if network is net else 0, 10, 514))
                            for place, sums in moments.items()
                        }  # fmt: skip
                found += [intervals(hits, bins) for _, _, hits, bins in moments.values()]
        return sum(found) / len(found)

    untrained = TensorDictModule(nn.Sequential(*[type(one)(128, one.out_features) if isinstance(one, nn.Linear) else
                                                 nn.ReLU() for one in net]), ["observation"], ["action"])  # fmt: skip
    found = measure({"probe_grid": ours, SUMS: by_hand}, rounds)
    yield from figures_of("a grid", f"5 layers x 10 concepts, {rows:,}", "probe_grid", found, [Budget(SUMS, 1.3)])


def intervals(hits: Tensor, bins: Tensor) -> float:
    """Of every concept, by the same functions."""
    accuracies = [
        interval_of.balanced_accuracy(hits[:, place, :2].numpy(), hits[:, place, 2:].numpy())
        for place in range(hits.shape[1])
    ]
    for place in range(bins.shape[1] if len(bins) else 0):
        interval_of.area_under_curve(bins[:, place, 257:].numpy(), bins[:, place, :257].numpy())
    return sum(one.estimate for one in accuracies[:10]) / 10


def concepts_of() -> dict[str, Any]:
    """Four concepts of the demo's environment, of two classes each."""
    lights = {f"light {place}": lambda td, place=place: td["concept", "bits"][..., place] for place in (0, 2)}
    return {"xor": ("concept", "xor"), "unneeded": ("concept", "unneeded_xor"), **lights}


def suite(frames: int, seeds: int, every: int) -> Iterator[Figure]:
    """A suite in the demo's PPO, beside the same statistics by hand on the same batches; one round a seed."""
    spent: dict[str, list[float]] = {name: [] for name in ("suite", "with a suite", SUMS, PLAIN)}
    for seed in range(seeds):
        torch.manual_seed(seed)
        actor = make_actor()
        ppo = PPO(actor, make_critic())
        split = GroupSplit(EPISODE, [("concept", "cell"), ("concept", "bits")], held_out=0.3)
        one = ProbeSuite(actor, sites=SITES, concepts=concepts_of(), split=split, decay=0.5, every=every)
        hand = ByHand(actor.module[0].module, split, decay=0.5)
        collector = Collector(
            CueCorners(batch_size=[ENVS], seed=seed), actor, frames_per_batch=BATCH,
            total_frames=frames // BATCH * BATCH,
        )  # fmt: skip
        inside, by_hand, start = 0.0, 0.0, time.process_time()
        for number, data in enumerate(collector):
            before = time.process_time()
            one.update(data)
            after = time.process_time()
            inside += after - before
            if number % every == 0:
                labels = [data.get(one) if isinstance(one, tuple) else one(data) for one in concepts_of().values()]
                hand.update(data, torch.stack(labels, -1).reshape(-1, len(labels)).long())
                by_hand += time.process_time() - after
            ppo.update(data)
        whole = time.process_time() - start - inside - by_hand
        collector.shutdown()
        for name, value in (("suite", inside), ("with a suite", whole + inside), (SUMS, by_hand), (PLAIN, whole)):
            spent[name].append(value)
    found = {name: np.array(values) for name, values in spent.items()}
    what, case = "3 sites x 4 concepts", f"PPO, every {every} batches"
    yield from figures_of(what, case, "with a suite", found, [Budget(PLAIN, 1.03)])
    yield from figures_of(what, case, "suite", found, [Budget(SUMS)])


def figures(rounds: int = 3, frames: int = 81_920, every: Sequence[int] = (1, 5, 10)) -> Iterator[Figure]:
    """Fitting, a grid, and a suite in training.

    Args:
        rounds: of each; of the suite, seeds.
        frames: of a training.
        every: how many batches lie between two looks of the suite.
    """
    yield from fitting(rounds)
    yield from grid(rounds)
    for batches in every:
        yield from suite(frames, rounds, batches)


def main(repeats: int, frames: int) -> None:
    torch.set_num_threads(1)
    torchrl.logger.setLevel("ERROR")
    warnings.simplefilter("ignore")
    show(figures(repeats, frames))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frames", type=int, default=81_920)
    main(**vars(parser.parse_args()))

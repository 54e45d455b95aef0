"""What a probe suite keeps of the demo's agent, written by hand: the floor that :mod:`benchmarks.probe_cost` prints.

Same forwards, sums in float64 by half, decay, probes of one given penalty, hits and scores of held-out rows by group.
Left out is what a user of such code would miss: penalties chosen by groups, rows that are not finite, groups without
end, classes that come late, futures, errors in words.
"""

from __future__ import annotations

import copy

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.rollout import GroupSplit

#: Groups are told apart by their number modulo this; bins are as wide as the suite's.
GROUPS, BINS, REACH = 512, 257, 8.0


class ByHand:
    """Binary concepts at the hidden layers of a network, those of an untrained copy, and the observation."""

    def __init__(self, net: nn.Sequential, split: GroupSplit, decay: float) -> None:
        self.nets = [net, copy.deepcopy(net)]
        self.nets[1].apply(lambda one: one.reset_parameters() if isinstance(one, nn.Linear) else None)
        self.split, self.decay = split, decay
        self.sums: dict[tuple[int, int], list[Tensor]] = {}

    @torch.no_grad()
    def update(self, batch: TensorDictBase, labels: Tensor) -> None:
        """Labels are ``(rows, concepts)``."""
        codes = [one.reshape(-1) for one in self.split.groups(batch)]
        train, held = self.split.masks(codes)
        dealt = (codes[-1][:, None] >> torch.arange(labels.shape[1])) & 1
        second = (codes[0] >> 5) & 1
        halves = [(train & (second == half)).nonzero().squeeze(-1) for half in (0, 1)]
        judged = held.nonzero().squeeze(-1)
        groups = [code[judged] % GROUPS for code in codes]
        x = batch["observation"].reshape(len(labels), -1)
        for number, net in enumerate((*self.nets, None)):
            wanted = torch.cat([labels, dealt], 1) if number == 0 else labels
            hot = nn.functional.one_hot(wanted, 2).double()
            h = x
            for place, layer in enumerate([nn.Identity()] if net is None else list(net)[:-1]):
                h = layer(h)
                if net is None or place % 2:
                    self._look((number, place), h, wanted, hot, halves, judged, groups)

    def _look(
        self, key: tuple[int, int], h: Tensor, wanted: Tensor, hot: Tensor, halves: list[Tensor], judged: Tensor,
        groups: list[Tensor],
    ) -> None:  # fmt: skip
        width, concepts = h.shape[1] + 1, wanted.shape[1]
        if key not in self.sums:
            bins = concepts // 2 if key[0] == 0 else 0
            shapes = [(2, width, width), (2, 2 * concepts, width), *[(GROUPS, concepts, 4)] * 2]
            self.sums[key] = [
                torch.zeros(shape).double() for shape in (*shapes, *[(GROUPS, bins, 2 * BINS)] * len(groups))
            ]
        sums = self.sums[key]
        moment, total = sums[:2]
        for one in sums[:4]:
            one.mul_(self.decay)
        for half, rows in enumerate(halves):
            value = torch.cat([h[rows].double(), torch.ones(len(rows), 1).double()], 1)
            moment[half].addmm_(value.T, value)
            total[half].addmm_(hot[rows].flatten(1).T, value)
        weight, bias = solved(moment.sum(0), total.sum(0))
        scores = (h[judged].double() @ weight + bias).view(len(judged), concepts, 2)
        right = scores.argmax(-1) == wanted[judged]
        values = torch.cat([hot[judged] * right[..., None], hot[judged]], -1)
        for table, group in zip(sums[2:4], groups, strict=True):
            table.index_add_(0, group, values)
        if key[0] == 0:
            chosen = concepts // 2
            margin = (scores[:, :chosen, 1] - scores[:, :chosen, 0]).clamp(-REACH, REACH)
            at = ((margin + REACH) * (BINS - 1) / (2 * REACH)).round().long() + BINS * wanted[judged, :chosen]
            for table, group in zip(sums[4:], groups, strict=True):
                flat = ((group[:, None] * chosen + torch.arange(chosen)) * 2 * BINS + at).flatten()
                table.view(-1).index_add_(0, flat, torch.ones(flat.numel()).double())


def solved(moment: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Discriminants from raw sums, all concepts from one factorisation."""
    rows, width = moment[-1, -1], len(moment) - 1
    mean = moment[-1, :-1] / rows
    covariance = moment[:-1, :-1] / rows - torch.outer(mean, mean)
    covariance.diagonal().add_(1e-3)
    centres = total[:, :-1] / total[:, -1:] - mean
    weight = torch.cholesky_solve(centres.T, torch.linalg.cholesky(covariance))
    return weight.reshape(width, -1), -(mean @ weight) - 0.5 * (centres.T * weight).sum(0)

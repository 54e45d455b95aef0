"""What has been published about networks in training and about probes, tried on small agents: expected and found.

python -m benchmarks.published_claims
python -m benchmarks.published_claims --seeds 4 --steps 2000

Some two minutes of an idle core; the table is written to ``docs/published_claims.md``. A claim is *found* where the
interval over seeds lies on the claimed side, *opposite* where it lies on the other, and *not found* where it holds
both. The agents are tiny beside those of the papers, so that a claim which is not found here is not refuted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector

from benchmarks.small_dqn import TARGET, Stack, train
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import PPO, make_actor, make_critic
from tdhook_rl.metrics import action_churn
from tdhook_rl.rollout import EPISODE, Future, GroupSplit, NetworkDiagnostics, ProbeSuite
from tdhook_rl.statistics import Interval, grouped_mean

PAGE = Path("docs/published_claims.md")
RATIOS = (0.25, 1.0, 4.0)
EPOCHS = (1, 4, 16)
LAST = "module.0.module.5"  # of make_actor: the third hidden layer, after its activation
HIDDEN = ("module.0.module.1", "module.0.module.3")
PLAN, TOKENS = 4, 5


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        source: whose claim it is.
        claim: what it says of this figure.
        figure: the figure, over seeds.
        values: what it is made of, in words.
        above, below: the figure lies above the one, or below the other, if the claim holds.
    """

    source: str
    claim: str
    figure: Interval
    values: str
    above: float | None = None
    below: float | None = None

    @property
    def verdict(self) -> str:
        low, high = self.figure.low, self.figure.high
        if self.above is not None:
            return "found" if low > self.above else "opposite" if high < self.above else "not found"
        return "found" if high < self.below else "opposite" if low > self.below else "not found"

    def cells(self) -> list[str]:
        expected = f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"
        found = f"{self.figure.estimate:.3f} ({self.figure.low:.3f} to {self.figure.high:.3f})"
        return [self.source, self.claim, expected, found, self.values, self.verdict]


def over_seeds(values: Tensor | Sequence[float]) -> Interval:
    return grouped_mean(values, method="t")


def listed(names: Sequence[float], values: Tensor) -> str:
    """The means over seeds of ``(settings, seeds)``."""
    return ", ".join(f"{name:g}: {value:.3f}" for name, value in zip(names, values.mean(1).tolist(), strict=True))


# ------------------------------------------------------------------ deep Q-learning


def measured(agents: Stack, states: Tensor) -> Tensor:
    """Of each seed the shares of dormant units, of both hidden layers together, at 0.025 and at 0.1."""
    found = []
    for seed, rows in enumerate(states):
        diagnostics = NetworkDiagnostics(
            agents.actor(seed), sites=HIDDEN, states=TensorDict({"observation": rows}, [len(rows)]), norms=False
        )
        diagnostics.update()
        scores = torch.cat([diagnostics.scores(site) for site in HIDDEN])
        found.append([float((scores <= tau).double().mean()) for tau in (0.025, 0.1)])
    return torch.tensor(found, dtype=torch.double)


class Churn:
    """The share of states whose greedy action one gradient step changes, by how long the target network has stood."""

    def __init__(self, steps: int, every: int = 25) -> None:
        self._from, self._every = steps // 3, every
        self._before: Tensor | None = None
        self._since = 0
        self.after_copy: list[Tensor] = []
        self.others: list[Tensor] = []

    def __call__(self, agents: Stack, states: Tensor, updates: int, since: int) -> None:
        if updates < self._from:
            return
        if self._before is None and since and updates % self._every:
            return
        rows = states[:, torch.linspace(0, states.shape[1] - 1, 512).long()] if self._before is None else self._states
        with torch.no_grad():
            greedy = agents(rows).argmax(-1)
        if self._before is not None:
            pairs = zip(self._before, greedy, strict=True)
            kept = self.after_copy if self._since == 0 else self.others
            kept.append(torch.tensor([action_churn(one, two) for one, two in pairs], dtype=torch.double))
            self._before = None
        else:
            self._before, self._states, self._since = greedy, rows, since


def dqn_rows(seeds: int, steps: int) -> list[Row]:
    churn, runs = Churn(steps), []
    for ratio in RATIOS:
        start: list[Stack] = []

        def watch(agents: Stack, states: Tensor, updates: int, since: int, start: list = start, ratio=ratio) -> None:
            if not updates:
                start.append(Stack(seeds, agents.copied()))
            if ratio == 1:
                churn(agents, states, updates, since)

        agents, seen, length = train(seeds=seeds, steps=steps, replay_ratio=ratio, watch=watch)
        runs.append((start[0], agents, seen, length))
        print(f"replay ratio {ratio:g}: episodes of {float(length.mean()):.0f} steps", flush=True)
    # All networks of a seed in the same states: those that each of its runs has seen.
    states = torch.cat([seen[:, torch.linspace(0, steps - 1, 512).long()] for _, _, seen, _ in runs], 1)
    late = torch.stack([length for *_, length in runs])
    ends = torch.stack([measured(agents, states) for _, agents, _, _ in runs])
    begun = measured(runs[1][0], states)
    rows = []
    source = "Sokar et al. 2023 (ICML)"
    for place, tau in enumerate((0.025, 0.1)):
        end, begin, words = ends[..., place], begun[:, place], f"dormant units (tau {tau:g}): share at "
        known = listed(RATIOS, end)
        rows += [
            Row(source, f"{words}replay ratio 4 minus at 0.25", above=0, figure=over_seeds(end[2] - end[0]),
                values=known),
            Row(source, f"{words}replay ratio 1 minus at 0.25", above=0, figure=over_seeds(end[1] - end[0]),
                values=known),
            Row(source, f"{words}replay ratio 4 minus at 1", above=0, figure=over_seeds(end[2] - end[1]), values=known),
            Row(source, f"{words}the end minus at the start, replay ratio 1", above=0,
                figure=over_seeds(end[1] - begin),
                values=f"start {float(begin.mean()):.3f}, end {float(end[1].mean()):.3f}"),
        ]  # fmt: skip
    rows.append(
        Row("asked beside it", "steps of an episode, replay ratio 4 minus 1 (more training, worse agents)", below=0,
            figure=over_seeds(late[2] - late[1]), values=", ".join(
                f"{ratio:g}: {one:.0f}" for ratio, one in zip(RATIOS, late.mean(1).tolist(), strict=True)))
    )  # fmt: skip
    single, after = torch.stack(churn.others), torch.stack(churn.after_copy)
    rows += [
        Row("Schaul et al. 2022 (NeurIPS)", "share of states whose greedy action one gradient step changes",
            above=0.001, figure=over_seeds(single.mean(0)),
            values=f"of {len(single)} steps: median {float(single.median()):.4f}, largest {float(single.max()):.3f}"),
        Row("asked beside it", "the same, of the first step after the target network was copied, minus other steps",
            above=0, figure=over_seeds(after.mean(0) - single.mean(0)),
            values=f"{float(after.mean()):.4f} of {len(after)}, {float(single.mean()):.4f} of {len(single)}"),
    ]  # fmt: skip
    return rows


# ------------------------------------------------------------------ proximal policy optimisation


def ppo_run(epochs: int, seed: int, batches: int) -> tuple[dict[str, float], dict[str, float]]:
    """The last hidden layer of an actor before training and after."""
    torch.manual_seed(seed)
    actor = make_actor()
    ppo = PPO(actor, make_critic(), epochs=epochs)
    diagnostics = NetworkDiagnostics(actor, sites=[LAST], rows=1024, norms=False)
    collector = Collector(
        CueCorners(batch_size=[128], seed=seed), actor, frames_per_batch=2048, total_frames=2048 * batches,
        auto_register_policy_transforms=False,
    )  # fmt: skip
    first: dict[str, float] = {}
    for data in collector:
        first = first or diagnostics.update(data)
        ppo.update(data)
    collector.shutdown()
    return first, diagnostics.update()


def ppo_rows(seeds: int, batches: int) -> list[Row]:
    runs = [[ppo_run(epochs, seed, batches) for seed in range(seeds)] for epochs in EPOCHS]
    print("ppo", flush=True)
    source, rows = "Moalla et al. 2024 (NeurIPS)", []
    for name, words, claimed in (
        ("effective_rank", "effective rank (srank)", {"below": 0.0}),
        ("entropy_rank", "entropy rank", {"below": 0.0}),
        ("norm", "norm of the features", {"above": 0.0}),
    ):
        ends = torch.tensor([[last[f"{name}/{LAST}"] for _, last in one] for one in runs], dtype=torch.double)
        start = sum(first[f"{name}/{LAST}"] for first, _ in runs[0]) / seeds
        rows.append(
            Row(source, f"{words} of the last hidden layer, {EPOCHS[-1]} epochs a batch minus {EPOCHS[0]}",
                figure=over_seeds(ends[-1] - ends[0]), values=f"start {start:.1f}; {listed(EPOCHS, ends)}", **claimed)
        )  # fmt: skip
    return rows


# ------------------------------------------------------------------ probes


def selectivity(seed: int) -> tuple[float, float, float, float]:
    """Probe and control task on 16 features and on 1024 that are made of them, of 300 types of input."""
    torch.manual_seed(seed)
    types = torch.randn(300, 16)
    label = (types @ torch.randn(16) > 0).long()
    drawn = torch.randint(300, (6000,))
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 2))
    policy = TensorDictModule(net, ["observation"], ["logits"])
    suite = ProbeSuite(
        policy, sites=["module.0", "module.2"], concepts={"side": "side"}, control="type", untrained=False,
        split=GroupSplit(EPISODE), penalty=1e-3,
    )  # fmt: skip
    data = {"observation": types[drawn], "side": label[drawn], "type": drawn, EPISODE: torch.arange(6000) // 20}
    suite.update(TensorDict(data, [6000]))
    table = suite.table()
    few, many = table["module.0", "side"], table["module.2", "side"]
    return few.selectivity.estimate, many.selectivity.estimate, few.shuffled.estimate, many.shuffled.estimate


class Planner(nn.Module):
    """Takes each token that it sees as the action of ``PLAN`` steps later: its state is its plan, one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = nn.Identity()

    def forward(self, observation: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
        plan = self.plan(torch.cat([plan, observation[..., None, :]], -2).flatten(-2)).unflatten(-1, (-1, TOKENS))
        return 50 * plan[..., 0, :], plan[..., 1:, :]


def planned(seed: int) -> dict[int, tuple[float, float]]:
    """By steps ahead how well the action there is read from the planner's state, and from what it sees."""
    torch.manual_seed(seed)
    policy = TensorDictModule(Planner(), ["observation", "plan"], ["logits", ("next", "plan")])
    seen = nn.functional.one_hot(torch.randint(TOKENS, (60, 40)), TOKENS).float()
    plan, steps = nn.functional.one_hot(torch.randint(TOKENS, (60, PLAN)), TOKENS).float(), []
    for time in range(40):
        step = TensorDict({"observation": seen[:, time], "plan": plan}, [60])
        policy(step)
        step["action"] = step["logits"].argmax(-1)
        plan = step["next", "plan"]
        steps.append(step)
    data = torch.stack(steps, 1)
    data[EPISODE] = torch.arange(60)[:, None].expand(60, 40)
    data["next", "done"] = (torch.arange(40) == 39).expand(60, 40)[..., None]
    ahead = (1, PLAN, PLAN + 1, PLAN + 2)
    suite = ProbeSuite(
        policy, sites=["module.plan"], concepts={str(k): Future("action", k) for k in ahead}, untrained=False
    )
    suite.update(data)
    table = suite.table()
    cells = {k: table["module.plan", str(k)] for k in ahead}
    return {k: (cell.trained.estimate, cell.input.estimate) for k, cell in cells.items()}


def probe_rows(seeds: int) -> list[Row]:
    found = torch.tensor([selectivity(seed) for seed in range(seeds)], dtype=torch.double).T
    few, many, control_few, control_many = found
    source = "Hewitt & Liang 2019 (EMNLP)"
    plans = [planned(seed) for seed in range(seeds)]
    print("probes", flush=True)
    state, observed = (
        {k: torch.tensor([one[k][place] for one in plans], dtype=torch.double) for k in plans[0]} for place in (0, 1)
    )
    known = f"chance {1 / TOKENS:g}; from the observation {float(observed[1].mean()):.3f}"
    future = "hand-built planner, whose plan is known"
    return [
        Row(source, "selectivity of a linear probe of 16 features", figure=over_seeds(few), above=0.2,
            values=f"control {float(control_few.mean()):.3f}"),
        Row(source, "selectivity of 1024 features made of these, minus that of the 16", figure=over_seeds(many - few),
            below=0, values=f"control {float(control_many.mean()):.3f}"),
        Row(future, "accuracy of the action 1 step ahead, from the state", figure=spread(state[1]), above=0.95,
            values=known),
        Row(future, f"accuracy of the action {PLAN} steps ahead, which has just been seen", above=0.95,
            figure=spread(state[PLAN]), values=f"from the observation {float(observed[PLAN].mean()):.3f}"),
        Row(future, f"accuracy of the action {PLAN + 1} steps ahead, which nobody knows, minus chance", below=0.05,
            figure=spread(state[PLAN + 1] - 1 / TOKENS),
            values=f"{PLAN + 2} steps: {float(state[PLAN + 2].mean()):.3f}"),
    ]  # fmt: skip


def spread(values: Tensor) -> Interval:
    """Over seeds; scores that are all alike have an interval without a width."""
    found = over_seeds(values)
    if math.isnan(found.low):
        raise RuntimeError(f"no interval: {found}")
    return found


# ------------------------------------------------------------------ the page


def page(rows: Sequence[Row], seeds: int, steps: int, batches: int) -> str:
    head = ["source", "claim", "expected", "found (95% over seeds)", "made of", "verdict"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""# Published claims, tried on small agents

Written by `python -m benchmarks.published_claims`, with torch {torch.__version__}: {seeds} seeds, differences paired
by seed, intervals by seed. *Found*: the interval lies on the claimed side; *opposite*: on the other; *not found*: it
holds both; intervals are not adjusted for how many there are. These agents are far smaller and learn for far shorter
than those of the papers, and a claim that is not found here is not refuted.

{table}

- Deep Q-learning: cart-pole, two hidden layers of 128, Adam (learning rate 0.001), a batch of 32, {steps:,} steps of
  the environment for each seed; the target network is copied every {TARGET}. Dormant units are those of both hidden
  layers (`NetworkDiagnostics.scores`), of all networks of a seed in the same states, a third of them from each of its
  runs.
- Churn is of 512 states of the buffer, from one gradient step to the next, at replay ratio 1 after the first third of
  training. Schaul et al. name some 10% for Atari, where ten and more actions are of nearly equal value; here are two.
- PPO: `CueCorners`, {batches} batches of 2,048 frames, three hidden layers of 64; ranks in 1,024 states of the first
  batch.
- Selectivity: 300 types of input, a label that is linear in them, and one for each type by chance; `ProbeSuite` with
  `control="type"`.
- The planner does what it saw {PLAN} steps ago, so that the actions of the next {PLAN} steps are in its state, and
  nothing of later ones. Probes are `Future("action", k)` of a `ProbeSuite`.
"""


def main(seeds: int, steps: int, batches: int) -> None:
    torch.set_num_threads(1)
    rows = [*probe_rows(seeds), *ppo_rows(seeds, batches), *dqn_rows(seeds, steps)]
    text = page(rows, seeds, steps, batches)
    print(text)
    PAGE.write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="agents of each kind")
    parser.add_argument("--steps", type=int, default=4000, help="of the environment, of a Q-learner")
    parser.add_argument("--batches", type=int, default=10, help="of 2,048 frames, of PPO")
    given = parser.parse_args()
    main(given.seeds, given.steps, given.batches)

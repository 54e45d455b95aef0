"""Every measure of networks of many kinds, against the layer by hand in float64 and the measure by its definition."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical

from tdhook_rl.rollout import NetworkDiagnostics, Plasticity, cka_matrix
from tests.diagnosed import KINDS, debiased_cka, divergence, dormant, ranks


def moved(policy: nn.Module, seed: int) -> None:
    """Other weights; a third of the units of hidden layers are put to sleep, others each time."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in policy.named_parameters():
            one.add_(torch.randn(one.shape, generator=draws) * 0.3)
            if name.endswith("bias") and one.shape[-1] > 3:
                one.masked_fill_(torch.rand(one.shape, generator=draws) < 0.3, -30.0)


@pytest.mark.parametrize("kind", KINDS)
def test_all_measures_of_a_site(kind: str) -> None:
    torch.manual_seed(0)
    made = KINDS[kind]()
    diagnostics = NetworkDiagnostics(made.policy, sites=[made.site], rows=100, trajectories=made.along)
    seen, masks = [], []
    for update in range(3):
        if update:
            moved(made.policy, update)
        found = diagnostics.update(made.states)
        now = made.activations()
        seen.append(now)
        units = made.units(now)
        masks.append(dormant(units))
        srank, entropy, stable = ranks(now)
        expected = {
            "dormant": masks[-1].mean(),
            "dead": (np.abs(units).max(0) == 0).mean(),
            "effective_rank": srank,
            "entropy_rank": entropy,
            "stable_rank": stable,
            "norm": np.sqrt(np.square(now.reshape(len(now), -1)).sum(1)).mean(),
            "cka_first": debiased_cka(seen[0], now),
            "overlap_first": (masks[0] & masks[-1]).sum() / max(masks[0].sum(), 1) if masks[0].any() else np.nan,
        }
        if update:
            expected["cka_last"] = debiased_cka(seen[-2], now)
            expected["overlap_last"] = (masks[-2] & masks[-1]).sum() / masks[-2].sum() if masks[-2].any() else np.nan
        for name, value in expected.items():
            assert found[f"{name}/{made.site}"] == pytest.approx(value, rel=2e-4, abs=1e-5, nan_ok=True), name
        assert found["states"] == len(now)
    if kind not in ("gru", "lstm"):
        assert masks[-1].any()
        assert not masks[-1].all()
    assert diagnostics.dormancy(made.site).numpy().tolist() == [mask.tolist() for mask in masks]
    sizes = np.abs(made.units(seen[-1])).mean(0)
    assert diagnostics.scores(made.site).numpy() == pytest.approx(sizes / sizes.mean(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_churn_divergence_and_drift(kind: str) -> None:
    torch.manual_seed(1)
    made = KINDS[kind]()
    diagnostics = NetworkDiagnostics(made.policy, sites=[made.site], states=made.states, trajectories=made.along)
    first = diagnostics.update()
    before = made.outputs(made.activations())
    moved(made.policy, 5)
    found = diagnostics.update()
    after = made.outputs(made.activations())
    assert found.keys() >= first.keys()
    if ("action" in made.policy.out_keys) or (("agents", "action") in made.policy.out_keys):
        changed = (before.argmax(-1) != after.argmax(-1)).reshape(len(before), -1).any(1)
        assert found["churn"] == changed.mean() > 0
        assert diagnostics.intervals["churn"].rows == len(before)
    if "logits" in made.policy.out_keys:
        assert "value_drift" not in found
        assert found["kl_churn"] == pytest.approx(divergence(before, after).mean(), rel=1e-4)
        assert diagnostics.kl_samples == 0
    else:
        assert "kl_churn" not in found
        change = np.abs(after - before).mean()
        assert found["value_drift"] == pytest.approx(change, rel=1e-4)
        assert found["value_drift_relative"] == pytest.approx(change / np.abs(before).mean(), rel=1e-4)
    names = {"churn", "kl_churn", "value_drift", "value_drift_relative"} & found.keys()
    intervals = diagnostics.intervals
    assert {name for name in intervals if "/" not in name} == names  # of sites, others
    assert all(intervals[f"cka_{which}/{made.site}"].known for which in ("first", "last"))
    for name in names:
        assert intervals[name].estimate == pytest.approx(found[name], rel=1e-9)
        assert intervals[name].low <= found[name] <= intervals[name].high


def loss_of(outputs: TensorDict) -> Tensor:
    flat = (outputs[key] for key in outputs.keys(True, True))
    return sum(one.square().mean() for one in flat if one.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_plasticity_leaves_training_as_it_is(kind: str) -> None:
    """Two runs of one training, one of which is looked at: the same weights, gradients, draws."""
    ends = []
    for looked in (False, True):
        torch.manual_seed(2)
        made = KINDS[kind]()
        how = Plasticity(every=2, steps=3)
        diagnostics = NetworkDiagnostics(
            made.policy, sites=[made.site], states=made.states, trajectories=made.along, plasticity=how,
            loss=lambda states, policy=made.policy: loss_of(policy(states)),
        )  # fmt: skip
        optimiser = torch.optim.Adam(made.policy.parameters(), lr=1e-2)
        found = []
        for _ in range(4):
            with diagnostics._fixed.recurrent():
                outputs = made.policy(made.states.clone())
            noise = torch.randn(())
            optimiser.zero_grad()
            (noise * loss_of(outputs)).backward()
            optimiser.step()
            if looked:
                found.append(diagnostics.update())
        ends.append((torch.rand(3), [(one.detach(), one.grad) for one in made.policy.parameters()]))
    (draws, weights), (same_draws, same_weights) = ends
    assert torch.equal(draws, same_draws)
    for (one, gradient), (two, same) in zip(weights, same_weights, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(gradient, same)
    assert ["plasticity_ratio" in one for one in found] == [True, False, True, False]
    assert found[0]["plasticity_loss_fresh"] == found[2]["plasticity_loss_fresh"] > 0
    ratio = found[2]["plasticity_loss"] / found[2]["plasticity_loss_fresh"]
    assert found[2]["plasticity_ratio"] == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "gru", "agents apart, pixels"])
def test_checkpoints_by_checkpoints(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    made = KINDS[kind]()
    clouds, kept = [], {}
    for update in range(3):
        moved(made.policy, update)
        clouds.append(made.activations())
        kept[f"at {update}"] = copy.deepcopy(made.policy.state_dict())
    torch.save(kept["at 1"], tmp_path / "one.pt")
    other = copy.deepcopy(made.policy)
    checkpoints = {"dict": kept["at 0"], "file": tmp_path / "one.pt", "module": other}
    weights = copy.deepcopy(made.policy.state_dict())
    found = cka_matrix(made.policy, checkpoints, [made.site], made.states, trajectories=made.along)
    assert found.checkpoints == ["dict", "file", "module"]
    assert found.at(made.site).shape == (3, 3)
    for row in range(3):
        for column in range(3):
            expected = debiased_cka(clouds[row], clouds[column])
            assert float(found.at(made.site)[row, column]) == pytest.approx(expected, abs=1e-4)
    assert all(torch.equal(one, weights[name]) for name, one in made.policy.state_dict().items())


def test_agents_padding_and_groups_along_trajectories() -> None:
    made = KINDS["gru"]()
    data = made.states.clone()
    data["collector"] = TensorDict(
        {"mask": torch.ones(3, 8).bool(), "traj_ids": torch.arange(3)[:, None].expand(3, 8).clone()}, [3, 8]
    )
    data["collector", "mask"][2, 5:] = False
    diagnostics = NetworkDiagnostics(made.policy, sites=[made.site], trajectories=True)
    found = diagnostics.update(data)
    real = np.r_[0:21]
    assert found["states"] == 21
    assert found[f"norm/{made.site}"] == pytest.approx(np.linalg.norm(made.activations()[real], axis=1).mean())
    moved(made.policy, 0)
    diagnostics.update()
    assert (diagnostics.intervals["kl_churn"].groups, diagnostics.intervals["kl_churn"].rows) == (3, 21)
    few = NetworkDiagnostics(made.policy, sites=[made.site], trajectories=True, rows=10)
    assert few.update(made.states)["states"] == 8


@pytest.mark.parametrize("changed", [("wolf",), ("sheep",), ("wolf", "sheep")])
def test_groups_of_agents_are_all_followed(changed: tuple[str, ...]) -> None:
    """What one group does anew is churn, whichever comes first: each by its key, and together without."""
    torch.manual_seed(2)
    heads = {group: nn.Linear(4, 4) for group in ("wolf", "sheep")}
    steps: list[nn.Module] = []
    for group, head in heads.items():
        steps += [
            TensorDictModule(head, [(group, "observation")], [(group, "logits")]),
            ProbabilisticTensorDictModule(
                in_keys={"logits": (group, "logits")}, out_keys=[(group, "action")], distribution_class=Categorical
            ),
            TensorDictModule(lambda x: x.sum(-1, True), [(group, "logits")], [(group, "state_value")]),
        ]
    policy = TensorDictSequential(*steps)
    states = TensorDict({group: TensorDict(observation=torch.randn(64, 4)) for group in heads}, [64])
    every: dict[str | None, NetworkDiagnostics] = {
        group: NetworkDiagnostics(
            policy, sites=["module.0"], states=states, norms=False,
            action_key=group and (group, "action"), value_key=group and (group, "state_value"),
        )
        for group in (None, *heads)
    }  # fmt: skip
    for one in every.values():
        one.update()
    for group in changed:
        nn.init.normal_(heads[group].weight)
    found = {group: one.update() for group, one in every.items()}
    for group in heads:
        assert (found[group]["churn"] > 0) is (found[group]["value_drift"] > 0) is (group in changed)
    assert found[None]["churn"] >= max(found[group]["churn"] for group in heads)
    assert found[None]["kl_churn"] == pytest.approx(sum(found[group]["kl_churn"] for group in heads))
    assert found[None]["value_drift"] == pytest.approx(sum(found[group]["value_drift"] for group in heads) / 2)

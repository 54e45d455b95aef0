"""A network's health: measures against numpy on constructed layers, and the object that follows training."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import GRUModule, QValueActor
from torchrl.record.loggers import CSVLogger, LoggerMonitor

from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, MissingKeyError, SiteError
from tdhook_rl.examples.agent import FC2, make_actor, make_critic
from tdhook_rl.experiments import EXPERIMENTS, load
from tdhook_rl.metrics import action_churn, dormant_units, effective_rank, entropy_rank
from tdhook_rl.rollout import NetworkDiagnostics, cka_matrix

# ------------------------------------------------------------------ measures


@pytest.mark.parametrize("tau", [0.0, 0.025, 0.5])
def test_dormant_units_against_a_loop(tau: float) -> None:
    values = torch.randn(50, 12).relu() * torch.linspace(0, 1, 12)
    rows = values.double().numpy()
    scores = [np.mean([abs(row[unit]) for row in rows]) for unit in range(12)]
    assert dormant_units(values, tau).tolist() == [score <= tau * np.mean(scores) for score in scores]


def test_the_units_of_feature_maps_are_channels_and_agents_are_rows() -> None:
    maps = torch.rand(5, 3, 4, 4)
    maps[:, 1] = 0
    assert dormant_units(maps).tolist() == [False, True, False]
    agents = torch.rand(5, 2, 3)
    agents[:, 0, 2] = 0  # silent for one agent only
    assert dormant_units(agents).tolist() == [False, False, False]
    agents[..., 2] = 0
    assert dormant_units(agents).tolist() == [False, False, True]


def test_a_silent_layer_is_dormant_as_a_whole() -> None:
    assert dormant_units(torch.zeros(4, 3)).all()
    assert effective_rank(torch.zeros(4, 3)) == 0
    assert entropy_rank(torch.zeros(4, 3)) == 0


def of_spectrum(*values: float) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(20, len(values), dtype=torch.double))[0] for _ in range(2))
    return left @ torch.diag(torch.tensor(values, dtype=torch.double)) @ right.T


@pytest.mark.parametrize(
    ("spectrum", "delta", "rank"),
    [
        ((1.0, 1.0, 1.0, 1.0), 0.01, 4),
        ((1.0, 1.0, 1.0, 1.0), 0.3, 3),
        ((99.0, 1.0), 0.02, 1),
        ((98.0, 2.0), 0.01, 2),
        ((5.0,), 0.01, 1),
        ((3.0, 2.0, 1.0), 0.1, 3),
    ],
)
def test_ranks_of_constructed_spectra(spectrum: tuple[float, ...], delta: float, rank: int) -> None:
    features = of_spectrum(*spectrum)
    shares = np.array(spectrum) / sum(spectrum)
    assert effective_rank(features, delta) == rank
    assert entropy_rank(features) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.double))[0]
    assert entropy_rank(3 * features @ rotation) == pytest.approx(entropy_rank(features), rel=1e-6)


def test_churn_counts_states() -> None:
    before, after = torch.randint(4, (100,)), torch.randint(4, (100,))
    expected = sum(int(a != b) for a, b in zip(before, after, strict=True)) / 100
    assert action_churn(before, after) == pytest.approx(expected)
    one_hot = [nn.functional.one_hot(actions, 4) for actions in (before, after)]
    assert action_churn(*one_hot) == pytest.approx(expected)
    assert action_churn(before, before) == 0


@pytest.mark.parametrize("measure", [dormant_units, effective_rank, entropy_rank])
def test_activations_that_cannot_be_measured(measure: object) -> None:
    for bad, message in (
        (torch.zeros(0, 3), "a row for each state"),
        (torch.zeros(3), "a row for each state"),
        (torch.zeros(3, 3, dtype=torch.long), "a row for each state"),
        (torch.full((3, 3), torch.nan), "NaN or infinite"),
    ):
        with pytest.raises(InputError, match=message):
            measure(bad)


def test_arguments_that_mean_nothing() -> None:
    with pytest.raises(InputError, match="tau="):
        dormant_units(torch.ones(2, 2), -1.0)
    with pytest.raises(InputError, match="delta="):
        effective_rank(torch.ones(2, 2), 1.0)
    for pair in ((torch.zeros(3), torch.zeros(4)), (torch.zeros(0), torch.zeros(0))):
        with pytest.raises(InputError, match="the same states"):
            action_churn(*pair)


# ------------------------------------------------------------------ following a network


def rollout(policy: nn.Module, steps: int = 20) -> TensorDict:
    return CueCorners(batch_size=[16], seed=0).rollout(steps, policy, break_when_any_done=False)


def test_what_is_found_is_what_the_layer_computes() -> None:
    actor = make_actor()
    with torch.no_grad():
        actor.get_submodule(FC2.rsplit(".", 1)[0])[2].bias[:10] = -100.0  # ten units that never act
    data = rollout(actor)
    diagnostics = NetworkDiagnostics(actor, sites=[FC2], rows=64)
    found = diagnostics.update(data)
    hidden = actor.get_submodule(FC2.rsplit(".", 1)[0])[:4](diagnostics.states["observation"]).detach()
    assert hidden.shape == (64, 64)
    assert found[f"dead/{FC2}"] >= 10 / 64
    assert found[f"dead/{FC2}"] == (hidden == 0).all(0).double().mean()
    assert found[f"dormant/{FC2}"] == dormant_units(hidden).double().mean()
    assert found[f"effective_rank/{FC2}"] == effective_rank(hidden)
    assert found[f"entropy_rank/{FC2}"] == pytest.approx(entropy_rank(hidden))
    assert found[f"norm/{FC2}"] == pytest.approx(hidden.norm(dim=-1).mean().item())
    assert found[f"cka_first/{FC2}"] == pytest.approx(1.0)
    assert np.isnan(found["churn"])
    assert found["states"] == 64
    assert diagnostics.stats() == found


def test_it_follows_the_weights_on_the_same_states() -> None:
    actor = make_actor()
    diagnostics = NetworkDiagnostics(actor, sites=[FC2])
    diagnostics.update(rollout(actor))
    kept = diagnostics.states.clone()
    assert diagnostics.update(rollout(actor))["churn"] == 0
    with torch.no_grad():
        before = actor(kept.copy())["logits"].argmax(-1)
        for parameter in actor.parameters():
            parameter.normal_()
        after = actor(kept.copy())["logits"].argmax(-1)
    found = diagnostics.update()
    assert (diagnostics.states == kept).all()
    assert found["churn"] == pytest.approx((before != after).double().mean().item())
    assert found["churn"] > 0
    assert found[f"cka_first/{FC2}"] < 0.99


@pytest.mark.parametrize("times", [1, 8])
def test_states_that_recur_are_compared_once(times: int) -> None:
    """In two layers that have nothing in common a state is alike to itself."""
    net = nn.Sequential(nn.Embedding(64, 256), nn.Linear(256, 3))
    policy, other = TensorDictModule(net, ["cell"], ["logits"]), copy.deepcopy(net)
    cells = torch.arange(64).repeat(times)
    states = TensorDict({"cell": cells, "episode": torch.arange(len(cells)) // 8}, [len(cells)])
    diagnostics = NetworkDiagnostics(policy, sites=["module.0"], rows=1024)
    assert diagnostics.update(states)["cka_first/module.0"] == pytest.approx(1)
    nn.init.normal_(net[0].weight)
    assert abs(diagnostics.update()["cka_first/module.0"]) < 0.1
    assert abs(diagnostics.intervals["cka_first/module.0"].estimate) < 0.1
    both = {"one": policy, "two": TensorDictModule(other, ["cell"], ["logits"])}
    found = cka_matrix(policy, both, ["module.0"], states, rows=1024, groups="episode")
    assert abs(float(found.at("module.0")[0, 1])) < 0.1


def test_looking_changes_nothing() -> None:
    actor = make_actor()
    data = rollout(actor)
    copied, hooks = copy.deepcopy(actor), [len(child._forward_hooks) for child in actor.modules()]
    state = torch.get_rng_state()
    NetworkDiagnostics(actor, sites=[FC2]).update(data)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(child._forward_hooks) for child in actor.modules()] == hooks
    assert all(torch.equal(a, b) for a, b in zip(actor.parameters(), copied.parameters(), strict=True))
    assert actor.training


def test_dropout_is_no_churn_and_statistics_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
    actor = QValueActor(TensorDictModule(net, ["observation"], ["action_value"]), action_space="categorical")
    data = TensorDict({"observation": torch.randn(100, 4)}, batch_size=100)
    diagnostics = NetworkDiagnostics(actor, sites=["module.0.module.2"])
    diagnostics.update(data)
    mean = net[1].running_mean.clone()
    assert diagnostics.update()["churn"] == 0
    assert torch.equal(net[1].running_mean, mean)
    actor.eval()
    assert diagnostics.update()["churn"] == 0  # and no warning that the two differ


def test_value_networks_and_recurrent_ones() -> None:
    critic = make_critic()
    site = next(name for name, child in critic.named_modules() if isinstance(child, nn.ReLU))
    found = NetworkDiagnostics(critic, sites=[site]).update(rollout(make_actor()))
    assert "churn" not in found
    assert 0 <= found[f"dormant/{site}"] <= 1
    core = GRUModule(
        input_size=4, hidden_size=8, in_keys=["observation", "state", "is_init"], out_keys=["h", ("next", "state")]
    )
    data = TensorDict(
        {"observation": torch.randn(6, 5, 4), "state": torch.zeros(6, 5, 1, 8), "is_init": torch.zeros(6, 5, 1).bool()},
        batch_size=(6, 5),
    )
    found = NetworkDiagnostics(core, sites=["gru"]).update(data)
    assert found["states"] == 30
    assert found["effective_rank/gru"] >= 1


def test_rows_that_are_padding_or_no_numbers() -> None:
    actor = make_actor()
    data = rollout(actor)
    data["collector", "mask"] = torch.zeros(data.batch_size, dtype=torch.bool)
    data["collector", "mask"][:, :2] = True
    diagnostics = NetworkDiagnostics(actor, sites=[FC2])
    assert diagnostics.update(data)["states"] == 32
    weights = copy.deepcopy(actor.state_dict())
    diagnostics = NetworkDiagnostics(actor, sites=[FC2], states=data)
    with torch.no_grad():
        next(actor.parameters())[0] = torch.nan
    found = diagnostics.update()
    assert found[f"nonfinite/{FC2}"] == 1
    assert np.isnan(found[f"dormant/{FC2}"])
    actor.load_state_dict(weights)
    assert diagnostics.update()[f"cka_first/{FC2}"] == pytest.approx(1.0)  # with itself, the first that is finite


def test_a_monitor_of_torchrl_logs_it(tmp_path: Path) -> None:
    actor = make_actor()
    diagnostics = NetworkDiagnostics(actor, sites=[FC2])
    monitor = LoggerMonitor(CSVLogger("run", log_dir=str(tmp_path)), background=False, on_error="raise")
    monitor.watch(diagnostics, name="network")
    diagnostics.update(rollout(actor))
    monitor.step()
    logged = {path.relative_to(tmp_path / "run" / "scalars").as_posix(): path for path in tmp_path.rglob("*.csv")}
    (dormant,) = (path for name, path in logged.items() if "dormant" in name)
    assert float(dormant.read_text().split(",")[-1]) == pytest.approx(diagnostics.last[f"dormant/{FC2}"])


def test_what_it_is_given_wrongly() -> None:
    actor = make_actor()
    data = rollout(actor)
    with pytest.raises(SiteError, match="nearest"):
        NetworkDiagnostics(actor, sites=["module.0.module.33"])
    with pytest.raises(InputError, match="positive integer"):
        NetworkDiagnostics(actor, sites=[FC2], rows=0)
    diagnostics = NetworkDiagnostics(actor, sites=[FC2])
    with pytest.raises(InputError, match="needs a batch"):
        diagnostics.update()
    with pytest.raises(InputError, match="no states"):
        diagnostics.update(data[:0])
    padding = data.copy().set(("collector", "mask"), torch.zeros(data.batch_size).bool())
    with pytest.raises(InputError, match="all of it padding"):
        diagnostics.update(padding)
    with pytest.raises(MissingKeyError, match="does not output; nearest: 'action'"):
        NetworkDiagnostics(actor, sites=[FC2], action_key="actions")
    with pytest.raises(MissingKeyError, match="'observation'"):
        diagnostics.update(data.select("action"))
    diagnostics.update(data)
    del actor
    assert diagnostics.update()["churn"] == 0  # the network is kept


def test_an_agent_that_learns_wakes_up_and_settles() -> None:
    """The snapshots of the agent of the probing experiment: dormant units fall, ranks rise, churn falls."""
    trained = load(EXPERIMENTS["probing"].agent, seed=0)
    live, site = trained.untrained.actor, trained.recipe.sites["fc3"]
    states = trained.recipe.env(batch_size=[64], seed=1).rollout(16, break_when_any_done=False)
    diagnostics = NetworkDiagnostics(live, sites=[site], states=states)
    found = [diagnostics.update()]
    for snapshot in trained.snapshots.values():
        live.load_state_dict(snapshot.actor.state_dict())
        found.append(diagnostics.update())
    dormant, rank, churn = (
        [one[name] for one in found] for name in (f"dormant/{site}", f"entropy_rank/{site}", "churn")
    )
    assert dormant[-1] < dormant[0] - 0.1
    assert rank[-1] > 1.5 * rank[0]
    assert churn[-1] < 0.5 * churn[1]

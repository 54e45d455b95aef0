"""Sites by concepts by checkpoints on stored data: the same cells as single probes, one forward for each row."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import balanced_accuracy_score, r2_score
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer

from tdhook_rl import ActivationCaching, statistics
from tdhook_rl.envs import CueCorners, CueGrid
from tdhook_rl.errors import ArtifactError, InputError, MissingKeyError
from tdhook_rl.experiments.checkpoints import load
from tdhook_rl.probes.board import CLASSES
from tdhook_rl.replay import probe_grid
from tdhook_rl.replay.probe_grid import _Facts, _Source
from tdhook_rl.rollout import EPISODE, Future, GroupSplit, ProbeSuite, Return


def wandered(envs: int = 200, steps: int = 20) -> TensorDict:
    env = CueCorners(batch_size=[envs], seed=1)
    data = env.rollout(steps, break_when_any_done=False)
    ended = data["next", "done"].squeeze(-1).long().cumsum(1).roll(1, 1)
    ended[:, 0] = 0
    return data.set(EPISODE, torch.arange(envs)[:, None] * 100 + ended)


def small(width: int = 90, seed: int = 0) -> TensorDictModule:
    torch.manual_seed(seed)
    return TensorDictModule(nn.Sequential(nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, 4)), ["observation"], ["out"])


CONCEPTS: dict[str, Any] = {
    "xor": ("concept", "xor"),
    "light": lambda td: td["concept", "bits"][..., 0],
    "column": lambda td: td["observation"][..., :30].float() @ torch.arange(30.0),
    "next light": Future(("concept", "xor"), 2),
    "return": Return(gamma=0.9),
}


def storage(kind: str, data: TensorDict, path: Path) -> Any:
    if kind == "TensorDict":
        return data
    flat = data.reshape(-1).detach()
    made = LazyMemmapStorage(len(flat), scratch_dir=path) if kind == "memmap" else LazyTensorStorage(len(flat))
    buffer = ReplayBuffer(storage=made)
    buffer.extend(flat)
    return buffer


@pytest.mark.parametrize("kind", ["TensorDict", "buffer", "memmap"])
@pytest.mark.parametrize("batch_size", [10_000, 333])
def test_chunks_and_storages_change_nothing(kind: str, batch_size: int, tmp_path: Path) -> None:
    data, policy = wandered(100), small()
    options = {"sites": ["module.*"], "concepts": CONCEPTS, "split": GroupSplit(EPISODE, held_out=0.4), "penalty": 1e-3}
    expected = probe_grid(policy, data, **options)
    found = probe_grid(policy, storage(kind, data, tmp_path), batch_size=batch_size, **options)
    for one, other in zip(found, expected, strict=True):
        assert (one.site, one.concept, one.left_out) == (other.site, other.concept, other.left_out)
        assert one.trained.estimate == pytest.approx(other.trained.estimate, abs=2e-3)
        assert one.trained.rows == other.trained.rows
    assert found["module.1", "next light"].left_out > 0


@pytest.mark.parametrize("batch_size", [7, 45, 10_000])
def test_trajectories_as_entries_are_their_rows(batch_size: int) -> None:
    """Rows that are padding count nowhere, and no more rows are read at once than were asked for."""
    data, policy = wandered(40), small()
    real = torch.arange(20) < torch.randint(8, 21, (40, 1))
    data["collector", "mask"] = real
    data["observation"] = torch.where(real[..., None], data["observation"].float(), 1e3)
    buffer = ReplayBuffer(storage=LazyTensorStorage(40))
    buffer.extend(data)
    read: list[int] = []
    policy.module[0].register_forward_hook(lambda module, args, output: read.append(len(args[0])))
    options: dict[str, Any] = {"sites": ["module.1"], "concepts": CONCEPTS, "split": GroupSplit(EPISODE, held_out=0.4),
                               "penalty": 1e-3, "untrained": False}  # fmt: skip
    found = probe_grid(policy, buffer, batch_size=batch_size, **options)
    assert max(read) <= max(20, batch_size)
    assert (max(read) > 20) == (batch_size > 40)
    expected = probe_grid(policy, data, **options)
    for one, other in zip(found, expected, strict=True):
        assert (one.concept, one.left_out, one.trained.rows) == (other.concept, other.left_out, other.trained.rows)
        assert one.trained.estimate == pytest.approx(other.trained.estimate, abs=2e-3)
        assert one.shuffled.estimate == pytest.approx(other.shuffled.estimate, abs=2e-3)
    assert found["module.1", "xor"].left_out == 0
    # The last two steps of each stretch have no later light: of the rows that are real.
    assert 0 < found["module.1", "next light"].left_out < int(real.sum())


def test_what_comes_later_is_told_in_whatever_order_it_lies() -> None:
    """The future of rows of which the trajectories lie between each other is that of one after the other."""
    data = wandered(60)
    data["step_count"] = torch.arange(20)[:, None].expand(60, 20, 1)
    data["collector", "traj_ids"] = data[EPISODE]
    flat = data.reshape(-1)
    order = flat[EPISODE] * 100 + flat["step_count"][:, 0]
    known = {}
    for name, one in (("in order", flat[order.argsort()]), ("between", flat[flat["step_count"][:, 0].argsort()])):
        source = _Source(one, 4096)
        facts = _Facts.of(source, CONCEPTS, GroupSplit(EPISODE), None, lambda *_: None)
        back = (one[EPISODE] * 100 + one["step_count"][:, 0]).argsort()
        known[name] = {name: (facts.labels[name][back], facts.known[name][back]) for name in CONCEPTS}
        assert facts.groups == {CLASSES: ["xor", "light"], "column": ["column"], "next light": ["next light"],
                                "return": ["return"]}  # fmt: skip
        assert facts.left_out["next light"] == int((~facts.known["next light"]).sum()) > 0
    for name in CONCEPTS:
        (label, there), (other, also) = known["in order"][name], known["between"][name]
        assert torch.equal(there, also)
        assert torch.equal(label[there], other[also])
    rewards, ended = flat["next", "reward"][:, 0], flat[EPISODE]
    label, there = known["in order"]["return"]
    rewards, ended = rewards[order.argsort()], ended[order.argsort()]
    last = 0.0
    for row in reversed(range(len(flat))):
        last = float(rewards[row]) + 0.9 * last * (row + 1 < len(flat) and bool(ended[row] == ended[row + 1]))
        if there[row]:
            assert float(label[row, 0, 0]) == pytest.approx(last, abs=1e-5)


def test_the_scores_are_those_of_scikit_learn() -> None:
    """Fitted on all training rows, scored on all held-out rows, once each."""
    data, policy = wandered(300), small()
    split = GroupSplit(EPISODE, held_out=0.4)
    table = probe_grid(policy, data, sites=["module.1"], concepts=CONCEPTS, split=split, penalty=0.0)
    with ActivationCaching("module.1").prepare(policy) as hooked:
        x = hooked.annotate(data)["cache", "module.1"].flatten(0, 1).double().numpy()
    train, held = (mask.reshape(-1).numpy() for mask in split(data))
    y = data["concept", "xor"].reshape(-1).numpy()
    model = LinearDiscriminantAnalysis(priors=[0.5, 0.5]).fit(x[train], y[train])
    expected = balanced_accuracy_score(y[held], model.predict(x[held]))
    cell = table["module.1", "xor"]
    assert cell.trained.estimate == pytest.approx(expected, abs=2e-3)
    assert cell.trained.groups == len(data[EPISODE].reshape(-1)[held].unique())
    column = CONCEPTS["column"](data).reshape(-1).double().numpy()
    design = np.c_[x, np.ones(len(x))]
    weights = np.linalg.lstsq(design[train], column[train], rcond=None)[0]
    assert table["module.1", "column"].trained.estimate == pytest.approx(
        r2_score(column[held], design[held] @ weights), abs=1e-3
    )


def test_every_row_runs_once_for_each_checkpoint_and_network() -> None:
    data, policy = wandered(60), small()
    seen: list[int] = []
    policy.module[0].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    split = GroupSplit(EPISODE, held_out=0.4)
    probe_grid(policy, data, sites=["module.1"], concepts={"xor": ("concept", "xor")}, split=split,
               untrained=False, checkpoints={"a": policy, "b": small(seed=1)}, batch_size=100)  # fmt: skip
    assert sum(one for one in seen if one > 1) == 2 * data.numel()  # beside some rows of the first chunk, alone


def test_checkpoints_of_every_kind(tmp_path: Path) -> None:
    policy, other = small(), small(seed=5)
    torch.save(other.state_dict(), tmp_path / "b.pt")
    save_file(other.state_dict(), tmp_path / "c.safetensors")
    before = copy.deepcopy(policy.state_dict())
    checkpoints = {"now": policy, "a": other.state_dict(), "b": tmp_path / "b.pt", "c": str(tmp_path / "c.safetensors")}
    options = {"sites": "module.1", "concepts": {"xor": ("concept", "xor")}, "split": GroupSplit(EPISODE)}
    data = wandered(80)
    table = probe_grid(policy, data, checkpoints=checkpoints, **options)
    assert [cell.checkpoint for cell in table] == list(checkpoints)
    found = {cell.checkpoint: cell.trained.estimate for cell in table}
    assert found["a"] == found["b"] == found["c"] != found["now"]
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert table["b", "module.1", "xor"].checkpoint == "b"
    alone = probe_grid(other, data, untrained=False, **options)
    assert alone["module.1", "xor"].trained.estimate == pytest.approx(found["a"])


def test_an_agent_knows_before_it_acts() -> None:
    """Of the experiment E3: the needed concept is read of the trained network, is marked, and rises with training."""
    trained = load("cue_grid", 0)
    env = CueGrid(batch_size=[400], seed=3)
    data = env.rollout(24, break_when_any_done=False)
    ended = data["next", "done"].squeeze(-1).long()
    data[EPISODE] = (ended.cumsum(1) - ended) + torch.arange(400)[:, None] * 100
    fc2 = trained.recipe.sites["fc2"]
    chosen = [*list(trained.snapshots)[:1], list(trained.snapshots)[-1]]
    table = probe_grid(
        trained.agent.actor, data, sites=[fc2], concepts={name: ("concept", name) for name in ("xor", "unneeded_xor")},
        checkpoints={f"{frames}": trained.snapshots[frames].actor for frames in chosen},
        untrained=trained.untrained.actor, split=GroupSplit(EPISODE, held_out=0.3),
    )  # fmt: skip
    first, last = map(str, chosen)
    needed = table[last, fc2, "xor"]
    assert needed.trained.low > 0.95
    assert needed.gain is not None
    assert needed.gain.low > 0.2
    assert needed.adjusted < 1e-6
    assert table[last, fc2, "unneeded_xor"].adjusted > 0.5
    assert table[first, fc2, "xor"].trained.estimate < needed.trained.estimate - 0.2
    np.testing.assert_allclose(
        [cell.adjusted for cell in table], statistics.benjamini_hochberg([cell.p for cell in table])
    )


def test_the_grid_and_the_suite_agree() -> None:
    """The suite scores with the probe of its time; after one batch that is the grid's."""
    data, policy = wandered(150), small()
    options: dict[str, Any] = {"sites": ["module.1"], "concepts": CONCEPTS, "split": GroupSplit(EPISODE)}
    suite = ProbeSuite(policy, **options)
    suite.update(data)
    for one, other in zip(suite.table(), probe_grid(policy, data, **options), strict=True):
        assert (one.concept, one.left_out <= other.left_out) == (other.concept, True)
        if one.concept not in ("next light", "return"):
            for name in ("trained", "untrained", "input", "shuffled", "gain", "selectivity"):
                a, b = getattr(one, name), getattr(other, name)
                assert (a.estimate, a.low, a.rows) == pytest.approx((b.estimate, b.low, b.rows), nan_ok=True), name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"concepts": {}}, InputError, "there is none"),
        ({"concepts": {"c": "nowhere"}}, MissingKeyError, "nowhere"),
        ({"batch_size": 0}, InputError, "batch_size="),
        ({"split": GroupSplit(("collector", "one"))}, InputError, "train and .* are held out"),
        ({"checkpoints": {"a": 3}}, InputError, "'a' is a int"),
        ({"checkpoints": {"a": "nowhere.pt"}}, ArtifactError, "there is no file"),
        ({"checkpoints": {"a": {}}}, InputError, "has not the weights"),
    ],
)
def test_what_means_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    data = wandered(20)
    data["collector", "one"] = torch.zeros(data.batch_size, dtype=torch.long)
    given = {"sites": "module.1", "concepts": {"xor": ("concept", "xor")}, "split": GroupSplit(EPISODE)} | options
    with pytest.raises(error, match=message):
        probe_grid(small(), data, **given)


@pytest.mark.parametrize("probes", [ProbeSuite, probe_grid])
@pytest.mark.parametrize("kind", [None, Future, Return])
def test_what_is_no_concept(probes: Any, kind: Any) -> None:
    def wrapped(what: Any) -> Any:
        return what if kind is None else Future(what, steps=1) if kind is Future else Return(reward=what)

    options: dict[str, Any] = {"data": wandered(20)} if probes is probe_grid else {}
    given = [{"": wrapped("value")}, *({"c": wrapped(what)} for what in (3, None, "", (), ["concept", "xor"], {"a"}))]
    for concepts in given:
        with pytest.raises(InputError, match="concepts= has a key, a function of the batch"):
            probes(policy=small(), sites="module.1", concepts=concepts, split=GroupSplit(EPISODE), **options)


def test_hostile_and_corrupt_checkpoints(tmp_path: Path) -> None:
    import pickle

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "hostile.pt").write_bytes(pickle.dumps({"weight": Hostile()}))
    torch.save({"weight": Hostile()}, tmp_path / "zip.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"abc")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("hostile.pt", "zip.pt", "cut.safetensors", "list.pt"):
        with pytest.raises(ArtifactError, match="holds"):
            probe_grid(small(), wandered(10), sites="module.1", concepts={"xor": ("concept", "xor")},
                       checkpoints={"a": tmp_path / name})  # fmt: skip
    assert not (tmp_path / "ran").exists()


def test_an_empty_buffer_and_one_that_is_partly_filled() -> None:
    options: dict[str, Any] = {"sites": "module.1", "concepts": {"xor": ("concept", "xor")}}
    buffer = ReplayBuffer(storage=LazyTensorStorage(5000))
    with pytest.raises(InputError, match="empty"):
        probe_grid(small(), buffer, **options)
    with pytest.raises(InputError, match="no row"):
        probe_grid(small(), wandered(4)[:0], **options)
    buffer.extend(wandered(60).reshape(-1).detach())
    cell = probe_grid(small(), buffer, **options)["module.1", "xor"]
    assert cell.trained.rows < 1200
    assert not math.isnan(cell.trained.estimate)


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    probe_grid(small(), wandered(20), sites="module.1", concepts={"xor": ("concept", "xor")}, batch_size=100,
               checkpoints={"a": small()}, progress=lambda *one: told.append(one))  # fmt: skip
    assert list(dict.fromkeys(what for what, _, _ in told)) == ["reading labels", "fitting a", "scoring a"]
    assert all(done <= total for _, done, total in told)
    assert told[-1][1] == told[-1][2]

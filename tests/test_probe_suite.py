"""What can be read where, from collected batches, beside what it is compared with."""

from __future__ import annotations

import json
import math
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector, MultiSyncCollector

from tdhook_rl import ActivationCaching, Compose, LinearProbe, ProbeReadout
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, MissingKeyError, SiteError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.metrics import untrained_copy
from tdhook_rl.probes.board import CLASSES, Source
from tdhook_rl.replay import probe_grid
from tdhook_rl.rollout import EPISODE, Future, GroupSplit, OnlineProbe, ProbeSuite, Return
from tests.walks import Walks, fitted, net, require_one_pass, suite, sums

STATE = [("concept", "cell"), ("concept", "bits")]


# ------------------------------------------------------------------ against the single probe


def test_the_scores_are_those_of_the_online_probe() -> None:
    actor = make_actor()
    split = GroupSplit(EPISODE, STATE, held_out=0.4)
    one = ProbeSuite(actor, sites=[FC2], concepts={"xor": ("concept", "xor"), "b": lambda td: td["concept", "bits"]},
                     split=split, penalty=1e-3, decay=0.9, untrained=False)  # fmt: skip
    alone = OnlineProbe(features=("cache", FC2), label=("concept", "xor"), split=split, penalty=1e-3, decay=0.9)
    with ActivationCaching(FC2).prepare(actor) as policy:
        collector = Collector(CueCorners(batch_size=[64]), policy, frames_per_batch=640, total_frames=3200)
        for data in collector:
            counts = one.update(data)
            found = alone.update(data)
    cell = one.table()[FC2, "xor"]
    assert cell.trained.estimate == pytest.approx(found["accuracy"], abs=1e-9)
    assert cell.trained.low == pytest.approx(found["accuracy_low"], abs=1e-6)
    assert cell.auc is not None
    assert cell.auc.estimate == pytest.approx(found["auc"], abs=2e-3)
    assert counts["held_out_rows"] == found["held_out_rows"]
    assert [f"b.{place}" for place in range(4)] == [one.concept for one in one.table() if one.concept.startswith("b.")]
    torch.testing.assert_close(one.probe(FC2, "xor").weight, alone.probe.weight, rtol=1e-3, atol=1e-4)


def test_activations_are_read_of_the_batches_of_the_hooked_policy_that_was_given() -> None:
    policy, data = net(), Walks(16).batch(40)
    with ActivationCaching("module.1").prepare(policy) as caching:
        one = suite(caching, {"value": "value"})
        one.update(caching(data.clone()))
        marked = caching(data.clone())
        marked["cache", "module.1"].zero_()
        read = suite(caching, {"value": "value"})
        read.update(marked)
    other = suite(policy, {"value": "value"})
    other.update(data)
    torch.testing.assert_close(sums(one, CLASSES), sums(other, CLASSES))
    assert not sums(read, CLASSES)["weight"].any()  # what it was given is what it read


@pytest.mark.parametrize("read", ["suite", "grid"])
def test_activations_of_others_in_a_batch_are_not_believed(read: str) -> None:
    """Of older weights, or of another network, under the same keys."""
    policy, data = net(), Walks(60).batch(40)
    with ActivationCaching("module.1").prepare(net(seed=7)) as other:
        foreign = other(data.clone())
    foreign["cache", "module.1"] *= 0
    found = []
    for batch in (data, foreign):
        if read == "suite":
            one = suite(policy, {"value": "value"})
            one.update(batch)
            found.append(one.table())
        else:
            found.append(probe_grid(policy, batch, sites="module.1", concepts={"value": "value"}))
    assert found[0]["module.1", "value"].trained == found[1]["module.1", "value"].trained


# ------------------------------------------------------------------ squares, agents, labels


def test_each_square_has_features_and_a_label_of_its_own() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    layers(torch.zeros(1, 3, 4, 5))
    policy = TensorDictModule(layers, ["pixels"], ["action"])
    pixels = torch.rand(400, 3, 4, 5)
    marked = pixels[:, 1] > 0.7  # of each square, as the convolution sees it
    data = TensorDict({"pixels": pixels, "marked": marked[..., None], "any": pixels[:, 1].amax((1, 2)) > 0.97,
                       "collector": {"traj_ids": torch.arange(400)}}, [400])  # fmt: skip
    each = ProbeSuite(policy, sites=["module.1"], concepts={"marked": "marked"}, layout="each")
    each.update(data)
    cell = each.table()["module.1", "marked"]
    assert cell.trained.rows > 400
    assert cell.trained.groups < 150
    assert cell.trained.estimate > 0.8
    assert cell.input is not None
    assert cell.input.estimate > 0.9  # the square's own pixels show it
    pooled = ProbeSuite(policy, sites=["module.1"], concepts={"any": "any"}, layout={"module.1": "pooled"})
    pooled.update(data)
    assert pooled._board._groups[CLASSES].find(Source("trained", "module.1"))[0].bank.width == 8  # type: ignore[index]
    with pytest.raises(InputError, match=r"the labels of marked have 20 places a row and the activation .* has 1"):
        ProbeSuite(policy, sites=["module.1"], concepts={"marked": "marked"}).update(data)


def test_each_agent_is_a_row_or_all_of_them_are_one() -> None:
    policy = TensorDictModule(nn.Sequential(nn.Linear(6, 12), nn.Tanh()), [("agents", "observation")], ["action"])
    seen = torch.randn(300, 5, 3, 6)
    data = TensorDict({
        "agents": {"observation": seen}, "own": (seen[..., 0] > 0)[..., None], "first": seen[:, :, 0, 1] > 0,
        "collector": {"traj_ids": torch.arange(300)[:, None].expand(300, 5)},
    }, [300, 5])  # fmt: skip
    own = ProbeSuite(policy, sites=["module.1"], concepts={"own": "own", "first": "first"}, layout="each")
    own.update(data)
    table = own.table()
    assert table["module.1", "own"].trained.estimate > 0.95
    assert table["module.1", "first"].trained.estimate < 0.8  # of three agents one knows it
    together = ProbeSuite(policy, sites=["module.1"], concepts={"first": "first"})
    together.update(data)
    assert together.table()["module.1", "first"].trained.estimate > 0.95


@pytest.mark.parametrize(
    ("label", "score", "names"),
    [
        (lambda td: td["value"], "accuracy", ["c"]),
        (lambda td: td["value"] == 1, "accuracy", ["c"]),
        (lambda td: nn.functional.one_hot(td["value"], 3), "accuracy", ["c.0", "c.1", "c.2"]),
        (lambda td: td["observation"][..., 3], "r2", ["c"]),
        (lambda td: td["observation"][..., 3:5], "r2", ["c.0", "c.1"]),
    ],
    ids=["classes", "yes or no", "several labels", "a number", "several numbers"],
)
def test_every_kind_of_concept(label: Callable[[TensorDict], Tensor], score: str, names: list[str]) -> None:
    one = suite(net(), {"c": label})
    one.update(Walks(60).batch(40))
    table = one.table()
    assert [cell.concept for cell in table] == names
    for cell in table:
        assert cell.score == score
        assert cell.trained.known
        assert cell.untrained is not None
        assert cell.gain is not None
        assert cell.gain.estimate == pytest.approx(cell.trained.estimate - cell.untrained.estimate)
        assert cell.selectivity is not None
        assert cell.shuffled is not None
        assert cell.selectivity.estimate == pytest.approx(cell.trained.estimate - cell.shuffled.estimate)
        assert (cell.auc is not None) == (score == "accuracy" and cell.classes == 2)
        assert cell.shuffled.estimate < cell.trained.estimate - 0.1
        assert one.probe("module.1", cell.concept) is not None


# ------------------------------------------------------------------ controls, merging, use of the probes


def test_shuffled_labels_belong_to_groups_and_are_as_frequent() -> None:
    """A label by state is the same wherever the state comes again: what can be memorised is."""
    torch.manual_seed(0)
    state = torch.randint(0, 8, (4000,))
    data = TensorDict({
        "observation": nn.functional.one_hot(state, 8).float(), "state": state, "rare": torch.rand(4000) < 0.1,
        "collector": {"traj_ids": torch.arange(4000) // 10},
    }, [4000])  # fmt: skip
    by_state = suite(net(8), {"rare": "rare"}, control="state")
    by_state.update(data)
    assert by_state.table()["module.1", "rare"].shuffled.estimate > 0.95 or math.isnan(
        by_state.table()["module.1", "rare"].shuffled.estimate
    )
    by_episode = suite(net(8), {"rare": "rare"})
    by_episode.update(data)
    assert by_episode.table()["module.1", "rare"].shuffled.estimate < 0.65


def test_what_two_workers_saw_adds_up() -> None:
    policy = net()
    concepts = {"value": "value", "number": lambda td: td["observation"][..., 4]}
    whole, parts = suite(policy, concepts), [suite(policy, concepts) for _ in range(2)]
    for seed, part in enumerate(parts):
        data = Walks(16, seed=seed).batch(30)
        data["collector", "traj_ids"] += 1_000_000 * seed
        part.update(data)
        whole.update(data)
    merged = pickle.loads(pickle.dumps(parts[0]._board)) + parts[1]._board
    together = parts[0] + parts[1]
    for group in (CLASSES, "number"):
        torch.testing.assert_close(sums(together, group), sums(whole, group), rtol=1e-3, atol=1e-4)
    cells = [one.table()["module.1", "value"].trained for one in (together, whole)]
    assert cells[0].rows == cells[1].rows
    assert cells[0].groups == cells[1].groups
    assert merged.scores().keys() == together._board.scores().keys()


def test_suites_of_other_processes_add_up_to_one_pass() -> None:
    policy = make_actor()
    collector = MultiSyncCollector(
        [lambda: CueCorners(batch_size=[8])] * 2, policy, frames_per_batch=2560, total_frames=2560, cat_results="stack"
    )
    try:
        data = next(iter(collector)).clone()
    finally:
        collector.shutdown()
    weights, shards = policy.state_dict(), list(data.unbind(0))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context()) as pool:
        first, second = pool.map(fitted, [weights] * 2, shards)
    require_one_pass(first, second, fitted(weights, data.flatten(0, 1)))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"split": GroupSplit(EPISODE, seed=1)}, "split"),
        ({"split": GroupSplit("value")}, "split"),
        ({"control": "value"}, "control"),
        ({"sites": ["module.0"]}, "sites"),
        ({"concepts": {"other": "value"}}, "concepts"),
    ],
)
def test_only_suites_of_one_kind_add_up(options: dict[str, Any], what: str) -> None:
    ones = [suite(net(), {"value": "value"}), suite(net(), options.get("concepts", {"value": "value"}), **{
        name: value for name, value in options.items() if name != "concepts"
    })]  # fmt: skip
    for one in ones:
        one.update(Walks(16).batch(20))
    with pytest.raises(InputError, match=f"only suites of the same {what} add up"):
        ones[0] + ones[1]


def test_rows_that_are_not_finite_are_counted_once_for_each_concept() -> None:
    data = Walks(16).batch(30)
    data["observation"][:3, :5] = math.nan
    number = torch.rand(16, 30)
    number[4, :7] = math.nan
    one = suite(net(), {"value": "value", "later": Future("value", 1), "number": lambda td: number})
    one.update(data)
    found = {cell.concept: cell for cell in one.table()}
    assert found["value"].left_out == 15
    assert found["number"].left_out == 15 + 7
    assert found["number"].shuffled is not None
    assert found["number"].shuffled.rows == found["number"].trained.rows  # no label that was dealt out is missing


def test_a_fitted_probe_reads_out_inline_and_is_pushed() -> None:
    policy = net()
    one = suite(policy, {"value": "value"})
    data = Walks(60).batch(40)
    blank = LinearProbe(weight=torch.zeros(3, 16), bias=torch.zeros(3), path="module.1")
    with Compose(ActivationCaching("module.1"), ProbeReadout({"value": blank})).prepare(policy) as hooked:
        assert not one.push(hooked.controls, "probe.value", "module.1", "value")
        one.update(data)
        assert one.push(hooked.controls, "probe.value", "module.1", "value")
        found = hooked(data.clone())
    probe = one.probe("module.1", "value")
    assert probe is not None
    torch.testing.assert_close(found["probe", "value"], probe.probabilities(found["cache", "module.1"]))
    assert (found["probe", "value"].argmax(-1) == data["value"]).double().mean() > 0.9


def test_workers_collect_and_the_suite_reads() -> None:
    policy = make_actor()
    one = ProbeSuite(policy, sites=[FC2], concepts={"xor": ("concept", "xor"), "next": Future(("concept", "xor"), 1)})
    collector = MultiSyncCollector(
        [lambda: CueCorners(batch_size=[8])] * 2, policy, frames_per_batch=320, total_frames=960, cat_results=0
    )
    try:
        for data in collector:
            counts = one.update(data)
    finally:
        collector.shutdown()
    assert counts["rows"] == 320
    assert one.table()[FC2, "next"].trained.rows > 0


def test_training_is_bit_identical_beside_a_suite() -> None:
    policy, data = net(), Walks(8).batch(20)
    before = torch.get_rng_state()
    kept = data.clone()
    one = suite(policy, {"value": "value", "later": Future("value", 1)})
    one.update(data)
    one.table()
    assert torch.equal(torch.get_rng_state(), before)
    assert (data == kept).all()
    assert sorted(map(str, data.keys(True))) == sorted(map(str, kept.keys(True)))


# ------------------------------------------------------------------ the untrained network


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.scale


def test_modules_that_cannot_be_drawn_anew_are_named() -> None:
    policy = TensorDictModule(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), Scale()), ["observation"], ["action"])
    with pytest.raises(InputError, match=r"module\.2 \(Scale\) has weights and no reset_parameters\(\)"):
        suite(policy, {"value": "value"})
    other = suite(policy, {"value": "value"}, untrained=False)
    other.update(Walks(16).batch(20))
    assert other.table()["module.1", "value"].untrained is None
    given = suite(policy, {"value": "value"}, untrained=net())
    given.update(Walks(16).batch(20))
    assert given.table()["module.1", "value"].untrained is not None
    fewer = TensorDictModule(nn.Sequential(nn.Linear(6, 4)), ["observation"], ["action"])
    with pytest.raises(InputError, match="the untrained network has other sites"):
        ProbeSuite(policy, sites=["module.*"], concepts={"value": "value"}, untrained=fewer)


def test_an_untrained_copy_leaves_the_network_and_the_generators() -> None:
    actor = make_actor()
    before, state = {name: value.clone() for name, value in actor.state_dict().items()}, torch.get_rng_state()
    copies = [untrained_copy(actor, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in actor.state_dict().items())
    weights = [one.state_dict()["module.0.module.0.weight"] for one in copies]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], before["module.0.module.0.weight"])


# ------------------------------------------------------------------ bad input


def _nan(data: TensorDict) -> None:
    data["observation"][:3, :5] = math.nan


def _one_class(data: TensorDict) -> None:
    data["value"].zero_()


def _one_episode(data: TensorDict) -> None:
    data["collector", "traj_ids"].zero_()


def _constant(data: TensorDict) -> None:
    data["observation"].zero_()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_nan, ""),
        (_one_class, "no probe yet: the training rows hold one class or none"),
        (_one_episode, "no"),
        (_constant, ""),
    ],
    ids=["NaN rows", "one class", "one episode", "constant features"],
)
def test_what_cannot_be_scored_says_so(spoil: Callable[[TensorDict], None], words: str) -> None:
    data = Walks(16).batch(30)
    spoil(data)
    one = suite(net(), {"value": "value"})
    one.update(data)
    cell = one.table()["module.1", "value"]
    assert words in cell.words
    assert cell.left_out == (15 if spoil is _nan else 0)
    assert math.isnan(cell.trained.estimate) == (spoil in (_one_class, _one_episode))
    assert isinstance(str(one.table()), str)
    assert json.loads(one.table().json())[0]["concept"] == "value"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sites": ["module.9"]}, SiteError, "module.9"),
        ({"concepts": {}}, InputError, "there is none"),
        ({"decay": 2.0}, InputError, "decay"),
        ({"penalty": -1.0}, InputError, "penalty"),
        ({"every": 0}, InputError, "every="),
        ({"most_waiting": -1}, InputError, "most_waiting="),
        ({"layout": {"nowhere": "flat"}}, SiteError, "layout= names 'nowhere'"),
        ({"units": {"nowhere": -1}}, SiteError, "units= names 'nowhere'"),
        ({"layout": {"module.1": "round"}}, InputError, "layout= is"),
        ({"confidence": 2.0}, InputError, "confidence"),
    ],
)
def test_arguments_that_mean_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        suite(net(), options.pop("concepts", {"value": "value"}), **options)


@pytest.mark.parametrize(
    ("concept", "error", "message"),
    [
        ("valeu", MissingKeyError, "nearest: 'value'"),
        (lambda td: td["value"][0], InputError, "expected real numbers for the batch"),
        (lambda td: 3, InputError, "int"),
        (lambda td: td["value"] - 5, InputError, "numbers from 0"),
        (Future("valeu", 1), MissingKeyError, "nearest: 'value'"),
    ],
)
def test_concepts_that_are_not_there(concept: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        suite(net(), {"c": concept}).update(Walks(4).batch(10))


@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch_changes_nothing(first: bool) -> None:
    data = Walks(16).batch(20)
    one, other = (suite(net(), {"value": "value", "later": Future("value", 1)}) for _ in range(2))
    for batch in (data[:, :0], data) if first else (data, data[:, :0]):
        counts = one.update(batch)
    other.update(data)
    assert counts["rows"] == (320 if first else 0)
    assert [cell.trained for cell in one.table()] == [cell.trained for cell in other.table()]


def test_futures_and_returns_that_mean_nothing() -> None:
    for steps in (0, -1, True):
        with pytest.raises(InputError, match="steps= is a positive integer"):
            Future("action", steps)
    with pytest.raises(InputError, match="discount"):
        Return(gamma=1.5)
    one = suite(net(), {"value": "value"})
    one.update(Walks(16).batch(20))
    with pytest.raises(InputError, match="nearest: 'value'"):
        one.probe("module.1", "valeu")
    with pytest.raises(InputError, match=r"nearest: 'module\.1'"):
        one.probe("module.2", "value")
    with pytest.raises(InputError, match="nearest"):
        one.table()["module.1", "valeu"]

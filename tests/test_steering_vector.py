"""Directions as artifacts: extracted from any source, against arithmetic by hand in float64, and wrong input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, ReplayBuffer

from tdhook_rl import ActivationAddition, LinearProbe, SteeringVectors
from tdhook_rl.errors import ArtifactError, InputError, MissingKeyError, SiteError
from tdhook_rl.latent import SteeringVector, principal_directions
from tdhook_rl.latent.vectors.dealing import Dealer
from tdhook_rl.rollout import GroupSplit, OnlineProbe, ProbeSuite
from tdhook_rl.sites.paths import resolve
from tests.policies import HIDDEN, POLICIES, Case, recurrent
from tests.small_states import close, mlp, states, written


def norms(vectors: Tensor) -> Tensor:
    return vectors.double().flatten(1).norm(dim=1)


def computed(policy: nn.Module, path: str, data: TensorDictBase, read: Callable[[Any], Tensor] | None = None) -> Tensor:
    """What a module computes for each row, ``(rows, *features)``, by a hook of torch on a copy in float64."""
    twin, seen = copy.deepcopy(policy).double().eval(), []
    read = read or (lambda output: output[0] if isinstance(output, tuple) else output)
    module = resolve(twin, path)[0][1]
    module.register_forward_hook(lambda _, args, output: seen.append(read(output).clone()))  # type: ignore[misc]
    torch.set_default_dtype(torch.float64)  # of what is made inside a forward
    try:
        with torch.no_grad():
            rows = data.reshape(-1).apply(lambda one: one.double() if one.is_floating_point() else one)
            twin(rows if isinstance(twin, TensorDictModuleBase) else rows["input"])
    finally:
        torch.set_default_dtype(torch.float32)
    return seen[0].reshape(data.numel(), *seen[0].shape[1:])


# ------------------------------------------------------------------------------------------- pairs and contrast sets


@pytest.mark.parametrize("batch", [(5,), (2, 3), (1,), (70,)])
@pytest.mark.parametrize("name", POLICIES)
def test_pairs_of_every_policy(name: str, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    case = POLICIES[name]
    policy, positive, negative = case.build(), case.data(*batch), case.data(*batch)
    torch_state, before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    found = SteeringVector.from_pairs(policy, case.site, positive, negative, shuffles=3)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]
    apart = computed(policy, case.site, positive) - computed(policy, case.site, negative)
    assert found.vector.shape == case.features
    assert found.vector.dtype == torch.float32
    assert close(found.vector, apart.mean(0))
    assert found.facts["norm"] == pytest.approx(float(apart.mean(0).norm()), rel=1e-4, abs=1e-5)
    assert found.facts["positive_states"] == found.facts["negative_states"] == positive.numel()
    assert found.check(policy) == "same"
    SteeringVectors(found, alpha=0.0).prepare(policy, return_context=False).restore()  # and warns of nothing
    assert not any(one._forward_hooks for one in policy.modules())
    if len(batch) == 1 and batch[0] < min(8, apart[0].numel()):
        weights = _weights(apart, found.shuffled) * len(apart)
        assert torch.allclose(weights.abs(), torch.ones(()).double(), atol=1e-2)


def _weights(rows: Tensor, sums: Tensor | None) -> Tensor:
    """Of which multiples of rows, fewer than features, sums of them are made, ``(rows, sums)``."""
    assert sums is not None
    return torch.linalg.lstsq(rows.flatten(1).T, sums.double().flatten(1).T).solution


@pytest.mark.parametrize("kind", ["TensorDict", "two dimensions", "buffer", "list", "folder", "function"])
@pytest.mark.parametrize("name", ["categorical", "pixels", "multi_agent", "recurrent", "tuples", "bytes", "batch_norm"])
def test_contrast_sets_of_every_source(name: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    case, rows = POLICIES[name], 24
    policy, data = case.build(), case.data(rows)
    data["door"] = torch.arange(rows) % 3  # labels 0, 1, 2
    source = _source(kind, data, tmp_path)
    made = [
        SteeringVector.from_contrast(policy, case.site, source, "door", batch_size=size, shuffles=4)
        for size in (5, None)
    ]
    values, door = computed(policy, case.site, data), data["door"]
    expected = values[door == 1].mean(0) - values[door == 0].mean(0)
    for found in made:
        assert close(found.vector, expected)
        assert found.facts["positive_rows"] == found.facts["negative_rows"] == found.facts["other_rows"] == 8
    assert made[0].facts["data"] == made[1].facts["data"]
    assert made[0].shuffled is not None
    assert close(made[0].shuffled, made[1].shuffled)
    against_all = SteeringVector.from_contrast(policy, case.site, source, lambda batch: batch["door"] == 1)
    rest = SteeringVector.from_contrast(policy, case.site, source, "door", negative=None)
    assert close(against_all.vector, values[door == 1].mean(0) - values[door != 1].mean(0))
    assert close(rest.vector, against_all.vector)


def _source(kind: str, data: TensorDict, folder: Path) -> Any:
    if kind == "TensorDict":
        return data
    if kind == "two dimensions":
        return data.reshape(4, 6)
    if kind == "list":
        return list(data.split(7))
    if kind == "function":
        return lambda: iter(data.split(7))
    buffer = ReplayBuffer(storage=LazyTensorStorage(100))
    buffer.extend(data)
    if kind == "folder":
        buffer.dumps(folder / "buffer")
        return folder / "buffer"
    return buffer


def test_shuffled_contrasts_are_permutations_of_the_labels() -> None:
    case = POLICIES["categorical"]
    torch.manual_seed(2)
    policy, data = case.build(), case.data(9)
    data["door"] = torch.tensor([1, 0, 0, 1, 2, 0, 0, 1, 0], dtype=torch.int32)
    kept = data["door"] < 2
    found = SteeringVector.from_contrast(policy, case.site, data, "door", shuffles=20, seed=5)
    weights = _weights(computed(policy, case.site, data)[kept], found.shuffled).T
    assert torch.allclose(weights.sort(1).values, torch.tensor([-1 / 5] * 5 + [1 / 3] * 3).double(), atol=1e-3)
    assert len({tuple((row > 0).tolist()) for row in weights}) > 10
    other = SteeringVector.from_contrast(policy, case.site, data, "door", shuffles=20, seed=6)
    assert not torch.equal(found.shuffled, other.shuffled)  # type: ignore[arg-type]
    assert torch.equal(found.vector, other.vector)


def test_labels_are_dealt_as_a_permutation_would() -> None:
    rows, positive, draws = 2600, 300, 400  # of several blocks
    dealer = Dealer(draws=draws, positive=positive, rows=rows, seed=0)
    dealt = torch.cat([dealer.next(size) for size in (1, 999, 1000, 600)], 1).double()
    assert dealt.sum(1).unique().tolist() == [positive]
    share = positive / rows
    assert abs(float(dealt.mean(0).std()) / (share * (1 - share) / draws) ** 0.5 - 1) < 0.1
    # The number in the first half is hypergeometric, whose spread a dealer of independent labels would exceed.
    spread = (rows / 2 * share * (1 - share) * (rows / 2) / (rows - 1)) ** 0.5
    assert abs(float(dealt[:, : rows // 2].sum(1).std()) / spread - 1) < 0.15
    with pytest.raises(InputError, match="more rows than labels"):
        dealer.next(1)


def test_labels_are_dealt_to_groups() -> None:
    case = POLICIES["categorical"]
    torch.manual_seed(2)
    policy, data = case.build(), case.data(12)
    data["episode"] = torch.tensor([30, 30, 30, 1, 1, 1, 2, 2, 2, 7, 7, 7])
    data["door"] = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    make = SteeringVector.from_contrast
    found = make(policy, case.site, data, "door", groups="episode", shuffles=20, batch_size=5)
    weights = _weights(computed(policy, case.site, data), found.shuffled).T.reshape(20, 4, 3)
    assert torch.allclose(weights, weights[..., :1].expand_as(weights), atol=1e-3)
    assert torch.allclose(weights[..., 0].sort(1).values, torch.tensor([-1, -1, 1, 1]).double() / 6, atol=1e-3)
    by_row = make(policy, case.site, data, "door", shuffles=20)
    assert close(found.vector, by_row.vector)  # other rows at once: the last digits of a product depend on it
    assert found.facts["groups"] == 4
    whole = make(policy, case.site, data.reshape(2, 6), "door", groups=lambda rows: rows["episode"], shuffles=20)
    assert close(whole.shuffled, found.shuffled)  # type: ignore[arg-type]
    # A concept that is one for each episode stands out among rows and not among episodes, of which six are two and two.
    repeated = data[torch.arange(12) // 3 * 3]
    scores = [make(policy, case.site, repeated, "door", groups=one).facts["score"] for one in (None, "episode")]
    assert scores[0] > scores[1]
    for wrong, words in ((lambda _: torch.zeros(12), "whole numbers"), (lambda rows: rows["door"] * 0, "of one")):
        with pytest.raises(InputError, match=words):
            make(policy, case.site, data, "door", groups=wrong)
    with pytest.raises(MissingKeyError, match="nearest: 'episode'"):
        make(policy, case.site, data, "door", groups="episodes")
    codes = iter([data["episode"], data["episode"] + 1])
    with pytest.raises(InputError, match="other groups the second time"):
        make(policy, case.site, data, "door", groups=lambda _: next(codes))


def test_sets_of_different_sizes_are_no_pairs() -> None:
    net, positive, negative = mlp(), states(2, seed=1), states(3, seed=2)
    found = SteeringVector.from_pairs(net, "1", positive, negative, shuffles=20)
    rows = torch.cat([computed(net, "1", one) for one in (positive, negative)])
    assert close(found.vector, rows[:2].mean(0) - rows[2:].mean(0))
    weights = _weights(rows, found.shuffled).T
    assert torch.allclose(weights.sort(1).values, torch.tensor([-1 / 3] * 3 + [1 / 2] * 2).double(), atol=1e-3)


# -------------------------------------------------------------------------------------------------- other sources


def test_states_of_recurrent_policies() -> None:
    torch.manual_seed(0)
    policy, case = recurrent(), POLICIES["recurrent"]
    place = ("module.0.module.0", ("next", "recurrent_state"))
    positive, negative = case.data(6), case.data(6)
    found = SteeringVector.from_pairs(policy, place, positive, negative)
    read = lambda output: output["next", "recurrent_state"]  # noqa: E731
    apart = computed(policy, place[0], positive, read) - computed(policy, place[0], negative, read)
    assert close(found.vector, apart.mean(0))
    assert found.vector.shape == (1, HIDDEN)
    with SteeringVectors(found, alpha=3.0).prepare(policy) as hooked:
        steered, plain = hooked(positive.clone()), policy(positive.clone())
    moved = steered["next", "recurrent_state"] - plain["next", "recurrent_state"]
    assert close(moved.mean(0), 3 * found.vector)
    with pytest.raises(SiteError, match="does not write"):
        SteeringVector.from_pairs(policy, (place[0], "recurrent"), positive, negative)


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, num_layers=2, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[1][0][-1])


def test_last_states_of_recurrent_modules() -> None:
    torch.manual_seed(0)
    net = Last()
    one, other = (TensorDict({"input": torch.randn(6, 3, 4)}, batch_size=6) for _ in range(2))
    found = SteeringVector.from_pairs(net, ("lstm", "h_n"), one, other)
    expected = [net.lstm(batch["input"])[1][0].movedim(0, 1).mean(0) for batch in (one, other)]
    assert close(found.vector, expected[0] - expected[1])
    with SteeringVectors(found).prepare(net) as hooked:
        moved = hooked(other.clone())["output"] - net(other["input"])
    assert close(moved, (found.vector[-1] @ net.head.weight.T).expand(6, 2))


def test_activation_addition_and_any_tensor() -> None:
    net, positive, negative = mlp(), states(5, seed=1), states(5, seed=2)
    with ActivationAddition(["1"]).prepare(net) as hooked:
        data = hooked(TensorDict({"positive": positive, "negative": negative}, batch_size=5))
    found = SteeringVector.from_addition(net, "1", data)
    assert close(found.vector, SteeringVector.from_pairs(net, "1", positive, negative).vector)
    assert found.check(net) == "same"
    mixed = data.clone()
    mixed["steer", "1"][2] += 1
    with pytest.raises(InputError, match="not one vector"):
        SteeringVector.from_addition(net, "1", mixed)
    with pytest.raises(MissingKeyError, match="steer"):
        SteeringVector.from_addition(net, "0", data)
    given = SteeringVector.from_tensor(net, "1", [1, 2, 3, 4, 5, 6], facts={"frames": 7})  # type: ignore[arg-type]
    assert given.vector.tolist() == [1, 2, 3, 4, 5, 6]
    assert (given.facts["frames"], given.facts["source"]) == (7, "tensor")


def planted(classes: int, rows: int = 400) -> TensorDict:
    """Labels that shift features of very different scales."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(rows) % classes
    x = torch.randn(rows, 6, generator=generator)
    x[:, 0] += label
    x[:, 3] -= (label == 1) * 2
    x *= torch.tensor([1.0, 100.0, 1.0, 1e-3, 1.0, 1.0])
    many = torch.stack([label == 0, label == 1], 1).long()
    return TensorDict({"cache": {"1": x}, "label": label, "many": many, "row": torch.arange(rows)}, batch_size=rows)


@pytest.mark.parametrize("kind", ["lda", "ridge"])
@pytest.mark.parametrize(("classes", "pair"), [(2, (1, 0)), (2, (0, 1)), (3, (2, 1)), (0, (1, None))])
def test_probes_in_units_of_the_activations(classes: int, pair: tuple[int, int | None], kind: Any) -> None:
    data, net = planted(classes or 2), mlp()
    probe = OnlineProbe(
        features=("cache", "1"), label="label" if classes else "many", classes=classes or 2, kind=kind,
        split=GroupSplit("row", held_out=0.25),
    )  # fmt: skip
    probe.update(data)
    assert probe.probe is not None
    train = probe.split(data)[0]
    x = data["cache", "1"][train].double()
    sides = [data["label"][train] == one for one in pair if one is not None]
    sides = sides if len(sides) == 2 else [data["many"][train][:, 1] == 1, data["many"][train][:, 1] == 0]
    apart = x[sides[0]].mean(0) - x[sides[1]].mean(0)
    weight = probe.probe.weight.double()
    along = weight[pair[0]] - (0 if pair[1] is None else weight[pair[1]])
    options = dict(zip(("positive", "negative"), pair, strict=True))
    unit = SteeringVector.from_probe(net, probe, **options)
    assert close(unit.vector, along / along.norm())
    means = SteeringVector.from_probe(net, probe, scale="means", **options)
    assert close(means.vector, along * (apart @ along) / along.square().sum())
    # Added to a row, it moves the scores as far as the mean of one class is from that of the other.
    moved = probe.probe.scores(x[:1] + means.vector) - probe.probe.scores(x[:1])
    gained = moved[0, pair[0]] - (0 if pair[1] is None else moved[0, pair[1]])
    assert float(gained) == pytest.approx(float(apart @ along), rel=1e-3)
    assert unit.facts["scale"] == "the norm is 1"
    assert unit.facts["score"] == probe.scores["accuracy"].estimate
    assert unit.facts["score_interval"][0] < unit.facts["score"] <= unit.facts["score_interval"][1]
    if classes == 2:  # a saved probe knows it too
        again = SteeringVector.from_probe(net, probe.probe, scale="means", **options)
        assert torch.allclose(again.vector, means.vector, rtol=1e-4)


def test_cells_of_a_suite() -> None:
    net = mlp()
    data = states(300)
    data["door"] = (data["input"][:, 0] > 0).long()
    data["row"] = torch.arange(300)
    suite = ProbeSuite(net, sites=["1"], concepts={"door": "door"}, split=GroupSplit("row"))
    suite.update(data)
    probe = suite.probe("1", "door")
    found = SteeringVector.from_probe(net, probe, scale="means")
    assert probe is not None
    x, train = computed(net, "1", data), suite.split(data)[0]
    apart = x[train & (data["door"] == 1)].mean(0) - x[train & (data["door"] == 0)].mean(0)
    along = (probe.weight[1] - probe.weight[0]).double()
    assert close(found.vector, along * (apart @ along) / along.square().sum())
    assert found.path == "1"
    assert found.facts["score"] == pytest.approx(suite.table()["1", "door"].trained.estimate)


def test_probes_that_give_no_direction() -> None:
    net, eye = mlp(), LinearProbe(weight=torch.eye(2, 6), bias=torch.zeros(2), path="1")
    make = SteeringVector.from_probe
    for probe, options, words in (
        (OnlineProbe(features="f", label="y"), {}, "no probe yet"),
        (None, {}, "no probe yet"),
        ("probe", {}, "LinearProbe"),
        (eye, {"positive": 2}, "positive=2"),
        (eye, {"positive": 0}, "both class 0"),
        (eye, {"negative": -1}, "negative=-1"),
        (eye, {"scale": "means"}, "not known"),
        (eye, {"shape": (2, 2)}, "4 features"),
        (LinearProbe(weight=torch.ones(2, 6), bias=torch.zeros(2), path="1"), {}, "the same"),
        (LinearProbe(weight=torch.eye(2, 6), bias=torch.zeros(2)), {}, "which module"),
        (LinearProbe(weight=torch.eye(2, 5), bias=torch.zeros(2), path="1"), {}, "features"),
        (
            LinearProbe(weight=torch.eye(2, 6), bias=torch.zeros(2), path="1", concept="labels"),
            {"negative": 1},
            "alone",
        ),
    ):
        with pytest.raises(InputError, match=words):
            make(net, probe, **options)
    with pytest.raises(InputError, match="scale"):
        make(net, eye, scale="mean")  # type: ignore[arg-type]


def test_flat_probes_of_maps() -> None:
    case: Case = POLICIES["pixels"]
    policy, data = case.build(), case.data(3)
    probe = LinearProbe(weight=torch.randn(2, 144), bias=torch.zeros(2), path=case.site)
    with pytest.raises(InputError, match="channels"):
        SteeringVector.from_probe(policy, probe)
    found = SteeringVector.from_probe(policy, probe, shape=(4, 6, 6))
    assert found.random_like(2).shape == found.vector.expand(2, 4, 6, 6).shape
    pooled = SteeringVector.from_probe(policy, LinearProbe(weight=torch.eye(2, 4), bias=torch.zeros(2), path=case.site))
    for one in (found, pooled):
        with SteeringVectors(one).prepare(policy) as hooked:
            hooked(data.clone())


@pytest.mark.parametrize("name", ["categorical", "pixels", "multi_agent"])
def test_principal_directions(name: str) -> None:
    torch.manual_seed(3)
    case = POLICIES[name]
    policy, positive, negative = case.build(), case.data(40), case.data(40)
    found = principal_directions(policy, case.site, positive, negative, rank=3)
    apart = (computed(policy, case.site, positive) - computed(policy, case.site, negative)).flatten(1).numpy()
    spectrum, axes = np.linalg.eigh(apart.T @ apart)
    for place, one in enumerate(found):
        axis = axes[:, -1 - place] * np.sign(apart.mean(0) @ axes[:, -1 - place])
        expected = torch.from_numpy(axis * (spectrum[-1 - place] / 40) ** 0.5).reshape(case.features)
        assert torch.allclose(one.vector.double(), expected, atol=1e-4)
        assert one.facts["explained"] == pytest.approx(spectrum[-1 - place] / spectrum.sum(), rel=1e-4)
        assert one.facts["explained_by_chance"] == 1 / apart.shape[1]
    with pytest.raises(InputError, match="rank="):
        principal_directions(policy, case.site, positive, negative, rank=41)
    with pytest.raises(InputError, match="not pairs"):
        principal_directions(policy, case.site, positive, negative[:3])
    with pytest.raises(InputError, match="0 directions"):
        principal_directions(policy, case.site, positive, positive)


# ------------------------------------------------------------------------------------------------ the shuffled control


def test_shuffled_directions_are_as_long_as_the_vector(tmp_path: Path) -> None:
    found = SteeringVector.from_pairs(mlp(), "1", states(7, seed=1), states(7, seed=2))
    found.save(tmp_path / "vector")
    for vector in (found, SteeringVector.load(tmp_path / "vector")):
        assert vector.shuffled_like().shape == (10, 6)
        assert torch.allclose(norms(vector.shuffled_like(3)), torch.tensor(vector.norm).double().expand(3))
    assert found.facts["score"] == pytest.approx(found.norm / float(norms(found.shuffled).mean()))
    cosine = (found.shuffled_like().double() @ found.vector.double() / found.norm**2).abs().mean()
    assert found.facts["shuffled_cosine"] == pytest.approx(float(cosine), rel=1e-4)
    with pytest.raises(InputError, match=r"11 shuffled extractions .* has 10"):
        found.shuffled_like(11)
    with pytest.raises(InputError, match="has 0"):
        SteeringVector.from_pairs(mlp(), "1", states(7), states(7), shuffles=0).shuffled_like()
    with pytest.raises(InputError, match="alike"):
        SteeringVector.from_pairs(mlp(), "1", states(7), states(7)).shuffled_like()
    moved = states(7).apply(lambda one: one + torch.tensor([1.0, 0.0, 0.0, 0.0]))
    with pytest.raises(InputError, match="direction itself"):
        SteeringVector.from_pairs(mlp(), "0", moved, states(7)).shuffled_like()


@pytest.mark.parametrize("wrong", [torch.ones(2, 4), torch.ones(3), torch.ones(0, 3), torch.full((2, 3), torch.nan)])
def test_shuffled_extractions_of_other_features(wrong: Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shuffled="):
        SteeringVector(vector=torch.ones(3), path="1", shuffled=wrong)
    with pytest.raises(ArtifactError):
        SteeringVector.load(written(tmp_path, {"vector": torch.ones(3), "shuffled": wrong}))


@pytest.mark.parametrize("wrong", [1.0, torch.ones(0), [[]], torch.tensor([1j]), [torch.inf, 1], "no numbers"])
def test_vectors_that_are_none(wrong: Any) -> None:
    with pytest.raises(InputError):
        SteeringVector(vector=wrong, path="1")


# ---------------------------------------------------------------------------------------------------------- wrong input


def test_pairs_without_a_mean() -> None:
    net, good = mlp(), states(3)
    make = SteeringVector.from_pairs
    several = TensorDict({"input": torch.zeros(3, 4)})  # as they come without a batch size
    for empty, said in ((good[:0], "at least one"), (TensorDict({"input": torch.zeros(4)}), r"batch_size=\[n\]")):
        for one in (empty, several) if "size" in said else (empty,):
            with pytest.raises(InputError, match=said):
                make(net, "1", one, good)
            with pytest.raises(InputError, match=said):
                make(net, "1", good, one)
    broken = good.clone()
    broken["input"][1] = torch.nan
    with pytest.raises(InputError, match="not finite in 1 of 3 negative states"):
        make(net, "1", good, broken)
    with pytest.raises(SiteError, match="nearest"):
        make(net, "one", good, good)
    with pytest.raises(InputError, match="names 3 modules"):
        make(net, ".*", good, good)
    with pytest.raises(MissingKeyError):
        make(net, "1", good.rename_key_("input", "other"), states(3))
    for wrong in (True, -1, 1.5):
        with pytest.raises(InputError, match="shuffles"):
            make(net, "1", states(3), states(3), shuffles=wrong)  # type: ignore[arg-type]


def test_contrasts_without_two_classes() -> None:
    net, data = mlp(), states(12)
    data["door"] = torch.full((12,), 2)
    data["door"][:4] = 5
    make = SteeringVector.from_contrast
    with pytest.raises(InputError, match=r"0 rows have the label 1 .*labels of 'door' are 2 \(8 rows\), 5 \(4 rows\)"):
        make(net, "1", data, "door")
    with pytest.raises(InputError, match="0 rows have the label 1"):
        make(net, "1", data, lambda batch: batch["door"] > 9)
    with pytest.raises(InputError, match="0 have the label 0"):
        make(net, "1", data, lambda batch: batch["door"] > 0)
    with pytest.raises(InputError, match="one class"):
        make(net, "1", data, "door", positive=2, negative=2)
    with pytest.raises(MissingKeyError, match="nearest: 'door'"):
        make(net, "1", data, "doors")
    for where in (lambda batch: batch["input"], lambda _: True, lambda _: "yes", lambda batch: batch["door"] * 1j, 3):
        with pytest.raises(InputError, match="where"):
            make(net, "1", data, where)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="nearest"):
        make(net, "one", data, "door", positive=2, negative=5)
    flags = iter([torch.arange(12) < 6, torch.arange(12) < 5])
    with pytest.raises(InputError, match="the second time"):
        make(net, "1", data, lambda _: next(flags))


def test_rows_that_are_left_out_are_counted() -> None:
    net, data = mlp(), states(12)
    data["door"] = torch.tensor([0.0, 1.0] * 6)
    data["door"][3] = torch.nan
    data["mask"] = torch.arange(12) != 5
    data["input"][5] = torch.nan  # padding
    data["input"][0] = torch.nan
    with pytest.warns(UserWarning, match="1 of 10 rows are left out"):
        found = SteeringVector.from_contrast(net, "1", data, "door")
    facts = found.facts
    assert [facts[f"{name}_rows"] for name in ("positive", "negative", "other", "not_finite")] == [4, 5, 1, 1]
    values = computed(net, "1", data)
    expected = values[[1, 7, 9, 11]].mean(0) - values[[2, 4, 6, 8, 10]].mean(0)
    assert close(found.vector, expected)
    data["input"][1::2] = torch.nan
    with pytest.raises(InputError, match="finite in 0 positive and 5 negative rows"):
        SteeringVector.from_contrast(net, "1", data, "door")


def test_facts_say_what_it_was_found_in() -> None:
    net, one, other = mlp(), states(4, seed=1), states(4, seed=2)
    make = SteeringVector.from_pairs
    found = make(net, "1", one, other, facts={"frames": 3})
    assert found.facts["frames"] == 3
    assert found.facts["versions"]["torch"] == torch.__version__
    json.dumps(dict(found.facts))
    assert found.facts["data"] == make(net, "1", one.clone(), other.reshape(2, 2), seed=9).facts["data"]
    assert found.facts["data"] != make(net, "1", other, one).facts["data"]
    changed = one.clone()
    changed["input"][0, 0] += 1e-6
    assert found.facts["data"] != make(net, "1", changed, other).facts["data"]
    assert repr(found) == f"SteeringVector(6 at '1', norm {found.norm:.4g}, from pairs, 10 shuffled)"

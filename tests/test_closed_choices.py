"""What reads all choices of a decision leaves those out that a mask of actions closes, in every kind of policy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical, RelaxedOneHotCategorical
from torchrl.modules import (
    DistributionalQValueModule,
    MaskedCategorical,
    MaskedOneHotCategorical,
    ProbabilisticActor,
    QValueActor,
)

from tdhook_rl import IntegratedGradients, Saliency, targets
from tdhook_rl.attribution import (
    LRP,
    SARFA,
    ActivationMaximisation,
    GuidedBackpropagation,
    Occlusion,
    PerturbationSaliency,
)
from tdhook_rl.attribution.lrp_rules import Epsilon, Uniform
from tdhook_rl.errors import InputError, MissingKeyError
from tdhook_rl.method import Method
from tdhook_rl.metrics import policy_divergence, random_target_loss
from tdhook_rl.replay import smallest_margins
from tdhook_rl.report.player.decisions import decision_tracks
from tdhook_rl.report.player.tracks import Options, Rows
from tdhook_rl.rollout import NetworkDiagnostics

WIDTH, ACTIONS, ATOMS, AGENTS = 5, 4, 6, 2
MASKS = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]]).bool()


class Lowered(Categorical):
    """As scripts write it: closed choices have a very low logit."""

    def __init__(self, logits: Tensor, mask: Tensor) -> None:
        super().__init__(logits=logits.where(mask, -1e8))

    @property
    def deterministic_sample(self) -> Tensor:
        return self.mode


class Kind(NamedTuple):
    policy: Any
    values: Callable[[Tensor], Tensor]
    key: NestedKey


def kind(name: str) -> Kind:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, ACTIONS)).double()
    if name == "values":
        options: dict[str, Any] = {"action_space": "one_hot", "spec": None, "action_mask_key": "open"}
        return Kind(QValueActor(net, in_keys=["observation"], **options), net, "action_value")
    if name == "returns":
        layers = nn.Linear(WIDTH, ATOMS * ACTIONS), nn.Unflatten(-1, (ATOMS, ACTIONS)), nn.LogSoftmax(-2)
        atoms, support = nn.Sequential(*layers).double(), torch.linspace(-1, 1, ATOMS).double()
        choice = DistributionalQValueModule(action_space="one_hot", support=support, action_mask_key="open")
        actor = TensorDictSequential(TensorDictModule(atoms, ["observation"], ["action_value"]), choice)
        return Kind(actor, lambda x: (atoms(x).exp() * support[:, None]).sum(-2), "action_value")
    group = ("agents",) if name == "agents" else ()
    key = (*group, "logits") if group else "logits"
    classes = {"one-hot": MaskedOneHotCategorical, "lowered": Lowered}
    given = "indices" if name == "listed" else "mask"
    actor = ProbabilisticActor(
        TensorDictModule(net, [(*group, "observation") if group else "observation"], [key]),
        in_keys={"logits": key, given: (*group, "open") if group else "open"},
        out_keys=[(*group, "action") if group else "action"],
        distribution_class=classes.get(name, MaskedCategorical),
        distribution_kwargs={"low": {"neg_inf": -1e3}, "listed": {"padding_value": ACTIONS}}.get(name, {}),
    )
    return Kind(actor, net, key)


# Not of "returns": TorchRL takes a closed action for one of return 0, and may choose several.
KINDS = ["mask", "one-hot", "low", "listed", "lowered", "agents", "values"]


def rows(name: str, batch: tuple[int, ...]) -> TensorDict:
    shape = (*batch, AGENTS) if name == "agents" else batch
    mask = MASKS[: max(1, torch.Size(shape).numel())].reshape(*shape, ACTIONS)
    if name == "listed":  # the numbers of what is open, padded
        numbers = torch.where(mask, torch.arange(ACTIONS), ACTIONS).sort(-1).values
        mask = numbers
    entries = {"observation": torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1)).double()}
    entries["open"] = mask.unsqueeze(-2) if name == "returns" else mask  # TorchRL has it over atoms
    if name == "agents":
        return TensorDict({"agents": TensorDict(entries, shape)}, batch)
    return TensorDict(entries, batch)


def mask_of(name: str, batch: tuple[int, ...]) -> Tensor:
    shape = (*batch, AGENTS) if name == "agents" else batch
    return MASKS[: max(1, torch.Size(shape).numel())].reshape(*shape, ACTIONS)


def explained(name: str) -> list[NestedKey] | None:
    return ["observation"] if name == "listed" else None  # the others are numbers of actions


def by_hand(values: Tensor, action: Tensor, mask: Tensor) -> Tensor:
    chosen = action.bool() if action.shape == values.shape else nn.functional.one_hot(action, ACTIONS).bool()
    best = values.masked_fill(~chosen, -torch.inf).amax(-1)
    return best - values.masked_fill(chosen | ~mask, -torch.inf).amax(-1)


def entry(data: Any, name: str, what: str, root: str = "") -> Tensor:
    return data[(*([root] if root else []), *(("agents",) if name == "agents" else ()), what)]


@pytest.mark.parametrize("when", ["batch", "step"])
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("name", KINDS)
def test_a_margin_is_to_the_best_choice_that_was_open(name: str, batch: tuple[int, ...], when: Any) -> None:
    if name == "listed" and batch == ():
        pytest.skip("TorchRL draws none of these for a single row")
    batch = {(5,): (3,), (2, 3): (1, 3)}.get(batch, batch) if name == "agents" else batch
    policy, values, key = kind(name)
    with Saliency(target=targets.margin(key), when=when, inputs=explained(name)).prepare(policy) as hooked:
        found = hooked.annotate(hooked(rows(name, batch)))
    x = entry(found, name, "observation").clone().requires_grad_()
    margin = by_hand(values(x), entry(found, name, "action"), mask_of(name, batch))
    if name == "agents":
        margin = margin.sum(-1)
    there = margin.isfinite()
    expected = torch.autograd.grad(margin[there].sum(), x)[0]
    assert torch.equal(found["computed", "attr"], there)
    torch.testing.assert_close(entry(found, name, "observation", "attr")[there], expected[there])
    assert entry(found, name, "observation", "attr")[~there].isnan().all()


@pytest.mark.parametrize("name", [name for name in KINDS if name != "agents"])
def test_methods_without_gradients_and_along_paths_do_so_too(name: str) -> None:
    policy, values, key = kind(name)
    data, mask = policy(rows(name, (5,))).detach(), mask_of(name, (5,))

    def margin(x: Tensor) -> Tensor:
        return by_hand(values(x), data["action"], mask)

    x = data["observation"]
    low = torch.stack([margin(x.where(torch.arange(WIDTH) != one, 0.0)) for one in range(WIDTH)], -1)
    with Occlusion(target=targets.margin(key), baseline=0.0, inputs=explained(name)).prepare(policy) as hooked:
        torch.testing.assert_close(hooked.annotate(data)["attr", "observation"], margin(x)[:, None] - low)
    with IntegratedGradients(
        target=targets.margin(key), baseline=0.0, n_steps=2000, method="riemann_middle", inputs=explained(name)
    ).prepare(policy) as hooked:
        total = hooked.annotate(data)["attr", "observation"].sum(-1)
    torch.testing.assert_close(total, margin(x) - margin(torch.zeros_like(x)), atol=2e-3, rtol=0)


@pytest.mark.parametrize("batch", [(6,), (2, 3)])
@pytest.mark.parametrize("name", ["mask", "one-hot", "lowered", "values"])
@pytest.mark.parametrize(
    "method", [Saliency, LRP, GuidedBackpropagation, ActivationMaximisation, IntegratedGradients, Occlusion]
)
def test_a_row_with_one_open_choice_has_no_margin_for_any_method(
    method: Any, name: str, batch: tuple[int, ...]
) -> None:
    policy, _, key = kind(name)
    options = {"baseline": 0.0} if method in (IntegratedGradients, Occlusion) else {}
    with method(target=targets.margin(key), **options).prepare(policy) as hooked:
        found = hooked.annotate(hooked(rows(name, batch)))
    there = mask_of(name, batch).sum(-1) > 1
    assert torch.equal(found["computed", "attr"], there)
    assert torch.equal(found["attr", "observation"].isfinite().all(-1), there)


@pytest.mark.parametrize("name", ["mask", "one-hot", "listed", "lowered", "values"])
def test_sarfa_shares_out_among_open_choices(name: str) -> None:
    policy, values, _ = kind(name)
    data, mask = policy(rows(name, (6,))).detach(), mask_of(name, (6,))
    with SARFA(baseline=0.0, inputs=explained(name)).prepare(policy) as hooked:
        found = hooked.annotate(data)["attr", "observation"]
    action = data["action"] if data["action"].ndim == 1 else data["action"].long().argmax(-1)
    for row in range(6):
        taken = int(action[row])
        others = [one for one in range(ACTIONS) if mask[row, one] and one != taken]
        for feature in range(WIDTH):
            x = data["observation"][row].clone()
            before = values(x)
            x[feature] = 0.0
            after = values(x)
            p, q = (one.detach()[[taken, *others]].softmax(-1)[0] for one in (before, after))
            drop = float(p - q)
            if drop <= 0 or not others:
                assert found[row, feature] == 0
                continue
            old, new = (one.detach()[others].log_softmax(-1) for one in (before, after))
            relevant = 1 / (1 + float((old.exp() * (old - new)).sum()))
            assert float(found[row, feature]) == pytest.approx(2 * relevant * drop / (relevant + drop))


def test_closed_logits_do_not_count_as_a_change_of_the_policy() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(-3), nn.Linear(72, ACTIONS)).double()
    module = TensorDictModule(net, ["pixels"], ["logits"])
    policy = ProbabilisticActor(module, {"logits": "logits", "mask": "open"}, distribution_class=MaskedCategorical)
    data = policy(TensorDict({"pixels": torch.rand(6, 1, 8, 8).double(), "open": MASKS}, [6])).detach()
    kept = module(data.clone())["logits"]

    class Open(nn.Module):
        """The same with closed logits at 0."""

        def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
            return net(pixels) * mask

    plain = ProbabilisticActor(TensorDictModule(Open(), ["pixels", "open"], ["logits"]), ["logits"],
                               distribution_class=Categorical)  # fmt: skip
    with PerturbationSaliency(mode="policy", stride=4).prepare(policy) as hooked:
        found = hooked.annotate(data)["attr", "pixels"]
    with PerturbationSaliency(mode="policy", stride=4, inputs=["pixels"]).prepare(plain) as hooked:
        expected = hooked.annotate(data.clone().set("logits", kept * MASKS))["attr", "pixels"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["values", "returns"])
def test_the_drift_of_values_is_that_of_open_actions(name: str) -> None:
    policy, values, _ = kind(name)
    data, mask = rows(name, (6,)), MASKS
    site = "module.0.module.0" if name == "returns" else "module.0.0"
    watch = NetworkDiagnostics(policy, sites=[site], states=data)
    with torch.no_grad():
        before = values(data["observation"])
        watch.update()
        for one in policy.parameters():
            one += 0.1 * torch.randn_like(one)
        change = (values(data["observation"]) - before).abs()
        found = watch.update()
    by_state = [
        torch.stack([row[at].mean() for row, at in zip(one, mask, strict=True)]) for one in (change, before.abs())
    ]
    assert found["value_drift"] == pytest.approx(float(by_state[0].mean()))
    assert found["value_drift_relative"] == pytest.approx(float(by_state[0].mean() / by_state[1].mean()))


def test_random_targets_are_fitted_by_open_values_only() -> None:
    policy, _, _ = kind("values")
    first, last = (random_target_loss(policy, rows("values", (6,)), steps=steps, lr=1e-2) for steps in (0, 200))
    assert bool(first.isfinite().all())
    assert bool((last < first).all())


def test_undecided_states_are_told_by_open_actions() -> None:
    logits = torch.tensor([[5.0, 0.0, 4.9], [1.0, 0.5, 9.0], [2.0, 2.1, 0.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1]]).bool()
    for name, options in {"action_mask": {}, "legal": {"allowed": "legal"}}.items():
        data = TensorDict({"logits": logits, name: mask}, [4])
        found = smallest_margins(data, k=4, **options)  # type: ignore[arg-type]
        assert found["index"].tolist() == [2, 1, 0]
        torch.testing.assert_close(found["margin"], torch.tensor([0.1, 0.5, 5.0]))
    lowest = TensorDict({"action_value": logits.masked_fill(~mask, torch.finfo(torch.float32).min)}, [4])
    assert smallest_margins(lowest, k=4)["index"].tolist() == [2, 1, 0]
    with pytest.raises(MissingKeyError, match=r"allowed='nope'"):
        smallest_margins(data, allowed="nope")
    with pytest.raises(InputError, match=r"boolean .*for each action"):
        smallest_margins(data, allowed="logits")


def test_a_player_shows_no_probability_of_a_closed_action() -> None:
    entries = {"logits": torch.zeros(3, ACTIONS), "action": torch.tensor([0, 1, 2]), "action_mask": MASKS[:3]}
    tracks = decision_tracks(Rows(TensorDict(entries, [3]), np.arange(3), Options()))
    (shown,) = (one.values for one in tracks if one.kind == "choice")
    np.testing.assert_allclose(shown, (MASKS[:3] / MASKS[:3].sum(-1, keepdim=True)).numpy())


def test_distributions_over_other_listed_choices_are_not_compared() -> None:
    logits = torch.randn(2, ACTIONS)
    one, other = (MaskedCategorical(logits=logits, indices=torch.tensor([at, at])) for at in ([0, 2], [2, 0]))
    assert policy_divergence(one, one).values.tolist() == [0.0, 0.0]
    for second in (other, MaskedCategorical(logits=logits[:, :2], mask=torch.ones(2, 2, dtype=torch.bool))):
        with pytest.raises(InputError, match=r"not the same ones"):
            policy_divergence(one, second)


class Closes(nn.Module):
    """Logits of which a network closes some by itself, in the ways that people write."""

    def __init__(self, how: str, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.how = nn.Linear(4, 6, bias=bias).double(), nn.Linear(6, 3, bias=bias).double(), how

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        logits = self.head(self.body(x).relu())
        low = torch.full_like(logits, -torch.inf)
        if self.how == "masked_fill":
            return logits.masked_fill(~mask, -torch.inf)
        if self.how == "where":
            return torch.where(mask, logits, low)
        return logits + torch.zeros_like(logits).masked_fill(~mask, -torch.inf) if self.how == "added" else logits


EXPLAIN: dict[str, Callable[..., Method]] = {
    "saliency": Saliency,
    "product": lambda **options: Saliency(multiply_by_inputs=True, **options),
    "path": lambda **options: IntegratedGradients(baseline=0.0, n_steps=4, **options),
    "relevance": lambda **options: LRP(rule_mapper=Uniform(Epsilon(0.0), epsilon=0.0), **options),
    "guided": GuidedBackpropagation,
    "occlusion": Occlusion,
}


@pytest.mark.parametrize(("method", "target"), [*product(EXPLAIN, ["logit", "chosen_logit"]), ("relevance", "default")])
def test_open_logits_are_explained_beside_those_that_are_minus_infinity(method: str, target: str) -> None:
    asked = {"logit": {"target": targets.logit(0)}, "chosen_logit": {"target": targets.chosen_logit()}, "default": {}}
    for batch in [(3,), (), (2, 3)]:
        torch.manual_seed(1)
        mask = torch.rand(*batch, 3) < 0.5
        mask[..., 0] = True
        data = TensorDict({"x": torch.randn(*batch, 4).double(), "mask": mask}, batch)
        data["action"] = torch.zeros(batch, dtype=torch.int64)
        found = []
        for how in ("masked_fill", "where", "added", "open"):
            net = TensorDictModule(Closes(how), ["x", "mask"], ["logits"])
            policy = ProbabilisticActor(net, ["logits"], distribution_class=Categorical)
            with EXPLAIN[method](inputs=["x"], **asked[target]).prepare(policy) as hooked:
                rows = hooked.annotate(data.clone())
            assert bool(rows["computed", "attr"].all())
            found.append(rows["attr", "x"])
        for one in found[:-1]:
            torch.testing.assert_close(one, found[-1])


@pytest.mark.parametrize("method", [name for name in EXPLAIN if name != "guided"])
@pytest.mark.parametrize("when", ["step", "batch"])
def test_a_relaxed_choice_has_a_share_of_each_logit(method: str, when: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3, bias=False).double()
    policy = ProbabilisticActor(
        TensorDictModule(net, ["x"], ["logits"]), ["logits"], distribution_class=RelaxedOneHotCategorical,
        distribution_kwargs={"temperature": torch.tensor(1.0)}, default_interaction_type=InteractionType.RANDOM,
    )  # fmt: skip
    options = {"when": when} if method in ("saliency", "product", "path") else {}
    with EXPLAIN[method](target=targets.chosen_logit(), **options).prepare(policy) as hooked:
        rows = hooked.annotate(hooked(TensorDict({"x": torch.randn(5, 4).double()}, batch_size=5)))
    slope = rows["action"] @ net.weight
    expected = slope if method == "saliency" else slope * rows["x"]
    torch.testing.assert_close(rows["attr", "x"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_relevance_of_large_logits(dtype: torch.dtype) -> None:
    """It starts at them, and not at their squares, of which float16 has none."""
    net = nn.Linear(4, 3, bias=False).to(dtype)
    x = (400 * torch.eye(4)).to(dtype)
    with LRP(target=targets.logit(0)).prepare(net, in_keys=["x"], out_keys=["logits"]) as hooked:
        rows = hooked(TensorDict({"x": x / net.weight[0].detach().abs().max()}, batch_size=4))
    torch.testing.assert_close(rows["attr", "x"].sum(-1), rows["logits"][:, 0].detach(), rtol=1e-2, atol=1e-2)

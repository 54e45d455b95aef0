"""All decisions of a policy are explained together, and what was drawn, not what is stored in its place."""

import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch import distributions as D
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal, ProbabilisticActor, QValueModule, TanhNormal

from tdhook_rl import LRP, Compose, IntegratedGradients, Saliency, targets
from tdhook_rl.errors import InputError, TargetError
from tdhook_rl.policies.inversion import noise_of, sample_with

ROWS, GROUPS = 5, ("a", "b")


def mlp(outputs: int, inputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def grouped(
    target: object, when: str = "step", mode: Callable = torch.enable_grad
) -> tuple[TensorDict, dict[str, nn.Module], TensorDict]:
    nets = {name: mlp(3) for name in GROUPS}
    policy = TensorDictSequential(
        *(
            ProbabilisticActor(
                TensorDictModule(nets[name], [(name, "seen")], [(name, "logits")]),
                in_keys={"logits": (name, "logits")},
                out_keys=[(name, "action")],
                distribution_class=D.Categorical,
            )
            for name in GROUPS
        )
    )
    data = TensorDict({name: {"seen": torch.randn(ROWS, 2, 4)} for name in GROUPS}, [ROWS])
    with Saliency(target=target, when=when).prepare(policy) as hooked, mode():  # type: ignore[arg-type]
        return hooked.annotate(hooked(data.clone())), nets, data


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_joint_log_probability_is_the_default(when: str, mode: Callable) -> None:
    found, nets, data = grouped(None, when, mode)
    for name in GROUPS:
        action = found[name, "action"].clone()  # of no inference mode
        right = gradient(
            lambda x, n=name, a=action: nets[n](x).log_softmax(-1).gather(-1, a[..., None]), data[name, "seen"]
        )
        torch.testing.assert_close(found["attr", name, "seen"], right)


@pytest.mark.parametrize("key", ["b", ("b", "action"), [("b", "action")]])
def test_one_group_is_chosen_by_key(key: object) -> None:
    with pytest.warns(UserWarning, match=r"reaches \('a', 'seen'\)"):
        found, nets, data = grouped(targets.taken_action_log_prob(key=key))  # type: ignore[arg-type]
    assert found["attr", "a", "seen"].isnan().all()
    assert found["computed", "attr"].all()
    action = found["b", "action"]
    right = gradient(lambda x: nets["b"](x).log_softmax(-1).gather(-1, action[..., None]), data["b", "seen"])
    torch.testing.assert_close(found["attr", "b", "seen"], right)
    with pytest.raises(TargetError, match="nearest"):
        grouped(targets.entropy(key="c"))


@pytest.mark.parametrize("target", [targets.chosen_logit(), targets.margin(), targets.entropy()])
def test_other_targets_are_sums_too(target: targets.Target) -> None:
    found, nets, data = grouped(target)
    for name in GROUPS:
        action = found[name, "action"]

        def value(x: Tensor, net: nn.Module = nets[name], action: Tensor = action) -> Tensor:
            logits = net(x)
            if target.name == "entropy":
                return D.Categorical(logits=logits).entropy()
            chosen = logits.gather(-1, action[..., None]).squeeze(-1)
            return chosen - (
                logits.scatter(-1, action[..., None], -torch.inf).amax(-1) if target.name == "margin" else 0
            )

        torch.testing.assert_close(found["attr", name, "seen"], gradient(value, data[name, "seen"]))


@pytest.mark.parametrize("read", [["x"], ["logits"], ["turn_action", "x"]])
def test_a_decision_that_has_no_probability_is_named(read: list[str]) -> None:
    drawn = ProbabilisticActor(
        TensorDictModule(mlp(3), ["x"], ["logits"]), in_keys=["logits"], out_keys=["turn_action"],
        distribution_class=D.Categorical,
    )  # fmt: skip
    policy = TensorDictSequential(drawn, TensorDictModule(lambda *read: 2 * read[-1], read, ["action"]))
    with Saliency(when="step").prepare(policy) as hooked, pytest.warns(UserWarning, match="leaves out 'action'"):
        hooked(TensorDict({"x": torch.randn(ROWS, 4)}, [ROWS]))


@pytest.mark.parametrize("steps", [1, 2])
def test_an_action_made_of_a_decision_alone_is_the_same_decision(steps: int) -> None:
    """Brought into bounds under a key of its own, say: nothing else is decided there, so nothing is left out."""
    net = TensorDictModule(mlp(3), ["x"], ["logits"])
    drawn = ProbabilisticActor(net, ["logits"], ["drawn_action"], distribution_class=D.Categorical)
    keys = ["drawn_action", *(["between"] if steps == 2 else []), "action"]
    moves = [TensorDictModule(lambda x: x + 1, [one], [other]) for one, other in pairwise(keys)]
    with Saliency(when="step").prepare(TensorDictSequential(drawn, *moves)) as hooked, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hooked(TensorDict({"x": torch.randn(5, 4)}, [5]))
    expected = gradient(
        lambda x: net.module(x).log_softmax(-1).gather(-1, found["drawn_action"][:, None]).squeeze(-1), found["x"]
    )
    torch.testing.assert_close(found["attr", "x"], expected)


TABLE = torch.tensor([2, 0, 1])
DISCRETE = {
    "table": (lambda a: TABLE[a], lambda s: TABLE.argsort()[s]),
    "one-hot": (lambda a: nn.functional.one_hot(a, 3), lambda s: s.argmax(-1)),
    "float": (lambda a: a.float() / 2 - 1, lambda s: ((s + 1) * 2).long()),
}
NUMBERS = {
    "scale": (lambda a: 3 * a - 1, lambda s: (s + 1) / 3),
    "tanh": (lambda a: 2 * (a / 4).tanh(), lambda s: 4 * (s / 2).atanh()),
    "reversed": (lambda a: -a, lambda s: -s),
}


@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("name", [*DISCRETE, *NUMBERS])
def test_an_action_that_is_written_over_is_explained_as_it_was_drawn(name: str, when: str) -> None:
    discrete = name in DISCRETE
    change, back = (DISCRETE | NUMBERS)[name]
    net = mlp(3) if discrete else nn.Sequential(mlp(4), NormalParamExtractor())
    keys = ["logits"] if discrete else ["loc", "scale"]
    family = D.Categorical if discrete else IndependentNormal
    actor = ProbabilisticActor(TensorDictModule(net, ["x"], keys), in_keys=keys, distribution_class=family)
    policy = TensorDictSequential(actor, TensorDictModule(change, ["action"], ["action"]))
    x = torch.randn(ROWS, 4)
    with Saliency(target=targets.taken_action_log_prob(), when=when).prepare(policy) as hooked:
        found = hooked.annotate(hooked(TensorDict({"x": x}, [ROWS])))
    drawn = back(found["action"])
    right = gradient(lambda x: (D.Categorical(logits=net(x)) if discrete else D.Normal(*net(x))).log_prob(drawn), x)
    torch.testing.assert_close(found["attr", "x"], right, rtol=1e-3, atol=1e-4)


def zero_first(action: Tensor) -> Tensor:
    action[..., 0] = 0
    return action


IN_PLACE = {
    "table": lambda a: a.copy_(TABLE[a]),
    "scale": lambda a: a.mul_(3).sub_(1),
    "tanh": lambda a: a.tanh_(),
    "clamp": lambda a: a.clamp_(-0.1, 0.1),
    "entry": zero_first,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_action_that_is_written_over_in_place_is_explained_as_it_was_drawn(
    name: str, when: str, mode: Callable
) -> None:
    discrete = name == "table"
    net = mlp(3) if discrete else nn.Sequential(mlp(4), NormalParamExtractor())
    keys = ["logits"] if discrete else ["loc", "scale"]
    family = D.Categorical if discrete else IndependentNormal
    actor = ProbabilisticActor(TensorDictModule(net, ["x"], keys), in_keys=keys, distribution_class=family)
    policy = TensorDictSequential(actor, TensorDictModule(IN_PLACE[name], ["action"], ["action"]))
    x, target = torch.randn(ROWS, 4), targets.taken_action_log_prob()
    # Each explains by passes of its own, of which none may see what the one before has made of the draw.
    several = Saliency(target={"one": target, "two": target}, when=when, attribution_key="several")
    method = Compose(IntegratedGradients(baseline=0.0, when=when, attribution_key="path"), several)
    with method.prepare(policy) as hooked, mode(), set_exploration_type(ExplorationType.RANDOM):
        torch.manual_seed(1)
        acted = hooked(TensorDict({"x": x.clone()}, [ROWS]))
        if when == "batch" and name in ("clamp", "entry"):
            with pytest.raises(InputError, match="writes over it"):
                hooked.annotate(acted)
            return
        found = hooked.annotate(acted)
    with set_exploration_type(ExplorationType.RANDOM):
        torch.manual_seed(1)
        drawn = actor(TensorDict({"x": x}, [ROWS]))["action"].detach()
        torch.manual_seed(1)
        torch.testing.assert_close(acted["action"], policy(TensorDict({"x": x}, [ROWS]))["action"])

    def log_prob(x: Tensor) -> Tensor:
        made = net(x)
        return (D.Categorical(logits=made) if discrete else IndependentNormal(*made)).log_prob(drawn)

    for one in ("one", "two"):
        torch.testing.assert_close(found["several", one, "x"], gradient(log_prob, x), rtol=1e-3, atol=1e-4)
    rise = log_prob(x) - log_prob(torch.zeros_like(x))
    torch.testing.assert_close(found["path", "x"].sum(-1), rise.detach(), rtol=0.1, atol=0.1)


UNTELLABLE = {
    "clamp": lambda a: a.clamp(-0.1, 0.1),
    "zero": lambda a: a * 0,
    "round": torch.round,
    # Of these several numbers give the same, and one of them looks like what was drawn.
    "size": torch.abs,
    "square": torch.square,
    "from a point": lambda a: (a - 2).abs(),
    "angle": lambda a: torch.remainder(a + 0.3, 0.6) - 0.3,
    "wide angle": lambda a: torch.remainder(2 * a + torch.pi, 2 * torch.pi) - torch.pi,
    "wave": lambda a: torch.sin(3 * a),
    "fold": lambda a: torch.where(a < 1, a, 2 - a),
    "bump": lambda a: a * torch.exp(-a.square()),
}


@pytest.mark.parametrize("change", UNTELLABLE.values(), ids=UNTELLABLE)
def test_what_cannot_be_told_from_what_is_stored_is_refused_in_a_batch(change: Callable) -> None:
    net = TensorDictModule(nn.Sequential(mlp(4), NormalParamExtractor()), ["x"], ["loc", "scale"])
    actor = ProbabilisticActor(net, in_keys=["loc", "scale"], distribution_class=IndependentNormal)
    policy = TensorDictSequential(actor, TensorDictModule(change, ["action"], ["action"]))
    data = policy(TensorDict({"x": torch.randn(ROWS, 4)}, [ROWS])).detach()
    with Saliency().prepare(policy) as hooked, pytest.raises(InputError, match="writes over it"):
        hooked.annotate(data)
    with Saliency(when="step").prepare(policy) as hooked:
        assert hooked(data.select("x"))["attr", "x"].abs().max() > 0


def test_a_choice_by_values_that_is_written_over() -> None:
    net = mlp(3)
    policy = TensorDictSequential(
        TensorDictModule(net, ["x"], ["action_value"]),
        QValueModule(action_space="categorical"),
        TensorDictModule(lambda a: TABLE[a], ["action"], ["action"]),
    )
    x = torch.randn(ROWS, 4)
    for when in ("step", "batch"):
        with Saliency(when=when).prepare(policy) as hooked:
            found = hooked.annotate(hooked(TensorDict({"x": x}, [ROWS])))
        torch.testing.assert_close(found["attr", "x"], gradient(lambda x: net(x).amax(-1), x))


FAMILIES = {
    "normal": lambda p: D.Normal(p, 0.5 + p.square()),
    "independent": lambda p: IndependentNormal(p, 0.5 + p.square()),
    "tanh": lambda p: TanhNormal(p, 0.5 + 0.1 * p.square()),
    "log": lambda p: D.LogNormal(p, 0.5 + p.square()),
    "laplace": lambda p: D.Laplace(p, 0.5 + p.square()),
    "gumbel": lambda p: D.Gumbel(p, 0.5 + p.square()),
    "uniform": lambda p: D.Uniform(p, p + 1 + p.square()),
    "exponential": lambda p: D.Exponential(0.5 + p.square()),
    "multivariate": lambda p: D.MultivariateNormal(p, torch.diag_embed(0.5 + p.square())),
    "relaxed": lambda p: D.RelaxedOneHotCategorical(torch.tensor(0.7), logits=p),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_makes_its_sample_again_with_the_gradient_of_the_draw(name: str) -> None:
    make, start = FAMILIES[name], torch.randn(6, 3, dtype=torch.float64)
    torch.manual_seed(3)
    leaf = start.clone().requires_grad_()
    drawn = make(leaf).rsample()
    weights = torch.randn_like(drawn)
    right = torch.autograd.grad((drawn * weights).sum(), leaf)[0]
    noise = noise_of(make(start), drawn.detach())
    assert noise is not None
    leaf = start.clone().requires_grad_()
    again = sample_with(make(leaf), noise)
    torch.testing.assert_close(again, drawn, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad((again * weights).sum(), leaf)[0], right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("when", ["step", "batch"])
def test_a_latent_follows_its_distribution(when: str) -> None:
    encoder = nn.Sequential(mlp(8), NormalParamExtractor())
    head = nn.Linear(4, 3)
    policy = TensorDictSequential(
        TensorDictModule(encoder, ["x"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["latent"], distribution_class=IndependentNormal,
            default_interaction_type="random",
        ),
        ProbabilisticActor(
            TensorDictModule(head, ["latent"], ["logits"]), in_keys=["logits"], distribution_class=D.Categorical
        ),
    )  # fmt: skip
    x = torch.randn(ROWS, 4)
    with Saliency(when=when).prepare(policy) as hooked:
        found = hooked.annotate(hooked(TensorDict({"x": x}, [ROWS])))
    with torch.no_grad():
        loc, scale = encoder(x)
        noise = (found["latent"] - loc) / scale

    def log_prob(x: Tensor) -> Tensor:
        loc, scale = encoder(x)
        return head(loc + noise * scale).log_softmax(-1).gather(-1, found["action"][:, None])

    torch.testing.assert_close(found["attr", "x"], gradient(log_prob, x), rtol=1e-4, atol=1e-5)
    if when == "batch":
        with Saliency().prepare(policy) as hooked, pytest.raises(InputError, match="latent"):
            hooked.annotate(found.select("x", "action"))


class CutOff(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, seen: Tensor, cut: Tensor) -> Tensor:
        return self.head(torch.cat([seen, cut.detach().relu()], -1))


@pytest.mark.parametrize("mode", ["eager", "no_grad", "inference_mode", "vmap"])
def test_an_input_that_no_gradient_reaches_is_named_in_every_mode(mode: str) -> None:
    data = TensorDict({"seen": torch.randn(4, 2, 4), "cut": torch.randn(4, 2, 4)}, [4, 2])
    method = Saliency(target=targets.logit(0), when="step")
    with method.prepare(CutOff(), in_keys=["seen", "cut"], out_keys=["logits"]) as hooked:
        call = torch.vmap(hooked) if mode == "vmap" else hooked
        surrounding = getattr(torch, mode) if mode in ("no_grad", "inference_mode") else torch.enable_grad
        with surrounding(), pytest.warns(UserWarning, match="reaches 'cut'"):
            found = call(data)
        assert found["attr", "cut"].isnan().all()
        assert not found["attr", "seen"].isnan().any()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            hooked(data.select("seen", "cut"))


class Then(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 5)

    def forward(self, turn: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([turn[..., None].to(x.dtype), x], -1))


@pytest.mark.parametrize("when", ["step", "batch"])
def test_heads_that_decide_one_after_the_other(when: str) -> None:
    first, then = mlp(3), Then()
    draw = {"distribution_class": D.Categorical, "default_interaction_type": "random"}
    policy = TensorDictSequential(
        TensorDictModule(first, ["x"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["turn"], **draw),
        TensorDictModule(then, ["turn", "x"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["gear"], **draw),
    )
    x = torch.randn(ROWS, 4)
    with Saliency(when=when).prepare(policy) as hooked:
        found = hooked.annotate(hooked(TensorDict({"x": x}, [ROWS])))

    def joint(x: Tensor) -> Tensor:
        turn, gear = found["turn"], found["gear"]
        logits = first(x), then(turn, x)
        return sum(D.Categorical(logits=one).log_prob(a) for one, a in zip(logits, (turn, gear), strict=True))

    torch.testing.assert_close(found["attr", "x"], gradient(joint, x))
    with LRP().prepare(policy) as hooked, pytest.raises(TargetError, match="a key of its own"):
        hooked.annotate(found.select("x", "turn", "gear"))


def test_several_samples_of_each_row() -> None:
    net, x = mlp(3), torch.randn(ROWS, 4)
    policy = TensorDictSequential(
        TensorDictModule(net, ["x"], ["logits"]),
        ProbabilisticTensorDictModule(
            ["logits"], ["action"], distribution_class=D.Categorical, default_interaction_type="random", num_samples=6
        ),
    )
    with Saliency(when="step").prepare(policy) as hooked:
        found = hooked(TensorDict({"x": x}, [ROWS]))
    many, action = x.expand(6, ROWS, 4), found["action"]
    right = gradient(lambda x: net(x).log_softmax(-1).gather(-1, action[..., None]), many)
    torch.testing.assert_close(found["attr", "x"], right)
    assert found["computed", "attr"].shape == (6, ROWS)

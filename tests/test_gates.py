"""Conditions and schedules of interventions: where they act, and that the data says so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_rl import Compose, LinearProbe, Saliency, Scheduled, SteeringVectors, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, MissingKeyError, SiteError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent import ActivationPatching, AtSteps, DirectionalAblation, DirectionClamping, ProbeGate, RowFunction
from tests.policies import CASES, HIDDEN, POLICIES, Case, categorical, mlp
from tests.steered_by_hand import (
    BATCHES,
    CASE,
    SITE,
    acting,
    by_case,
    by_hand,
    counted,
    gated,
    positive,
    ramp,
    replayed,
    require_equal,
    some_batch,
)


@by_case
def test_conditions_and_schedules_are_what_hooks_by_hand_do(case: Case, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    policy, vector = case.build(), torch.randn(case.features)
    some_batch(case, batch)
    data = case.data(*batch)
    rows, strength = positive(case, data), ramp(case, data).to(vector)
    by_key = data.clone().set("open", rows).set("strength", strength)
    plain = partial(by_hand, policy, case, batch=batch)
    gate = lambda rows, case=case: positive(case, rows)  # noqa: E731
    for method, read, change, acts in (
        (
            SteeringVectors({case.site: vector}, alpha=0.7, when=gate),
            data,
            lambda value, spread: torch.where(spread(rows), value + 0.7 * vector, value),
            rows,
        ),
        (
            SteeringVectors({case.site: vector}, alpha="strength", when=["open", gate]),
            by_key,
            lambda value, spread: torch.where(spread(rows), value + spread(strength) * vector, value),
            rows & (strength != 0),
        ),
        (
            SteeringVectors({case.site: vector}, alpha=lambda rows, case=case: ramp(case, rows).unsqueeze(-1)),
            data,
            lambda value, spread: value + spread(strength) * vector,
            strength != 0,
        ),
        (
            SteeringVectors(modules_to_steer=[case.site], steer_fn=lambda key, output: 2 * output, when="open"),
            by_key,
            lambda value, spread: torch.where(spread(rows), 2 * value, value),
            rows,
        ),
        (
            DirectionClamping({case.site: vector}, value=2.0, when=gate, name="steering"),
            data,
            lambda value, spread: torch.where(spread(rows), clamped(value, vector, 2.0), value),
            rows,
        ),
        (
            DirectionalAblation({case.site: vector}, when="open", name="steering"),
            by_key,
            lambda value, spread: torch.where(spread(rows), clamped(value, vector, 0.0), value),
            rows,
        ),
    ):
        twin = copy.deepcopy(policy)  # of a policy with buffers that its forward writes
        with method.prepare(twin) as hooked:
            assert ("steered", "steering") in hooked.out_keys
            found, expected = acting(hooked, read), acting(plain(change), read)
            require_equal(found, expected, policy.out_keys)
            mask = found["steered", "steering"]
            assert mask.dtype == torch.bool
            assert torch.equal(mask, acts)
            assert bool(found["computed", "steered"].all())
            if callable(getattr(policy, "log_prob", None)) and case is not POLICIES["actor_value"]:
                torch.testing.assert_close(hooked.log_prob(found.clone()), plain(change).log_prob(found.clone()))
            assert not hooked._hooked.runtime.rows
            assert hooked._hooked.runtime.decided is None


@by_case
def test_keys_of_rows_may_have_a_dimension_of_their_own(case: Case, batch: tuple[int, ...]) -> None:
    """As ends and counts of steps have one in TorchRL."""
    torch.manual_seed(0)
    policy, vector = case.build(), torch.randn(case.features)
    some_batch(case, batch)
    data = case.data(*batch)
    data = data.set("open", positive(case, data)).set("strength", ramp(case, data).to(vector))
    wide = data.clone()
    for key in ("open", "strength"):
        wide[key] = wide[key].unsqueeze(-1)
    for alpha in ("strength", lambda rows: rows["strength"]):
        for when in ("open", lambda rows: rows["open"], ["open", lambda rows: rows["open"]]):
            with SteeringVectors({case.site: vector}, alpha=alpha, when=when).prepare(copy.deepcopy(policy)) as hooked:
                expected = acting(hooked, data)
            with SteeringVectors({case.site: vector}, alpha=alpha, when=when).prepare(copy.deepcopy(policy)) as hooked:
                found = acting(hooked, wide)
            require_equal(found, expected, policy.out_keys)
            assert torch.equal(found["steered", "steering"], expected["steered", "steering"])


def clamped(value: Tensor, direction: Tensor, wanted: float) -> Tensor:
    unit = direction / direction.norm()
    dims = tuple(range(-unit.ndim, 0))
    return value + (wanted - (value * unit).sum(dims, keepdim=True)) * unit


# ---------------------------------------------------------------------- what is not reached is not changed


@pytest.mark.parametrize(
    "case", [CASES["categorical"], CASES["pixels"], POLICIES["recurrent"]], ids=["categorical", "pixels", "recurrent"]
)
def test_closed_gates_and_strengths_of_0_keep_every_bit_and_the_generator(case: Case) -> None:
    policy = case.build()
    closed = lambda rows: torch.zeros(rows.batch_size, dtype=torch.bool)  # noqa: E731
    vector = torch.full(case.features, torch.inf)  # 0 times that would be NaN
    finite = torch.randn(case.features)
    for method in (
        SteeringVectors({case.site: "vector"}, when=closed),
        SteeringVectors({case.site: "vector"}, alpha=lambda rows: torch.zeros(rows.batch_size)),
        DirectionalAblation({case.site: finite}, when=closed, name="steering"),
        SteeringVectors(modules_to_steer=case.site, steer_fn=lambda key, output: output / 0, when=closed),
    ):
        with method.prepare(policy) as hooked:
            for step in range(2):
                torch.manual_seed(step)
                data = case.data(4)
                rows = data.clone().set("vector", vector.expand(4, *vector.shape))
                expected, state = acting(policy, data), torch.get_rng_state()
                found = acting(hooked, rows)
                assert torch.equal(torch.get_rng_state(), state)
                for key in policy.out_keys:
                    assert torch.equal(found[key], expected[key])
                assert not found["steered", "steering"].any()


# ---------------------------------------------------------------------- one call, one question


def test_a_function_is_asked_once_in_each_call() -> None:
    asked = []

    def even(rows: TensorDictBase) -> Tensor:
        asked.append(rows.batch_size)
        rows["observation"] = rows["observation"] * 0  # what it is given is a copy
        return rows["step_count"].squeeze(-1) % 2 == 0

    actor = categorical()
    data = CASE.data(4).set("step_count", torch.arange(4)[:, None])
    steering = SteeringVectors({SITE: torch.randn(HIDDEN), "module.0.module.3": torch.randn(HIDDEN)}, when=even)
    with Compose(steering, Saliency(when="step")).prepare(actor) as hooked:
        found = hooked(data.clone())
        assert len(asked) == 1  # the second pass of the gradient does not ask again
        assert torch.equal(found["observation"], data["observation"])
        hooked.get_dist(data.clone())
        assert len(asked) == 2
        hooked.log_prob(found.clone())
        assert len(asked) == 3
        params = TensorDict.from_module(actor).data.expand(3).clone()

        def call(params: TensorDict) -> Tensor:
            with params.to_module(hooked):
                return hooked(data.clone())["logits"]

        stacked = torch.vmap(call, randomness="different")(params)
        assert len(asked) == 4
        torch.testing.assert_close(stacked[0], found["logits"])
        hooked.module[0](data.clone())  # a part of it alone
        assert len(asked) == 5
        assert hooked._hooked.runtime.decided is None


def test_attributions_explain_rows_as_they_were_steered() -> None:
    actor = categorical().double()
    data = TensorDict({"observation": torch.randn(6, 6).double(), "time": torch.arange(6)}, batch_size=6)
    vector, target = torch.randn(HIDDEN).double(), targets.logit(1)
    method = Compose(
        SteeringVectors(
            {SITE: vector}, alpha=lambda rows: 0.5 + rows["time"] / 6, when=lambda rows: rows["time"] % 2 == 0
        ),
        Saliency(target=target, when="step", attribution_key="live"),
        Saliency(target=target),
    )
    with method.prepare(actor) as hooked:
        found = hooked(data.clone())
        later = hooked.annotate(found.exclude("live"))
        moved = found.exclude("live", "time")  # the record is enough
        again = hooked.annotate(moved)
        unrecorded = hooked.annotate(found.exclude("live", "steered", ("computed", "steered")))
        with pytest.raises(MissingKeyError, match=r"when= of 'steering' .* reads 'time'|alpha= .* reads 'time'"):
            hooked.annotate(moved.exclude("steered", ("computed", "steered")))
        turned = found.exclude("live", "time").clone()
        turned["steered", "steering"] = ~turned["steered", "steering"]
        with pytest.warns(UserWarning, match="explained by another policy"):
            hooked.annotate(turned)
    net = actor.module[0].module
    alpha = torch.where(data["time"] % 2 == 0, 0.5 + data["time"] / 6, 0)
    observation = data["observation"].clone().requires_grad_()
    logits = net[2:](net[:2](observation) + alpha[:, None] * vector)
    (expected,) = torch.autograd.grad(logits[:, 1].sum(), observation)
    torch.testing.assert_close(found["steered", "steering.alpha"], 0.5 + data["time"] / 6, check_dtype=False)
    for one, root in ((found, "live"), (later, "attr"), (again, "attr"), (unrecorded, "attr")):
        torch.testing.assert_close(one[root, "observation"], expected)
    torch.testing.assert_close(later["steered", "steering"], found["steered", "steering"])


# ---------------------------------------------------------------------- steps and probes


def test_steps_of_an_episode() -> None:
    actor, vector = make_actor(), torch.randn(64)
    with SteeringVectors({FC2: vector}, when=AtSteps({0, 2})).prepare(actor) as hooked:
        assert "step_count" in hooked.in_keys
        data = counted(3).rollout(14, hooked, break_when_any_done=False)
        with pytest.raises(MissingKeyError, match=r"'step_count'.*StepCounter"):
            hooked(CueCorners(batch_size=[2]).reset())
    steps = data["step_count"].squeeze(-1)
    assert torch.equal(data["steered", "steering"], (steps == 0) | (steps == 2))
    assert bool((steps == 0).sum() > 3)  # of several episodes
    torch.testing.assert_close(data["logits"], replayed(data, actor, vector))
    behaviour = data["logits"].log_softmax(-1).gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(data["action_log_prob"], behaviour)
    rows = TensorDict({"t": torch.arange(10.0)}, batch_size=10)
    for steps in (range(2, 5), range(0, 9, 3), [1, 7]):
        assert AtSteps(steps, key="t")(rows).nonzero().squeeze(-1).tolist() == sorted(steps)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_a_probe_decides_in_the_same_forward(batch: tuple[int, ...]) -> None:
    actor, vector = categorical(), torch.randn(HIDDEN)
    data = CASE.data(*batch)
    net = actor.module[0].module
    for kind, concept, label in (
        ("lda", "classes", 2),
        ("ridge", "classes", 0),
        ("lda", "labels", 1),
        ("ridge", "values", 1),
    ):
        probe = LinearProbe(weight=torch.randn(3, HIDDEN), bias=torch.randn(3), kind=kind, concept=concept, path=SITE)
        hidden = net[:2](data["observation"]).detach()
        read = probe.predict(hidden) if concept == "values" else probe.probabilities(hidden)
        limit = float(read[..., label].median())
        gate = ProbeGate(probe, above=limit - 1e-3, below=limit + 10, label=label)
        expected = read[..., label] > limit - 1e-3
        for site, rest in ((SITE, 2), ("module.0.module.3", 4)):
            with SteeringVectors({site: vector}, when=gate).prepare(actor) as hooked:
                found = hooked(data.clone())
                dist = hooked.get_dist(data.clone())
            inner = net[:rest](data["observation"])
            logits = net[rest:](torch.where(expected[..., None], inner + vector, inner))
            torch.testing.assert_close(found["logits"], logits)
            torch.testing.assert_close(dist.logits, logits.log_softmax(-1))
            assert torch.equal(found["steered", "steering"], expected)


def test_a_probe_after_the_site_is_refused_and_its_limits_are_controls() -> None:
    probe = LinearProbe(weight=torch.randn(2, HIDDEN), bias=torch.zeros(2), path="module.0.module.3")
    steering = SteeringVectors({SITE: torch.randn(HIDDEN)}, when=ProbeGate(probe, above=0.5))
    with (
        steering.prepare(categorical()) as hooked,
        pytest.raises(SiteError, match=r"module\.0\.module\.3.*has not run"),
    ):
        hooked(CASE.data(3))
    gate = ProbeGate(LinearProbe(weight=torch.randn(2, HIDDEN), bias=torch.zeros(2), path=SITE), above=0.0)
    with SteeringVectors({SITE: torch.randn(HIDDEN)}, when=gate).prepare(categorical()) as hooked:
        assert bool(hooked(CASE.data(3))["steered", "steering"].all())
        hooked.controls["steering.gate.above"] = 1.0
        assert not hooked(CASE.data(3))["steered", "steering"].any()


# ---------------------------------------------------------------------- copies, compilation, what is refused


def test_copies_and_compiled_policies_do_the_same() -> None:
    actor = make_actor()
    data = counted(4).rollout(3, break_when_any_done=False).select("observation", "step_count")
    with gated().prepare(actor) as hooked:
        expected = acting(hooked, data)
        assert bool(expected["steered", "steering"].any())
        for twin in (copy.deepcopy(hooked), pickle.loads(pickle.dumps(hooked))):
            found = acting(twin, data)
            require_equal(found, expected, ["logits", ("steered", "steering"), ("steered", "steering.alpha")])
        with torch.no_grad():
            compiled = torch.compile(hooked.get_dist, fullgraph=True, backend="eager")(data.clone())
            torch.testing.assert_close(compiled.logits, expected["logits"].log_softmax(-1))
            whole = torch.compile(hooked, fullgraph=True, backend="eager")(data.clone())
        require_equal(whole, expected, ["logits", ("steered", "steering")])


def test_what_is_declared_reaches_the_functions_by_in_keys_alone() -> None:
    late = RowFunction(lambda rows: rows["step_count"].squeeze(-1) > 2, reads=["step_count"])
    data = CASE.data(4).set("step_count", torch.arange(1, 5)[:, None])
    with SteeringVectors({SITE: torch.randn(HIDDEN)}, when=late).prepare(categorical()) as hooked:
        assert hooked.in_keys == ["observation", "step_count"]
        found = hooked(data.select(*hooked.in_keys))
    assert found["steered", "steering"].tolist() == [False, False, True, True]


def test_a_gate_that_never_opens_is_reported_once() -> None:
    data = CASE.data(3).set("step_count", torch.zeros(3, 1))
    net = categorical()
    with SteeringVectors({SITE: torch.ones(HIDDEN)}, when=AtSteps({7})).prepare(net) as hooked:
        for _ in range(99):
            hooked(data.clone())
        with pytest.warns(UserWarning, match="when= of 'steering' has not held in any row of the first 100 calls"):
            hooked(data.clone())
        for _ in range(120):
            hooked(data.clone())
    with SteeringVectors({SITE: torch.ones(HIDDEN)}, when=AtSteps({7})).prepare(net) as hooked:
        hooked(data.clone().set("step_count", torch.full((3, 1), 7)))
        for _ in range(120):
            hooked(data.clone())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"when": 0.5}, InputError, "when= is a boolean key"),
        ({"when": []}, InputError, "has no condition"),
        ({"when": lambda: True}, InputError, "called with one argument"),
        ({"when": lambda rows: True}, InputError, "when= of 'steering' gives a boolean for each row.*returned True"),
        ({"when": lambda rows: rows["observation"]}, InputError, "gives a boolean .* tensor of torch.float32"),
        ({"when": lambda rows: rows["observation"][:2, 0] > 0}, InputError, r"the batch \(3,\).*shape \(2,\)"),
        ({"when": lambda rows: rows["nowhere"]}, MissingKeyError, "reads 'nowhere', which is not there"),
        ({"when": "nowhere"}, MissingKeyError, "per-row key 'nowhere'"),
        ({"when": "numbers"}, InputError, "per-row key 'numbers'.*must be boolean"),
        ({"alpha": "infinite"}, InputError, "per-row key 'infinite' has NaN or infinite"),
        ({"alpha": lambda rows: rows["infinite"]}, InputError, "alpha= of 'steering' has NaN or infinite"),
        ({"alpha": lambda rows: rows["infinite"][:2]}, InputError, r"shape \(2,\)"),
        ({"alpha": lambda rows: rows["numbers"] > 0}, InputError, "gives a number"),
        ({"alpha": float("nan")}, InputError, "finite number"),
    ],
)
def test_bad_conditions_and_strengths_are_refused_by_name(options: dict, error: type[Exception], said: str) -> None:
    data = CASE.data(3).set("numbers", torch.ones(3)).set("infinite", torch.tensor([0.0, torch.nan, 1.0]))
    with (
        pytest.raises(error, match=said),
        SteeringVectors({SITE: torch.ones(HIDDEN)}, **options).prepare(categorical()) as hooked,
    ):
        hooked(data)


def test_bad_gates_are_refused() -> None:
    probe = LinearProbe(weight=torch.zeros(3, HIDDEN), bias=torch.zeros(3), path=SITE)
    for make, said in (
        (lambda: AtSteps([]), "numbers of steps"),
        (lambda: AtSteps({-1, 2}), "counted from 0"),
        (lambda: ProbeGate(probe), "above= or below="),
        (lambda: ProbeGate(probe, above=0.9, below=0.1), "between above=0.9 and below=0.1, where nothing is"),
        (lambda: ProbeGate(probe, above=0.5, below=0.5), "where nothing is"),
        (lambda: ProbeGate(probe, above=0.5), "say which, label="),
        (lambda: ProbeGate(probe, above=0.5, label=3), "has 3, counted from 0"),
        (lambda: ProbeGate(LinearProbe(weight=torch.zeros(1, 2), bias=torch.zeros(1)), above=0.5), "which module"),
        (lambda: RowFunction(lambda rows: rows, reads=[]), "is empty"),
    ):
        with pytest.raises(InputError, match=said):
            make()
    steering = SteeringVectors({SITE: torch.ones(HIDDEN)}, when="open")
    with pytest.raises(InputError, match="nothing to schedule"):
        Scheduled(steering, every=2).prepare(categorical()).__enter__()
    with SteeringVectors({"1": torch.ones(HIDDEN)}, when="open").prepare(mlp()) as hooked:
        with pytest.raises(MissingKeyError, match="open"):
            hooked(input=torch.zeros(2, 6))


# ---------------------------------------------------------------------- functions that see the rows


@pytest.mark.parametrize(
    "function",
    [
        lambda module_key, output, rows: output * (rows["goal"] > 2)[..., None],
        lambda output, module_key, *, rows: output * (rows["goal"] > 2)[..., None],
        lambda k, o, rows: o * (rows["goal"] > 2)[..., None],
    ],
)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_functions_may_see_the_rows_they_act_on(function: Callable, batch: tuple[int, ...]) -> None:
    net = mlp().double()
    x, goal = torch.randn(*batch, 6).double(), torch.randint(0, 5, batch)
    data = TensorDict({"input": x, "goal": goal, ("patched", "input"): -x}, batch_size=batch)
    method = Compose(SteeringVectors(modules_to_steer=["1"], steer_fn=function), Saliency(when="step"))
    with method.prepare(net) as hooked:
        found = hooked(data.clone())
        with pytest.raises(InputError, match="steer_fn takes the rows at '1'"):
            hooked(input=x)
    point = x.clone().requires_grad_()
    expected = net[2:](net[:2](point) * (goal > 2)[..., None])
    torch.testing.assert_close(found["output"], expected)
    torch.testing.assert_close(found["attr", "input"], torch.autograd.grad(expected.sum(), point)[0])

    def half(key: str, here: Tensor, first: Tensor, rows: TensorDictBase) -> Tensor:
        assert torch.equal(rows["input"], -x)
        return torch.where((rows["goal"] > 2)[..., None], first, here)

    with ActivationPatching(["1"], patch_fn=half).prepare(net) as hooked:
        patched = hooked(data.clone())["patched", "output"]
    torch.testing.assert_close(patched, net[2:](torch.where((goal > 2)[..., None], net[:2](x), net[:2](-x))))


@pytest.mark.parametrize("site", ["0", "1"])  # what the first gives is what it was given
def test_a_function_that_works_in_place_acts_where_it_is_to(site: str) -> None:
    net = nn.Sequential(nn.Identity(), nn.Linear(6, 4), nn.Tanh()).double()
    data = TensorDict({"input": torch.randn(5, 6).double(), "open": torch.arange(5) % 2 == 0}, batch_size=5)

    def doubled(module_key: str, output: Tensor) -> Tensor:
        return output.mul_(2)

    for when in (None, "open"):
        acts = data["open"][:, None] if when else torch.ones(5, 1, dtype=torch.bool)
        with (
            SteeringVectors(modules_to_steer=[site], steer_fn=doubled, when=when).prepare(net) as hooked,
            torch.no_grad(),
        ):
            found = hooked(data.clone())
        at = net[: int(site) + 1](data["input"])
        expected = net[int(site) + 1 :](torch.where(acts, 2 * at, at))
        torch.testing.assert_close(found["output"], expected.detach())
        assert torch.equal(found["input"], data["input"])
    other = data.clone().set(("patched", "input"), -data["input"])
    with (
        ActivationPatching([site], patch_fn=lambda k, here, first: here.mul_(2)).prepare(net) as hooked,
        torch.no_grad(),
    ):
        assert torch.equal(hooked(other)["patched", "input"], -data["input"])


def test_what_functions_see_is_read_only() -> None:
    def writes(k: str, o: Tensor, rows: TensorDictBase) -> Tensor:
        rows["observation"] = o
        return o

    with SteeringVectors(modules_to_steer=SITE, steer_fn=writes).prepare(categorical()) as hooked:
        with pytest.raises(RuntimeError, match="locked"):
            hooked(CASE.data(3))

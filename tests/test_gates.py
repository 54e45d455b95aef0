"""Conditions and schedules of interventions: where they act, and that the data says so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.collectors import Collector, Evaluator, MultiSyncCollector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import Compose as EnvCompose
from torchrl.envs import InitTracker, StepCounter, TransformedEnv
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from tdhook_rl import Compose, LinearProbe, Saliency, Scheduled, SteeringVectors, targets
from tdhook_rl.attribution import IntegratedGradients, Occlusion
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, KeyCollisionError, MissingKeyError, SiteError
from tdhook_rl.examples.agent import FC2, make_actor, make_critic
from tdhook_rl.latent import ActivationPatching, AtSteps, DirectionalAblation, DirectionClamping, ProbeGate, RowFunction
from tdhook_rl.metrics import deletion_insertion
from tdhook_rl.rollout import check
from tests.policies import CASES, HIDDEN, POLICIES, Case, categorical, mlp, recurrent

CASE = CASES["categorical"]
SITE = CASE.site
BATCHES = [(), (5,), (3, 2)]


def by_case(function: Callable[[Case, tuple[int, ...]], None]) -> Callable[..., None]:
    """On every policy, at every batch shape."""
    mark = pytest.mark.parametrize("batch", BATCHES, ids=str)
    return mark(pytest.mark.parametrize("case", POLICIES.values(), ids=list(POLICIES))(function))


def some_batch(case: Case, batch: tuple[int, ...]) -> None:
    """Skip batch shapes that the policy itself does not take."""
    if case in [POLICIES[name] for name in ("batch_norm", "batch_norm_eval", "bytes")] and len(batch) != 1:
        pytest.skip("the policy takes one batch dimension")


def positive(case: Case, rows: TensorDictBase) -> Tensor:
    """A condition that about half of the rows of a case fulfil."""
    values = rows[case.key].double().reshape(*rows.batch_size, -1)
    return values.sum(-1) > (0 if values.min() < 0 else 127.5 * values.shape[-1])


def ramp(case: Case, rows: TensorDictBase) -> Tensor:
    """A strength for each row, 0 in some."""
    return rows[case.key].double().reshape(*rows.batch_size, -1).mean(-1).sin().clamp_min(0)


def by_hand(policy: nn.Module, case: Case, change: Callable[[Tensor, Callable], Tensor], batch: tuple) -> nn.Module:
    """A copy of a policy with a hook of torch; ``change(value, spread)`` is given a way to spread numbers of rows."""
    policy = copy.deepcopy(policy)

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        lead = batch if value.shape[: len(batch)] == batch else (torch.Size(batch).numel(),)
        rest = (1,) * (value.ndim - len(lead))
        changed = change(value, lambda rows: rows.reshape(*lead, *rest))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    policy.get_submodule(case.site).register_forward_hook(hook)
    return policy


def acting(policy: nn.Module, data: TensorDict) -> TensorDict:
    torch.manual_seed(4)
    return policy(data.clone())


def require_equal(found: TensorDictBase, expected: TensorDictBase, keys: Any) -> None:
    for key in keys:
        torch.testing.assert_close(found[key], expected[key], equal_nan=True)


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


def counted(*batch: int, max_steps: int = 6, seed: int = 0) -> TransformedEnv:
    env = CueCorners(batch_size=batch, max_steps=max_steps, seed=seed)
    return TransformedEnv(env, EnvCompose(InitTracker(), StepCounter()))


def replayed(data: TensorDictBase, actor: nn.Module, vector: Tensor) -> Tensor:
    """The logits of rows from their observations and what the data says of steering."""
    net = actor.module[0].module
    acts = data["steered", "steering"]
    alpha = data.get(("steered", "steering.alpha"), torch.ones(acts.shape))
    hidden = net[:4](data["observation"])
    return net[4:](torch.where(acts[..., None], hidden + alpha[..., None] * vector, hidden))


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


# ---------------------------------------------------------------------- collectors, buffers, evaluation


def gated() -> SteeringVectors:
    probe = LinearProbe(weight=torch.linspace(-1, 1, 128).reshape(2, 64), bias=torch.zeros(2), path=FC2)
    return SteeringVectors(
        {FC2: torch.linspace(-1, 1, 64)},
        alpha=lambda rows: 1 - rows["step_count"] / 8,
        when=[AtSteps(range(1, 6)), lambda rows: rows["observation"].sum(-1) > -100, ProbeGate(probe, above=0.05)],
    )


def makers(count: int) -> list[Callable[[], TransformedEnv]]:
    return [partial(counted, 2, seed=seed) for seed in range(count)]


COLLECTORS = {
    "Collector": lambda policy, **options: Collector(counted(2), policy, **options),
    "to a buffer": lambda policy, **options: Collector(
        counted(2), policy, replay_buffer=ReplayBuffer(storage=LazyTensorStorage(64, ndim=2), batch_size=8), **options
    ),
    "MultiSync": lambda policy, **options: MultiSyncCollector(makers(1), policy, cat_results="stack", **options),
}


@pytest.mark.parametrize("kind", COLLECTORS)
def test_in_collectors_every_row_says_where_it_was_steered(kind: str) -> None:
    actor = make_actor()
    with Compose(gated(), Saliency()).prepare(actor) as hooked:
        collector = COLLECTORS[kind](hooked, frames_per_batch=32, total_frames=64, init_random_frames=0)
        try:
            batches = [data if data is not None else collector.replay_buffer[:] for data in collector]
        finally:
            collector.shutdown()
        for data in batches:
            torch.testing.assert_close(
                data["logits"], replayed(data, actor, torch.linspace(-1, 1, 64)), atol=1e-4, rtol=1e-4
            )
            steps = data["step_count"].squeeze(-1)
            acts = data["steered", "steering"]
            assert bool(data["computed", "steered"].all())
            assert bool(acts.any())
            assert not acts[(steps < 1) | (steps > 5)].any()
            hooked.annotate(data, on_mismatch="raise")


def test_random_frames_are_not_steered() -> None:
    with gated().prepare(make_actor()) as hooked:
        for buffers in (True, False):
            collector = Collector(
                counted(2), hooked, frames_per_batch=16, total_frames=48, init_random_frames=16, use_buffers=buffers
            )
            masks = [data["computed", "steered"].clone() for data in collector]
            collector.shutdown()
            assert not masks[0].any()
            assert bool(masks[-1].all())


def test_an_evaluator_and_a_recurrent_policy_step_by_step() -> None:
    actor = recurrent()
    state = ("next", "recurrent_state")
    vectors = {("module.0.module.0", state): torch.randn(HIDDEN), "module.0.module.1": torch.randn(4)}
    case = POLICIES["recurrent"]
    data = case.data(3, 5).set("step_count", torch.arange(5).expand(3, 5).unsqueeze(-1).clone())
    with SteeringVectors(vectors, when=AtSteps({1, 3})).prepare(actor) as hooked:
        rows, carried = [], data["recurrent_state"][:, 0]
        plain = carried.clone()
        for step in range(5):
            now = data[:, step].clone().set("recurrent_state", carried)
            found = hooked(now)
            expected = actor(data[:, step].clone().set("recurrent_state", plain))
            plain = expected["next", "recurrent_state"]
            if step in (1, 3):
                plain = plain + vectors["module.0.module.0", state]
            carried = found["next", "recurrent_state"]
            torch.testing.assert_close(carried, plain)
            rows.append(found["steered", "steering"])
        assert torch.stack(rows, 1).tolist() == [[False, True, False, True, False]] * 3
    with gated().prepare(make_actor()) as hooked:
        evaluator = Evaluator(counted(2), hooked, max_steps=6)
        try:
            metrics = evaluator.evaluate()
        finally:
            evaluator.shutdown()
        assert metrics


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


def test_what_functions_see_is_read_only() -> None:
    def writes(k: str, o: Tensor, rows: TensorDictBase) -> Tensor:
        rows["observation"] = o
        return o

    with SteeringVectors(modules_to_steer=SITE, steer_fn=writes).prepare(categorical()) as hooked:
        with pytest.raises(RuntimeError, match="locked"):
            hooked(CASE.data(3))


# ---------------------------------------------------------------------- agents, trajectories, losses


def test_agents_may_be_steered_one_by_one() -> None:
    case = POLICIES["multi_agent"]
    policy, data, vector = case.build(), case.data(4), torch.randn(3, HIDDEN)
    which = data[case.key].sum(-1) > 0
    method = SteeringVectors({case.site: vector}, when=lambda rows: rows[case.key].sum(-1) > 0)
    with Compose(method, Saliency(target=targets.entropy())).prepare(policy) as hooked:
        found = hooked(data.clone())
        hooked.annotate(found, on_mismatch="raise")
    plain = by_hand(policy, case, lambda value, spread: torch.where(which[..., None], value + vector, value), (4,))
    torch.testing.assert_close(found[case.logits], plain(data.clone())[case.logits])
    assert torch.equal(found["steered", "steering"], which)


def test_whole_trajectories_are_steered_at_their_steps() -> None:
    actor, case = recurrent(), POLICIES["recurrent"]
    data = case.data(3, 5).set("step_count", torch.arange(5).expand(3, 5).unsqueeze(-1).clone())
    vector = torch.randn(4)
    with SteeringVectors({"module.0.module.1": vector}, when=AtSteps({1, 3})).prepare(actor) as hooked:
        with set_recurrent_mode(True):
            found, plain = hooked(data.clone()), actor(data.clone())
    acts = torch.tensor([False, True, False, True, False])
    torch.testing.assert_close(found["logits"], plain["logits"] + acts[:, None] * vector)
    assert torch.equal(found["steered", "steering"], acts.expand(3, 5))
    carried = {("module.0.module.0", ("next", "recurrent_state")): torch.randn(HIDDEN)}
    with SteeringVectors(carried, when=AtSteps({1})).prepare(actor) as hooked:
        with set_recurrent_mode(True), pytest.raises(SiteError, match="call it step by step"):
            hooked(data.clone())


def test_a_loss_over_steered_data_sees_the_steered_policy() -> None:
    actor, critic = make_actor(), make_critic()
    with gated().prepare(actor) as hooked:
        with torch.no_grad():
            data = counted(4).rollout(6, hooked, break_when_any_done=False)
        loss = ClipPPOLoss(hooked, critic)
        GAE(gamma=0.9, lmbda=0.9, value_network=critic)(data)
        found = loss(data)
        unsteered = ClipPPOLoss(actor, critic)(data)
    assert float(found["kl_approx"].abs()) < 1e-6  # the policy of the loss is the one that acted
    assert float(unsteered["kl_approx"].abs()) > 1e-4
    found["loss_objective"].backward()
    assert all(parameter.grad is not None for parameter in actor.parameters())


def test_metrics_and_the_doctor_are_of_the_policy_as_it_was_steered() -> None:
    actor, env = make_actor(), counted(4)
    steering = SteeringVectors({FC2: torch.randn(64)}, when=lambda rows: rows["step_count"] % 2 == 0)
    with Compose(steering, Saliency(target=targets.chosen_logit())).prepare(actor) as hooked:
        with torch.no_grad():
            data = env.rollout(6, hooked, break_when_any_done=False)
        assert check(hooked, env, {"postproc": hooked.annotate}).ok

        def score(data: TensorDictBase) -> Tensor:
            return deletion_insertion(hooked, data, n_steps=3, n_random=1).deletion

        score_of = score(hooked.annotate(data))
        torch.testing.assert_close(score(hooked.annotate(data).exclude("step_count")), score_of)  # the record is enough
        turned = hooked.annotate(data)
        turned["steered", "steering"] = ~turned["steered", "steering"]
        assert not torch.allclose(score(turned), score_of)


def test_several_interventions_each_say_where_they_acted() -> None:
    data, first, second = CASE.data(4), torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([0, 0, 1, 1]).bool()
    data["first"], data["second"] = first, second
    vectors = {SITE: torch.randn(HIDDEN)}
    both = Compose(SteeringVectors(vectors, when="first"), DirectionalAblation(vectors, when=["first", "second"]))
    with both.prepare(categorical()) as hooked:
        found = hooked(data.clone())
    assert torch.equal(found["steered", "steering"], first)
    assert torch.equal(found["steered", "ablation"], first & second)
    found["steered", "steering"].zero_()
    assert torch.equal(found["first"], first)  # the key is the data's own
    twice = Compose(SteeringVectors({SITE: "first"}, alpha="first"), SteeringVectors({SITE: "first"}, alpha="second"))
    with pytest.raises(KeyCollisionError, match=r"two methods write .*another name="):
        twice.prepare(categorical()).__enter__()


def test_a_record_of_an_earlier_call_decides_nothing() -> None:
    """Neither where the policy acts again on the same TensorDict, nor where its own forward is explained."""
    net, vector = mlp().double(), torch.randn(HIDDEN).double()
    data = TensorDict({"input": torch.randn(4, 6).double(), "t": torch.arange(4)}, batch_size=4)
    asked = []

    def even(rows: TensorDictBase) -> Tensor:
        asked.append(1)
        return rows["t"] % 2 == 0

    methods = Compose(
        SteeringVectors({"1": vector}, alpha=lambda rows: 1.0 + rows["t"], when=even),
        Saliency(when="step"),
        IntegratedGradients(baseline=0.0, n_steps=200, when="step", attribution_key="path"),
    )
    for first in (0, 1):
        with methods.prepare(net) as hooked:
            for start in (first, 1 - first, first):
                data["t"] = torch.arange(start, start + 4)
                asked.clear()
                data = hooked(data)
                assert len(asked) == 1
                strength = torch.where(data["t"] % 2 == 0, 1.0 + data["t"], 0)[:, None]
                point, blank = data["input"].clone().requires_grad_(), torch.zeros(4, 6).double()
                outputs = [net[2:](net[:2](x) + strength * vector).sum(-1) for x in (point, blank)]
                torch.testing.assert_close(data["output"].sum(-1), outputs[0])
                torch.testing.assert_close(data["attr", "input"], torch.autograd.grad(outputs[0].sum(), point)[0])
                change = (outputs[0] - outputs[1]).detach()
                torch.testing.assert_close(data["path", "input"].sum(-1), change, atol=1e-3, rtol=1e-3)


def test_paths_and_perturbations_keep_what_was_decided_for_the_row() -> None:
    net, vector = mlp().double(), torch.randn(HIDDEN).double()
    data = TensorDict({"input": torch.randn(6, 6).double()}, batch_size=6)
    acts = data["input"].sum(-1) > 0
    method = Compose(
        SteeringVectors({"1": vector}, when=lambda rows: rows["input"].sum(-1) > 0),
        IntegratedGradients(baseline=0.0, n_steps=200, attribution_key="path"),
        Occlusion(attribution_key="occlusion"),
    )
    with method.prepare(net) as hooked:
        recorded, unrecorded = hooked.annotate(hooked(data.clone())), hooked.annotate(data)
    outputs = [
        net[2:](net[:2](x) + acts[:, None] * vector).sum(-1).detach() for x in (data["input"], data["input"] * 0)
    ]
    gone = [
        net[2:](net[:2](data["input"].index_fill(1, torch.tensor([one]), 0)) + acts[:, None] * vector).sum(-1).detach()
        for one in range(6)
    ]
    for found in (recorded, unrecorded):
        torch.testing.assert_close(found["path", "input"].sum(-1), outputs[0] - outputs[1], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found["occlusion", "input"], outputs[0][:, None] - torch.stack(gone, -1))

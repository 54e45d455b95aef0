"""Time is not batch: recurrent policies are explained row by row at their stored hidden state."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Categorical
from torchrl import data as spec
from torchrl.data import Unbounded
from torchrl.envs import InitTracker, TransformedEnv, transforms
from torchrl.modules import GRUModule, LSTMModule, ProbabilisticActor, set_recurrent_mode

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import DimsConfig, GradCAM, IntegratedGradients, Occlusion
from tdhook_rl.errors import InputError, MismatchError, SiteError
from tests.mock_env import MockEnv
from tests.policies import categorical


def recurrent_actor() -> ProbabilisticActor:
    gru = GRUModule(input_size=4, hidden_size=8, in_key="observation", out_key="hidden")
    head = TensorDictModule(nn.Linear(8, 3), in_keys=["hidden"], out_keys=["logits"])
    net = TensorDictSequential(gru, head)
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True).double()


def step_by_step(policy: nn.Module, observations: torch.Tensor) -> TensorDict:
    """A rollout of trajectories ``(B, T, 4)`` by hand: the hidden state of each step is stored with it."""
    rows, hidden = [], torch.zeros(len(observations), 1, 8, dtype=torch.float64)
    for step in range(observations.shape[1]):
        data = TensorDict(
            {
                "observation": observations[:, step],
                "recurrent_state": hidden,
                "is_init": torch.full((len(observations), 1), step == 0),
            },
            batch_size=[len(observations)],
        )
        rows.append(policy(data).detach())
        hidden = rows[-1]["next", "recurrent_state"]
    return torch.stack(rows, 1)


def test_annotate_equals_inline_at_the_stored_hidden_states() -> None:
    actor = recurrent_actor()
    observations = torch.randn(3, 6, 4, dtype=torch.float64)
    method = Compose(
        ActivationCaching("module.0.module.1.module"),
        Saliency(target=targets.chosen_logit(), inputs=["observation"], when="step", attribution_key="live"),
        Saliency(target=targets.chosen_logit(), inputs=["observation"]),
    )
    with method.prepare(actor) as hooked:
        data = step_by_step(hooked, observations)
        found = hooked.annotate(data)
    torch.testing.assert_close(found["attr", "observation"], found["live", "observation"])
    # By hand: one step of one trajectory, its hidden state a constant.
    row = data[1, 4]
    x = row["observation"].clone().requires_grad_()
    one = TensorDict(
        {"observation": x, "recurrent_state": row["recurrent_state"], "is_init": row["is_init"]}, batch_size=[]
    )
    logit = actor.get_dist_params(one)["logits"][row["action"]]
    torch.testing.assert_close(found["attr", "observation"][1, 4], torch.autograd.grad(logit, x)[0])


def test_rows_are_explained_at_their_stored_states_also_in_recurrent_mode() -> None:
    actor = recurrent_actor()
    data = step_by_step(actor, torch.randn(3, 6, 4, dtype=torch.float64))
    method = Saliency(inputs=["observation"])
    with method.prepare(actor) as hooked:
        expected = hooked.annotate(data)["attr", "observation"]
        with set_recurrent_mode(True):
            found = hooked.annotate(data)["attr", "observation"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("reset_at", [None, 3])
def test_the_trajectory_horizon_runs_through_time_and_stops_at_resets(kind: str, reset_at: int | None) -> None:
    actor, unroll = recurrent_pair(kind)
    steps = 6
    observations = torch.randn(2, steps, 4, dtype=torch.float64)
    is_init = torch.zeros(2, steps, 1, dtype=torch.bool)
    is_init[:, 0] = True
    if reset_at is not None:
        is_init[1, reset_at] = True
    actions = torch.randint(0, 3, (2, steps))
    states = {
        name: torch.zeros(2, steps, 1, 8, dtype=torch.float64) for name in actor.in_keys if "recurrent" in str(name)
    }
    data = TensorDict(
        {"observation": observations, "is_init": is_init, "action": actions, **states}, batch_size=[2, steps]
    )
    method = Saliency(target=targets.chosen_logit(), inputs=["observation"], horizon="trajectory")
    with method.prepare(actor) as hooked:
        found = hooked.annotate(data)
        one_by_one = torch.stack([hooked.annotate(row)["attr", "observation"] for row in data])
        chunked = hooked.annotate(data, chunk_size=1)["attr", "observation"]
    x = observations.clone().requires_grad_()
    logits = unroll(x, is_init)
    expected = torch.autograd.grad(logits.gather(-1, actions[..., None]).sum(), x)[0]
    torch.testing.assert_close(found["attr", "observation"], expected)
    torch.testing.assert_close(one_by_one, expected)
    torch.testing.assert_close(chunked, expected)
    if reset_at is not None:  # nothing decided after the reset rests on what was seen before it
        late = torch.autograd.grad(unroll(x, is_init)[1, reset_at:].sum(), x)[0][1]
        assert float(late[:reset_at].abs().max()) == 0.0


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_whole_trajectories_of_a_rollout_are_those_of_the_policy_that_acted(kind: str) -> None:
    """What is carried from step to step is compared where it is known; other weights are told all the same."""
    actor, _ = recurrent_pair(kind)
    actor = actor.float()
    core = next(one for one in actor.modules() if isinstance(one, GRUModule | LSTMModule))
    env = MockEnv(
        {"observation": Unbounded(shape=(4,))},
        {"action": spec.Categorical(3, shape=(), dtype=torch.long)},
        batch_size=(2,),
        length=5,
    )
    env = TransformedEnv(env, transforms.Compose(InitTracker(), core.make_tensordict_primer()))
    method = Saliency(target=targets.chosen_logit(), inputs=["observation"], horizon="trajectory")
    with method.prepare(actor) as hooked:
        data = env.rollout(5, hooked, break_when_any_done=False)
        assert hooked.annotate(data.clone(), on_mismatch="raise")["computed", "attr"].all()
        with torch.no_grad():
            next(actor.parameters()).add_(1.0)
        with pytest.raises(MismatchError):
            hooked.annotate(data, on_mismatch="raise")


def recurrent_pair(kind: str):
    """A recurrent policy, and the same unrolled by hand with resets."""
    module = {"gru": GRUModule, "lstm": LSTMModule}[kind]
    rnn = module(input_size=4, hidden_size=8, in_key="observation", out_key="hidden")
    head = TensorDictModule(nn.Linear(8, 3), in_keys=["hidden"], out_keys=["logits"])
    net = TensorDictSequential(rnn, head)
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True).double()
    core = rnn.gru if kind == "gru" else rnn.lstm

    def unroll(x: torch.Tensor, is_init: torch.Tensor) -> torch.Tensor:
        rows = []
        for trajectory, resets in zip(x, is_init, strict=True):
            state, outputs = None, []
            for step, reset in zip(trajectory, resets, strict=True):
                state = None if bool(reset) else state
                output, state = core(step[None, None], state)
                outputs.append(head.module(output[0, 0]))
            rows.append(torch.stack(outputs))
        return torch.stack(rows)

    return actor, unroll


def test_the_trajectory_horizon_of_a_feed_forward_policy_is_its_step() -> None:
    actor = categorical()
    data = actor(TensorDict({"observation": torch.randn(3, 5, 6)}, batch_size=[3, 5]))
    for horizon in ("step", "trajectory"):
        with Saliency(horizon=horizon).prepare(actor) as hooked:
            data[horizon] = hooked.annotate(data)["attr", "observation"]
    torch.testing.assert_close(data["step"], data["trajectory"])


def test_what_the_trajectory_horizon_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match="which no step knows"):
        Saliency(horizon="trajectory", when="step")
    with pytest.raises(InputError, match="has the horizons 'step'"):
        GradCAM(modules_to_attribute={"0": DimsConfig()}, horizon="trajectory")
    with Saliency(horizon="trajectory").prepare(categorical()) as hooked:
        with pytest.raises(InputError, match="no batch dimension"):
            hooked.annotate(hooked(TensorDict({"observation": torch.randn(6)}, batch_size=[])))


CORES = {"lstm": (LSTMModule, False), "gru": (GRUModule, False)}
CORES |= {f"{name} in python": (kind, True) for name, (kind, _) in CORES.items()}


class Unrolled:
    """A recurrent policy, a batch of trajectories with resets, and what its core computes, step by step."""

    def __init__(self, core: str, batch: tuple[int, ...], resets: bool, **options) -> None:
        kind, in_python = CORES[core]
        rnn = kind(
            input_size=4, hidden_size=8, in_key="observation", out_key="hidden", python_based=in_python, **options
        )
        head = TensorDictModule(nn.Linear(8, 3), in_keys=["hidden"], out_keys=["logits"])
        net = TensorDictSequential(rnn, head)
        self.actor = ProbabilisticActor(
            net, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True
        ).double()
        self.head = head.module
        self.name = "lstm" if kind is LSTMModule else "gru"
        self.site = f"module.0.module.0.{self.name}"
        is_init = torch.zeros(*batch, 1, dtype=torch.bool)
        is_init[..., 0, :] = True
        if resets:
            is_init[..., 2, :] = True
            is_init.reshape(-1, batch[-1])[-1, 3] = True
        states = {key: torch.zeros(*batch, 1, 8).double() for key in self.actor.in_keys if "recurrent" in str(key)}
        self.data = TensorDict(
            {
                "observation": torch.randn(*batch, 4).double(),
                "is_init": is_init,
                "strength": torch.rand(*batch).double(),
                "action": torch.randint(0, 3, batch),
                **states,
            },
            batch_size=batch,
        )
        core_module = getattr(rnn, self.name)
        rows = []
        flat = self.data["observation"].reshape(-1, batch[-1], 4)
        for trajectory, starts in zip(flat, is_init.reshape(len(flat), -1), strict=True):
            state = self._start()
            for step, reset in zip(trajectory, starts, strict=True):
                output, state = core_module(step[None, None], self._start() if bool(reset) else state)
                rows.append(output[0, 0])
        self.hidden = torch.stack(rows).reshape(*batch, 8)

    def _start(self):
        zeros = torch.zeros(1, 1, 8).double()
        return (zeros, zeros) if self.name == "lstm" else zeros


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("batch", [(5,), (3, 5), (2, 2, 5)])
@pytest.mark.parametrize("core", CORES)
def test_the_core_in_recurrent_mode_shows_and_takes_a_row_for_each_step(core: str, batch: tuple, resets: bool) -> None:
    case, vector = Unrolled(core, batch, resets), torch.randn(8).double()
    with ActivationCaching(case.site).prepare(case.actor) as hooked, set_recurrent_mode(True):
        found = hooked(case.data.clone())
    torch.testing.assert_close(found["cache", case.site], case.hidden)
    method = SteeringVectors({case.site: vector}, alpha="strength")
    with method.prepare(case.actor) as hooked, set_recurrent_mode(True):
        found = hooked(case.data.clone())
        again = hooked.get_dist(case.data.clone())
    expected = case.head(case.hidden + case.data["strength"].unsqueeze(-1) * vector)
    torch.testing.assert_close(found["logits"], expected)
    torch.testing.assert_close(again.logits, expected.log_softmax(-1))


@pytest.mark.parametrize("core", CORES)
def test_the_core_is_explained_row_by_row_along_trajectories(core: str) -> None:
    case = Unrolled(core, (3, 5), True)
    method = Saliency(target=targets.chosen_logit(), input_modules=[case.site], horizon="trajectory")
    with method.prepare(case.actor) as hooked:
        found = hooked.annotate(case.data)
    torch.testing.assert_close(found["attr", case.site], case.head.weight[case.data["action"]])


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_core_in_collection_mode_has_no_dimension_of_time(core: str, batch: tuple) -> None:
    case = Unrolled(core, (*batch, 1), False)
    data = case.data.clone().squeeze(-1)
    with Compose(ActivationCaching(case.site), SteeringVectors({case.site: torch.ones(8).double()})).prepare(
        case.actor
    ) as hooked:
        found = hooked(data)
    torch.testing.assert_close(found["cache", case.site], case.hidden.squeeze(-2))
    torch.testing.assert_close(found["logits"], case.head(case.hidden.squeeze(-2) + 1))


@pytest.mark.parametrize("batch", [(5,), (3, 5)])
@pytest.mark.parametrize("attribution", [Saliency, partial(IntegratedGradients, baseline=0.0), Occlusion])
def test_attribution_per_step_is_refused_in_recurrent_mode(attribution, batch: tuple) -> None:
    case = Unrolled("gru", batch, False)
    with attribution(when="step", inputs=["observation"]).prepare(case.actor) as hooked:
        with set_recurrent_mode(True), pytest.raises(InputError, match=r"annotate .*horizon='trajectory'"):
            hooked(case.data.clone())
        assert not hooked._hooked.runtime.slots


@pytest.mark.parametrize("core", ["lstm", "gru"])
def test_the_scan_backend_does_not_call_the_core_and_says_so(core: str) -> None:
    pytest.importorskip("hoptorch")
    case = Unrolled(core, (3, 5), True, recurrent_backend="scan")
    step = case.data[:, 0]
    with SteeringVectors({case.site: torch.ones(8).double()}).prepare(case.actor) as hooked:
        hooked(step.clone())  # collection does call it
        with set_recurrent_mode(True):
            for call in (hooked, hooked.get_dist, hooked.get_dist_params):
                with pytest.raises(SiteError, match="recurrent_backend='pad'"):
                    call(case.data.clone())
    with ActivationCaching(case.site).prepare(case.actor) as hooked:
        hooked(step.clone())
        with set_recurrent_mode(True), pytest.raises(SiteError, match="did not run"):
            hooked(case.data.clone())
    with ActivationCaching("module.0.module.1").prepare(case.actor) as hooked, set_recurrent_mode(True):
        found = hooked(case.data.clone())  # what reads the output runs as ever
    torch.testing.assert_close(found["cache", "module.0.module.1"], case.head(case.hidden))


def test_runs_see_rows_of_the_core() -> None:
    case = Unrolled("gru", (3, 5), True)
    with ActivationCaching(case.site).prepare(case.actor) as hooked, set_recurrent_mode(True):
        with hooked.run(case.data.clone(), target=lambda data: data["logits"].sum()) as run:
            run.save(case.site)
            run.save_grad_output(case.site)
        torch.testing.assert_close(run.get(case.site).resolve(), case.hidden.detach())
        expected = case.head.weight.sum(0).expand(3, 5, 8)
        torch.testing.assert_close(run.get_grad_output(case.site).resolve(), expected)
        data = case.data.clone()
        with hooked.run(data) as run:
            run.set(case.site, torch.ones(3, 5, 8).double())
    torch.testing.assert_close(data["logits"], case.head(torch.ones(3, 5, 8).double()))


def test_the_carried_state_is_steered_at_the_rows_that_say_so() -> None:
    """Against a hidden state changed by hand between two steps."""
    actor, vector = recurrent_actor(), torch.randn(1, 8, dtype=torch.float64)
    state = ("next", "recurrent_state")
    observations = torch.randn(3, 6, 4, dtype=torch.float64)
    with SteeringVectors({("module.0.module.0", state): vector}, alpha="alpha").prepare(actor) as hooked:
        assert list(hooked.controls) == ["steering.module.0.module.0:next.recurrent_state"]
        data, hidden, expected = [], torch.zeros(3, 1, 8, dtype=torch.float64), []
        steered_hidden = hidden
        for step in range(6):
            common = {"observation": observations[:, step], "is_init": torch.full((3, 1), step == 0)}
            alpha = torch.tensor([0.0, float(step == 2), -2.0 * (step == 3)], dtype=torch.float64)
            row = TensorDict(common | {"recurrent_state": steered_hidden, "alpha": alpha}, batch_size=[3])
            data.append(hooked(row).detach())
            steered_hidden = data[-1][state]
            row = actor(TensorDict(common | {"recurrent_state": hidden}, batch_size=[3])).detach()
            expected.append(row)
            hidden = row[state] + alpha[:, None, None] * vector
    for step in range(6):
        torch.testing.assert_close(data[step]["logits"], expected[step]["logits"], rtol=0, atol=1e-14)
    assert torch.equal(data[5]["logits"][0], expected[5]["logits"][0])  # alpha 0: every bit
    plain = step_by_step(actor, observations)["logits"]
    assert (data[5]["logits"][1:] - plain[1:, 5]).abs().amax(-1).gt(1e-6).all()


@pytest.mark.parametrize(
    ("path", "key", "message"),
    [
        ("module.0.module.0", ("next", "recurrent"), "nearest: .*recurrent_state"),
        ("module.0.module.1.module", "logits", "writes no entries"),
    ],
)
def test_an_entry_that_a_module_does_not_write_is_refused(path: str, key: object, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        with SteeringVectors({(path, key): torch.zeros(8)}).prepare(recurrent_actor()):
            pass


def test_the_carried_state_is_not_steered_in_recurrent_mode() -> None:
    vector = torch.ones(1, 8, dtype=torch.float64)
    with SteeringVectors({("module.0.module.0", ("next", "recurrent_state")): vector}).prepare(
        recurrent_actor()
    ) as hooked:
        data = step_by_step(hooked, torch.randn(2, 3, 4, dtype=torch.float64))
        with set_recurrent_mode(True), pytest.raises(SiteError, match="step by step"):
            hooked(data)


@pytest.mark.parametrize("moves", [False, True], ids=["scaled", "moved"])
def test_an_undefined_target_leaves_the_steps_before_it_undefined_as_well(moves: bool) -> None:
    """A step is explained by the sum of the targets from it on, to the end of its trajectory; also where the
    derivative is a number, as of a target that is moved by an infinite one."""
    actor = recurrent_actor()
    data = step_by_step(actor, torch.randn(2, 6, 4, dtype=torch.float64))
    data["is_init"][0, 2] = True
    data["scale"] = torch.ones(2, 6, dtype=torch.float64)
    data["scale"][0, 4] = torch.inf
    change = torch.add if moves else torch.mul
    scaled = targets.Target("scaled", lambda run: change(run.outputs["logits"][..., 0], run.stored["scale"]))
    method = Saliency(target=scaled, inputs=["observation"], horizon="trajectory", additional_init_keys=["scale"])
    with method.prepare(actor) as hooked:
        found = hooked.annotate(data, on_mismatch="ignore")["attr", "observation"]
    undefined = found.isnan().all(-1)
    assert torch.equal(undefined, found.isnan().any(-1))
    assert undefined[0].tolist() == [False, False, True, True, True, False]
    assert not undefined[1].any()


def test_the_state_of_an_enclosing_module_is_not_steered_in_recurrent_mode_either() -> None:
    vector = torch.ones(1, 8, dtype=torch.float64)
    with SteeringVectors({("module.0", ("next", "recurrent_state")): vector}).prepare(recurrent_actor()) as hooked:
        data = step_by_step(hooked, torch.randn(2, 3, 4, dtype=torch.float64))
        with set_recurrent_mode(True), pytest.raises(SiteError, match="step by step"):
            hooked(data)


def test_an_entry_that_is_not_carried_is_steered_in_both_modes() -> None:
    actor = recurrent_actor()
    vector = torch.randn(8, dtype=torch.float64)
    with SteeringVectors({("module.0.module.0", "hidden"): vector}).prepare(actor) as hooked:
        data = step_by_step(hooked, torch.randn(2, 3, 4, dtype=torch.float64))
        with set_recurrent_mode(True):
            whole = hooked(data.clone())
    torch.testing.assert_close(whole["logits"], data["logits"])


@pytest.mark.parametrize("steered", [("0", "a", "b"), ("0",), 3, ("0", 3)])
def test_what_is_steered_is_a_path_or_a_path_and_a_key(steered: object) -> None:
    with pytest.raises(InputError, match="a pair of a path and a TensorDict key"):
        with SteeringVectors({steered: torch.zeros(8)}).prepare(recurrent_actor()):
            pass

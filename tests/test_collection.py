"""One process: every way in which a ``Collector`` runs a policy, and input that it should not have been given."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ListStorage, ReplayBuffer
from torchrl.envs import ParallelEnv
from torchrl.envs.utils import exploration_type

from tdhook_rl import ActivationCaching, Saliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InPlaceError, InputError, TieError, WorkerError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.rollout import Guarded, set_controls
from tests.collecting import (
    PROBES,
    RESULTS,
    Learner,
    check,
    check_all,
    env_functions,
    expected,
    make_collector,
    rows_of,
    version_of,
)

STORAGES = {"tensor": LazyTensorStorage, "memmap": LazyMemmapStorage, "list": ListStorage}


def has_everything(learner: Learner, data: TensorDictBase) -> None:
    for key in learner.policy._step_keys():
        assert data.get(key, None) is not None, key


# ---------------------------------------------------------------------- ways to collect


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": ()},
        {"policy_device": "cpu:0"},  # the policy is copied, as it is onto a GPU
        {"policy_device": "cpu:0", "storing_device": "cpu"},
        pytest.param({"compile_policy": {"backend": "eager", "fullgraph": True}}, marks=pytest.mark.slow),
        {"use_buffers": False},
        {"reset_at_each_iter": True},
        {"trajs_per_batch": 5, "traj_format": "padded"},
        {"trajs_per_batch": 5, "traj_format": "cat"},
        {"compact_obs": True},
        {"max_frames_per_traj": 3},
    ],
    ids=str,
)
def test_values_follow_the_weights_and_the_controls(options: dict[str, Any]) -> None:
    learner = Learner()
    collector = make_collector(learner.policy, **options)
    steady = "trajs_per_batch" in options  # trajectories are handed out some time after they were collected
    batches = []
    for index, data in enumerate(collector):
        has_everything(learner, data)
        batches.append(learner.policy.annotate(data))
        if index == 2:
            break
        if not steady:
            learner.step()
            collector.update_policy_weights_()
            set_controls(collector, {"steering.alpha": 2.0 + index, "probe.x.weight": PROBES[1].weight})
    collector.shutdown()
    check_all(learner, rows_of(batches))
    if not steady:
        versions = [version_of(rows_of([batch]), learner.versions).unique().tolist() for batch in batches]
        assert versions == [[0], [1], [2]]
        assert [batch["control", "steering.alpha"].unique().tolist() for batch in batches] == [[0.5], [2.0], [3.0]]
    assert bool(rows_of(batches)["next", "done"].any())


@pytest.mark.parametrize("options", [{}, {"trajs_per_batch": 4}], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_replay_buffers_hold_the_results(storage: str, options: dict[str, Any]) -> None:
    learner = Learner()
    buffer = ReplayBuffer(storage=STORAGES[storage](256), batch_size=8)
    collector = make_collector(learner.policy, replay_buffer=buffer, **options)
    assert list(collector) == [None] * len(list(range(0, 128, 32)))
    collector.shutdown()
    has_everything(learner, buffer[:])
    check_all(learner, rows_of([learner.policy.annotate(buffer[:].to_tensordict())]))


@pytest.mark.parametrize("where", ["memmap", "list", "no buffers", "buffers"])
def test_random_frames_have_results_that_are_not_computed(where: str) -> None:
    learner = Learner()
    buffer = ReplayBuffer(storage=STORAGES[where](256), batch_size=8) if where in STORAGES else None
    use_buffers = False if where == "no buffers" else None
    collector = make_collector(
        learner.policy, batch_size=(), init_random_frames=32, replay_buffer=buffer, use_buffers=use_buffers
    )
    batches = list(collector)
    collector.shutdown()
    batches = batches if buffer is None else [buffer[:]]
    has_everything(learner, batches[0])
    # What the policy itself would have written is not there in random frames, and some storages then never take it.
    keys = [*learner.policy._step_keys(), "observation", "action"]
    rows = torch.cat([batch.to_tensordict().select(*keys) for batch in batches])
    random, acted = rows[:32], rows[32:]
    for root in ("cache", "live", "probe", "control", "steered"):
        assert not bool(random["computed", root].any())
        assert bool(acted["computed", root].all())
    assert float(random["cache", FC2].abs().sum()) == 0.0
    wanted = expected(acted, learner.versions[0])
    for what in ("caching", "probe readout", "saliency per step"):
        name, key = RESULTS[what]
        torch.testing.assert_close(acted[key], wanted[name], rtol=1e-3, atol=1e-5)
    assert bool(learner.policy.annotate(random)["computed", "cache"].all())


class Greedy(nn.Module):
    """A net that writes nothing but the action, as a tensor storage demands after random frames."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(90, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.net(observation).argmax(-1)


def test_random_frames_in_a_tensor_storage() -> None:
    actor = TensorDictModule(Greedy(), in_keys=["observation"], out_keys=["action"])
    buffer = ReplayBuffer(storage=LazyTensorStorage(256), batch_size=8)
    with ActivationCaching("module.net.1").prepare(actor) as policy:
        list(make_collector(policy, batch_size=(), init_random_frames=64, replay_buffer=buffer))
    rows = buffer[:]
    assert rows["computed", "cache"].tolist() == [False] * 64 + [True] * 64
    assert not bool(rows["cache", "module.net.1"][:64].any())
    with torch.no_grad():
        torch.testing.assert_close(rows["cache", "module.net.1"][64:], actor.module.net[:2](rows["observation"][64:]))


def test_the_blank_results_of_random_frames_leave_the_generator_alone() -> None:
    found = []
    for policy in (make_actor(), Learner().policy):
        torch.manual_seed(3)
        buffer = ReplayBuffer(storage=ListStorage(100), batch_size=8)
        collector = make_collector(policy, init_random_frames=32, total_frames=32, replay_buffer=buffer)
        assert len(list(collector)) == 1
        found.append((buffer[:]["action"], torch.get_rng_state()))
        collector.shutdown()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_hook_of_the_user_is_called_beside_ours() -> None:
    calls = []
    collector = make_collector(Learner().policy, pre_collect_hook=lambda: calls.append(1))
    list(collector)
    collector.shutdown()
    assert len(calls) == 4


def test_a_policy_made_in_the_collector() -> None:
    learner = Learner()
    collector = make_collector(None, policy_factory=lambda: learner.policy)
    set_controls(collector, {"steering.alpha": 1.5})
    rows = rows_of([learner.policy.annotate(data) for data in collector])
    collector.shutdown()
    check_all(learner, rows)
    assert rows["control", "steering.alpha"].unique().tolist() == [1.5]


@pytest.mark.limit(60)
def test_collection_in_the_background() -> None:
    learner = Learner()
    buffer = ReplayBuffer(storage=LazyTensorStorage(10_000), batch_size=8)
    collector = make_collector(learner.policy, batch_size=(), replay_buffer=buffer, total_frames=10_000)
    with Guarded(collector, timeout=30) as guarded:
        guarded.start()
        for alpha in (1.0, 2.0):
            until = len(buffer) + 64
            while len(buffer) < until:
                guarded.check()
                time.sleep(0.01)
            set_controls(guarded, {"steering.alpha": alpha})
        until = len(buffer) + 64
        while len(buffer) < until:
            guarded.check()
            time.sleep(0.01)
    rows = learner.policy.annotate(buffer[:], on_mismatch="ignore")
    for what in ("steering", "caching", "probe readout"):
        check(rows, learner.versions, what, allowed=2)  # the step during which a control is set
    assert rows["control", "steering.alpha"].unique().tolist() == [0.5, 1.0, 2.0]


@pytest.mark.limit(60)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_background_that_fails_is_an_error() -> None:
    def fail(data: TensorDictBase) -> TensorDictBase:
        raise ValueError("no")

    buffer = ReplayBuffer(storage=LazyTensorStorage(100), batch_size=8)
    collector = make_collector(Learner().policy, batch_size=(), replay_buffer=buffer, postproc=fail)
    guarded = Guarded(collector)
    guarded.start()
    collector._thread.join(20)
    with pytest.raises(WorkerError, match="in the background ended after 32 frames"):
        guarded.check()


def test_weights_in_every_form_and_those_that_do_not_fit() -> None:
    learner = Learner()
    forms: dict[str, Callable[[nn.Module], Any]] = {
        "none": lambda actor: None,
        "tensordict": TensorDict.from_module,
        "module": lambda actor: actor,
        "state_dict": lambda actor: actor.state_dict(),
    }
    with Guarded(make_collector(learner.policy, policy_device="cpu:0", total_frames=-1)) as guarded:
        iterator = iter(guarded)
        next(iterator)
        for form in forms.values():
            learner.step()
            guarded.update_policy_weights_(form(learner.actor))
            rows = rows_of([next(iterator)])
            assert version_of(rows, learner.versions).unique().tolist() == [len(learner.versions) - 1]
        with pytest.raises(InputError, match="which the policy does not have; nearest: 'module"):
            guarded.update_policy_weights_(TensorDict({"pol": TensorDict.from_module(learner.actor)}))
        weights = TensorDict.from_module(learner.actor).data.clone()
        weights["module", "0", "module", "0", "weight"] = torch.zeros(3, 90)
        with pytest.raises(InputError, match=r"of shape \(3, 90\); the policy's has \(64, 90\)"):
            guarded.update_policy_weights_(weights)


def test_guarded_is_a_collector_to_its_users() -> None:
    guarded = Guarded(make_collector(Learner().policy))
    assert guarded.total_frames == 128
    assert guarded.set_seed(1) is not None
    with guarded:
        assert len(list(guarded)) == 4
    with pytest.raises(AttributeError, match="no_such_thing"):
        guarded.no_such_thing  # noqa: B018
    with pytest.raises(InputError, match="timeout="):
        Guarded(guarded.collector, timeout=0)


# ---------------------------------------------------------------------- ties and controls


def test_an_untied_policy_is_noticed_before_the_next_batch() -> None:
    learner = Learner()
    with Guarded(make_collector(learner.policy)) as guarded:
        iterator = iter(guarded)
        next(iterator)
        learner.actor.load_state_dict(copy.deepcopy(learner.actor.state_dict()), assign=True)
        with pytest.raises(TieError, match="prepare it again"):
            guarded.update_policy_weights_()
        with pytest.raises(TieError, match="prepare it again"):
            next(iterator)
    with pytest.raises(TieError, match="prepare it again"):
        copy.deepcopy(learner.policy)  # as for a worker, which cannot look


def test_controls_that_do_not_fit_are_refused_and_none_is_set() -> None:
    learner = Learner()
    collector = make_collector(learner.policy)
    with pytest.raises(InputError, match="shape"):
        set_controls(collector, {"steering.alpha": 3.0, "probe.x.bias": torch.zeros(7)})
    assert float(learner.policy.controls["steering.alpha"]) == 0.5
    with pytest.raises(KeyError, match=r"nearest: 'steering\.alpha'"):
        set_controls(collector, {"steering.alfa": 3.0})
    collector.shutdown()
    plain = make_collector(make_actor())
    with pytest.raises(InputError, match="runs no hooked policy"):
        set_controls(plain, {"steering.alpha": 1.0})
    plain.shutdown()


@pytest.mark.slow
@pytest.mark.limit(120)
@pytest.mark.usefixtures("spawned")
def test_a_dead_environment_of_a_parallel_env_is_named() -> None:
    env = ParallelEnv(2, env_functions(1, ())[0])
    collector = Collector(env, Learner().policy, frames_per_batch=16, total_frames=-1)
    guarded = Guarded(collector, timeout=30)
    iterator = iter(guarded)
    next(iterator)
    victim = collector.env._workers[1].pid
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(
        WorkerError, match=rf"environment worker 1 \(process {victim}\) of Collector was killed by SIGKILL"
    ):
        next(iterator)
    assert exploration_type() is None  # the thread that waited had set it for its rollout


class Slow(CueCorners):
    """Lets the collector wait."""

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        time.sleep(0.5)
        return super()._step(tensordict)


def test_ctrl_c_while_a_guarded_collector_waits_leaves_the_exploration_type() -> None:
    env = ParallelEnv(1, Slow)
    guarded = Guarded(Collector(env, Learner().policy, frames_per_batch=100, total_frames=-1), timeout=60)
    stop = threading.Timer(1.0, signal.raise_signal, [signal.SIGINT])
    stop.start()
    with pytest.raises(KeyboardInterrupt):
        next(iter(guarded))
    guarded.shutdown(2.0)
    assert exploration_type() is None


def test_a_module_with_its_own_register_collector_keeps_it() -> None:
    class Own(TensorDictModule):
        def register_collector(self, collector: Any) -> None:
            self.seen = collector

    module = Own(nn.Linear(90, 4), in_keys=["observation"], out_keys=["logits"])
    hooked = ActivationCaching("module").prepare(module, return_context=False)

    class Place:
        env = CueCorners()

    place = Place()
    hooked.register_collector(place)
    assert hooked.seen is place


class Stepped:
    """A target during which somebody steps the weights, as a learner does while a collector runs in the background."""

    name = "stepped"

    def __init__(self, actor: nn.Module, times: int) -> None:
        self.weight = actor.module[0].module[2].weight
        self.times = times

    def __call__(self, run: Any) -> torch.Tensor:
        if self.times:
            self.times -= 1
            with torch.no_grad():
                self.weight.add_(0.1)
        return run.outputs["logits"].sum(-1)


def test_weights_that_are_stepped_during_an_explanation() -> None:
    actor = make_actor()
    data = CueCorners(batch_size=[3], seed=0).reset()
    with Saliency(target=Stepped(actor, 2), when="step").prepare(actor) as policy, torch.no_grad():
        found = policy(data.clone())["attr", "observation"]
    with Saliency(target=Stepped(actor, 0), when="step").prepare(actor) as policy, torch.no_grad():
        assert torch.equal(found, policy(data.clone())["attr", "observation"])
    with (
        Saliency(target=Stepped(actor, 1000), when="step").prepare(actor) as policy,
        torch.no_grad(),
        pytest.raises(InPlaceError, match=r"changed in place.*modified by an inplace operation"),
    ):
        policy(data.clone())

"""As :mod:`tests.contracts`, for what is expected of TorchRL: of its collectors, buffers, trainers and modules."""

from __future__ import annotations

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import AsyncBatchedCollector, Collector, Evaluator, MultiSyncCollector
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ReplayBuffer,
    ReplayBufferEnsemble,
    TensorDictReplayBuffer,
)
from torchrl.envs import GymWrapper, ParallelEnv, TrajCounter, TransformedEnv
from torchrl.modules import (
    GRUModule,
    LSTMModule,
    MaskedCategorical,
    MultiAgentMLP,
    MultiStepActorWrapper,
    QValueModule,
    RSSMPosteriorV3,
    RSSMPriorV3,
    RSSMRolloutV3,
    TanhNormal,
)
from torchrl.trainers import ReplayBufferTrainer, Trainer
from torchrl.weight_update import MultiProcessWeightSyncScheme

from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import make_actor
from tdhook_rl.internals import torchrl_names as names
from tests.contracts import contract

contract = partial(contract, "torchrl_names")


@contextlib.contextmanager
def shut(collector: Any) -> Any:
    try:
        yield collector
    finally:
        collector.shutdown()


# ---------------------------------------------------------------------- collectors


@contract("carrier_of", "copies_into_buffers", "draws_random_frames", "frames_so_far")
def a_collector() -> None:
    for use in (False, True):
        made = Collector(
            CueCorners(), make_actor(), frames_per_batch=4, total_frames=8, init_random_frames=4, use_buffers=use
        )
        with shut(made) as collector:
            assert names.copies_into_buffers(collector) is use
            assert names.draws_random_frames(collector) is True
            assert names.frames_so_far(collector) == 0
            first = names.carrier_of(collector)["observation"].clone()
            data = next(iter(collector))
            assert torch.equal(data["observation"][0], first)
            assert torch.equal(names.carrier_of(collector)["observation"], data["next", "observation"][-1])
            assert names.draws_random_frames(collector) is False
            assert names.frames_so_far(collector) == 4


@contract("background_thread")
def a_collector_in_the_background() -> None:
    buffer = ReplayBuffer(storage=LazyTensorStorage(8))
    made = Collector(CueCorners(), make_actor(), frames_per_batch=4, total_frames=8, replay_buffer=buffer)
    assert names.background_thread(made) is None
    made.start()
    thread = names.background_thread(made)
    thread.join(60)
    made.async_shutdown(timeout=5)
    assert not thread.is_alive()
    assert len(buffer) == 8


@contract("starts_processes", "collects_freely", "sent_policy", "weight_schemes", "weight_queues")
def a_collector_with_workers() -> None:
    assert names.starts_processes(MultiSyncCollector)
    assert not names.starts_processes(Collector)
    assert names.sent_policy(SimpleNamespace()) is None
    assert names.weight_schemes(SimpleNamespace()) == []
    scheme = MultiProcessWeightSyncScheme()
    actor, schemes = make_actor(), {"policy": scheme}
    with shut(
        MultiSyncCollector(
            [CueCorners], actor, policy_factory=make_actor, frames_per_batch=4, total_frames=4,
            weight_sync_schemes=schemes,
        )
    ) as collector:  # fmt: skip
        assert names.sent_policy(collector) is actor
        assert names.collects_freely(collector) is False
        assert names.weight_schemes(collector) == [scheme]
        assert callable(scheme.shutdown)
        queues = list(names.weight_queues([scheme]))
        assert len(queues) == 3
        assert all(callable(queue.cancel_join_thread) for queue in queues)


@contract("env_workers", "has_env_workers")
def environments_with_workers() -> None:
    env = ParallelEnv(2, CueCorners)
    env.reset()
    found = list(names.env_workers(env))
    assert names.has_env_workers(env)
    env.close()
    assert not names.has_env_workers(CueCorners())
    assert list(names.env_workers(CueCorners())) == []
    assert len(found) == 2
    assert all(process.exitcode is not None and process.pid for process in found)


@contract("async_pool", "has_async_pool", "env_backend", "background_error", "server_process")
def an_asynchronous_collector() -> None:
    plain = SimpleNamespace()
    assert names.async_pool(plain) is names.server_process(plain) is names.background_error(plain) is None
    assert (names.env_backend(plain), names.has_async_pool(plain)) == ("threading", False)
    made = AsyncBatchedCollector(
        [CueCorners] * 2, policy=make_actor(), frames_per_batch=4, env_backend="multiprocessing", transport="driver"
    )
    with shut(made) as collector:
        assert names.has_async_pool(collector)
        assert (names.env_backend(collector), collector.server_backend) == ("multiprocessing", "thread")
        assert names.async_pool(collector) is None
        next(iter(collector))
        assert all(process.pid for process in names.async_pool(collector).threads)
        assert len(names.async_pool(collector).threads) == 2
        assert names.server_process(collector) is None
        collector._replay_error = error = ValueError()
        assert names.background_error(collector) is error
        collector._replay_error = None
    served = AsyncBatchedCollector(
        [CueCorners], policy_factory=make_actor, frames_per_batch=4, env_backend="multiprocessing", transport="auto"
    )
    with shut(served) as collector:
        assert collector.server_backend == "process"
        next(iter(collector))
        assert names.server_process(collector).pid
        assert all(process.pid for process in names.env_workers(collector))
        assert len(names.env_workers(collector)) == 1


@contract("actor_id")
def an_actor() -> None:
    ray = pytest.importorskip("ray", exc_type=ImportError)

    @ray.remote
    class Actor:
        pass

    actor = Actor.remote()
    try:
        assert names.actor_id(actor) == actor._ray_actor_id.hex()
    finally:
        ray.shutdown()


@contract("backend_of", "collector_of", "evaluates_by_workers", "evaluated_policy")
def an_evaluator() -> None:
    actor = make_actor()
    assert names.backend_of(SimpleNamespace()) is names.evaluated_policy(SimpleNamespace()) is None
    assert names.evaluates_by_workers(SimpleNamespace()) is False
    with shut(Evaluator(CueCorners(batch_size=[2]), actor, num_trajectories=2, max_steps=4)) as evaluator:
        backend = names.backend_of(evaluator)
        assert names.evaluated_policy(backend) is actor
        assert names.evaluates_by_workers(backend) is False
        assert names.collector_of(backend) is None
        evaluator.evaluate()
        assert names.collector_of(backend).policy is not None
    schemes = {"policy": MultiProcessWeightSyncScheme()}
    several = Evaluator(CueCorners, policy_factory=make_actor, weight_sync_schemes=schemes, backend="thread")
    with shut(several) as evaluator:
        assert names.evaluates_by_workers(names.backend_of(evaluator)) is True


# ---------------------------------------------------------------------- replay buffers, trainers


@contract("collate_fn", "read_lock", "time_first", "cursor_of", "length_in_time", "set_written")
def a_buffer() -> None:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(12, ndim=2), dim_extend=1, batch_size=2)
    data = TensorDict({"x": torch.arange(6).reshape(2, 3)}, batch_size=[2, 3])
    buffer.extend(data)
    assert names.length_in_time(buffer.storage, otherwise=len(buffer)) == 3
    assert len(buffer) == 6
    assert torch.equal(names.time_first(buffer, data)["x"], data["x"].T)
    ring = ReplayBuffer(storage=LazyTensorStorage(4), collate_fn=lambda found: {"found": found})
    ring.extend(TensorDict({"x": torch.arange(5)}, batch_size=[5]))
    assert names.cursor_of(ring.writer) == 1
    assert torch.equal(ring.storage[:]["x"], torch.tensor([4, 1, 2, 3]))
    assert "found" in names.collate_fn(ring)(ring.storage[:2])
    with names.read_lock(ring), names.read_lock(SimpleNamespace()):
        ring.sample(1)  # the thread that holds it may read
    shared = ReplayBuffer(storage=LazyTensorStorage(4), shared=True)
    with names.read_lock(shared):
        assert not shared._write_lock.acquire(block=False)  # other processes write under it
    assert shared._write_lock.acquire(block=False)
    assert (names.collate_fn(SimpleNamespace()), names.cursor_of(SimpleNamespace())) == (None, 0)
    assert names.length_in_time(SimpleNamespace(), otherwise=7) == 7
    names.set_written(ring.writer, 7, 3)
    assert (names.cursor_of(ring.writer), ring.write_count) == (3, 7)


@contract("storages_of", "fixed_keys")
def storages() -> None:
    buffers = [ReplayBuffer(storage=kind(4)) for kind in (LazyTensorStorage, LazyMemmapStorage)]
    for buffer in buffers:
        buffer.extend(TensorDict({"x": torch.ones(2)}, batch_size=[2]))
        buffer.empty()
    assert [names.fixed_keys(one.storage) for one in buffers] == [None, ["x"]]
    ensemble = ReplayBufferEnsemble(*buffers, batch_size=2, num_buffer_sampled=1)
    assert [*names.storages_of(ensemble.storage)] == [one.storage for one in buffers]
    assert names.storages_of(buffers[0].storage) == (buffers[0].storage,)


@contract("batch_operations", "modules_of")
def a_trainer() -> None:
    collector = Collector(CueCorners(), make_actor(), frames_per_batch=4, total_frames=4)
    with shut(collector):
        trainer = Trainer(
            collector=collector, total_frames=4, frame_skip=1, optim_steps_per_batch=1, loss_module=nn.Linear(1, 1),
            progress_bar=False,
        )  # fmt: skip
        hook = ReplayBufferTrainer(TensorDictReplayBuffer(storage=LazyTensorStorage(4), batch_size=2))
        hook.register(trainer)
        found = [getattr(one, "__wrapped__", one) for one in names.batch_operations(trainer)]
        assert [one.__self__ for one in found] == [hook]
        assert hook in names.modules_of(trainer).values()
    assert not names.batch_operations(SimpleNamespace())
    assert not names.modules_of(SimpleNamespace())


# ---------------------------------------------------------------------- environments


def counted() -> TransformedEnv:
    return TransformedEnv(CueCorners(), TrajCounter())


@contract("lower_done_flags")
def an_environment_with_workers() -> None:
    env = ParallelEnv(1, counted, mp_start_method="fork")
    try:
        env.reset()
        env.load_state_dict(env.state_dict())
        assert list(env._shm_done_flags) == [1], "TorchRL lowers them itself: leave lower_done_flags out"
        names.lower_done_flags(env)
        assert list(env._shm_done_flags) == [0]
        names.lower_done_flags(counted())
    finally:
        env.close()


@contract("wrapped_env")
def an_environment_of_gymnasium() -> None:
    inside = gymnasium.make("CartPole-v1")
    assert names.wrapped_env(GymWrapper(inside)) is inside
    assert names.wrapped_env(counted()) is None


@contract("forget_last_step")
def a_vector_of_gymnasium() -> None:
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    env = GymWrapper(gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2, autoreset_mode=mode))
    env.set_seed(0)
    env.rollout(100)
    assert float(env.reset()["observation"].abs().max()) > 0.05, "TorchRL resets all rows: leave forget_last_step out"
    names.forget_last_step(env.transform)
    assert float(env.reset()["observation"].abs().max()) <= 0.05
    names.forget_last_step(counted())


# ---------------------------------------------------------------------- modules and distributions


@contract("actor_keys")
def a_wrapper_of_several_steps() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Unflatten(-1, (3, 2)))
    wrapper = MultiStepActorWrapper(TensorDictModule(net, ["seen"], ["action"]), n_steps=3)
    data = TensorDict({"seen": torch.zeros(1, 5), "is_init": torch.ones(1, 1, dtype=torch.bool)}, [1])
    written = wrapper(data)
    [(key, kept)] = names.actor_keys(wrapper).items()
    assert key in ("action", ("action",))
    assert torch.equal(written[kept][:, -3:], net(data["seen"]))


@contract("lends_weights", "is_lent_weights")
def a_multi_agent_net() -> None:
    net = MultiAgentMLP(2, 2, n_agents=3, centralized=False, share_params=False)
    assert names.lends_weights(net)
    assert not names.lends_weights(nn.Linear(1, 1))
    lent = [path for path, module in net.named_modules() if names.is_lent_weights(path)]
    assert any(isinstance(net.get_submodule(path), nn.Linear) for path in lent)
    assert not names.is_lent_weights("module.0")


@contract("walks_through_time")
def world_models_that_walk_through_time() -> None:
    for key, fast in (("state", True), ("latent", False)):
        sizes = {"num_categoricals": 2, "num_classes": 2, "rnn_hidden_dim": 4}
        prior = RSSMPriorV3(action_shape=(1,), action_dim=1, hidden_dim=4, **sizes)
        posterior = RSSMPosteriorV3(4, obs_embed_dim=3, **sizes)
        given, seen = [key, "belief", "action"], [("next", "belief"), ("next", "encoded_latents")]
        parts = [("next", "prior_logits"), ("next", "state"), ("next", "belief")]
        walk = RSSMRolloutV3(
            TensorDictModule(prior, given, parts),
            TensorDictModule(posterior, seen, [("next", "posterior_logits"), ("next", "state")]),
            action_key="action",
        )
        assert names.walks_through_time(walk) is fast
        calls: list[int] = []
        walk.rssm_prior.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        shape = {"state": 4, "latent": 4, "belief": 4, "action": 1, ("next", "encoded_latents"): 3}
        walk(TensorDict({}, [2, 3]).update({name: torch.zeros(2, 3, size) for name, size in shape.items()}))
        assert bool(calls) is not fast
    assert not names.walks_through_time(nn.Linear(1, 1))


@contract("closed_values")
def values_that_a_mask_closes() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        data = TensorDict({"action_value": torch.randn(2, 3, dtype=dtype), "action_mask": mask}, [2])
        found = QValueModule(action_space="one-hot", action_mask_key="action_mask")(data)
        assert torch.equal(names.closed_values(found["action_value"]), ~mask)
    assert not names.closed_values(torch.tensor([-1e30, 0.0, torch.nan])).any()
    assert not names.closed_values(torch.tensor([-(2**62), 0])).any()


@contract("is_sparse", "listed_choices", "open_by_mask")
def masked_choices() -> None:
    logits = torch.zeros(2, 4)
    assert names.is_sparse(MaskedCategorical(logits=logits, indices=torch.tensor([[0, 1], [2, 3]])))
    assert not names.is_sparse(MaskedCategorical(logits=logits, mask=torch.ones(2, 4, dtype=torch.bool)))
    listed = MaskedCategorical(logits=logits, indices=torch.tensor([[0, 1], [2, 3]]))
    assert names.listed_choices(listed).tolist() == [[0, 1], [2, 3]]
    assert names.open_by_mask(listed, 4).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    padded = MaskedCategorical(logits=logits, indices=torch.tensor([[0, 4], [2, 3]]), padding_value=4)
    assert names.open_by_mask(padded, 4).int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 1]]
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    assert torch.equal(names.open_by_mask(MaskedCategorical(logits=logits, mask=mask), 4), mask)
    assert names.open_by_mask(torch.distributions.Categorical(logits=logits), 4) is None
    assert names.listed_choices(torch.distributions.Categorical(logits=logits)) is None
    assert not names.is_sparse(torch.distributions.Categorical(logits=logits))


@contract("recurrent_step")
def one_step_of_a_recurrent_module() -> None:
    for kind, number in ((GRUModule, 1), (LSTMModule, 2)):
        module = kind(input_size=3, hidden_size=4, in_key="x", out_key="y", num_layers=2)
        states = [torch.randn(5, 1, 2, 4) for _ in range(number)]
        value = torch.randn(5, 1, 3)
        data = TensorDict({"x": value[:, 0], "is_init": torch.zeros(5, 1, dtype=torch.bool)}, [5])
        for known in (states, [None] * number):
            entries = {key: one[:, 0] for key, one in zip(module.in_keys[1:], known, strict=False) if one is not None}
            expected = module(data.clone().update(entries))
            for key, one in zip(module.out_keys, names.recurrent_step(module, value, known), strict=True):
                assert torch.equal(one[:, 0], expected[key])


@contract("is_entrywise")
def squashed_actions() -> None:
    location = torch.zeros(2, requires_grad=True)
    for safe in (False, True):
        distribution = TanhNormal(location, torch.ones(2), safe_tanh=safe)
        functions, nodes = [], [distribution.rsample().grad_fn, distribution.log_prob(torch.ones(2) / 2).grad_fn]
        while nodes:
            node = nodes.pop()
            functions += [kind] if (kind := getattr(type(node), "_forward_cls", None)) is not None else []
            nodes += [child for child, _ in node.next_functions if child is not None]
        assert all(map(names.is_entrywise, functions))
        assert functions or not safe
    assert not names.is_entrywise(torch.autograd.Function)

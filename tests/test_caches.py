"""Caches of the caller's: the captures of the last call, in memory, locked or memory-mapped, in copies and workers."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import ActivationCaching, Compose, HookedModule, Saliency
from tdhook_rl.errors import InputError, KeyCollisionError, MissingKeyError, PreparationError
from tdhook_rl.latent.caches import CacheStore
from tests.method_table import DIRECTIONS
from tests.policies import CASES, FEATURES, HIDDEN, categorical, mlp


def rows(*batch: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*batch, FEATURES)}, batch_size=batch)


class Branch(nn.Module):
    """Runs one of two modules, and raises on NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(FEATURES, 2), nn.Linear(FEATURES, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.left(x) if x.sum() > 0 else self.right(x)
        if x.isnan().any():
            raise ZeroDivisionError
        return found


def test_the_last_call_with_its_batch_size() -> None:
    cache = TensorDict({"kept?": torch.ones(1)}, batch_size=1)
    with ActivationCaching("(0|1)$", cache=cache, directions=DIRECTIONS).prepare(mlp()) as hooked:
        assert cache.is_empty()
        assert cache.batch_size == ()
        for batch in ((5,), (3, 2), (), (7,)):
            data = hooked(rows(*batch))
            assert cache.batch_size == torch.Size(batch)
            data["output"].sum().backward()
            assert cache.batch_size == torch.Size(batch)
            assert len(list(cache.keys(True, True))) == 8
            for key in cache.keys(True, True):
                assert cache[key].shape == (*batch, HIDDEN) or key in (("fwd_pre", "0"), ("bwd", "0"))
            assert torch.equal(cache["fwd", "1"], data["cache", "fwd", "1"])


def test_no_entry_is_of_an_earlier_call() -> None:
    cache = TensorDict()
    with ActivationCaching("left|right", cache=cache).prepare(Branch()) as hooked:
        positive = TensorDict({"input": torch.ones(3, FEATURES)}, batch_size=3)
        hooked(input=positive["input"])
        assert list(cache.keys()) == ["left"]
        hooked(input=-positive["input"])
        assert list(cache.keys()) == ["right"]


def test_a_call_that_raises_leaves_the_cache_as_it_was() -> None:
    cache = TensorDict()
    with ActivationCaching("right", cache=cache).prepare(Branch()) as hooked:
        hooked(TensorDict({"input": -torch.ones(3, FEATURES)}, batch_size=3))
        before = cache["right"].clone()
        for data in (TensorDict({"input": torch.full((2, FEATURES), torch.nan)}, batch_size=2), rows()):
            if data.batch_size == ():
                data["input"] = torch.ones(FEATURES)  # the other branch: the named module does not run
            with pytest.raises((ZeroDivisionError, LookupError)):
                hooked(data)
            assert torch.equal(cache["right"], before)
        with pytest.raises(ZeroDivisionError):
            hooked(input=torch.full((2, FEATURES), torch.nan))
        assert torch.equal(cache["right"], before)


def test_other_entries_of_the_caller_stay_and_bound_the_batch_size() -> None:
    cache = TensorDict({"mine": torch.ones(4, 9), "0": torch.ones(4, 9)}, batch_size=(4, 9))
    with ActivationCaching("0", cache=cache, clear_cache=False).prepare(mlp()) as hooked:
        hooked(rows(4, 2))
        assert cache.batch_size == (4,)
        hooked(rows(3))
        assert cache.batch_size == ()
        assert cache["mine"].shape == (4, 9)
        assert cache["0"].shape == (3, HIDDEN)


def test_calls_with_tensors_and_runs_fill_it_annotate_and_get_dist_do_not() -> None:
    case, cache = CASES["categorical"], TensorDict()
    actor = categorical()
    method = Compose(ActivationCaching(case.site, cache=cache), Saliency(when="step"))
    with method.prepare(actor) as hooked:
        hooked.get_dist(case.data(3))
        hooked.annotate(actor(case.data(3)))
        assert cache.is_empty()
        x = torch.randn(3, FEATURES)
        hooked(observation=x)
        torch.testing.assert_close(cache[case.site], actor.module[0].module[:2](x))
        assert cache.batch_size == ()
        with hooked.run(case.data(2)) as run:
            run.save("module.0.module.0")
        assert cache[case.site].shape == (2, HIDDEN)
        with hooked.disable_context_hooks() as bare:
            bare(case.data(4))
        assert cache[case.site].shape == (2, HIDDEN)


def test_gradients_of_calls_with_tensors_and_of_single_modules() -> None:
    net, cache = mlp(), TensorDict()
    with ActivationCaching("2", cache=cache, directions=["bwd_pre"]).prepare(net) as hooked:
        hooked(input=torch.randn(3, FEATURES)).sum().backward()
        first = cache["2"].clone()
        assert first.shape == (3, HIDDEN)
        hooked.hooked_root(torch.randn(2, FEATURES)).sum().backward()  # around the policy's own forward
        assert cache["2"].shape == (2, HIDDEN)


@pytest.mark.parametrize("kind", ["locked", "memory-mapped"])
def test_preallocated_entries_are_written_in_place(kind: str, tmp_path: Path) -> None:
    net = mlp()
    cache = TensorDict(
        {("fwd", "1"): torch.zeros(4, HIDDEN, dtype=torch.float64), ("bwd_pre", "1"): torch.zeros(4, HIDDEN)},
        batch_size=4,
    )
    cache = cache.lock_() if kind == "locked" else cache.memmap_(tmp_path)
    held = cache["fwd", "1"]
    method = ActivationCaching("1", cache=cache, clear_cache=False, directions=["fwd", "bwd_pre"])
    for _ in range(2):  # the context may be entered again
        with method.prepare(net) as hooked:
            data = hooked(rows(4))
            data["output"].sum().backward()
            assert cache["fwd", "1"] is held
            torch.testing.assert_close(held, net[:2](data["input"]).double(), check_dtype=True)
            assert bool(cache["bwd_pre", "1"].any())
    if kind == "memory-mapped":
        assert torch.equal(TensorDict.load_memmap(tmp_path)["fwd", "1"], held)


def test_what_does_not_fit_a_locked_cache_is_refused() -> None:
    cache = TensorDict({"0": torch.zeros(4, HIDDEN), "1": torch.zeros(4, HIDDEN)}, batch_size=4)
    with ActivationCaching(["0", "1"], cache=cache).prepare(mlp()) as unlocked:
        unlocked(rows(4))
        cache.lock_()
        with pytest.raises(InputError, match=r"shape \(4, 16\) for '0', but the capture has shape \(5, 16\)"):
            unlocked(rows(5))
    with pytest.raises(InputError, match="pass clear_cache=False"):
        ActivationCaching("0", cache=cache)
    with pytest.raises(MissingKeyError, match=r"no entry '2'; nearest: '0', '1'"):
        ActivationCaching("2", cache=cache, clear_cache=False).prepare(mlp()).__enter__()
    with ActivationCaching("(0|2)$", cache=cache, clear_cache=False).prepare(mlp()) as hooked:
        before = cache["0"].clone()
        with pytest.raises(MissingKeyError, match="no entry '2'"):
            hooked(rows(4))
        assert torch.equal(cache["0"], before)  # all or nothing
    with pytest.raises(InputError, match="got a dict"):
        ActivationCaching("0", cache={})
    unlocked_later = TensorDict()
    context = ActivationCaching("0", cache=unlocked_later).prepare(mlp())
    unlocked_later.lock_()
    with pytest.raises(InputError, match="cannot be emptied"):
        context.__enter__()


def test_entering_again_empties_or_keeps() -> None:
    for clear in (True, False):
        cache = TensorDict()
        context = ActivationCaching("1", cache=cache, clear_cache=clear).prepare(mlp())
        with context as hooked:
            hooked(rows(3))
        assert cache["1"].shape == (3, HIDDEN)  # it outlives the context
        with context:
            assert cache.is_empty() == clear


def test_methods_share_a_cache_where_they_fill_different_entries() -> None:
    cache = TensorDict()
    first, second = (ActivationCaching(path, cache=cache) for path in ("0", "1"))
    with Compose(first, second).prepare(mlp()) as hooked:
        for batch in ((3,), (4, 2)):
            hooked(rows(*batch))
            assert set(cache.keys()) == {"0", "1"}
            assert cache.batch_size == torch.Size(batch)
        assert hooked.hooking_context.cache is cache
    other = ActivationCaching("0", cache=cache, cache_key="other")
    with pytest.raises(KeyCollisionError, match=r"two methods would fill the entry \('0',\) of one cache"):
        Compose(first, other).prepare(mlp()).__enter__()


def test_the_cache_is_found_at_the_hooked_policy() -> None:
    cache = TensorDict()
    with ActivationCaching("1", cache=cache).prepare(mlp()) as hooked:
        hooked(rows(3))
        assert hooked.hooking_context.cache is cache
        with hooked.hooking_context.disable() as own:
            assert isinstance(own, nn.Sequential)
        with hooked.hooking_context.disable_hooks() as bare:
            assert "cache" not in bare(rows(3)).keys()
    assert hooked.hooking_context.cache["1"].shape == (3, HIDDEN)
    with pytest.raises(PreparationError, match="no method of this policy captures activations"):
        _ = HookedModule.from_module(mlp()).hooking_context.cache
    two = Compose(*(ActivationCaching(path, cache=TensorDict()) for path in ("0", "1")))
    with two.prepare(mlp()) as hooked, pytest.raises(PreparationError, match="fill 2 caches"):
        _ = hooked.hooking_context.cache


@pytest.mark.parametrize("options", [{}, {"callback": lambda output: output * 1}, {"directions": ["fwd", "fwd_pre"]}])
@pytest.mark.parametrize("look_first", [False, True])
def test_without_a_cache_the_last_call_is_at_the_hooked_policy(options: dict, look_first: bool) -> None:
    net = mlp()
    key = ("fwd", "1") if "directions" in options else "1"
    context = ActivationCaching("(0|1)$", **options).prepare(net)
    with context as hooked:
        if look_first:
            cache = hooked.hooking_context.cache
        first, second = rows(3), rows(5)
        hooked(first.clone())
        hooked(second.clone())
        copied = copy.deepcopy(hooked)
        cache = cache if look_first else hooked.hooking_context.cache
        assert torch.equal(cache[key], net[:2](second["input"]))
        hooked.annotate(first)  # does not fill it
        with pytest.raises(MissingKeyError):
            hooked(first.select())
        assert torch.equal(cache[key], net[:2](second["input"]))
        copied(first.clone())
        assert torch.equal(cache[key], net[:2](first["input"]))
        assert cache.batch_size == (3,)
    assert context.cache is cache


def test_copies_share_the_cache_and_pickled_ones_have_their_own() -> None:
    cache = TensorDict()
    method = ActivationCaching("1", cache=cache, directions=["fwd", "bwd"])
    with method.prepare(mlp()) as hooked:
        hooked(rows(2))
        copy.deepcopy(hooked)(rows(3))["output"].sum().backward()
        assert cache["fwd", "1"].shape == cache["bwd", "1"].shape == (3, HIDDEN)
        twin = pickle.loads(pickle.dumps(hooked))
        data = twin(rows(4))
        data["output"].sum().backward()
    assert cache.batch_size == (3,)
    own = twin.hooking_context.cache
    assert torch.equal(own["fwd", "1"], data["cache", "fwd", "1"])
    assert own["bwd", "1"].shape == (4, HIDDEN)


def test_a_pickled_copy_of_a_shared_or_mapped_cache_leaves_the_memory_alone(tmp_path: Path) -> None:
    cache = TensorDict({"0": torch.zeros(4, HIDDEN), "1": torch.zeros(4, HIDDEN)}, batch_size=4).memmap_(tmp_path)
    methods = [ActivationCaching(path, cache=cache, clear_cache=False) for path in ("0", "1")]
    with Compose(*methods).prepare(mlp()) as hooked:
        twin = pickle.loads(pickle.dumps(hooked))
        twin(rows(5))  # a worker's batches may have another size
    assert not bool(cache["1"].any())
    assert set(twin.hooking_context.cache.keys()) == {"0", "1"}


def _batch_size_in_fork(store: CacheStore, queue) -> None:
    store.put(("1",), torch.ones(2))
    queue.put((len(list(store.data.keys())), store.data.is_locked))


def test_a_forked_process_leaves_shared_memory_alone() -> None:
    cache = TensorDict({"1": torch.zeros(2)}, batch_size=2).share_memory_()
    store, context = CacheStore(cache), multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_batch_size_in_fork, args=(store, queue))
    process.start()
    process.join(20)
    assert queue.get() == (1, False)
    assert not bool(cache["1"].any())


def test_inside_vmap_the_cache_holds_plain_tensors() -> None:
    net, cache = mlp(), TensorDict()
    with ActivationCaching("1", cache=cache).prepare(net) as hooked:
        x = torch.randn(4, 3, FEATURES)

        def outputs(one: torch.Tensor) -> torch.Tensor:
            return hooked(TensorDict({"input": one}, batch_size=3))["output"]

        torch.func.vmap(outputs)(x)
        torch.testing.assert_close(cache["1"], net[:2](x).transpose(0, 1))
        torch.func.vmap(lambda one: hooked(input=one))(x)
        torch.testing.assert_close(cache["1"], net[:2](x).transpose(0, 1))

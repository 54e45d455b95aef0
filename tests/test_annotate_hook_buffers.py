"""A buffer that is fed by turns with and without results: the same keys, and masks that say which rows are real."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import (
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBufferEnsemble,
    TensorDictReplayBuffer,
)

from tdhook_rl import ActivationCaching, Compose, Saliency, Scheduled, targets
from tdhook_rl.errors import InputError
from tdhook_rl.rollout import AnnotateHook
from tests.method_table import SAMPLES
from tests.policies import POLICIES

KEYS = {"in_keys": ["observation"], "out_keys": ["logits"]}
STORAGES: dict[str, Callable[[int, Path], Any]] = {
    "tensors": lambda size, folder: LazyTensorStorage(size),
    "memmap": lambda size, folder: LazyMemmapStorage(size, scratch_dir=folder),
    "list": lambda size, folder: ListStorage(size),
    "stack": lambda size, folder: LazyStackStorage(size),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))


def plain(*shape: int) -> TensorDict:
    return TensorDict({"observation": torch.randn(*shape, 2)}, batch_size=shape)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("start", [0, 1])
def test_off_schedule(storage: str, start: int, tmp_path: Path) -> None:
    """With the first batch on or off schedule; the fourth goes where the first was."""
    net = network()
    buffer = TensorDictReplayBuffer(storage=STORAGES[storage](12, tmp_path), batch_size=4)
    method = Compose(Saliency(target=targets.logit(0), when="batch"), ActivationCaching("1", cache_key="seen"))
    with method.prepare(net, **KEYS) as hooked:
        hook = AnnotateHook(hooked, every=2)
        hook.load_state_dict({"batches": start, "written": 0})
        due = [(start + index) % 2 == 0 for index in range(4)]
        for _ in range(4):
            buffer.extend(hook.annotate_batch(plain(4)))
    rows = buffer[:]
    x = rows["observation"].clone().requires_grad_()
    right = torch.autograd.grad(net(x)[:, 0].sum(), x)[0]
    real = torch.tensor([due[3], due[1], due[2]]).repeat_interleave(4)
    for root in ("attr", "seen"):
        assert torch.equal(rows["computed", root], real)
    torch.testing.assert_close(rows["attr", "observation"][real], right[real])
    assert bool(rows["attr", "observation"][~real].isnan().all())
    with method.prepare(net, **KEYS) as other:
        torch.testing.assert_close(other.annotate(rows)["attr", "observation"], right)


def test_integers_batches_of_two_dimensions_and_a_schedule_of_its_own() -> None:
    schedule = Scheduled(Saliency(target=targets.logit(0), when="batch"), every=2)
    with schedule.prepare(network(), **KEYS) as hooked:
        hook = AnnotateHook(hooked, every=2)
        hook.load_state_dict({"batches": 1, "written": 0})
        found = [hook.annotate_batch(plain(2, 3)) for _ in range(4)]  # off, on, off, on
    # The row that shows the shapes is none that the schedule counts.
    assert [bool(one["computed", "attr"].all()) for one in found] == [False, True, False, False]
    assert len({tuple(sorted(map(str, one.keys(True, True)))) for one in found}) == 1


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if sample.observes])
def test_results_of_every_method_have_the_same_forms_off_schedule(name: str) -> None:
    sample = SAMPLES[name]
    case = POLICIES[sample.usual]
    policy = case.build()
    with sample.make(case).prepare(policy) as hooked, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of methods that speak up by themselves
        hook = AnnotateHook(hooked, every=2)
        acted = [hooked(sample.data(case, 4)) for _ in range(4)]
        whole = hooked.annotate(acted[0].exclude(*hooked.result_keys))
        if not any(key in hooked.result_keys for key in whole.keys(True)):
            pytest.skip("it writes nothing into batches")
        for start in (0, 1):
            hook.load_state_dict({"batches": start, "written": 0})
            buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(16), batch_size=4)
            for batch in acted:
                found = hook.annotate_batch(batch.exclude(*hooked.result_keys))
                forms = {
                    key: (found[key].shape, found[key].dtype) for key in hooked.result_keys if key in whole.keys(True)
                }
                assert forms == {key: (whole[key].shape, whole[key].dtype) for key in forms}
                assert forms
                buffer.extend(found)
            masks = [key for key in forms if key[0] == "computed" and found[key].dtype == torch.bool]
            for key in masks:
                assert not bool(buffer[:][key].reshape(4, 4)[1 - start :: 2].any())


class Trains:
    """What the hook reads of a trainer."""

    def __init__(self, buffer: Any) -> None:
        self.replay_buffer = buffer


@pytest.mark.parametrize("storage", STORAGES)
def test_a_buffer_of_plain_rows(storage: str, tmp_path: Path) -> None:
    old = TensorDictReplayBuffer(storage=STORAGES[storage](20, tmp_path / "old"), batch_size=4)
    old.extend(plain(8))
    with Saliency(target=targets.logit(0), when="batch").prepare(network(), **KEYS) as hooked:
        hook = AnnotateHook(hooked)
        hook._trainer = Trains(old)
        with pytest.raises(InputError, match=r"holds 8 rows without \('attr', 'observation'\)"):
            hook.annotate_batch(plain(4))
        new = TensorDictReplayBuffer(storage=STORAGES[storage](20, tmp_path / "new"), batch_size=4)
        new.extend(hook.without_results(old[:]))
        hook._trainer = Trains(new)
        new.extend(hook.annotate_batch(plain(4)))
    assert new[:]["computed", "attr"].tolist() == [False] * 8 + [True] * 4


class Trainer(Trains):
    """One with a method of the user's, or of a buffer, registered for each batch."""

    def __init__(self, operation: Callable) -> None:
        self._batch_process_ops = [(operation, {})]


class Feeds:
    """A hook of the user's with a buffer of its own."""

    def __init__(self, buffer: Any) -> None:
        self.replay_buffer = buffer

    def feed(self, batch: TensorDict) -> None:
        self.replay_buffer.extend(batch)


def into(buffer: Any, batch: TensorDict) -> None:
    buffer.extend(batch)


BUFFER: Any = None

#: How a trainer may reach a buffer by what is registered.
REACHED: dict[str, Callable[[Any], Any]] = {
    "extend": lambda buffer: buffer.extend,
    "hook": lambda buffer: Feeds(buffer).feed,
    "lambda": lambda buffer: lambda batch: buffer.extend(batch),
    "lambda of a method": lambda buffer: (lambda extend: lambda batch: extend(batch))(buffer.extend),
    "partial": lambda buffer: functools.partial(buffer.extend),
    "partial of an argument": lambda buffer: functools.partial(into, buffer),
    "partial of a lambda": lambda buffer: functools.partial(lambda batch, twice: buffer.extend(batch), twice=False),
    "wrapped": lambda buffer: functools.wraps(into)(functools.partial(into, buffer)),
    "global": lambda buffer: lambda batch: BUFFER.extend(batch),
    "hook in a lambda": lambda buffer: (lambda hook: lambda batch: hook.replay_buffer.extend(batch))(Feeds(buffer)),
}


@pytest.mark.parametrize("where", ["emptied", "ensemble", *REACHED])
def test_plain_rows_elsewhere(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory-mapped storage that was emptied, one buffer of an ensemble, a buffer that what is registered fills."""
    old = TensorDictReplayBuffer(storage=LazyMemmapStorage(8, scratch_dir=tmp_path), batch_size=4)
    old.extend(plain(8))
    trainer: Any = Trains(old)
    if where == "emptied":
        old.empty()
    elif where in REACHED:
        monkeypatch.setattr(sys.modules[__name__], "BUFFER", old)
        trainer = Trainer(REACHED[where](old))
    else:
        new = TensorDictReplayBuffer(storage=LazyTensorStorage(8), batch_size=4)
        trainer = Trains(ReplayBufferEnsemble(new, old, batch_size=4, num_buffer_sampled=1))
    with Saliency(target=targets.logit(0), when="batch").prepare(network(), **KEYS) as hooked:
        hook = AnnotateHook(hooked)
        hook._trainer = trainer
        with pytest.raises(InputError, match=r"rows.* without \('attr', 'observation'\)"):
            hook.annotate_batch(plain(4))


@pytest.mark.parametrize("reads", [lambda old: lambda batch: print(len(old)), lambda old: functools.partial(len)])
def test_a_buffer_that_is_only_read_is_no_matter(reads: Callable[[Any], Any]) -> None:
    old = TensorDictReplayBuffer(storage=LazyTensorStorage(8), batch_size=4)
    old.extend(plain(8))
    with Saliency(target=targets.logit(0), when="batch").prepare(network(), **KEYS) as hooked:
        hook = AnnotateHook(hooked)
        hook._trainer = Trainer(reads(old))
        assert bool(hook.annotate_batch(plain(4))["computed", "attr"].all())

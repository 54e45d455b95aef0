"""Checks of where a hooked policy goes: copies, workers' pickles, collectors, beside other methods."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase

from tdhook_rl.latent.activation_caching import ActivationCaching
from tdhook_rl.method import Compose
from tdhook_rl.testing.calling import _acted, _require_close
from tdhook_rl.testing.subject import Subject, annotated_keys, as_tuples, require, same_bits

FRAMES, BATCHES = 8, 3


def is_the_policy(subject: Subject) -> None:
    """The hooked policy is an instance of the policy's class, with its keys, its weights and its state."""
    policy = subject.new_policy()
    with subject.method().prepare(policy) as hooked:
        require(isinstance(hooked, type(policy)), f"the hooked policy is no {type(policy).__name__}")
        require(list(hooked.state_dict()) == list(policy.state_dict()), "the hooked policy's state_dict has other keys")
        ours, theirs = (list(TensorDict.from_module(one).keys(True, True)) for one in (hooked, policy))
        require(ours == theirs, "TensorDict.from_module of the hooked policy has other keys")
        modes = {name: module.training for name, module in hooked.named_modules()}
        other = [name for name, module in policy.named_modules() if modes.get(name) is not module.training]
        require(
            not other, f"the mode of {(other or [''])[0]!r}, training or eval, is another than in the user's policy"
        )
        own = list(policy.out_keys)
        require(list(hooked.out_keys)[: len(own)] == own, "the policy's own out_keys do not come first")
        if subject.observes:
            same = all(a is b for a, b in zip(hooked.parameters(), policy.parameters(), strict=True))
            require(same, "the hooked policy holds other parameters than the user's")


def pickles(subject: Subject) -> None:
    """A pickled copy, as workers are sent, writes the same bits."""
    _copies(subject, lambda hooked: pickle.loads(pickle.dumps(hooked)), "an unpickled copy")


def deep_copies(subject: Subject) -> None:
    """So does a deep copy."""
    _copies(subject, copy.deepcopy, "a deep copy")


def composes_in_either_order(subject: Subject) -> None:
    """Beside a method that observes it writes what it writes alone, and so does the other."""
    policy = subject.new_policy()
    layers = [path for path, module in policy.named_modules() if type(module) is nn.Linear]
    if not layers:
        return  # there is nothing that another method could surely be placed on
    other = ActivationCaching(layers[-1], cache_key="another root")
    found = []
    for method in (subject.method(), Compose(subject.method(), other), Compose(other, subject.method())):
        with method.prepare(policy) as hooked:
            torch.manual_seed(6)
            data = hooked(subject.rows(4))
            torch.manual_seed(6)
            found.append(hooked.annotate(_acted(hooked, subject.rows(4))).update(data.select(*hooked.policy_out_keys)))
    same_bits(found[1], found[0], "before another method")
    same_bits(found[2], found[0], "after another method")


def collects(subject: Subject) -> None:
    """In a collector over several batches with weights that change, each batch has the results of its weights."""
    if "action" not in subject.new_policy().out_keys or not subject.takes():
        return  # it does not act in an environment by itself
    policy = subject.new_policy()
    env = _Rows(subject)
    with subject.method().prepare(policy) as hooked:
        collector = Collector(
            env, hooked, frames_per_batch=FRAMES, total_frames=BATCHES * FRAMES, postproc=hooked.annotate,
            auto_register_policy_transforms=False,
        )  # fmt: skip
        seen = 0
        for batch in collector:
            batch = batch.clone()
            written = as_tuples(batch.keys(True, True))
            missing = as_tuples(hooked.result_keys) - written
            require(not missing, f"batch {seen + 1} of a collector lacks {min(missing, default='')!r}")
            if subject.by_row:
                with subject.method().prepare(policy) as fresh:
                    _require_fresh(fresh, batch, seen)
            _learn(policy)
            seen += 1
        collector.shutdown()
        require(seen == BATCHES, f"the collector gave {seen} batches of {BATCHES}")


def _require_fresh(hooked: Any, batch: TensorDictBase, seen: int) -> None:
    again = hooked.annotate(batch.exclude(*hooked.result_keys), on_mismatch="ignore")
    for key in annotated_keys(hooked) & as_tuples(again.keys(True, True)):
        if "computed" not in key:
            _require_close(again[key], batch[key], f"in batch {seen + 1} of a collector {key!r} is not of its weights")


def _learn(policy: nn.Module) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def _copies(subject: Subject, make: Callable[[Any], Any], what: str) -> None:
    with subject.hooked() as hooked:
        torch.manual_seed(3)
        expected = hooked(subject.rows(4))
        try:
            twin = make(hooked)
        except Exception as error:
            require(False, f"{what} cannot be made: {type(error).__name__}: {error}")
        with _seeded(3):
            same_bits(twin(subject.rows(4)), expected, what)
        with _seeded(3):
            same_bits(hooked(subject.rows(4)), expected, f"the hooked policy itself, after {what} was called")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    torch.manual_seed(seed)
    yield


class _Rows(EnvBase):
    """Rows of the subject's data, one after the other, whatever is done."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(batch_size=[])
        self._subject = subject
        self._generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            row = subject.rows()
            action = subject.new_policy()(row.clone())["action"]
        spec = {}
        for key, value in row.items(True, True):
            spec[key] = Unbounded(value.shape, dtype=value.dtype)
        self.observation_spec = Composite()
        for key, one in spec.items():
            self.observation_spec.set(key, one)
        self.action_spec = (
            Unbounded(action.shape, dtype=action.dtype)
            if action.is_floating_point()
            else CategoricalSpec(2**20, shape=action.shape, dtype=action.dtype)
        )
        self.reward_spec = Unbounded((1,))

    def _row(self) -> TensorDict:
        with torch.random.fork_rng(devices=[]):
            return self._subject.rows(seed=int(torch.randint(2**30, (), generator=self._generator)))

    def _reset(self, tensordict: TensorDictBase | None = None, **options: Any) -> TensorDict:
        return self._row()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return self._row().update({"reward": torch.zeros(1), "done": torch.zeros(1, dtype=torch.bool)})

    def _set_seed(self, seed: int | None) -> None:
        self._generator.manual_seed(seed or 0)


TRAVELLING: list[Callable[[Subject], None]] = [
    is_the_policy, pickles, deep_copies, composes_in_either_order, collects,
]  # fmt: skip

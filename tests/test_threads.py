"""One hooked policy in several threads, and in a process that forks: no error, no wait, and results as alone."""

from __future__ import annotations

import gc
import os
import select
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.sites import forking

#: Most of these never annotate.
pytestmark = pytest.mark.filterwarnings("ignore:the policy was called:UserWarning")

METHOD = Compose(
    ActivationCaching(r"module\.0\.module\.1"),
    SteeringVectors({"module.0.module.0": torch.ones(16)}, alpha="strength"),
    Saliency(target=targets.taken_action_log_prob()),
)
#: Of a process in which other tests have started threads, a child may hang in torch itself: these run alone.
FORKS = pytest.mark.slow


def actor() -> ProbabilisticActor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def batch(rows: int = 8) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    data = {
        "observation": torch.randn(rows, 6, generator=generator),
        "action": torch.rand(rows, 2, generator=generator) - 0.5,
        "strength": torch.linspace(0, 1, rows),
    }
    return TensorDict(data, [rows])


@pytest.fixture(autouse=True)
def turns() -> Iterator[None]:
    """Threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def captured(policy: Any, data: TensorDict) -> torch.Tensor:
    with policy.run(data) as run:
        run.save("module.0.module.1")
    return run.get("module.0.module.1").resolve()


def hooked_for_a_while(policy: Any) -> torch.Tensor:
    handles = [policy.register_submodule_hook("module.0.module.1", lambda *_: None) for _ in range(20)]
    handles.append(policy.save({}, "module.0.module.1")[0])
    for handle in handles:
        handle.remove()
    return torch.zeros(1)


#: What a thread does, and what it looks at: none depends on what is drawn.
ENTRIES: dict[str, Callable[[Any], torch.Tensor]] = {
    "call": lambda policy: policy(batch())["cache", "module.0.module.1"],
    "annotate": lambda policy: policy.annotate(batch())["attr", "observation"],
    "annotate in chunks": lambda policy: policy.annotate(batch(), chunk_size=3)["attr", "observation"],
    "get_dist": lambda policy: policy.get_dist(batch()).base_dist.base_dist.loc,
    "log_prob": lambda policy: policy.log_prob(policy(batch()).set("action", batch()["action"])),
    "run": lambda policy: captured(policy, batch()),
    "hooks": hooked_for_a_while,
    "keys": lambda policy: torch.tensor([len(policy.in_keys), len(policy.out_keys), len(policy.result_keys)]),
}
PAIRS = [("call", other) for other in ENTRIES] + [
    ("annotate", "annotate in chunks"), ("annotate in chunks", "get_dist"), ("annotate", "log_prob"), ("run", "run"),
    ("run", "hooks"), ("annotate", "hooks"),
    ("annotate", "keys"), ("get_dist", "keys"), ("annotate", "run"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=[" beside ".join(pair) for pair in PAIRS])
def test_two_threads(one: str, other: str) -> None:
    """Each gets what it gets alone, whatever the other does."""
    wrong: list[str] = []
    with METHOD.prepare(actor()) as policy:
        alone = {name: ENTRIES[name](policy).clone() for name in (one, other)}
        stop = threading.Event()

        def loop(name: str) -> None:
            while not stop.is_set() and not wrong:
                try:
                    if not torch.equal(ENTRIES[name](policy), alone[name]):
                        wrong.append(f"{name}: another result than alone")
                except Exception as error:
                    wrong.append(f"{name}: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=loop, args=(name,)) for name in (one, other)]
        for thread in threads:
            thread.start()
        stop.wait(0.3)
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not wrong


def test_a_call_does_not_wait_for_the_whole_of_an_annotation() -> None:
    """Between two chunks another thread has its turn, and it does not see how the pass is run."""
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    under_way = threading.Event()
    seen: list[str] = []
    with ActivationCaching("0").prepare(net, in_keys=["observation"], out_keys=["logits"]) as policy:

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            here = threading.current_thread() is threading.main_thread()
            seen.append(f"{'chunk' if here else 'call'}, {'train' if policy.module[1].training else 'eval'}")
            if not under_way.is_set():
                under_way.set()
                time.sleep(0.2)  # in which the other comes to the lock

        policy.module[2].register_forward_hook(note)

        def call() -> None:
            under_way.wait(10)
            policy(batch())

        other = threading.Thread(target=call)
        other.start()
        policy.annotate(batch(), chunk_size=2, on_mismatch="ignore")
        other.join(10)
    assert seen == ["chunk, eval", "call, train", "chunk, eval", "chunk, eval", "chunk, eval"]


def test_noise_of_another_thread_is_not_repeated() -> None:
    """What another thread draws between two chunks is drawn once."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    drawn: list[torch.Tensor] = []
    with ActivationCaching("1").prepare(net, in_keys=["observation"], out_keys=["logits"]) as policy:
        runtime = policy._hooked.runtime

        class Turn:
            """A lock of which each release is a moment for another thread."""

            def __init__(self) -> None:
                self.lock = threading.RLock()

            def __enter__(self) -> None:
                self.lock.acquire()

            def __exit__(self, *_: object) -> None:
                self.lock.release()
                drawn.append(torch.randn(4))

        runtime.lock = Turn()
        found = policy.annotate(batch(), chunk_size=2)["cache", "1"]
        drawn.append(torch.randn(4))
    assert len({tuple(one.tolist()) for one in drawn}) == len(drawn) >= 5
    chunks = [(part == 0).flatten().tolist() for part in found.split(2)]
    assert len({tuple(one) for one in chunks}) == 4  # and chunks have noise of their own


# ------------------------------------------------------------------ forks


def answers(function: Callable[[], object]) -> bool:
    """Whether a forked child comes to the end of a function within some seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            function()
            os.write(write, b"1")
        finally:
            os._exit(0)
    os.close(write)
    answered = bool(select.select([read], [], [], 20)[0]) and os.read(read, 1) == b"1"
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(read)
    return answered


@FORKS
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("name", ["call", "annotate in chunks", "get_dist", "run"])
def test_a_child_that_was_forked_meanwhile(name: str) -> None:
    with METHOD.prepare(actor()) as policy:
        alone = {entry: ENTRIES[entry](policy).clone() for entry in ("call", "annotate", "keys")}

        def check() -> None:
            for entry, expected in alone.items():
                assert torch.equal(ENTRIES[entry](policy), expected)

        stop = threading.Event()

        def loop() -> None:
            while not stop.is_set():
                ENTRIES[name](policy)

        thread = threading.Thread(target=loop)
        thread.start()
        found = []
        while len(found) < 12 and all(found):
            found.append(answers(check))
            time.sleep(0.003)
        stop.set()
        thread.join(20)
        check()
    assert found == [True] * 12


@FORKS
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_does_not_wait_for_a_call_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "PATIENCE", 0.05)
    go, inside = threading.Event(), threading.Event()
    with METHOD.prepare(actor()) as policy:
        expected = ENTRIES["call"](policy).clone()

        def hold(module: nn.Module, args: tuple) -> None:
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                go.wait(20)

        handle = policy.module[0].register_forward_pre_hook(hold)
        thread = threading.Thread(target=ENTRIES["call"], args=(policy,))
        thread.start()
        assert inside.wait(10)

        def check() -> None:
            assert torch.equal(ENTRIES["call"](policy), expected)
            assert "cache" in policy(batch()).keys()

        assert answers(check)
        go.set()
        thread.join(10)
        handle.remove()
        check()


@FORKS
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_in_the_middle_of_a_call() -> None:
    """The child goes on with the call, as the parent does."""
    with METHOD.prepare(actor()) as policy:
        expected = ENTRIES["call"](policy).clone()
        state: dict[str, int] = {}

        def fork(module: nn.Module, args: tuple) -> None:
            if not state:
                state["child"] = os.fork()

        policy.module[0].register_forward_pre_hook(fork)
        same = torch.equal(ENTRIES["call"](policy), expected) and torch.equal(ENTRIES["call"](policy), expected)
        if state["child"] == 0:
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(state["child"], 0)[1]) == 0
        assert same


def test_nothing_is_kept_for_forks() -> None:
    before = len(forking._living)
    with METHOD.prepare(actor()) as policy:
        policy(batch())
        runtime = weakref.ref(policy._hooked.runtime)
    del policy
    gc.collect()
    assert runtime() is None
    assert len(forking._living) <= before


def test_hooks_that_go_while_the_methods_are_off_do_not_come_back() -> None:
    with METHOD.prepare(actor()) as policy:
        site, heard = "module.0.module.1", []
        first, second = (policy.register_submodule_hook(site, lambda *_, n=n: heard.append(n)) for n in (1, 2))
        with policy.disable_context_hooks():
            first.remove()
            third = policy.register_submodule_hook(site, lambda *_: heard.append(3))
        assert ("cache", site) in policy(batch()).keys(True)
        assert heard == [2, 3]
        second.remove()
        third.remove()

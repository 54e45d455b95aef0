"""The three ways of use run, and do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from tdhook_rl import LinearProbe, Saliency, targets
from tdhook_rl.examples import replay_buffer, steer_at_eval, train_ppo
from tdhook_rl.examples.agent import make_trained_actor


@pytest.fixture(scope="module")
def actor():
    return make_trained_actor(frames=20_480)


def test_the_examples_are_short() -> None:
    for module in (train_ppo, replay_buffer, steer_at_eval):
        assert len(Path(module.__file__).read_text().splitlines()) < 100


def test_train_ppo() -> None:
    measured = train_ppo.train(frames=24_576)
    assert measured["success"] > 0.9
    assert measured["xor_probe"] > 0.9
    assert measured["relevant_over_irrelevant"] > 4


def test_replay_buffer(actor, tmp_path: Path) -> None:
    results = replay_buffer.analyse(tmp_path, frames=4096, actor=actor)
    assert results.batch_size == (4096,)
    again = TensorDict.load_memmap(tmp_path / "results")
    buffer = TensorDict.load_memmap(tmp_path / "buffer")
    assert torch.equal(again["attr", "observation"], results["attr", "observation"])
    assert bool(again["computed", "attr"].all())
    assert bool((again["attr", "observation"].abs().sum(-1) > 0).any())
    assert LinearProbe.load(tmp_path / "xor_probe").path == "module.0.module.3"
    with Saliency(target=targets.chosen_logit()).prepare(actor) as policy:
        expected = policy.annotate(buffer[1020:1030])["attr", "observation"]  # across the end of a batch
    torch.testing.assert_close(again["attr", "observation"][1020:1030], expected)


def test_steer_at_eval(actor, tmp_path: Path) -> None:
    towards_a = steer_at_eval.steer(tmp_path, actor=actor)
    for values in towards_a.values():
        assert values[0] < values[1] < values[2]
        assert values[2] > 0.85

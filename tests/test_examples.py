"""The three ways of use run, and do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from tdhook_rl import LinearProbe, Saliency, targets
from tdhook_rl.examples import replay_buffer, steer_at_eval, train_dqn, train_ppo
from tdhook_rl.examples.agent import make_trained_actor
from tdhook_rl.report import FileSink


@pytest.fixture(scope="module")
def actor():
    return make_trained_actor(frames=20_480)


def test_the_examples_are_short() -> None:
    for module in (train_ppo, train_dqn, replay_buffer, steer_at_eval):
        assert len(Path(module.__file__).read_text().splitlines()) < 100


def test_train_ppo(tmp_path: Path) -> None:
    found = train_ppo.train(frames=24_576, folder=tmp_path)
    assert found["episodes.return"] > 0.8
    assert found["probe.xor.accuracy"] > 0.9 > found["probe.xor.accuracy.shuffled"]
    assert found["mass.observation.needed"] > 4 * found["mass.observation.unneeded"]
    assert (tmp_path / "artifacts" / "probe.xor").is_dir()


def test_train_dqn(tmp_path: Path) -> None:
    rows = train_dqn.train(frames=2048, folder=tmp_path)
    assert bool(rows["computed", "attr"].all())
    assert "cache" not in rows.keys()
    assert any(name.startswith("cache.") for name in FileSink.read(tmp_path / "log.csv"))
    assert len(rows) == 2048


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

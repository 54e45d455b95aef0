"""Whatever is wrong outside: training is what it would be, the local files are complete, and it is said once."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import resource
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image as Pillow
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector

from tdhook_rl import ActivationCaching, Saliency, targets
from tdhook_rl.envs import CueCorners
from tdhook_rl.examples.agent import PPO, make_actor, make_critic
from tdhook_rl.report import Budgets, FileSink, Monitor
from tdhook_rl.rollout import OnlineProbe
from tests.monitoring import METHOD, QUIET, said
from tests.wandb_reader import finished

STEPS = [160, 320, 480]


def train(folder: Path, run: Any, spoil: Callable[[int, Any], Any] | None, **options: Any) -> Any:
    """Three batches of PPO; the weights, and what was said."""
    torch.manual_seed(1)
    actor = make_actor()
    ppo = PPO(actor, make_critic(), epochs=1)
    with said() as told, METHOD.prepare(actor) as policy:
        monitor = None
        if run is not None:
            monitor = Monitor(policy, run, folder=folder, media_every=1, table_every=1, **options)
        collector = Collector(
            CueCorners(batch_size=[16], seed=1), policy, frames_per_batch=160, total_frames=480,
            auto_register_policy_transforms=False,
        )  # fmt: skip
        for number, data in enumerate(collector):
            if monitor is not None:
                monitor.step(data if spoil is None else spoil(number, data))
            ppo.update(data)
        collector.shutdown()
        if monitor is not None:
            monitor.close()
    weights = [one.clone() for one in actor.state_dict().values()]
    return weights, [str(one.message) for one in told if "annotate only" not in str(one.message)]


# ------------------------------------------------------------------ what a run may meet


@contextlib.contextmanager
def no_room(folder: Path) -> Iterator[Callable[[int, Any], Any]]:
    """The disk is full from the second batch to the third."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def spoil(number: int, data: Any) -> Any:
        size = 100 if number == 1 else before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return data

    try:
        yield spoil
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def no_numbers(folder: Path) -> Iterator[Callable[[int, Any], Any]]:
    def spoil(number: int, data: TensorDictBase) -> TensorDictBase:
        data = data.clone()
        data["observation"][number] = (float("nan"), float("inf"), -float("inf"))[number]
        data["next", "reward"][:, -1] = float("nan")
        return data

    yield spoil


@contextlib.contextmanager
def a_crash(folder: Path) -> Iterator[None]:
    """A run was killed here: half a line, half a histogram, a picture that was not finished."""
    folder.mkdir()
    (folder / "log.csv").write_text("step,name,value\n80,attr.observation,0.5\n80,cache.x,0.")
    (folder / "histograms.jsonl").write_text('{"step": 80, "name": "hist')
    (folder / "media" / "bars.observation.0").mkdir(parents=True)
    (folder / "media" / "bars.observation.0" / "000000160.png.new").write_bytes(b"\x89PNG")
    yield None


@contextlib.contextmanager
def removed(folder: Path) -> Iterator[Callable[[int, Any], Any]]:
    """Somebody removes the folder while the agent trains."""
    import shutil

    def spoil(number: int, data: Any) -> Any:
        if number == 1:
            shutil.rmtree(folder)
        return data

    yield spoil


NAMES = [f'concept {n}/a \\b: "é" {"x" * (n == 7) * 300}' for n in range(90)]
CASES: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "nothing": (None, {}, []),
    "a full disk": (no_room, {}, ["left out", "log.csv cannot be written", "Run failed (OSError"]),
    "what is not finite": (no_numbers, {}, ["rows"]),
    "a folder of a crash": (a_crash, {"resume": True}, []),
    "a folder that is removed": (removed, {}, ["removed or moved while"]),
    "odd names": (None, {"feature_names": NAMES, "groups": {"a/b c": [1], "é": [3]}}, []),
    "many names": (None, {"feature_names": NAMES, "budgets": Budgets(keys=20)}, ["there are more than 20 names"]),
    "no room for media": (None, {"budgets": Budgets(bytes=10)}, ["bytes of media that are allowed (budget)"]),
}


@pytest.fixture(scope="module")
def alone() -> list[torch.Tensor]:
    return train(Path(), None, None)[0]


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_as_without(name: str, alone: list[torch.Tensor], tmp_path: Path) -> None:
    prepare, options, words = CASES[name]
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=QUIET)
    folder = tmp_path / "local"
    with prepare(folder) if prepare else contextlib.nullcontext() as spoil:
        weights, told = train(folder, run, spoil, **options)
    rows = finished(run)
    assert all(torch.equal(one, other) for one, other in zip(weights, alone, strict=True))
    assert len(told) == len(set(told)) <= len(words) + bool(words)
    assert all(any(word in one for one in told) for word in words), told
    # W&B has all of it, within the budget, whatever became of the folder.
    steps = [row["interp/step"] for row in rows if "interp/attr.observation" in row]
    assert sorted(steps) == STEPS  # what it missed is handed on when it is back
    assert all(value == value for row in rows for value in row.values() if isinstance(value, float))
    curves = FileSink.read(folder / "log.csv")
    whole = [80, *STEPS] if name == "a folder of a crash" else STEPS
    expected = {"a full disk": [160, 480], "a folder that is removed": [320, 480]}.get(name, whole)
    assert [step for step, _ in curves["attr.observation"]] == expected
    for line in (folder / "histograms.jsonl").read_text().splitlines()[name == "a folder of a crash" :]:
        assert len(json.loads(line)["counts"]) == 64
    for path in folder.rglob("*.png"):
        with Pillow.open(path) as picture:
            picture.load()
    if "feature_names" in options:
        assert len([one for one in curves if one.startswith("attr.observation.concept")]) == 90
        shown = {key for row in rows for key in row if key.startswith("interp/") and key.count("/") == 1}
        assert len(shown) == 21 if name == "many names" else len(shown) > 90


# ------------------------------------------------------------------ W&B that cannot be online

ONLINE = """
    import json, sys, warnings
    from tdhook_rl import Saliency
    from tdhook_rl.examples.agent import make_actor
    from tdhook_rl.report import Monitor, open_wandb
    from tdhook_rl.report.sinks import together
    from tests.monitoring import batch_of
    together.LONGEST_START = 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Saliency().prepare(make_actor()) as policy:
            with Monitor(policy, open_wandb(sys.argv[1], "cues", {}, mode="online")) as monitor:
                monitor.step(batch_of(policy))
    words = [str(one.message) for one in told if "W&B" in str(one.message)]
    print(json.dumps({"words": words, "folder": str(monitor.folder), "log": (monitor.folder / "log.csv").read_text()}))
"""


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"errors":[{"message":"user is not logged in"}]}'
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
def test_a_run_that_cannot_be_online_is_offline(tmp_path: Path) -> None:
    """No account, no network, another key: all at once, each in a process of its own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    key, here = {"WANDB_API_KEY": "x" * 40}, f"http://127.0.0.1:{server.server_port}"
    cases = {
        "No API key": {"WANDB_BASE_URL": "http://127.0.0.1:9"},
        "refused|deadline|timed out": {"WANDB_BASE_URL": "http://127.0.0.1:9", **key},
        "401": {"WANDB_BASE_URL": here, **key},
    }
    started = {}
    for number, (words, env) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        started[words] = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(ONLINE), str(folder)], env={**plain, "HOME": str(folder), **env},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    try:
        for words, process in started.items():
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            found = json.loads(out.splitlines()[-1])
            (told,) = found["words"]
            assert "W&B could not start online" in told
            assert "an offline run, which `wandb sync` uploads later" in told
            assert any(word in told for word in words.split("|")), told
            assert "offline-run-" in found["folder"]
            assert "80,attr.observation," in found["log"]
    finally:
        for process in started.values():
            process.kill()
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------ inputs of any shape and dtype

SHAPES = {
    "a line": (7,), "one": (1,), "many": (300,), "grid": (9, 8), "small grid": (2, 3), "CHW": (3, 12, 10),
    "HWC": (12, 10, 3), "stack": (4, 16, 16), "one channel": (1, 9, 9), "planes": (6, 7, 7), "of agents": (3, 2, 4),
    "video": (2, 3, 8, 8),
}  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int64]


class Flat(nn.Module):
    def __init__(self, size: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.dims = len(size)
        self.out = nn.Linear(int(np.prod(size)), 2, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x.flatten(-self.dims).to(self.out.weight.dtype))


@pytest.mark.parametrize(("shape", "dtype"), list(itertools.product(SHAPES, DTYPES)), ids=str)
def test_inputs_of_any_shape_and_dtype_are_shown(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    size = SHAPES[shape]
    torch.manual_seed(0)
    weights = dtype if dtype.is_floating_point else torch.float32
    values = torch.randn(2, 5, *size) * (50 if dtype in (torch.uint8, torch.int64) else 1)
    data = TensorDict(
        {
            "x": (values.abs() if dtype == torch.uint8 else values).to(dtype) if dtype != torch.bool else values > 0,
            "next": {"reward": torch.ones(2, 5, 1), "done": torch.tensor([[0, 0, 0, 1, 0]] * 2).bool()[..., None]},
        },
        batch_size=[2, 5],
    )
    net = TensorDictModule(Flat(size, weights), in_keys=["x"], out_keys=["logits"])
    folder = tmp_path / "seen"
    with (
        Saliency(target=targets.logit(0)).prepare(net) as policy,
        Monitor(policy, folder, budgets=Budgets(images=2)) as monitor,
    ):
        found = monitor.step(data)
    assert found is not None
    assert found["computed.attr"] == 1.0
    expected = net.module.out.weight.detach()[0].abs().float().mean()
    assert found["attr.x"] == pytest.approx(float(expected), rel=2e-2)
    kinds = {path.name.split(".")[0] for path in (folder / "media").iterdir()}
    frames = shape in ("grid", "CHW", "HWC", "stack", "one channel", "planes")
    assert kinds == {"episodes"} | ({"overlay", "episode"} if frames else {"bars"})
    for path in [*folder.rglob("*.png"), *folder.rglob("*.gif")]:
        with Pillow.open(path) as picture:
            picture.load()
            assert min(picture.size) > 30


@pytest.mark.parametrize("shape", [(1, 91, 91), (3, 84, 84), (9000,)], ids=str)
def test_frames_are_too_large_for_a_control_of_a_probe(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A probe of frames would take gigabytes and minutes a batch: the others stay beside it."""
    data = TensorDict({"x": torch.randint(0, 256, (8, 5, *shape), dtype=torch.uint8)}, [8, 5])
    data["label"], data["collector", "traj_ids"] = (
        torch.arange(40).reshape(8, 5) % 2,
        torch.arange(8)[:, None].expand(8, 5),
    )
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(-len(shape)), nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2))
    net = TensorDictModule(body, in_keys=["seen"], out_keys=["logits"])
    data["seen"] = data.pop("x").float()
    net(data.clone())
    probe = OnlineProbe(features=("cache", "module.2"), label="label", min_rows=1)
    folder = tmp_path / "log"
    with said() as told, ActivationCaching("module.2").prepare(net) as policy:
        with Monitor(policy, folder, probes={"parity": probe}) as monitor:
            found = [monitor.step(policy.annotate(data)) for _ in range(2)][-1]
    assert found is not None
    assert "probe.parity.accuracy.shuffled" in found
    assert "probe.parity.accuracy.input" not in found
    words = [str(one.message) for one in told if "this control is left out" in str(one.message)]
    assert len(words) == 1

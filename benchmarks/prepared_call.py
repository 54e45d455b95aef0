"""What one call of a prepared policy with one cached module costs beyond the plain call, in microseconds.

python -m benchmarks.prepared_call --rounds 60
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from benchmarks.nets import mlp
from benchmarks.pairs import Median, measure, repetitions
from benchmarks.peers import installed
from tdhook_rl import ActivationCaching

SITE = "module.1"
AT_MOST = 60.0  # microseconds
BATCHES = (1, 64)


def contenders(batch: int, stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """Plain calls, and calls that also give the output of the first hidden layer."""
    problem = mlp(3, 64, batch)
    net, x = problem.net, problem.x
    plain = TensorDictModule(net, in_keys=["input"], out_keys=["output"])
    data = TensorDict({"input": x}, batch_size=batch)
    hooked = stack.enter_context(ActivationCaching(SITE).prepare(plain))
    expected = net[:2](x)
    torch.testing.assert_close(hooked(data.copy())["cache", SITE], expected)
    runs: dict[str, Callable[[], Any]] = {
        "net": lambda: net(x),
        "TensorDictModule": lambda: plain(data.copy()),
        "tdhook_rl": lambda: hooked(data.copy()),
    }
    if installed("captum"):
        from captum.attr import LayerActivation

        attribute = LayerActivation(net, net[1]).attribute
        torch.testing.assert_close(attribute(x), expected)
        runs["captum"] = lambda: attribute(x)
    if installed("tdhook"):
        from tdhook.latent import ActivationCaching as Peer

        # On a module of its own: it places hooks on the module that it is given.
        theirs = stack.enter_context(Peer(SITE.replace(".", r"\.") + "$").prepare(copy.deepcopy(plain)))
        torch.testing.assert_close(theirs(data.copy())["cache", SITE], expected)
        runs["tdhook"] = lambda: theirs(data.copy())
    return runs


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    for batch in BATCHES:
        with ExitStack() as stack, torch.no_grad():
            runs = contenders(batch, stack)
            repeat = max(repetitions(run) for run in runs.values())
            seconds = measure(runs, rounds, repeat)
        print(f"batch {batch}, {rounds} rounds of {repeat} calls")
        for name, values in seconds.items():
            line = f"  {name:17}{Median.of(values * 1e6).median:8.1f} us"
            against = {"tdhook_rl": "TensorDictModule", "tdhook": "TensorDictModule", "captum": "net"}.get(name)
            if against is not None:
                extra = Median.of((values - seconds[against]) * 1e6)
                line += f"   {extra.median:+7.1f} us [{extra.low:+.1f}, {extra.high:+.1f}] over {against}"
            if name == "tdhook_rl":
                line += f"   at most {AT_MOST:.0f}: {'holds' if extra.median <= AT_MOST else 'FAILS'}"
            print(line)
        for peer in ("captum", "tdhook"):
            if peer not in seconds:
                print(f"  {peer:17}not installed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    main(**vars(parser.parse_args()))

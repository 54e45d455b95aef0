"""What one call of a prepared policy with one cached module costs, beside the plain call and a hook by hand.

python -m benchmarks.prepared_call --rounds 60
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor

from benchmarks.budgeted import Budget, Figure, figures_of, show
from benchmarks.nets import mlp
from benchmarks.pairs import measure, repetitions
from benchmarks.peers import installed
from tdhook_rl import ActivationCaching

SITE = "module.1"
PLAIN, BY_HAND = "TensorDictModule", "a hook by hand"
#: Of the plain call's time.
AT_MOST = 1.86
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
        PLAIN: lambda: plain(data.copy()),
        BY_HAND: lambda: by_hand(data.copy()),
        "tdhook_rl": lambda: hooked(data.copy()),
    }
    kept = []
    copied = copy.deepcopy(plain)
    copied.get_submodule(SITE).register_forward_hook(lambda module, args, output: kept.append(output))

    def by_hand(data: TensorDict) -> TensorDict:
        return copied(data).set(("cache", SITE), kept.pop())

    torch.testing.assert_close(by_hand(data.copy())["cache", SITE], expected)
    if installed("captum"):
        from captum.attr import LayerActivation

        attribute = LayerActivation(net, net[1]).attribute
        torch.testing.assert_close(attribute(x), expected)
        runs["captum"] = lambda: attribute(x)
    if installed("nnsight"):
        from nnsight import NNsight

        traced = NNsight(copy.deepcopy(net))

        def trace() -> Tensor:
            with traced.trace(x):
                found = traced[1].output.save()
            return found

        torch.testing.assert_close(trace(), expected)
        runs["nnsight"] = trace
    if installed("tdhook"):
        from tdhook.latent import ActivationCaching as Peer

        # On a module of its own: it places hooks on the module that it is given.
        theirs = stack.enter_context(Peer(SITE.replace(".", r"\.") + "$").prepare(copy.deepcopy(plain)))
        torch.testing.assert_close(theirs(data.copy())["cache", SITE], expected)
        runs["tdhook"] = lambda: theirs(data.copy())
    return runs


def figures(rounds: int = 60) -> Iterator[Figure]:
    """Measure at each batch; captum and nnsight are given bare tensors, the others a TensorDict."""
    for batch in BATCHES:
        with ExitStack() as stack, torch.no_grad():
            runs = contenders(batch, stack)
            repeat = max(repetitions(run) for run in runs.values())
            seconds = measure(runs, rounds, repeat)
        budgets = [
            Budget(PLAIN, AT_MOST, "60 us beside a call of 70"),
            Budget(BY_HAND),
            *(Budget(peer) for peer in ("captum", "nnsight", "tdhook")),
        ]
        yield from figures_of("one call, one site", f"MLP 3 x 64, {batch}", "tdhook_rl", seconds, budgets)


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    show(figures(rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    main(**vars(parser.parse_args()))

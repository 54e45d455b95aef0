"""What a check finds on a hooked policy as it stands, before anything runs; and whether it compiles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule
from torch import nn

from tdhook_rl.doctor.dry_run import Deadline, first_line, trial_copy
from tdhook_rl.doctor.findings import Finding
from tdhook_rl.doctor.recorded_rollout import as_tuple, hooks_of, is_ours
from tdhook_rl.errors import TieError
from tdhook_rl.internals.dynamo_names import TorchDynamoException
from tdhook_rl.internals.torch_names import held_buffers, held_parameters
from tdhook_rl.policies.draws import draws
from tdhook_rl.replaying.batching import in_recurrent_mode
from tdhook_rl.sites.known import own_class

_ELSEWHERE = "build and prepare the policy inside a function and give it to the collector as policy_factory="


def policy_findings(policy: Any, *, in_processes: bool, factory: Callable[[], Any] | None) -> Iterator[Finding]:
    """Findings on the tie, the user's policy, copies of the hooked one, its names and its modules; nothing changes."""
    original = None if policy._hooked.tie is None else policy._hooked.tie.original()
    yield from _tie(policy, original)
    if original is not None:
        yield _hooks_on_original(original)
        yield from _weights(policy, original)
    yield _deep_copy(policy)
    yield _pickle(policy, in_processes, factory)
    yield _names(policy)
    yield from _modules(policy)


def _tie(policy: Any, original: nn.Module | None) -> Iterator[Finding]:
    tie = policy._hooked.tie
    if tie is None:
        yield Finding.warning(
            "tie",
            "this is a copy of a hooked policy, with weights of its own",
            "give the hooked policy that prepare() returned, unless another object trains this copy",
        )
        return
    again = "prepare the policy again, after load_state_dict(assign=True) or .to(...)"
    path = tie.untied()
    stray = tie.stray(policy.hooked_root)
    if path is not None:
        yield Finding.error("tie", f"the user's policy holds another tensor at {path!r} than when prepared", again)
    elif stray is not None:
        yield Finding.error("tie", f"the hooked policy holds a tensor of its own at {stray!r}", again)
    else:
        count = len(held_parameters(policy)) + len(held_buffers(policy))
        yield Finding.ok("tie", f"{count} parameters and buffers are shared with the user's policy")
    edited = tie.outdated()
    if edited is not None:
        yield Finding.warning(
            "tie",
            f"the user's policy has changed at {edited!r}, of which the hooked one has an edited copy",
            "leave the context and enter it again, to edit the new weights",
        )
    if original is None:
        yield Finding.ok("original", "the user's policy was deleted: only the hooked one is there to check")
    elif original.training is not policy.training:
        names = {True: "train", False: "eval"}
        yield Finding.warning(
            "modes",
            f"the user's policy is in {names[original.training]} mode, the hooked one in {names[policy.training]} mode",
            "call train() or eval() on both: it acts only where it is called",
        )


def _hooks_on_original(original: nn.Module) -> Finding:
    found = [
        (path, hook)
        for path, module in original.named_modules()
        for hook in hooks_of(module)
        if not type(hook).__module__.startswith(("torch.nn.", "tensordict.", "torchrl."))
    ]
    ours = [path for path, hook in found if is_ours(hook)]
    if ours:
        return Finding.error(
            "original",
            f"a hook of a method is on the user's policy, at {ours[0]!r}: losses would run it",
            "register hooks through a method, which places them on the hooked policy",
        )
    if found:
        path, hook = found[0]
        name = getattr(hook, "__name__", type(hook).__name__)
        return Finding.warning(
            "original",
            f"{len(found)} hooks of your own are on the user's policy, the first ({name}) at {path!r}: "
            "they run in losses, target networks and collectors alike",
            "use a method (ActivationCaching, SteeringVectors) or hooked.run() instead",
        )
    return Finding.ok("original", "no hook is on the user's policy")


def _weights(policy: Any, original: nn.Module) -> Iterator[Finding]:
    root = policy.hooked_root
    for what, names in (
        ("state_dict()", lambda module: list(module.state_dict())),
        ("TensorDict.from_module()", lambda module: list(TensorDict.from_module(module).keys(True, True))),
    ):
        own, hooked = names(original), names(root)
        odd = next((name for name in (*hooked, *own) if (name in hooked) != (name in own)), None)
        if odd is not None or own != hooked:
            holder = "is not in the user's policy" if odd in hooked else "is not in the hooked policy"
            yield Finding.error(
                "weights",
                f"{what} of the two differ: {odd!r} {holder}"
                if odd is not None
                else f"{what} of the two are in another order",
                "weights of one would not load into the other: add modules and buffers before prepare()",
            )
            return
    if root is not policy:
        yield Finding.warning(
            "weights",
            "the user's policy is a plain module: its keys lack the prefix 'module.' of the policy",
            "sync the hooked policy's own weights: collector.update_policy_weights_(TensorDict.from_module(hooked))",
        )
        return
    yield Finding.ok("weights", f"{len(own)} weights have the user's policy's keys, so that every scheme syncs them")


def _deep_copy(policy: Any) -> Finding:
    try:
        _require_same(copy.deepcopy(policy), policy)
    except Exception as error:
        return Finding.error(
            "deepcopy",
            f"{type(error).__name__}: {first_line(error)}",
            "remove what does not deep-copy (locks, open files) from the policy: collectors on another device copy it",
        )
    return Finding.ok("deepcopy", "a deep copy writes the same results")


def _pickle(policy: Any, in_processes: bool, factory: Callable[[], Any] | None) -> Finding:
    import cloudpickle

    if factory is not None:
        try:
            cloudpickle.dumps(factory)
        except Exception as error:
            return Finding.error(
                "pickle",
                f"the policy_factory: {type(error).__name__}: {first_line(error)}",
                "let the function make everything it uses, rather than close over it",
            )
        return Finding.ok("pickle", "the policy_factory travels by cloudpickle")
    try:
        _require_same(pickle.loads(pickle.dumps(policy)), policy)
    except Exception as error:
        level = "error" if in_processes else "warning"
        return Finding(
            "pickle", level, f"spawned workers cannot take it: {type(error).__name__}: {first_line(error)}", _ELSEWHERE
        )
    return Finding.ok("pickle", "plain pickle, as spawned workers use")


def _require_same(copied: Any, policy: Any) -> None:
    if copied.result_keys != policy.result_keys:
        raise TieError(f"the copy writes {copied.result_keys}, not {policy.result_keys}")


def _names(policy: Any) -> Finding:
    private = [key for key in map(as_tuple, policy.policy_out_keys) if any(_is_private(part) for part in key)]
    if private:
        return Finding.warning(
            "names",
            f"collectors strip {private[0]}, which the policy writes, because of its underscore",
            "rename it, if training reads it",
        )
    return Finding.ok("names", "no key is private; reserved ones are refused by prepare()")


def _is_private(part: str) -> bool:
    return part.startswith("_") and part != "_"  # "_" alone is how TensorDict modules name an output to forget


def _modules(policy: Any) -> Iterator[Finding]:
    if in_recurrent_mode(policy):
        yield Finding.error(
            "recurrent",
            "the policy is in recurrent mode, in which it reads whole trajectories",
            "collect with set_recurrent_mode off, so that each step is read at its stored hidden state",
        )
    exploring = [
        f"{own_class(module).__name__} at {path!r}"
        for path, module in policy.named_modules()
        if draws(module) and not isinstance(module, ProbabilisticTensorDictModule)
    ]
    if exploring:
        yield Finding.ok(
            "exploration",
            f"{', '.join(exploring)}: the action taken is explained, and its schedule is shared with the user's policy",
        )


#: Calls of a compiled policy. The first may compile once more at the second: one that explores reads its step count.
CALLS = 4


def compile_findings(policy: Any, data: TensorDictBase, deadline: Deadline, *, fullgraph: bool) -> Iterator[Finding]:
    """Compile copies of the hooked policy and of the user's with a backend that only counts graphs.

    Where the collector would compile with ``fullgraph=True``, a break of the graph is an error.
    """
    deadline.waiting_for = "torch.compile of the hooked policy"
    graphs, reason = _compiled(trial_copy(policy), data)
    tie = policy._hooked.tie
    original = None if tie is None else tie.original()
    plain_reason = None
    if original is not None and policy.hooked_root is policy and reason is not None:
        deadline.waiting_for = "torch.compile of the user's policy"
        _, plain_reason = _compiled(copy.deepcopy(original), data)
    if reason is not None:
        yield Finding(
            "compile",
            "error" if fullgraph else "warning",
            f"it does not compile as one graph: {reason}",
            "the user's policy does not either: change its forward"
            if plain_reason is not None
            else "leave out the method or the function that the reason names, or compute it with when='batch'",
        )
        return
    yield Finding.ok("compile", "one graph")
    if graphs[-1] > graphs[1]:
        yield Finding.warning(
            "recompilation",
            f"{graphs[-1] - graphs[1]} more graphs were compiled in {CALLS} calls on the same data",
            "a Python number changes at every call: keep it in a tensor, such as one of policy.controls",
        )
    else:
        yield Finding.ok("recompilation", f"none in {CALLS} calls")


def _compiled(module: Any, data: TensorDictBase) -> tuple[list[int], str | None]:
    """How many graphs there were after each call; or why there is no single one."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def call(data: TensorDictBase) -> TensorDictBase:
        return module(data)

    # Compiled code is kept, and its number limited, for each code object: that of the user's policy is not used.
    call.__code__ = call.__code__.replace()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    counts = []
    try:
        for _ in range(CALLS):
            compiled(data.clone())
            counts.append(len(graphs))
    except TorchDynamoException as error:
        return counts, first_line(error)
    return counts, None

"""What stands behind the chain of an actor: a module that decides by its output, and explanations of what it decided.

The chain's derivatives need no graph, and the one of what stands behind it is small: its leaf is the chain's output. Of
the log-probability of common distributions the derivative is known, and there is none but that of what makes their
parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, skip_existing
from tensordict.utils import unravel_key
from torch import Tensor, nn

from tdhook_rl.arguments.keys import get_entry, key_parts
from tdhook_rl.calls.chains import Chain, actor_classes, chain_layers, is_usual, run_chain
from tdhook_rl.calls.decisions import chosen_by
from tdhook_rl.calls.known_slopes import log_prob_slopes, of_rows, slopes_of
from tdhook_rl.calls.passes import Call, Pass, Slope
from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.calls.writing import set_tensor, tensors_as_entries
from tdhook_rl.policies.draws import Draw, draws, sample_keys
from tdhook_rl.replaying.batching import row_vectors
from tdhook_rl.replaying.samples import Drawn, Replay
from tdhook_rl.sites.known import own_class
from tdhook_rl.sites.listed import modules

_PLAIN = Draw()


def is_decided_by(call: Call, chain: Chain, stored: TensorDictBase) -> bool:
    """Whether a call is one that a head may be explained in: what was decided is stored as it was decided."""
    head, state = chain.head, call.policy._hooked
    if state.records or state.passes or state.noise or state.supports or state.chunks is not None:
        return False
    if not all(map(_is_plain_draw, state.draws)):
        return False
    if isinstance(head, ProbabilisticTensorDictModule):
        keys = sample_keys(head)
        plain = _is_plain_draw(getattr(head, "_hooked_draw", None))
        return plain and len(keys) == 1 and isinstance(get_entry(stored, unravel_key(keys[0])), Tensor)
    # Of a Q-network its values are compared with those that are stored.
    return all(get_entry(call.data, key) is not None for key in chain.module.out_keys)


def _is_plain_draw(draw: Draw | None) -> bool:
    """Whether samples are stored as they were drawn, whatever is made of them alone."""
    return draw is not None and (draw == _PLAIN or replace(draw, becomes=()) == _PLAIN)


def replay_chain(call: Call) -> bool:
    """Note what a policy that is a chain, or decides by one, puts out for the inputs of a call; whether it is one."""
    policy, chain = call.policy, call.policy._hooked.chain
    if chain is None or len(call.inputs) != 1:
        return False
    ((key, value),) = call.inputs.items()
    layers = chain_layers(policy, value)
    if layers is None or (chain.head is not None and not is_decided_by(call, chain, call.data)):
        return False
    try:
        output = run_chain(layers, value)
    except RuntimeError:  # which the policy says in its own words
        return False
    if chain.head is not None:
        call.replayed = HeadPass(call, chain, call.inputs, output, call.data).outputs()
        return True
    call.replayed = tensors_as_entries({key: value, policy.policy_out_keys[0]: output}, call.batch_size)
    return True


class HeadPass:
    """A pass over what stands behind a chain.

    Args:
        call: the call that is explained.
        chain: the chain and its head.
        inputs: the one input.
        output: what the chain put out.
        stored: where samples come from.
    """

    def __init__(
        self,
        call: Call,
        chain: Chain,
        inputs: Mapping[NestedKey, Tensor],
        output: Tensor,
        stored: TensorDictBase,
        weights: Tensor | None = None,
    ) -> None:
        self._call, self._chain, self._inputs, self._stored = call, chain, inputs, stored
        self.weights = weights  # of the rows
        self.leaf = output.detach()
        self._run: Pass | None = None
        self._split: TensorDictBase | None = None  # the parameters, where they were made for a slope

    @functools.cached_property
    def values(self) -> Pass | None:
        """The values that a Q-network chooses by, and nothing that it chose; ``None`` of other heads."""
        if isinstance(self._chain.head, ProbabilisticTensorDictModule):
            return None
        return self._pass(self._entries(self.leaf.detach()), list(self._chain.module.out_keys), [])

    def run(self) -> Pass:
        """The pass, whose graph begins at the leaf; the head is called as the policy would."""
        if self._run is None:
            self.leaf.requires_grad_()
            with torch.enable_grad():
                entries = self._entries(self.leaf)
                self._given = {key: get_entry(entries, key) for key in self._chain.module.out_keys}
                self._run = self._decide(entries)
        return self._run

    def by_leaf(self, slopes: Sequence[Slope]) -> list[Tensor | None]:
        """The derivatives by the leaf of what has these derivatives by outputs of the pass.

        ``None`` where an output is no number, or may overflow when it is summed.
        """
        run = self.run()
        values = [run.outputs.get(slope.key) for slope in slopes]
        known = {id(one): one.dtype.itemsize >= 4 and surely_finite(one.detach()) for one in values}
        found: list[Tensor | None] = [None] * len(slopes)
        for value in {id(one): one for one in values if known[id(one)]}.values():
            places = [place for place, one in enumerate(values) if one is value]
            outer = [slopes[place].values for place in places]
            for place, one in zip(places, self._through(value, outer), strict=True):
                found[place] = one
        return found

    def _through(self, value: Tensor, outer: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Derivatives by one output as derivatives by the leaf."""
        if value is self.leaf or not value.requires_grad:
            return outer if value is self.leaf else [None] * len(outer)
        key = next((key for key, one in self._given.items() if one is value), None)
        if key is None or len(outer) == 1:
            kept = {"retain_graph": True, "allow_unused": True}
            return [torch.autograd.grad(value, self.leaf, one, **kept)[0] for one in outer]
        # One of the parameters that the last layer makes of the output, row by row: of all copies of it at once.
        copies = self.leaf.detach().expand(len(outer), *self.leaf.shape).requires_grad_()
        made = dict(zip(self._chain.module.out_keys, self._parameters(copies), strict=True))
        return torch.autograd.grad(made[key], copies, torch.stack(list(outer)))[0].unbind()

    def keep_last(self) -> None:
        """Keep for the call what the policy puts out for its rows as they are, which are the last of the pass."""
        call, leaf = self._call, self.leaf.detach()
        if self._split is not None:
            call.keep_last(self._split)
            return
        batch = call.batch_size
        last = leaf[-batch.numel() :]  # choosing takes long
        if len(batch) != 1:
            last = last.reshape((*batch, *leaf.shape[1:]))
        call.replayed = HeadPass(call, self._chain, call.inputs, last, call.data).outputs()

    def outputs(self) -> TensorDictBase:
        """What the policy puts out, for a comparison with what is stored."""
        if isinstance(self._chain.head, ProbabilisticTensorDictModule):
            return self._entries(self.leaf.detach()) if self._split is None else self._split
        known: Pass = self.values  # type: ignore[assignment]
        return chosen_by(self._chain.head, known.outputs, self._stored)

    def weighted(self, slope: Tensor) -> Tensor:
        return of_rows(slope, self.weights)

    def _entries(self, output: Tensor) -> TensorDictBase:
        chain = self._chain
        made = self._parameters(output) if chain.splits else (output,)
        entries = {**self._inputs, **dict(zip(chain.module.out_keys, made, strict=True))}
        return tensors_as_entries(entries, self._stored.batch_size)

    def _parameters(self, output: Tensor) -> tuple[Tensor, ...]:
        """What the last layer makes of the output of the others."""
        layers = list(self._chain.module.module._modules.values())  # type: ignore[union-attr]
        return layers[-1](output)  # type: ignore[misc]

    def _decide(self, data: TensorDictBase) -> Pass:
        policy, state = self._call.policy, self._call.policy._hooked
        runtime, replay = state.runtime, Replay(self._stored, self._call.in_step)
        previous = runtime.replay, runtime.recording, runtime.start
        runtime.replay, runtime.recording, runtime.start = replay, False, None
        try:
            outputs = self._chain.head(data)  # type: ignore[misc]
            for one in self._chain.tail:
                outputs = one(outputs)
        finally:
            runtime.replay, runtime.recording, runtime.start = previous
        return self._pass(outputs, policy.policy_out_keys, replay.distributions)

    def _pass(self, outputs: TensorDictBase, out_keys: list[NestedKey], distributions: list[Drawn]) -> Pass:
        state = self._call.policy._hooked
        return Pass(
            outputs, self._stored, distributions, out_keys, {}, state.supports,
            state.slots, state.actions, state.runtime.warned,
        )  # fmt: skip

    def log_prob_slope(self, keys: Sequence[NestedKey] | None) -> Tensor | None:
        """The derivative of the log-probability of what was decided, times the weights of the rows.

        Args:
            keys: the decisions that are meant; ``None`` for all.

        Returns:
            of the shape of the chain's output; ``None`` where it is not known for what the head draws from, or what is
            stored is no sample of it: the policy's own way says why.
        """
        head: Any = self._chain.head
        if not self._chain.splits:
            found = log_prob_slopes(head, keys, self._stored, [self.leaf.detach()])
            return None if found is None else self.weighted(found[0])
        if slopes_of(getattr(head, "distribution_class", None)) is None:
            return None
        leaf = self.leaf.detach().requires_grad_()
        with torch.enable_grad():
            entries = self._entries(leaf)
        parameters = [get_entry(entries, key) for key in head.in_keys]
        for key, value in zip(head.in_keys, parameters, strict=True):
            set_tensor(entries, key, value.detach())
        self._split = entries
        found = log_prob_slopes(head, keys, self._stored, [one.detach() for one in parameters])
        if found is None:
            return None
        weighted = [self.weighted(one) for one in found]
        reaching = [(one, slope) for one, slope in zip(parameters, weighted, strict=True) if one.requires_grad]
        values, slopes = zip(*reaching, strict=True)
        return torch.autograd.grad(values, leaf, slopes)[0]


def decider_of(policy: Any) -> nn.Module | None:
    """What draws in an actor, if that is its last module, after one other, and draws from a known distribution."""
    if own_class(policy) not in actor_classes() or len(policy.module) != 2 or not is_usual(policy):
        return None
    trunk, head = policy.module
    if not isinstance(head, ProbabilisticTensorDictModule) or slopes_of(head.distribution_class) is None:
        return None
    alone = [child for child in modules(policy) if draws(child)] == [head] and len(sample_keys(head)) == 1
    actions = [key for key in policy.out_keys if key_parts(key)[-1] == "action"]
    return head if alone and actions in ([], sample_keys(head)) and set(head.in_keys) <= set(trunk.out_keys) else None


class TrunkPass:
    """The part of an actor before its draw, and the log-probability of what is stored as a function of what it gives.

    Of the common distributions the derivative is known, so that neither the distribution nor its graph is made.
    """

    def __init__(self, call: Call, head: Any) -> None:
        self._call, self._head = call, head

    def fits(self) -> bool:
        """Whether it may stand for the whole in the call."""
        state = self._call.policy._hooked
        plain = getattr(self._head, "_hooked_draw", None) == _PLAIN and not skip_existing()
        lends = state.draws or state.records or state.passes or state.noise or state.chunks is not None
        return plain and not lends and type(self._call) is Call

    def targets(self, run: Pass, names: Sequence[str], all_keys: Sequence[Any]) -> list[Tangent] | None:
        """Of each target a function that has its derivatives; ``None`` where they are not known."""
        parameters = [get_entry(run.outputs, key) for key in self._head.in_keys]
        if not all(type(one) is Tensor and surely_finite(one.detach()) for one in parameters):
            return None
        found: list[Tangent] = []
        with torch.no_grad():
            for name, keys in zip(names, all_keys, strict=True):
                slopes = log_prob_slopes(self._head, keys, run.stored, [one.detach() for one in parameters])
                if slopes is None:
                    return None
                found.append(Tangent(name, parameters, slopes))
        return found


class Tangent:
    """What has, at the parameters, the derivatives of a target."""

    def __init__(self, name: str, parameters: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        self.name = name
        self._parameters, self._slopes = parameters, slopes

    def on_graph(self, weights: Tensor | None) -> tuple[list[Tensor], list[Tensor]] | None:
        """The parameters that have a gradient, and the target's by them; ``None`` where one is surely no number."""
        found = [(p, s) for p, s in zip(self._parameters, self._slopes, strict=True) if p.requires_grad]
        if not found or not all(surely_finite(slope) for _, slope in found):
            return None
        return [p for p, _ in found], [of_rows(s, weights) for _, s in found]

    def __call__(self, run: Pass) -> Tensor:
        batch = run.outputs.batch_size
        terms = [row_vectors(p * s, batch).sum(-1) for p, s in zip(self._parameters, self._slopes, strict=True)]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def run_trunk(policy: Any, data: TensorDictBase) -> TensorDictBase:
    """The forward of an actor without its draw."""
    return policy.module[0](data)

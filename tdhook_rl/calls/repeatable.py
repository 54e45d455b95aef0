"""Whether a policy's passes can be repeated, and whether copies of the data may be put into one of them.

Where two on the same inputs, state and noise do not give the same outputs, the forward writes, or reads, something that
the policy does not hold: a file, the time, a server, an object of C. Our passes would advance it, the policy would act
by that, and what is explained would not be what ran.

Paths and perturbations look at many copies of the rows of a call, and usually put them into one pass. That changes what
is computed where the rows of a pass share batch statistics, where noise is drawn for each row (one mask must hold for
both sides of a difference), and where the policy writes what it reads. There each copy is a pass of its own.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.calls.passes import Call, effects_of
from tdhook_rl.calls.undifferentiable import in_words
from tdhook_rl.errors import InputError, listed, warn
from tdhook_rl.internals.torch_names import held_parameters, is_any_autocast_enabled
from tdhook_rl.replaying.batching import repeat_rows, shallow_copy
from tdhook_rl.sites.known import own_class
from tdhook_rl.sites.runtime import vmap_level

#: How far outputs of two passes may differ: some kernels add up in another order each time, and batches of different
#: sizes differ in the last bits.
RELATIVE, ABSOLUTE = 1e-3, 1e-5


def require_repeatable(call: Call) -> None:
    """Look at this, in the first calls of a policy that has modules of the user's own.

    Where passes differ, what the policy's code writes in classes, closures and globals is kept for them from then on.

    Raises:
        InputError: if they differ nevertheless.
    """
    effects = effects_of(call.policy)
    if effects.watch.idle and not _might_be_shared(call):
        return
    start = call.start
    if start is None or call.policy._hooked.runtime.level >= 0:
        return
    if call.batch_size not in effects.same_bits and _might_be_shared(call):
        with start.wide():
            effects.same_bits[call.batch_size] = _same_bits_with_a_graph(call)
    if not effects.look_at_repeats():
        return
    with start.wide():
        differs = _differing(call)
    if differs is not None and start.look_wide():
        differs = _differing(call)
    if differs is not None:
        raise InputError(
            f"two passes of {own_class(call.policy).__name__} over the same inputs, state and noise give another "
            f"{differs!r}, so what is explained would not be what ran, and passes would change how it acts: "
            f"{_suspects(call)} reads or writes state that it does not hold (an iterator or counter of itertools, a "
            "file, the time, a variable elsewhere). Keep that state in a buffer or an attribute, or pass it in as an "
            "input"
        )


def _has_floats(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta


def _might_be_shared(call: Call) -> bool:
    """Whether the policy's own forward might be explained (see :mod:`tdhook_rl.calls.shared_pass`) in such a call."""
    tie = call.policy._hooked.tie
    able = call.policy._hooked.shares and tie is not None and tie.asks_for_gradients() and torch.is_grad_enabled()
    return able and not any(value.requires_grad for value in call.inputs.values() if isinstance(value, Tensor))


def _same_bits_with_a_graph(call: Call) -> bool:
    """Whether inputs that ask for a gradient leave the outputs as they are; torch may take another kernel for them."""
    points = {key: value.detach().requires_grad_() for key, value in call.inputs.items() if _has_floats(value)}
    try:
        with torch.enable_grad():
            found = call.replay(points).outputs
    except RuntimeError as error:
        if in_words(error) is None:
            raise
        return False  # it does not run at all
    for key in call.policy.policy_out_keys:
        one, other = found.get(key, None), call.data.get(key, None)
        if _has_floats(one) and _has_floats(other) and not torch.equal(one.nan_to_num(), other.nan_to_num()):
            return False
    return True


def _differing(call: Call) -> NestedKey | None:
    """The output in which two passes differ."""
    with torch.no_grad():
        first, again = (call.replay(as_it_was=True).outputs for _ in range(2))
    for key in call.policy.policy_out_keys:
        one, other = first.get(key, None), again.get(key, None)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and not _alike(one, other):
            return key
    return None


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.is_meta:  # which has no numbers
        return one.shape == other.shape
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)
    return torch.equal(one, other)


def _suspects(call: Call) -> str:
    """The modules whose forward is the user's own, by path and class."""
    modules = effects_of(call.policy).watch.modules
    own = [(path, module) for path, module in modules if not type(module).__module__.startswith("torch.")]
    named = ((path, own_class(module).__name__) for path, module in own or modules)
    return listed((f"{path!r} ({name})" if path else name for path, name in named), 3, "or one of {} more")


#: On how many rows that is tried.
FEW = 16


def coupled(call: Call) -> bool:
    """Whether the rows of a pass over a call, or the noise in it, would change if copies were added to it.

    Modules that are known are asked; of others it is found out once for each training mode, by two small passes.
    """
    if torch.compiler.is_compiling():
        return False
    effects = effects_of(call.policy)
    meeting = effects.meeting()
    if meeting is not None:
        _say(call, f"rows of a batch share its statistics in {meeting}")
        return True
    quiet = effects.quiet()
    if quiet and call.policy._hooked.chain is not None:
        return False
    start: Any = call.start
    if not quiet and (effects.watch.idle or effects.watch.writes or start.noisy):
        return True
    if _found_to_meet(call) is not False:
        _say(call, "each row's output depends on the other rows")
        return True
    return not effects.quiet() and bool(start.noisy or effects.watch.writes)


def require_rows_apart(call: Call, laid_out: str) -> None:
    """Look at whether rows are computed each by itself, before they are computed in another layout than the data's.

    Args:
        call: on some of the rows.
        laid_out: in which layout, for the message.

    Raises:
        InputError: if rows change with those before or after them, as the steps of a sequence do.
    """
    start, state = call.start, call.policy._hooked
    if start is None or state.chain is not None or start.effects.meeting() is not None:
        return
    if _found_to_meet(call):
        raise InputError(
            f"in {own_class(call.policy).__name__} a row's output depends on the rows beside it, as in a network that "
            f"reads a sequence, and {laid_out}: what is explained would not be what the policy computes. Let what is "
            "read together be one entry, as with data.batch_size = data.batch_size[:-1] for time in the last "
            "dimension, or explain trajectories with Saliency(horizon='trajectory'). Where time is read off the "
            "batch size, as in world models, activations are shown by the call: hooked(batch)"
        )


def _found_to_meet(call: Call) -> bool | None:
    """Whether rows meet, found out once for each training mode; ``None`` where it cannot be."""
    effects, traits = effects_of(call.policy), call.policy._hooked.traits
    if traits.read_trajectories(call.policy):  # methods of rows refuse it by themselves
        return False
    if call.policy._hooked.chain is not None:
        return False
    mode = effects.mode()
    if mode not in effects.meets:
        if vmap_level() >= 0:
            return False
        effects.meets[mode] = _rows_meet(call)
    return effects.meets[mode]


def _rows_meet(call: Call) -> bool | None:
    """Whether rows change when others stand before and after; this also shows what the policy draws and writes."""
    start = call.start
    data = shallow_copy(call.data)
    for key, value in call.inputs.items():
        data.set(key, value)
    few = repeat_rows(data, 1)[:FEW]
    rows, inputs = len(few), {key: few.get(key) for key in call.inputs}
    with torch.no_grad():
        try:
            alone = call.replay(inputs, few).outputs
            if start is None or start.effects.watch.writes:
                return False
            if start.noisy:
                return _slopes_meet(call, inputs, few)
            own = call.policy.policy_in_keys
            for key, value in inputs.items():  # also those that interventions read, such as a strength of each row
                moves = key in own and isinstance(value, Tensor) and value.is_floating_point()
                other = 0.5 * value + 0.25 if moves else value
                inputs[key] = torch.cat([other, value, other[:1]])
            joined = call.replay(inputs, torch.cat([few, few, few[:1]])).outputs
        except Exception:  # the policy knows how many rows it takes
            return None
    for key in call.policy.policy_out_keys:
        one, two = _rows_first(alone, key), _rows_first(joined, key)
        if one is not None and two is not None and one.is_floating_point():
            if not _equal_but_for_rounding(call.policy, one, two[rows : 2 * rows]):
                return True
    return False


def _rows_first(outputs: TensorDictBase, key: NestedKey) -> Tensor | None:
    """An output with its rows in the first dimension; an ensemble puts its copies before them."""
    value = outputs.get(key, None)
    return value.movedim(outputs.ndim - 1, 0) if isinstance(value, Tensor) and outputs.ndim > 1 else value


def _slopes_meet(call: Call, inputs: dict[NestedKey, Tensor], few: TensorDictBase) -> bool | None:
    """Whether a row's output has a gradient with respect to its neighbours: what is drawn keeps two passes from being
    compared. ``None`` where no input has a gradient."""
    joined = {key: torch.cat([value, value, value[:1]]) for key, value in inputs.items()}
    own = call.policy.policy_in_keys
    leaves = {key: joined[key].detach().requires_grad_() for key in own if _has_floats(joined.get(key))}
    with torch.enable_grad():
        outputs = call.replay({**joined, **leaves}, torch.cat([few, few, few[:1]])).outputs
        given = [_rows_first(outputs, key) for key in call.policy.policy_out_keys]
        # Weighed: the plain sum of a distribution is always 1.
        weighed = [_weighed(value[1::2]) for value in given if _has_floats(value) and value.requires_grad]
    if not leaves or not weighed:
        return None
    slopes = torch.autograd.grad(weighed, list(leaves.values()), allow_unused=True)
    found = [slope.nan_to_num(0.0, 0.0, 0.0).abs() for slope in slopes if slope is not None]
    sizes = [(float(slope[1::2].max()), float(slope[::2].max())) for slope in found if slope.numel()]
    return any(beside > RELATIVE * max(size for size, _ in sizes) for _, beside in sizes)


def _weighed(value: Tensor) -> Tensor:
    return (value * torch.arange(1.0, 1 + value.numel()).reshape(value.shape).to(value)).sum()


def _equal_but_for_rounding(policy: nn.Module, one: Tensor, two: Tensor) -> bool:
    """Whether two outputs are equal up to what products of other batch sizes round in another way."""
    dtypes = {one.dtype, *(tensor.dtype for tensor in held_parameters(policy).values() if tensor.is_floating_point())}
    if is_any_autocast_enabled():
        dtypes.add(torch.bfloat16)
    relative = max(RELATIVE, *(8 * torch.finfo(dtype).eps for dtype in dtypes))
    one, two = one.detach().double(), two.detach().double()
    finite = one[torch.isfinite(one)]
    size = float(finite.abs().max()) if finite.numel() else 0.0  # differences of large numbers may be near 0
    return torch.allclose(one, two, rtol=relative, atol=max(ABSOLUTE, relative * size), equal_nan=True)


def _say(call: Call, why: str) -> None:
    said = call.policy._hooked.runtime.said
    if "rows meet" not in said:
        said.add("rows meet")
        warn(
            f"{why}, so all rows of a call are moved together along a path, or perturbed together, and each is given "
            "what it and the others have changed for it; eval() mode explains rows one by one"
        )

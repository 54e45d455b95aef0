"""What an environment and a policy hold from episode to episode, so that each of several plays starts from the same.

Running statistics of ``VecNorm`` or of batch normalisation, counters, buffers of transforms of the user's own: a play
moves them, and the next one would start from elsewhere, as would the user's training.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.envs import EnvBase, ParallelEnv, TransformedEnv
from torchrl.envs.transforms import Compose, Transform, VecGymEnvTransform

from tdhook_rl.files.digests import digest_of
from tdhook_rl.internals.torch_names import held_buffers
from tdhook_rl.internals.torchrl_names import forget_last_step, lower_done_flags
from tdhook_rl.policies.memory import same_values
from tdhook_rl.replaying.environment_generators import keep_generators


@contextlib.contextmanager
def same_state(env: EnvBase, policy: nn.Module | None = None) -> Iterator[Callable[[], None]]:
    """Inside, a function that puts back what was held at the beginning; afterwards all is as it was then, and so are
    the generators of an environment in this process, which plays seed.

    Put back are the state dicts of an environment's transforms and workers, and the buffers of a policy; what is in
    neither stays as it is. An environment of which something has no state before its first reset is seeded and reset
    once; so is a ``ParallelEnv`` that shows nothing but zeros yet, because a worker that was never reset cannot be
    asked for its state. Vectors of Gymnasium environments forget their last step, for which they would take the next
    reset.

    Args:
        env: the environment.
        policy: what acts in it.

    Example:
        >>> from torchrl.envs import GymEnv, TransformedEnv, VecNormV2
        >>> env = TransformedEnv(GymEnv("CartPole-v1"), VecNormV2(in_keys=["observation"]))
        >>> with same_state(env) as put_back:
        ...     _ = env.rollout(3)
        ...     played = env.transform.loc.clone()
        ...     put_back()
        ...     bool((env.transform.loc == played).any())
        False
    """
    put_back_generators = keep_generators(env)
    _reset_what_is_new(env)
    held = [(one, _copied(_state_of(one))) for one in holders(env)]
    states = [(one, state) for one, state in held if state is not None and any(True for _ in _leaves(state))]
    held_by_policy = [] if policy is None else held_buffers(policy).values()
    buffers = [(one, one.detach().clone()) for one in held_by_policy if _has_numbers(one)]

    def put_back() -> None:
        for holder in holders(env):
            if isinstance(holder, VecGymEnvTransform):
                forget_last_step(holder)
        for holder, then in states:
            now = _state_of(holder)
            # Buffers of another shape are of as many rows as were played: a reset begins them.
            if now is not None and _compared(then, now, _same_shape) and not _compared(then, now, _same):
                holder.load_state_dict(_copied(then))
                lower_done_flags(holder)
        with torch.no_grad():
            for buffer, numbers in buffers:
                if buffer.shape == numbers.shape and not same_values(buffer, numbers):
                    buffer.copy_(numbers)

    try:
        yield put_back
    finally:
        put_back()
        put_back_generators()


def state_digest(env: EnvBase, put_back: Callable[[], None], seed: int) -> str:
    """A digest of what :func:`same_state` puts back: what a reset begins anew as it begins it, all else as it is.

    Args:
        env: the environment, inside ``same_state``, which is left as at its beginning.
        put_back: of it.
        seed: of the resets.

    Returns:
        nothing where the environment holds nothing.
    """
    put_back()
    before = _numbers_of(env)
    if not before:
        return ""
    resets = []
    with torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(seed)
            _seed(env, seed % (1 << 31))
            env.reset()
            resets.append(_numbers_of(env))
    put_back()
    first, second = resets
    begun = {name for name, one in first.items() if name in second and same_values(one, second[name])}
    return digest_of((name, first[name] if name in begun else one) for name, one in before.items())


def _numbers_of(env: EnvBase) -> dict[str, Tensor]:
    """All that is held, by name; what is no tensor as the bytes of its text."""
    found: dict[str, Tensor] = {}
    for number, holder in enumerate(holders(env)):
        for name, value in _named_leaves(_state_of(holder), str(number)):
            if isinstance(value, Tensor):
                found[name] = value.detach().clone()
            elif isinstance(value, bool | int | float | str):
                found[name] = torch.tensor(list(repr(value).encode()), dtype=torch.uint8)
    return found


def _named_leaves(state: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from _named_leaves(value, f"{name} {key}")
    elif state is not None:
        yield name, state


def _reset_what_is_new(env: EnvBase) -> None:
    """By a seed, so that the state it begins with is the same wherever the same is played."""
    inside = holders(env)[-1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if isinstance(inside, ParallelEnv) and not _were_reset(inside):
            _seed(inside)
            inside.reset()  # a worker that is asked before would end
        if any(_state_of(one) is None for one in holders(env)):
            _seed(env)
            env.reset()


def _were_reset(env: ParallelEnv) -> bool:
    """Whether workers surely were: what they share with this process is no longer as it was made."""
    shared = None if env.is_closed else getattr(env, "shared_tensordict_parent", None)
    if shared is None:
        return False
    made = env.fake_tensordict()
    return any(
        isinstance(value, Tensor) and isinstance(made.get(key, None), Tensor) and not torch.equal(value, made[key])
        for key, value in shared.items(True, True)
    )


def _seed(env: EnvBase, seed: int = 0) -> None:
    with contextlib.suppress(Exception):  # whatever an environment of others raises that has no seed
        env.set_seed(seed)


def holders(env: EnvBase) -> list[Any]:
    """Each transform, and the environment inside, which is the last one."""
    found: list[Any] = []
    while isinstance(env, TransformedEnv):
        found += _single(env.transform)
        env = env.base_env
    return [*found, env]


def _single(transform: Transform) -> list[Transform]:
    if isinstance(transform, Compose):
        return [one for inner in transform.transforms for one in _single(inner)]
    return [transform]


def _state_of(holder: Any) -> Any:
    """The state dict; ``None`` where it is not there yet, or cannot be had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of statistics that have not begun
            state = holder.state_dict()
    except Exception:  # whatever an environment of others raises
        return None
    return None if any(leaf is None for leaf in _leaves(state)) else state


def _copied(state: Any) -> Any:
    """With tensors of its own, without the graph that statistics have where a rollout recorded gradients."""
    if isinstance(state, Mapping):
        return type(state)((key, _copied(value)) for key, value in state.items())  # type: ignore[call-arg]
    return state.detach().clone() if isinstance(state, Tensor) else copy.deepcopy(state)


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, Mapping):
        for value in state.values():
            yield from _leaves(value)
    else:
        yield state


def _compared(one: Any, other: Any, alike: Callable[[Any, Any], bool]) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_compared(value, other[key], alike) for key, value in one.items())
    return alike(one, other)


def _same_shape(one: Any, other: Any) -> bool:
    return not isinstance(one, Tensor) or (isinstance(other, Tensor) and one.shape == other.shape)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_values(one, other)
    return bool(one == other) if isinstance(one, int | float | str | Sequence) else False


def _has_numbers(buffer: Tensor) -> bool:
    return not isinstance(buffer, nn.UninitializedBuffer) and not buffer.is_meta

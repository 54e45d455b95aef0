"""What steering does: vectors at many strengths beside controls of equal norm, in any environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.envs import EnvBase, SerialEnv
from torchrl.envs.utils import exploration_type

from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.progress import Progress, shown
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.errors import InputError, warn
from tdhook_rl.files.functions import in_words
from tdhook_rl.latent import SteeringVectors
from tdhook_rl.replaying.environment_settings import settings_of
from tdhook_rl.replaying.environment_state import same_state, state_digest
from tdhook_rl.replaying.plays import lacking_told
from tdhook_rl.sweeps.conditions import (
    BASELINE,
    REPEATED,
    Condition,
    Direction,
    Place,
    conditions_of,
    directions_of,
)
from tdhook_rl.sweeps.episodes import ALPHA, Blocks, Rows, Setting, Sign, Steered, seed_env, takes_rows, vector_key
from tdhook_rl.sweeps.outcomes import LENGTH, RETURN, Outcomes
from tdhook_rl.sweeps.sweep_file import UNFINISHED, Kept
from tdhook_rl.sweeps.sweep_result import SweepResult

#: Of a function that makes environments, so many are stepped together.
TOGETHER = 32


@checked
def steering_sweep(
    policy: nn.Module,
    env: EnvBase | Callable[[], EnvBase],
    vectors: Any,
    *,
    alphas: Sequence[float] | Tensor = (0.25, 0.5, 0.75, 1.0),
    controls: int = 10,
    episodes: int = 64,
    outcomes: Any = (RETURN, LENGTH),
    max_steps: int = 1000,
    sign: Sign | None = None,
    when: Any = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress | bool | None = None,
) -> SweepResult:
    """Play the same episodes under every vector, strength and control.

    All conditions have the same starts and the same noise of actions (common random numbers), so that a difference
    between two of them is due to the steering. Alpha 0 is played twice: where the two are not equal to the bit, the
    environment draws by itself, and conditions are played one by one from the same seeds; where they still differ the
    result is unpaired, which is said. Each condition begins with what transforms (statistics of ``VecNorm``, say) and
    the policy's buffers held at first, and leaves it so, as it does the environment's generators in this process; where
    rows of a batch change each other by these, conditions are played one by one.

    Args:
        policy: the policy, not hooked; of any kind of action. It acts by the
            :class:`~torchrl.envs.utils.set_exploration_type` in force, as in ``env.rollout``.
        env: an environment, or a function that makes one, of which up to 32 are then stepped together. One that is
            not batch-locked and has an empty batch plays all conditions as rows of one rollout.
        vectors: a :class:`~tdhook_rl.latent.SteeringVector`, several, or ``{name: vector}``, where a vector may also be
            several that act together, or ``{path: tensor}`` with places as of
            :class:`~tdhook_rl.latent.SteeringVectors`.
        alphas: the strengths, in units of the vector, such as ``torch.linspace(0, 1, 5)``; 0 is always played.
        controls: how many random vectors of equal norm stand beside each vector, and as many of labels dealt out by
            chance where the vector has them.
        episodes: of each condition.
        outcomes: ``"return"`` (of agents their mean, of several rewards each by its name), ``"length"``, or functions,
            best by name, that map episodes ``(episodes, time)`` to one number for each, such as
            ``lambda data: data["next", "reward"].sum((-1, -2)) > 1``. Episodes are zero after their last step, which is
            no action 0: ``"mask"`` says where they are. Where only agents end, an episode lasts until all have ended
            once, and rewards of an agent are zero after its own end.
        max_steps: the longest an episode may last; those that are longer are counted in ``facts["unfinished"]``.
        sign: for each start state +1 or -1, where the direction that is wanted depends on the state.
        when: where it acts, as of :class:`~tdhook_rl.latent.SteeringVectors`.
        seed: of the starts, the noise and the random vectors.
        folder: where the result is kept as it grows; the same call goes on from there, with the same policy (weights,
            modules and their options) and an environment that was made with the same arguments and holds the same
            statistics as when it began.
        progress: a function of what is done and all, ``True`` for a bar, ``False`` for nothing.

    Raises:
        InputError: for no episodes, no strength but 0, NaN, a vector that does not fit, outcomes of a wrong shape, or
            a folder with another sweep, or with one that began with other statistics in the environment.
        MissingKeyError: if the policy reads what the environment does not write.

    Warns:
        UserWarning: for episodes that did not end, conditions that could not be paired, an environment that cannot
            be seeded, and vectors that were found in other weights.

    Reference: Turner et al. 2023; common random numbers: Glasserman & Yao 1992, Management Science 38.

    Example:
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import make_trained_actor
        >>> from tdhook_rl.examples.steer_at_eval import contrast
        >>> actor = make_trained_actor(seed=0)
        >>> found = steering_sweep(actor, CueCorners(), contrast(actor), alphas=[1.0], controls=2, episodes=8)
        >>> found.paired, found.values["return"].shape
        (True, torch.Size([7, 8]))
    """
    if controls < 0 or episodes < 1 or max_steps < 1:
        raise InputError(f"there is nothing to play: controls={controls}, episodes={episodes}, max_steps={max_steps}")
    directions = directions_of(vectors, controls, seed)
    for vector in (one for direction in directions.values() for one in direction.given):
        vector.check(policy)
        vector.say_other_weights(policy)
    conditions = conditions_of(directions, alphas.flatten().tolist() if isinstance(alphas, Tensor) else alphas)
    with _made(env, episodes) as made, same_state(made, policy) as put_back:
        unseeded = seed_env(made, seed)
        if unseeded:
            warn(f"the environment cannot be seeded ({unseeded}): episodes played one by one begin anew each time")
        measured = Outcomes(outcomes, made.reward_keys)
        setting = Setting(
            env=made, episodes=episodes, max_steps=max_steps, seed=seed, sign=sign, keys=measured.keys,
            put_back=put_back,
        )  # fmt: skip
        sweep = _Sweep(policy, setting, measured, directions, when)
        facts = {
            "alphas": sorted({one.alpha for one in conditions}), "controls": controls, "episodes": episodes,
            "max_steps": max_steps, "exploration": str(exploration_type()),
            "seed": seed, "streams": f"{stream_of(seed, 'plays'):x}",
            "environment": repr(made)[:200], "env": "" if isinstance(env, EnvBase) else in_words(env),
            "settings": settings_of(made) if isinstance(env, EnvBase) else {},
            "sign": in_words(sign), "when": in_words(when),
            "measured": measured.described(in_words),
            "environment_state": "" if folder is None else state_digest(made, put_back, seed),
            "vectors": {name: {"places": [str(place) for place in one.places], "norm": one.norm}
                        for name, one in directions.items()},
        }  # fmt: skip
        kept = Kept(folder, conditions, facts, policy, directions)
        try:
            with lacking_told(made, policy), shown(progress, "conditions") as show:
                sweep.run(kept, show)
        finally:
            kept.write()
    values = {name: found for name, found in kept.values.items() if name != UNFINISHED}
    return SweepResult(conditions=conditions, values=values, facts=kept.facts())


class _Sweep:
    """The conditions of one call, played in the first layout in which alpha 0 repeats itself."""

    def __init__(
        self,
        policy: nn.Module,
        setting: Setting,
        outcomes: Outcomes,
        directions: Mapping[str, Direction],
        when: Any,
    ) -> None:
        self._policy = policy
        self._setting = setting
        self._outcomes = outcomes
        self._directions = directions
        self._when = {} if when is None else {"when": when}

    def run(self, kept: Kept, show: Progress) -> None:
        kinds: list[type[Rows | Blocks]] = [Rows, Blocks] if takes_rows(self._setting.env) else [Blocks]
        players = [kind(self._setting) for kind in kinds if kept.layout in ("", kind.words)]
        with torch.no_grad():
            for last, player in ((one is players[-1], one) for one in players):
                if self._play_all(player, kept, show, last):
                    return

    def _play_all(self, player: Rows | Blocks, kept: Kept, show: Progress, last: bool) -> bool:
        """Play what is not there yet; false if the two baselines differ and another layout is left."""
        known = next(iter(self._directions.values()))
        groups: dict[tuple[Place, ...], list[Condition]] = {}
        for condition in kept.missing():
            places = self._directions.get(condition.vector, known).places
            groups.setdefault(places, []).append(condition)
        for places, conditions in groups.items():
            vectors = {place: vector_key(number) for number, place in enumerate(places)}
            with SteeringVectors(vectors, alpha=ALPHA, **self._when).prepare(self._policy) as hooked:
                if isinstance(player, Rows) and not last:
                    strongest = max(conditions, key=lambda one: abs(one.alpha))
                    both = [self._steered(places, ones) for ones in ([BASELINE], [BASELINE, strongest])]
                    if not player.apart(hooked, *both):
                        kept.forget()
                        return False
                for part in _parts(conditions, player.at_once()):
                    kept.add(part, self._measured(player, hooked, places, part), player.words)
                    if REPEATED in part and not kept.repeated() and not last:
                        kept.forget()
                        return False
                    show(*kept.done())
        return True

    def _measured(
        self, player: Rows | Blocks, hooked: Any, places: Sequence[Place], conditions: Sequence[Condition]
    ) -> dict[str, Tensor]:
        """``(conditions, episodes)`` of each outcome, and of those that did not end."""
        found: list[dict[str, Tensor]] = []
        for episodes, unfinished in player.play(hooked, self._steered(places, conditions)):
            found.append({**self._outcomes.of(episodes), UNFINISHED: unfinished.double().cpu()})
        return {name: torch.cat([one[name] for one in found]).reshape(len(conditions), -1) for name in found[0]}

    def _steered(self, places: Sequence[Place], conditions: Sequence[Condition]) -> Steered:
        """What conditions add, of which all act at these places, or not at all."""
        like = next(one for one in self._directions.values() if one.places == tuple(places))
        of = [self._directions.get(one.vector, like) for one in conditions]
        vectors = {
            place: torch.stack([one.part(condition, place) for one, condition in zip(of, conditions, strict=True)])
            for place in places
        }
        double = any(vector.dtype == torch.float64 for vector in vectors.values())
        dtype = torch.float64 if double else torch.get_default_dtype()
        return Steered(vectors=vectors, alphas=torch.tensor([one.alpha for one in conditions], dtype=dtype))


def _parts(conditions: Sequence[Condition], size: int) -> Iterator[Sequence[Condition]]:
    """So many at once; the two baselines are in the first part, if they fit."""
    for start in range(0, len(conditions), size):
        yield conditions[start : start + size]


@contextmanager
def _made(env: EnvBase | Callable[[], EnvBase], episodes: int) -> Iterator[EnvBase]:
    """The environment, or some of those that a function makes, which are closed afterwards."""
    if isinstance(env, EnvBase):
        yield env
        return
    one = env()
    if not isinstance(one, EnvBase):
        raise InputError(f"env= makes a {type(one).__name__}; it must make a TorchRL environment")
    if takes_rows(one) or one.batch_size:
        made = one
    else:
        one.close()
        blocks = -(-episodes // TOGETHER)
        made = SerialEnv(-(-episodes // blocks), env)
    try:
        yield made
    finally:
        made.close()

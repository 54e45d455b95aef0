"""``tdhook-rl play``: episodes of a hooked policy as one page."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdhook_rl.cli.setups import EXAMPLE, made_with_environment, one_environment
from tdhook_rl.cli.showing import seed

if TYPE_CHECKING:
    from tdhook_rl.latent import SteeringVector


def add(commands: Any) -> None:
    """Add the command to the parser."""
    play = commands.add_parser(
        "play",
        help="look at episodes of a hooked policy, step by step, in the browser",
        description="Roll episodes out, explain them, and write one page on which a timeline drives frames, "
        "attributions, probabilities, probes and activations; perhaps beside the same episodes steered or untrained.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    play.add_argument(
        "target",
        nargs="?",
        default=EXAMPLE,
        metavar="MODULE:FUNCTION",
        help="returns (hooked policy, environment) or (..., collector arguments), and takes no argument",
    )
    play.add_argument("--episodes", type=int, default=4, help="how many")
    play.add_argument("--steps", type=int, default=200, help="the longest an episode may last")
    play.add_argument("--seed", type=seed, default=0, help="of the starts and of the actions that are drawn")
    play.add_argument("--deterministic", action="store_true", help="take the likeliest actions, do not draw")
    play.add_argument("--compare", choices=("steered", "untrained"), help="what is played beside it")
    play.add_argument("--vector", type=Path, help="a saved steering vector; the policy needs SteeringVectors there")
    play.add_argument("--alpha", type=float, default=1.0, help="the strength of steering")
    play.add_argument("--out", type=Path, default=Path("player.html"), help="the page")
    play.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    import torchrl

    from tdhook_rl.errors import InputError
    from tdhook_rl.latent import SteeringVector
    from tdhook_rl.metrics.untrained import untrained_copy
    from tdhook_rl.report import player
    from tdhook_rl.rollout.alike import alike_episodes

    torchrl.logger.setLevel("ERROR")
    if not math.isfinite(options.alpha):
        raise InputError(f"--alpha is a finite number, got {options.alpha}")
    vector = None if options.vector is None else SteeringVector.load(options.vector)
    compare = options.compare or (None if vector is None else "steered")
    if vector is not None and compare != "steered":
        raise InputError(f"--vector steers, and --compare {compare} does not: leave one out")
    policy, env, *_ = made_with_environment(options.target)
    env = one_environment(env)

    def episodes(of: Any) -> Any:
        return alike_episodes(
            of, env, episodes=options.episodes, max_steps=options.steps, seed=options.seed,
            deterministic=options.deterministic,
        )  # fmt: skip

    shown: Any
    if compare == "steered":
        name = _steering(policy, vector)
        sets = {"plain": 0.0, f"steered, alpha {options.alpha:g}": options.alpha}
        shown = {}
        for called, alpha in sets.items():
            policy.controls[f"{name}.alpha"] = alpha
            shown[called] = episodes(policy)
            for one in shown[called]:
                _note_strength(one, f"{name}.alpha", alpha)
    elif compare == "untrained":
        shown = {"as it is": episodes(policy), "untrained": episodes(untrained_copy(policy, seed=options.seed))}
    else:
        shown = episodes(policy)
    made = player(shown, policy=policy, env=env, title=f"{options.target}, seed {options.seed}")
    for note in made.notes:
        print(f"note: {note}")
    print(f"{made.save(options.out)}  the player: open it in a browser")
    return 0


def _steering(policy: Any, vector: SteeringVector | None) -> str:
    """The name of the steering method whose controls are set, with the vector put in its place.

    Raises:
        InputError: if the policy has none, or none at the vector's module.
    """
    from tdhook_rl.errors import InputError, nearest

    controls = list(policy.controls)
    names = [one.removesuffix(".alpha") for one in controls if one.endswith(".alpha")]
    places = {one: name for name in names for one in controls if one.startswith(f"{name}.") and one != f"{name}.alpha"}
    if not places:
        raise InputError(
            "the policy cannot be steered: add SteeringVectors({path: vector}, alpha=0.0) to the methods that it is "
            "prepared with"
        )
    if vector is None:
        return next(iter(places.values()))
    found = next((one for one, name in places.items() if one == f"{name}.{vector.site}"), None)
    if found is None:
        paths = [one.removeprefix(f"{name}.") for one, name in places.items()]
        raise InputError(
            f"the vector acts at {vector.site!r}, where the policy is not steered; {nearest(vector.site, paths)}: add "
            f"SteeringVectors({{{vector.path!r}: vector}}, alpha=0.0) to its methods"
        )
    vector.check(policy)  # raises
    vector.say_other_weights(policy)
    policy.controls[found] = vector.vector
    return places[found]


def _note_strength(data: Any, name: str, alpha: float) -> None:
    """What the strength was, where no ``ControlRecord`` says it."""
    import torch

    if data.get(("control", name), None) is None:
        data.set(("control", name), torch.full(data.batch_size, alpha))

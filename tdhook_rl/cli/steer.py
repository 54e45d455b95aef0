"""``tdhook-rl steer``: a policy, vectors and an environment in; what they do, beside controls, out."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tdhook_rl.cli.options import chosen_options, named_file, printed_warnings
from tdhook_rl.cli.setups import is_function, made, named_function
from tdhook_rl.cli.showing import print_table, progress_bar, seed, terminal
from tdhook_rl.errors import InputError, nearest

#: What a config file may say, and what holds where nobody says anything.
DEFAULTS: dict[str, Any] = {
    "policy": None, "vector": None, "env": None, "alphas": "0.25,0.5,0.75,1", "controls": 10, "episodes": 64,
    "outcome": None, "sampled": False, "sign": None, "when": None, "max_steps": 1000, "seed": 0, "player": 2,
    "out": None,
}  # fmt: skip
NUMBERS = {"controls": int, "episodes": int, "max_steps": int, "seed": int, "player": int}
HEADS = ("vector", "alpha", "mean", "effect", "largest of random", "adjusted p")
#: The longest that an episode in the player is.
STEPS = 200


def add(commands: Any) -> None:
    """Add the command to the parser."""
    steer = commands.add_parser(
        "steer",
        help="play the same episodes under vectors at several strengths, beside random ones, and write a report",
        description="Play the same episodes under every vector and strength, beside random vectors of equal norm and "
        "those of shuffled labels, and write a table, figures and a report. The same command goes on where it was "
        "stopped.",
    )
    steer.add_argument("--policy", metavar="MODULE:FUNCTION", help="returns the policy, or (policy, environment)")
    steer.add_argument(
        "--vector", action="append", metavar="[NAME=]FILE", help="a saved SteeringVector; may be given several times"
    )
    steer.add_argument(
        "--env",
        metavar="GYM_ID|MODULE:FUNCTION",
        help="of Gymnasium, with actions as the policy gives them, or a function that makes a TorchRL environment",
    )
    steer.add_argument(
        "--alphas", metavar="A,B,...", help="the strengths (default: 0.25,0.5,0.75,1); 0 is always played"
    )
    steer.add_argument("--controls", type=int, help="random vectors beside each (default: 10)")
    steer.add_argument("--episodes", type=int, help="of each condition (default: 64)")
    steer.add_argument(
        "--outcome", action="append", metavar="[NAME=]MODULE:FUNCTION", help="maps episodes to a number for each, and "
        "is what is to change; return and length stand beside it, or alone",
    )  # fmt: skip
    steer.add_argument("--sampled", action="store_true", default=None, help="draw actions; else the likeliest is taken")
    steer.add_argument("--sign", metavar="MODULE:FUNCTION", help="of a start state: +1 or -1, which way it is wanted")
    steer.add_argument(
        "--when", metavar="KEY|MODULE:FUNCTION", help="where it acts: a key of truth values, or a function of rows",
    )  # fmt: skip
    steer.add_argument("--max-steps", type=int, help="the longest an episode may last (default: 1000)")
    steer.add_argument("--seed", type=seed, help="of starts, noise and random vectors (default: 0)")
    steer.add_argument(
        "--player", type=int, metavar="EPISODES", help="to look at step by step (default: 2); 0 for none"
    )
    steer.add_argument("--out", type=Path, metavar="FOLDER", help="for the results (default: runs/steer-ENV-VECTOR)")
    steer.add_argument("--config", type=Path, metavar="FILE", help="the same options in YAML or JSON; flags go first")
    steer.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    import matplotlib  # noqa: F401  (without it the figures would fail after the work)
    import torchrl

    from tdhook_rl.files.durable import tidied

    torchrl.logger.setLevel("ERROR")
    chosen = chosen_options(options, DEFAULTS, NUMBERS)
    policy, env = _policy(chosen)
    vectors = _vectors(chosen["vector"])
    asked = {
        "alphas": _alphas(chosen["alphas"]),
        "controls": chosen["controls"],
        "episodes": chosen["episodes"],
        "outcomes": _outcomes(chosen["outcome"]),
        "max_steps": chosen["max_steps"],
        "sign": None if chosen["sign"] is None else named_function(chosen["sign"]),
        "when": _when(chosen["when"]),
        "seed": chosen["seed"],
    }
    folder = _folder(chosen, vectors)
    with tidied(folder, alone="config.json"):
        _require_sweep(folder, chosen, policy, options.written)
        return _steered(policy, env, vectors, asked, folder, chosen, options.written)


def _steered(
    policy: Any,
    env: Any,
    vectors: Mapping[str, Any],
    asked: Mapping[str, Any],
    folder: Path,
    chosen: Mapping[str, Any],
    command: str,
) -> int:
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    from tdhook_rl.sweeps import steering_sweep

    how = ExplorationType.RANDOM if chosen["sampled"] else ExplorationType.DETERMINISTIC
    console = terminal()
    bar = progress_bar(console, "conditions")
    reached = ["nothing is played yet"]

    def show(done: int, total: int) -> None:
        reached[0] = f"{done} of {total} conditions are played"
        bar.update(task, completed=done, total=total, visible=True)

    try:
        with printed_warnings():
            with bar, set_exploration_type(how):
                task = bar.add_task("steering", total=None, visible=False)
                result = steering_sweep(policy, env, vectors, **asked, folder=folder, progress=show)
            shown = _player(policy, env, vectors, result, chosen, asked)
            lead = _write(folder, result, shown, command)
    except KeyboardInterrupt:
        print(f"tdhook-rl: stopped; {reached[0]}; the same command goes on: {command}")
        return 130
    print_table(console, f"What steering does to {result.outcomes[0]}", HEADS, _summary(result))
    console.print(lead, highlight=False)
    for name, what in (
        ("effects.csv", "every vector, strength and outcome"),
        ("steering.json", "the same with its facts"),
        ("sweep.safetensors", "every episode (tdhook_rl.sweeps.SweepResult.load)"),
        ("figures", "with their data beside"),
        ("report.html", "the report: open it in a browser"),
    ):
        console.print(f"  {folder / name}  {what}", highlight=False, soft_wrap=True)
    return 0


# ---------------------------------------------------------------------- options


def _policy(chosen: Mapping[str, Any]) -> tuple[Any, Any]:
    """The policy, plain, and the environment or what makes one."""
    from tdhook_rl.hooking.hooked import HookedMixin
    from tdhook_rl.method import HookingContext

    if chosen["policy"] is None:
        raise InputError("name the policy: --policy MODULE:FUNCTION")
    found = made(chosen["policy"])
    policy, beside, *_ = found if isinstance(found, tuple) and len(found) > 1 else (found, None)
    if isinstance(policy, HookedMixin | HookingContext):
        raise InputError(
            f"{chosen['policy']} returns a hooked policy: return the plain one, which the sweep hooks itself"
        )
    if chosen["env"] is None and beside is None:
        raise InputError(
            f"{chosen['policy']} returns a policy alone: name the environment by --env, an id of Gymnasium or "
            "MODULE:FUNCTION"
        )
    return policy, beside if chosen["env"] is None else _env(chosen["env"], policy)


def _env(text: str, policy: Any) -> Any:
    if is_function(text):
        return named_function(text)
    try:
        import gymnasium
    except ModuleNotFoundError:
        raise InputError(
            f"--env {text!r} is an id of Gymnasium, which is not installed (pip install gymnasium), or MODULE:FUNCTION"
        ) from None
    from torchrl.envs import GymEnv

    try:
        gymnasium.spec(text)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise InputError(
            f"--env {text!r} is no environment of Gymnasium ({error}); {nearest(text, gymnasium.registry)}; your own "
            "is MODULE:FUNCTION"
        ) from None
    return partial(GymEnv, text, **({"categorical_action_encoding": True} if _gives_numbers(policy, text) else {}))


def _gives_numbers(policy: Any, name: str) -> bool:
    """Whether the policy gives numbers of choices, where TorchRL makes an environment that takes them one-hot."""
    import torch
    from torchrl.data import OneHot
    from torchrl.envs import GymEnv

    from tdhook_rl.policies.rebinding import deep_copy
    from tdhook_rl.replaying.plays import require_taken

    env = GymEnv(name)
    try:
        if isinstance(env.full_action_spec[env.action_key], OneHot):
            with torch.random.fork_rng(), torch.no_grad():
                require_taken(env, deep_copy(policy)(env.reset()))
    except InputError:
        return True
    except Exception:  # what else does not fit is said where it is played
        return False
    finally:
        env.close()
    return False


def _vectors(given: Any) -> dict[str, Any]:
    from tdhook_rl.sweeps import SteeringVector

    listed = [given] if isinstance(given, str) else list(given or ())
    if not listed:
        raise InputError("name what steers: --vector FILE, of a saved SteeringVector")
    found: dict[str, Any] = {}
    for text in listed:
        name, rest = named_file(str(text))
        file = Path(rest)
        name = name or file.name.removesuffix(".safetensors").removesuffix(".json")
        if not name or name in found:
            raise InputError(f"two vectors are called {name!r}: name them, --vector NAME=FILE")
        found[name] = SteeringVector.load(file)
    return found


def _alphas(given: Any) -> list[float]:
    try:
        return [float(one) for one in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        raise InputError(f"alphas are numbers with commas between, such as 0.5,1; got {given!r}") from None


def _outcomes(given: Any) -> dict[str, Any]:
    """What is to change, first; return and length beside."""
    listed = [given] if isinstance(given, str) else list(given or ())
    found: dict[str, Any] = {}
    for text in listed:
        before, sign, rest = str(text).partition("=")
        function = named_function(rest if sign else before)
        name = before if sign else before.rpartition(":")[2]
        if name in found:
            raise InputError(f"two outcomes are called {name!r}: name them, --outcome NAME=MODULE:FUNCTION")
        found[name] = function
    beside = {name: name for name in ("return", "length") if name not in found}
    return {**found, **beside}


def _when(text: str | None) -> Any:
    if text is None or is_function(text):
        return None if text is None else named_function(text)
    parts = tuple(text.split("/"))
    return parts if len(parts) > 1 else text


def _folder(chosen: Mapping[str, Any], vectors: Mapping[str, Any]) -> Path:
    where = chosen["env"] or chosen["policy"]
    name = re.sub(r"[^\w.-]+", "-", "-".join(["steer", str(where), *list(vectors)[:3]]))
    return Path(chosen["out"] or Path("runs") / name)


def _require_sweep(folder: Path, chosen: Mapping[str, Any], policy: Any, command: str) -> None:
    """Write the options into the folder of the results; one in which there are others is refused.

    Raises:
        InputError: if the folder has a sweep that was asked for with other options, or other files.
    """
    from tdhook_rl.cli.setups import hooked
    from tdhook_rl.files.durable import put, read_json
    from tdhook_rl.replay.manifest import facts_of

    asked = json.loads(json.dumps({one: value for one, value in chosen.items() if one not in ("out", "player")}))
    file = folder / "config.json"
    inside = {one.name for one in folder.iterdir()} if folder.is_dir() else set()
    if file.exists() and inside != {file.name}:  # with nothing beside it, a command that could not begin left it
        known = read_json(file, "the options of a sweep").get("options", {})
        other = next((one for one in asked if known.get(one) != asked[one]), None)
        if other is not None:
            raise InputError(
                f"{folder} holds a sweep with another {other} ({known.get(other)!r:.80}, asked {asked[other]!r:.80}): "
                "give another --out, or ask for the same"
            )
        return
    if folder.exists() and (not folder.is_dir() or inside - {file.name}):
        raise InputError(f"{folder} exists and holds no sweep: give another --out")
    facts = {"command": command, "options": asked, **facts_of(hooked(policy))}
    put(file, json.dumps(facts, indent=1, default=str) + "\n")


# ---------------------------------------------------------------------- the end


def _player(
    policy: Any, env: Any, vectors: Mapping[str, Any], result: Any, chosen: Mapping[str, Any], asked: Mapping[str, Any]
) -> Any:
    """Episodes that are steered beside the same that are not; ``None`` where these cannot be played."""
    from tdhook_rl.report.steered_player import MOST, steered_player
    from tdhook_rl.report.steering import strongest

    if not chosen["player"]:
        return None
    few = dict(list(vectors.items())[:MOST])
    try:
        return steered_player(
            policy, _seen(env), few, {name: strongest(result, name) for name in few}, sign=asked["sign"],
            when=asked["when"], episodes=chosen["player"], max_steps=min(chosen["max_steps"], STEPS),
            seed=chosen["seed"], deterministic=not chosen["sampled"],
        )  # fmt: skip
    except Exception as error:  # whatever an environment of others raises; the numbers are there without it
        print(f"tdhook-rl: there is no player ({type(error).__name__}: {error})")
        return None


def _seen(env: Any) -> Any:
    """One environment, with frames where those of Gymnasium can be drawn."""
    from torchrl.envs import EnvBase

    if isinstance(env, EnvBase):
        return env
    if isinstance(env, partial):
        try:
            found = env(from_pixels=True, pixels_only=False)
            found.reset()
            return found
        except Exception:  # it draws nothing, or what draws it is not installed
            return env()
    return env()


def _summary(result: Any) -> list[list[str]]:
    from tdhook_rl.report.page.numbers import shown

    return [
        [one.vector, f"{one.alpha:g}", shown(one.mean.estimate), shown(one.effect),
         shown(float(one.random.abs().max()) if len(one.random) else None), f"{one.adjusted:.2g}"]
        for one in result.table(result.outcomes[0])
    ]  # fmt: skip


def _write(folder: Path, result: Any, player: Any, command: str) -> str:
    """All files; returns the answer in words."""
    from tdhook_rl.files.durable import put
    from tdhook_rl.report import sweep_page
    from tdhook_rl.report.page.saved import as_csv
    from tdhook_rl.report.sweep_pages import sweep_rows

    table = sweep_rows(result)
    put(folder / "effects.csv", as_csv(table.columns, table.rows))
    document = {"command": command, **result.facts, "rows": json.loads(result.table().json())}
    put(folder / "steering.json", json.dumps(document, indent=1) + "\n")
    if player is not None:
        player.record(folder)
    page = sweep_page(result, player=player, command=command)
    page.keep(folder)
    return page.lead

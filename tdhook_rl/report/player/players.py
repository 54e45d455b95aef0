"""The player: made from rollouts, saved as a page, kept in a run's folder, exported as GIF."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import NestedKey

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import ArtifactError, InputError, nearest
from tdhook_rl.files.durable import put, read_json
from tdhook_rl.report.media import Animation
from tdhook_rl.report.pictures import bars, overlays, robust_scale
from tdhook_rl.report.player.budget import FORMAT, Contents, packed_within
from tdhook_rl.report.player.packing import Packed, unpack
from tdhook_rl.report.player.page import code, fragment, page
from tdhook_rl.report.player.reading import read
from tdhook_rl.report.player.tracks import Options
from tdhook_rl.report.readings import Features
from tdhook_rl.report.sinks.names import told_apart

#: Beside the code, what a page's head takes.
MARGIN = 2_000


@checked
def player(
    rollouts: Any,
    *,
    names: Sequence[str] | None = None,
    policy: Any = None,
    env: Any = None,
    sites: str | Sequence[NestedKey] | None = None,
    frames_key: NestedKey | None = None,
    feature_names: Any = None,
    action_names: Any = None,
    title: str = "",
    name: str | None = None,
    most_bytes: int = 2_000_000,
) -> Player:
    """A player of episodes: one timeline drives frames, attributions, probabilities, values, probes and activations.

    What is in the rollouts is shown: ``("attr", ...)`` over frames or as bars, ``logits``, ``probs``,
    ``action_value`` or ``loc`` and ``scale`` beside the action, ``state_value``, reward, ``("probe", name)``,
    ``("control", name)``, ``("steered", name)``, ``("cache", site)``, ``("concept", name)``. Rows that were not
    computed (``("computed", root)``) are shown as such.

    Args:
        rollouts: a TensorDict of shape ``(time,)`` or ``(episodes, time)``, a list of these, or a mapping of up to
            four names to them, which are put side by side: steered and not, trained and untrained, paired states. An
            episode of one is put beside that of the same row in the others. Where an episode ends inside a row,
            another begins.
        names: of the episodes, in their order.
        policy: the hooked policy, which tells its inputs, targets and how its distribution squashes actions.
        env: where it is one of :mod:`tdhook_rl.envs`, states are drawn; names of actions are taken from it.
        sites: whose activations are shown; all that are in the rollouts by default.
        frames_key: the entry with frames; ``"pixels"`` is found by itself.
        feature_names: names of the features of an input, or of each by key.
        action_names: names of the actions, or of each decision's by key.
        title: above the player.
        name: what links to a step call it; made of the title by default.
        most_bytes: of the page, its code included. Attributions are rounded more coarsely, frames are shown smaller,
            and at last activations, further attributions and episodes are left out; the page says so.

    Raises:
        InputError: for what holds no rollout or no step, names in another number, or too few bytes.
        MissingKeyError: for a site or frames that the rollouts lack.

    Example:
        >>> from tdhook_rl import Saliency
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import make_actor
        >>> env = CueCorners(batch_size=[2], seed=0)
        >>> with Saliency().prepare(make_actor()) as policy:
        ...     data = policy.annotate(env.rollout(20, policy, break_when_any_done=False))
        ...     shown = player(data, policy=policy, env=env, title="CueCorners")
        >>> "data-player" in shown.fragment()
        True
    """
    options = Options(policy, env, sites, frames_key, Features(feature_names), action_names)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is shown as not there
        recording = read(rollouts, names, options)
    called = _slug(name or title or "player")
    room = most_bytes - len(code()) - MARGIN
    if room <= 0:
        raise InputError(f"the player alone takes {len(code()) + MARGIN} bytes, got most_bytes={most_bytes}")
    return Player(called, packed_within(recording, {"name": called, "title": title}, room))


class Player:
    """A player of episodes, as :func:`tdhook_rl.report.player` makes it: packed, ready to be shown."""

    def __init__(self, name: str, contents: Contents) -> None:
        self.name, self._contents = name, contents

    @property
    def title(self) -> str:
        """What is above it."""
        return self._contents.head["title"]

    @property
    def notes(self) -> list[str]:
        """What is not shown, or coarser than it was."""
        return list(self._contents.head["notes"])

    def fragment(self, *, with_code: bool = True) -> str:
        """HTML for the body of a page, in which several players may be.

        Args:
            with_code: whether the code comes with it, which a page needs once; twice does no harm.
        """
        return fragment(self.name, self._contents, with_code)

    @checked
    def save(self, path: str | Path) -> Path:
        """Write one page that needs nothing else.

        Raises:
            ArtifactError: if it cannot be written.
        """
        return put(Path(path), page(self.name, self._contents))

    def record(self, folder: str | Path) -> Path:
        """Keep it in a run's folder, as ``players/NAME.json`` and ``players/NAME.bin``; returns the former.

        One that was recorded there under the same title is replaced, and so is one of a name that was given.

        Raises:
            ArtifactError: if it cannot be written, or its name is made of its title and that of another is there.
        """
        place = Path(folder) / "players"
        self._require_own(place / f"{self.name}.json")
        data = b"".join(one.data for one in self._contents.arrays)
        put(place / f"{self.name}.bin", data)
        sizes = [len(one.data) for one in self._contents.arrays]
        kept = {"sha256": _hash(self._contents.head, data), "sizes": sizes, "head": self._contents.head}
        return put(place / f"{self.name}.json", json.dumps(kept, allow_nan=False))

    def _require_own(self, path: Path) -> None:
        """Raise :class:`ArtifactError` where another title has come to this name; a damaged file holds no title."""
        if self.name != _slug(self.title or "player"):
            return
        try:
            title = read_json(path, "a recorded player")["head"]["title"] if path.exists() else self.title
        except (ArtifactError, KeyError, TypeError):
            return
        if title != self.title:
            raise ArtifactError(
                f"{path} is the player of {title!r}, and that of {self.title!r} has the same name, {self.name!r}: give "
                "one of them a name of its own, player(..., name=...)"
            )

    @classmethod
    @checked
    def load(cls, folder: str | Path, name: str | None = None) -> Player:
        """One that was recorded.

        Args:
            folder: of the run.
            name: which, where there are several.

        Raises:
            ArtifactError: if there is none of that name, or its files are not what was recorded.
        """
        known = {one.stem: one for one in sorted((Path(folder) / "players").glob("*.json"))}
        if name is None and len(known) == 1:
            (name,) = known
        if name is None or name not in known:
            asked = "a player's name is wanted" if name is None else f"no player {name!r} was recorded"
            raise ArtifactError(f"{asked} in {folder}; {nearest(name or '', known)}")
        path = known[name]
        kept = read_json(path, "a recorded player")
        try:
            head, sizes = kept["head"], [int(size) for size in kept["sizes"]]
            data = path.with_suffix(".bin").read_bytes()
            if head["format"] != FORMAT:
                raise ValueError(f"it has format {head['format']}, and this version reads {FORMAT}")
            if _hash(head, data) != kept["sha256"] or sum(sizes) != len(data):
                raise ValueError(f"it and {path.stem}.bin are not what was recorded")
            ends = np.cumsum([0, *sizes]).tolist()
            arrays = [
                Packed(spec, data[start:end])
                for spec, start, end in zip(head["arrays"], ends[:-1], ends[1:], strict=True)
            ]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is no recorded player: {error}") from error
        return cls(_slug(name), Contents(head, arrays))

    @classmethod
    def load_all(cls, folder: str | Path) -> list[Player]:
        """All that were recorded in a run's folder, by name."""
        return [cls.load(folder, one.stem) for one in sorted((Path(folder) / "players").glob("*.json"))]

    def gif(self, path: str | Path, episode: int = 0, *, fps: float = 6.0) -> Path:
        """Write an episode as a GIF: the first attribution over its frames, or as bars where there are none.

        Args:
            path: the file.
            episode: which.
            fps: how many steps are shown in a second.

        Raises:
            ArtifactError: if it cannot be written.
            InputError: for an episode that is not there, or if nothing of it can be looked at.
        """
        known = self._contents.head["episodes"]
        if not 0 <= episode < len(known):
            raise InputError(f"there are episodes 0 to {len(known) - 1}, got {episode}")
        strips: list[np.ndarray] = []
        for label, part in zip(self._contents.head["sets"], known[episode]["parts"], strict=True):
            if part is not None:
                words = " · ".join(one for one in (label, known[episode]["name"]) if one)
                strips.append(self._pictures(part, words))
        longest, height = max(map(len, strips)), max(one.shape[1] for one in strips)
        sides: list[np.ndarray] = []
        for one in strips:  # the shorter one stays at its last step
            one = np.concatenate([one, one[-1:].repeat(longest - len(one), 0)])
            margins = ((0, 0), (0, height - one.shape[1]), (16 if sides else 0, 0), (0, 0))
            sides.append(np.pad(one, margins, constant_values=255))
        return put(Path(path), Animation(np.concatenate(sides, 2), fps).content())

    def _pictures(self, part: Mapping[str, Any], words: str) -> np.ndarray:
        head, steps = self._contents.head, slice(part["start"], part["start"] + part["length"])
        captions = [f"{words} · step {step}" for step in range(part["length"])]
        explained = [one for one in head["tracks"] if one["kind"] == "attribution"]
        for view in head["views"]:
            places = self._array(view["places"])[steps, 0].astype(int)
            if (places < 0).any():
                continue
            frames = self._array(view["pictures"])[places]
            over = next((one for one in explained if view["name"] in one.get("over", ())), None)
            if over is None:
                return overlays(frames, np.zeros(frames.shape[:3]), captions, scale=1.0)
            return overlays(frames, self._array(over["array"])[steps], captions, scale=over["scale"])
        listed = [one for one in [*explained, *head["tracks"]] if one.get("names") and one["kind"] != "choice"]
        for one in listed:
            values = self._array(one["array"])[steps]
            if one["kind"] in ("attribution", "features") and len(one["names"]) == values[0].size:
                scale = robust_scale(values)
                rows = zip(values, captions, strict=True)
                return np.stack([bars(value, one["names"], caption, scale=scale) for value, caption in rows])
        raise InputError("there is nothing to look at: the episode has no frames and no features")

    def _array(self, number: int) -> np.ndarray:
        return unpack(self._contents.arrays[number])

    def _repr_html_(self) -> str:
        """In a notebook, a frame of its own: its style and keys stay inside."""
        whole = html.escape(page(self.name, self._contents))
        return f'<iframe title="{html.escape(self.title or "episodes")}" srcdoc="{whole}" style="{_FRAME}"></iframe>'

    def __repr__(self) -> str:
        count = len(self._contents.head["episodes"])
        return f"Player({self.name!r}, {count} episode{'s' * (count != 1)}, {self._contents.size / 1000:.0f} kB)"


_FRAME = "width:100%;height:880px;border:0"


def _hash(head: Any, data: bytes) -> str:
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode() + data).hexdigest()


def _slug(text: str) -> str:
    """A name for files and links; of another text it is another one."""
    if re.fullmatch(r"[a-z0-9-]{1,80}", text):
        return text
    return told_apart(re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "player", text, most=60)

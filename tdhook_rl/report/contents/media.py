"""Pictures, animations, tables, players and files of runs, as many as the page has room for."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdhook_rl.errors import TdhookError
from tdhook_rl.report.contents.logged_tables import with_intervals
from tdhook_rl.report.page import Fragment, Gallery, Picture, Section, Table
from tdhook_rl.report.page.numbers import amount, frames
from tdhook_rl.report.page.saved import PICTURES
from tdhook_rl.report.runs import Run, Shown

#: Of each name so many pictures; and so many names.
EACH, NAMES = 3, 24
#: Frames of a video that becomes a GIF.
LONGEST = 64


def pictures_of(runs: Sequence[Run], most_bytes: float) -> tuple[Section | None, list[str]]:
    """Galleries within so many bytes: the newest of each name first, then some evenly spaced; and what is damaged."""
    found: dict[str, list[tuple[Run, str, Shown]]] = {}
    for run in runs:
        for name, listed in [*run.animations.items(), *run.pictures.items()]:
            found.setdefault(name, []).extend((run, name, one) for one in listed)
    each = max(1, EACH // len(runs))
    wanted: list[tuple[int, str, Run, Shown]] = []
    for name in list(found)[:NAMES]:
        for run in runs:
            listed = [one for owner, _, one in found[name] if owner is run]
            wanted += [(turn, name, run, one) for turn, one in enumerate(_chosen(listed, each))]
    wanted.sort(key=lambda entry: entry[0])
    kept: dict[str, list[tuple[Run, Shown, Picture]]] = {}
    broken, room = [], most_bytes
    for _, name, run, one in wanted:
        if one.size > room:
            continue
        try:
            content, ending = _whole(one)
        except Exception as error:  # whatever a damaged file makes of its reader
            broken.append(f"{name} at {one.step:,} ({type(error).__name__})")
            continue
        if len(content) > room:
            continue
        room -= len(content)
        kept.setdefault(name, []).append((run, one, _picture(content, ending, name, run, one, len(runs) > 1)))
    total = sum(map(len, found.values()))
    shown = sum(map(len, kept.values()))
    damaged = [f"Pictures that were cut or damaged are left out: {', '.join(broken[:4])}"] if broken else []
    text = ""
    if shown + len(broken) < total:
        text = (
            f"{shown:,} of {total:,} that were logged ({amount(most_bytes - room)}): of each name the newest and some "
            "evenly spaced. The others are in the folder of the run."
        )
    galleries = [Gallery(head, _in_order(entries)) for head, entries in _by_head(kept).items()]
    return Section("Pictures", galleries, text) if total else None, damaged


def _by_head(kept: dict[str, list[tuple[Run, Shown, Picture]]]) -> dict[str, list[tuple[str, Run, Shown, Picture]]]:
    """Those that differ by a number at the end stand together."""
    found: dict[str, list[tuple[str, Run, Shown, Picture]]] = {}
    for name, entries in kept.items():
        found.setdefault(re.sub(r"\.\d+$", "", name), []).extend((name, *entry) for entry in entries)
    return found


def _in_order(entries: list[tuple[str, Run, Shown, Picture]]) -> list[Picture]:
    return [one for *_, one in sorted(entries, key=lambda entry: (-entry[2].step, entry[1].name, entry[0]))]


def _chosen(listed: Sequence[Shown], most: int) -> list[Shown]:
    """The newest, then the oldest, then those between, evenly spaced."""
    ordered = sorted(listed, key=lambda one: one.step)
    if len(ordered) <= most:
        return ordered[::-1]
    places = [round(number * (len(ordered) - 1) / max(most - 1, 1)) for number in range(most)]
    chosen = [ordered[place] for place in dict.fromkeys(places)]
    return [ordered[-1]] if most == 1 else [chosen[-1], chosen[0], *chosen[1:-1]]


def _picture(content: bytes, ending: str, name: str, run: Run, one: Shown, several: bool) -> Picture:
    of = f" of {run.name}" if several else ""
    caption = f"{name}{of}, {run.axis[:-1]} {frames(one.step)}" + (f": {one.caption}" if one.caption else "")
    kind = "Animation" if ending in ("gif", "mp4", "webm") else "Picture"
    return Picture(content, ending, caption, f"{kind} {name}{of} at {run.axis[:-1]} {one.step:,} {one.caption}".strip())


def _whole(one: Shown) -> tuple[bytes, str]:
    """What a file holds, looked through to its end."""
    if one.ending == "pt":
        return _gif_of(one), "gif"
    content = one.content()
    if one.ending not in PICTURES or not content:
        raise ValueError(f"no picture: .{one.ending}")
    if one.ending in ("png", "gif", "jpg", "jpeg", "webp"):
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            for frame in range(getattr(image, "n_frames", 1)):
                image.seek(frame)
                image.load()
    return content, one.ending


def _gif_of(one: Shown) -> bytes:
    """A video that TorchRL's CSVLogger has saved as a tensor, ``(videos, time, channels, rows, columns)``."""
    import torch

    from tdhook_rl.report.media import Animation

    source = io.BytesIO(one.content())
    video = torch.load(source, weights_only=True)
    video = video.flatten(0, video.ndim - 4)
    step = math.ceil(len(video) / LONGEST)
    return Animation(video[::step]).content()


def tables_of(runs: Sequence[Run]) -> list[Table]:
    """The newest table of each name."""
    found = []
    for run in runs:
        for name, listed in run.tables.items():
            newest = listed[-1]
            of = f"{name} of {run.name}" if len(runs) > 1 else name
            earlier = f" {len(listed) - 1} earlier ones are in the folder." if len(listed) > 1 else ""
            text = f"At {run.axis[:-1]} {newest.step:,}.{earlier}" if run.series or earlier else ""
            columns, rows = with_intervals(newest)
            found.append(Table(of.capitalize(), columns, rows, text))
    return found


def files_of(runs: Sequence[Run]) -> Table | None:
    """The probes, vectors and other files that were kept."""
    rows = []
    for run in runs:
        for one in run.artifacts:
            size = sum(file.stat().st_size for file in one.files if file.is_file())
            facts = ", ".join(f"{name} {_fact(value)}" for name, value in list(one.facts.items())[:6])
            where = _below(one.files[0].parent, run.path) if one.files else ""
            row = [one.name, one.kind, one.step, amount(size) if one.files else "", facts, where]
            rows.append([run.name, *row] if len(runs) > 1 else row)
    if not rows:
        return None
    columns = ["name", "kind", "frame", "size", "facts", "folder"]
    return Table("Files that were kept", ["run", *columns] if len(runs) > 1 else columns, rows)


def _below(path: Path, folder: Path) -> str:
    """Where something is in the folder of its run: a page is mailed, and says nothing of other folders."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def players_of(runs: Sequence[Run]) -> tuple[Section | None, list[str]]:
    """The episode players that were recorded in the folders of runs; and those that cannot be read."""
    from tdhook_rl.report.player import Player

    parts: list[Any] = []
    broken: list[str] = []
    for run in runs:
        for name in run.players:
            try:
                player = Player.load(run.path, name)
            except TdhookError as error:
                broken.append(f"An episode player is left out: {error}")
                continue
            heading = run.name if len(runs) > 1 else ""  # it has its own title
            parts.append(Fragment(heading, player.fragment(with_code=not parts)))
    return Section("Episodes, step by step", parts) if parts else None, broken

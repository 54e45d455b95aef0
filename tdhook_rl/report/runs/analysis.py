"""Folders that ``analyze`` has written beside a replay buffer: memory-mapped results and their manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdhook_rl.replay.manifest import MANIFEST
from tdhook_rl.replay.results import INDEX, Results
from tdhook_rl.report.media import Histogram
from tdhook_rl.report.page import Finding
from tdhook_rl.report.runs.record import Bins, Rows, Run

KIND = "an analysis of a replay buffer"
#: Of so many rows, evenly spaced, statistics are made.
SAMPLE = 8192
#: Features that are listed one by one, those with the largest means.
FEATURES = 64


def is_one(path: Path) -> bool:
    """Whether a folder is one."""
    return (path / MANIFEST).exists()


def read(path: Path) -> Run:
    """Statistics of each result, over the rows that are done.

    Raises:
        ArtifactError: if the manifest is none, or does not describe the files beside it.
    """
    run = Run(name=path.resolve().name, path=path, kind=KIND, axis="rows")
    results = Results.find(path)
    if results is None:
        run.ended = False
        run.warnings.append("no entry is done yet")
        return run
    manifest = results.manifest
    # What tells whether an analysis may go on is for no reader: each option of each module, sums of rows.
    run.config = {name: one for name, one in manifest.facts.items() if name not in ("settings", "rows")}
    run.ended = manifest.done == manifest.entries
    if not run.ended:
        run.warnings.append(f"{manifest.done:,} of {manifest.entries:,} entries are done: call analyze() again")
    step = max(1, -(-manifest.done // SAMPLE))
    data = results.data[: manifest.done : step]
    if step > 1:
        run.warnings.append(f"statistics are of {len(data):,} of {manifest.done:,} entries, evenly spaced")
    rows, features = [], []
    for key, value in data.items(True, True):
        parts = (key,) if isinstance(key, str) else key
        if parts[0] in ("computed", INDEX):
            continue
        mask = data.get(("computed", parts[0]), None)
        name = ".".join(parts)
        flat, share, finite = _rows(value, mask)
        rows.append([name, "x".join(map(str, value.shape[1:])) or "1", str(value.dtype).removeprefix("torch."),
                     share, finite, *_spread(flat)])  # fmt: skip
        if flat.size:
            bins = Histogram.of(flat[np.isfinite(flat)])
            run.histograms[name] = [Bins(manifest.done, bins.counts, bins.edges)]
            if parts[0] == "attr" and flat.ndim > 1:
                features += (found := _features(name, flat))
                run.findings.append(_finding(name, found, flat.shape[1]))
    columns = ["result", "shape of a row", "dtype", "share computed", "share finite of these", "mean |.|", "mean",
               "standard deviation", "smallest", "largest"]  # fmt: skip
    run.tables["results"] = [Rows(manifest.done, columns, rows)]
    if features:
        columns = ["attribution of", "feature", "mean |.|", "median |.|", "lower quartile", "upper quartile", "rows"]
        run.tables["features"] = [Rows(manifest.done, columns, features)]
    return run


def _finding(name: str, features: list[list[Any]], count: int) -> Finding:
    _, feature, mean, median, low, high, rows = features[0]
    listed = f"; the {len(features)} largest are listed" if len(features) < count else ""
    return Finding(
        question="What does it look at?",
        measured=f"mean |.| of {name}, its largest feature",
        value=mean,
        beside={f"feature {other[1]}": other[2] for other in features[1:4]},
        words=f"the largest of {count:,} is feature {feature}; half of {rows:,} rows lie between {low:.3g} and "
        f"{high:.3g} (median {median:.3g}){listed}",
    )


def _rows(value: Tensor, mask: Any) -> tuple[np.ndarray, float, float]:
    """The rows that were computed and are finite, and their shares."""
    rows = value.reshape(len(value), -1) if not isinstance(mask, Tensor) else value.flatten(0, mask.ndim - 1)
    rows = rows.reshape(len(rows), -1).detach()
    rows = rows.to(torch.float64 if not rows.is_complex() else torch.complex128).abs() if rows.is_complex() else rows
    numbers = rows.double().numpy()
    computed = np.ones(len(numbers), bool) if not isinstance(mask, Tensor) else mask.reshape(-1).numpy().astype(bool)
    finite = np.isfinite(numbers).all(1)
    share = float(computed.mean()) if len(computed) else float("nan")
    return numbers[computed & finite], share, float(finite[computed].mean()) if computed.any() else float("nan")


def _spread(flat: np.ndarray) -> list[float | None]:
    if not flat.size:
        return [None] * 5
    return [float(one) for one in (np.abs(flat).mean(), flat.mean(), flat.std(), flat.min(), flat.max())]


def _features(name: str, flat: np.ndarray) -> list[list[Any]]:
    sizes = np.abs(flat)
    order = np.argsort(-sizes.mean(0), kind="stable")[:FEATURES]
    quartiles = np.quantile(sizes[:, order], [0.25, 0.5, 0.75], axis=0)
    return [
        [name, int(feature), float(sizes[:, feature].mean()), float(quartiles[1, at]), float(quartiles[0, at]),
         float(quartiles[2, at]), len(sizes)]
        for at, feature in enumerate(order)
    ]  # fmt: skip

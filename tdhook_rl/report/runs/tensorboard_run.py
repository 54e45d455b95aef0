"""Folders with event files of TensorBoard, where it is installed."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import numpy as np

from tdhook_rl.errors import ArtifactError
from tdhook_rl.report.runs.record import Bins, Run, Shown

KIND = "event files of TensorBoard"


def is_one(path: Path) -> bool:
    """Whether a folder has some."""
    return any(path.glob("*tfevents*"))


def read(path: Path) -> Run:
    """Scalars, histograms and images; a record that was cut is where reading ends.

    Raises:
        ArtifactError: where TensorBoard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ArtifactError(f"{path} holds {KIND}, which TensorBoard reads: pip install tensorboard")
    from tensorboard.backend.event_processing import event_accumulator as events
    from tensorboard.util import tensor_util

    logging.getLogger("tensorboard").setLevel(logging.CRITICAL)
    run = Run(name=path.resolve().name, path=path, kind=KIND, axis="steps")
    everything = dict.fromkeys(events.STORE_EVERYTHING_SIZE_GUIDANCE, 0)
    found = events.EventAccumulator(str(path), size_guidance=everything)
    try:
        found.Reload()
    except Exception as error:  # whatever a damaged file makes of its reader
        run.warnings.append(f"the event files could be read in part only ({type(error).__name__}: {error})")
    tags = found.Tags()
    for name in tags["scalars"]:
        run.series[name] = [(one.step, float(one.value)) for one in found.Scalars(name)]
    for name in tags["tensors"]:
        for one in found.Tensors(name):
            value = tensor_util.make_ndarray(one.tensor_proto)
            if value.size == 1 and value.dtype.kind in "fiu":
                run.series.setdefault(name, []).append((one.step, float(value)))
            elif value.dtype.kind in "OSU" and value.size:
                text = value.reshape(-1)[0]
                run.texts[name.removesuffix("/text_summary")] = (
                    text.decode(errors="replace") if isinstance(text, bytes) else str(text)
                )
    for name in tags["histograms"]:
        for one in found.Histograms(name):
            value = one.histogram_value
            edges = np.asarray([value.min, *value.bucket_limit], float)
            edges[-1] = min(edges[-1], value.max) if len(edges) > 1 else edges[-1]
            edges = np.maximum.accumulate(edges)
            counts = np.asarray(value.bucket, float)
            if len(counts) and np.isfinite(edges).all() and edges[-1] > edges[0]:
                run.histograms.setdefault(name, []).append(Bins(one.step, counts, edges))
    for name in tags["images"]:
        for one in found.Images(name):
            content = bytes(one.encoded_image_string)
            ending = "gif" if content[:3] == b"GIF" else "png"
            group = run.animations if ending == "gif" else run.pictures
            group.setdefault(name, []).append(Shown(one.step, content, ending))
    return run

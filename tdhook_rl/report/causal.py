"""Causal tests as figures: which site carries the decision, which units, and how many of them keep it."""

from __future__ import annotations

from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures import grouped_bars, lines
from tdhook_rl.report.figures.style import Number
from tdhook_rl.sweeps import Circuit, PatchTable, UnitTable

_WAYS = {
    "denoising": "The activation of the clean run is put into the run on corrupt states",
    "noising": "The activation of the corrupt run is put into the run on clean states",
}


def patch_bars(table: PatchTable, *, title: str = "Which sites carry the decision") -> Drawing:
    """The median share that each site brings over, beside random directions where there are some.

    Args:
        table: of :func:`tdhook_rl.sweeps.patch_sites` or :func:`tdhook_rl.sweeps.patch_paths`.
        title: of the drawing.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdhook_rl.sweeps import patch_sites
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> clean, corrupt = (TensorDict({"input": torch.randn(20, 3)}, batch_size=20) for _ in range(2))
        >>> patch_bars(patch_sites(net, clean, corrupt, ["0", "1"])).alt
        'median share. All: 0 1, 1 1.'
    """
    groups: dict[str, dict[str, Number]] = {}
    for cell in table:
        own = groups.setdefault(f"{cell.checkpoint}, {cell.site}" if cell.checkpoint else cell.site, {})
        own[cell.patch] = cell.median
        if cell.random is not None:
            own["random"] = cell.random
    left = max((cell.left_out for cell in table), default=0)
    said = f" Up to {left} states are left out." if left else ""
    caption = f"{_WAYS[table.way]}: 1 is as in the other run, 0 no change. Of: {table.metric}.{said}"
    return grouped_bars(groups, unit="median share", title=title, of="groups of states", caption=caption)


def unit_bars(table: UnitTable, *, most: int = 12, title: str = "Which units carry the decision") -> Drawing:
    """The units with the largest shares: as estimated, and as measured by patching them.

    Args:
        table: of :func:`tdhook_rl.sweeps.attribution_patching` or :func:`tdhook_rl.sweeps.patch_units`.
        most: how many.
        title: of the drawing.
    """
    groups: dict[str, dict[str, Number]] = {}
    for cell in table[:most]:
        sides = {"measured": cell.measured, "estimated": cell.estimated}
        groups[f"{cell.site}, {cell.unit}"] = {name: one for name, one in sides.items() if one is not None}
    how_far = f" Over all: {table.agreement}." if table.agreement is not None else ""
    caption = f"{_WAYS[table.way]}, at one unit; {len(table) - len(groups)} more are in the table.{how_far}"
    return grouped_bars(groups, unit="share of the difference", title=title, of="groups of states", caption=caption)


def faithfulness_curve(circuit: Circuit, *, title: str = "How many units keep the decision") -> Drawing:
    """What the most important units keep, by their number, beside random sets with as many units of each site.

    Args:
        circuit: of :func:`tdhook_rl.sweeps.find_circuit`.
        title: of the drawing.
    """
    curves = {"the most important": [(float(point.size), point.faithfulness) for point in circuit.curve]}
    random = [(float(point.size), point.random) for point in circuit.curve if point.random is not None]
    if random:
        curves["random sets"] = random
    caption = (
        f"All others are as in the corrupt run. The circuit, of {circuit.size} of {circuit.of} units, keeps "
        f"{circuit.faithfulness.estimate:.2f}."
    )
    return lines(
        curves, unit="share that is kept", axis="units", title=title, of="groups of states or sets", caption=caption
    )

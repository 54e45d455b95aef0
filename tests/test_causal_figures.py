"""Figures of causal tests say what the tables say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl.report.causal import faithfulness_curve, patch_bars, unit_bars
from tdhook_rl.sweeps import attribution_patching, find_circuit, patch_sites


def test_figures_have_what_the_tables_have(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1))
    pair = [TensorDict({"input": torch.randn(30, 3)}, 30) for _ in range(2)]
    sites = patch_sites(net, *pair, ["0", "1"], rank=1, controls=4)
    units = attribution_patching(net, *pair, ["0", "1"], compare=6)
    circuit = find_circuit(net, *pair, ["1"], controls=4)
    bars, most, curve = patch_bars(sites), unit_bars(units, most=5), faithfulness_curve(circuit)
    assert f"{sites['0'].random.estimate:.3g}" in bars.alt
    assert "runs on corrupt" not in bars.caption
    assert "corrupt states" in bars.caption
    assert f"{units[0].site}, {units[0].unit}" in most.alt
    assert "35 more" in most.caption
    assert f"{circuit.size} of 20 units" in curve.caption
    drawn = curve.data["curves"]["the most important"]
    assert [point.faithfulness.estimate for point in circuit.curve] == pytest.approx(list(drawn["y"]), nan_ok=True)
    for number, one in enumerate((bars, most, curve)):
        assert one.save(tmp_path / f"{number}.png").stat().st_size > 5000
    plain = faithfulness_curve(find_circuit(net, *pair, ["1"], controls=0))
    assert list(plain.data["curves"]) == ["the most important"]

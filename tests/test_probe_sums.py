"""Probes of features that nearly agree, sums that meet across modes and workers, and pushes to another place."""

from __future__ import annotations

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tensordict import TensorDict
from torch import nn

from tdhook_rl import ActivationCaching, Compose, LinearProbe, ProbeReadout
from tdhook_rl.errors import InputError
from tdhook_rl.latent.probing import ClassStatistics, TargetStatistics
from tdhook_rl.rollout import GroupSplit, OnlineProbe
from tdhook_rl.statistics import Interval

ROWS, WIDTH = 3000, 16


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    z = torch.randn(ROWS, WIDTH)
    return z, (z[:, 0] + 0.5 * torch.randn(ROWS) > 0).long()


#: Features in which the concept lies in small differences.
ALIKE = {
    "a common mode": lambda z: z + 100 * torch.randn(ROWS, 1),
    "one feature beside another": lambda z: torch.cat([z[:, 1:], 100 * z[:, 1:2] + 0.03 * z[:, :1]], 1),
    "a spectrum that falls": lambda z: (
        (z * torch.logspace(-3, 0, WIDTH)) @ torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    ),
    "zeros at first, then an offset": lambda z: torch.where(torch.arange(ROWS)[:, None] < 300, 0.0, z + 300),
    "each twice": lambda z: torch.cat([z, 2 * z + 1], 1),
}


@pytest.mark.parametrize("labels", [False, True], ids=["classes", "labels"])
@pytest.mark.parametrize("name", ALIKE)
def test_a_discriminant_finds_small_differences_of_features_that_nearly_agree(name: str, labels: bool) -> None:
    z, y = drawn()
    x = ALIKE[name](z)
    if labels:
        sums = TargetStatistics(features=x.shape[1], targets=1, labels=True)
        sums.add(x, y[:, None])
        found = sums.solve(kind="lda").predict(x)[:, 0]
    else:
        classes = ClassStatistics(features=x.shape[1], classes=2)
        classes.add(x, y)
        found = classes.solve().predict(x)
    peer = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr"))
    expected = peer.fit(x.double().numpy(), y.numpy()).score(x.double().numpy(), y.numpy())
    assert float((found == y).double().mean()) > expected - 0.01
    assert expected > 0.8


def test_a_covariance_of_few_rows_is_kept_in_check() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2000, 64), torch.arange(2000) % 2
    x[:, 0] += 2.0 * y

    def score(penalty: float | None) -> float:
        sums = ClassStatistics(features=64, classes=2)
        sums.add(x[:66], y[:66])
        return sums.solve(penalty=penalty).accuracy(x[66:], y[66:])

    assert score(None) > score(0.0) + 0.02


@pytest.mark.parametrize("kind", ["classes", "targets"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_sums_of_one_mode_go_on_in_another(kind: str, mode: type) -> None:
    z, y = drawn()

    def make() -> ClassStatistics | TargetStatistics:
        if kind == "classes":
            return ClassStatistics(features=WIDTH, classes=2)
        return TargetStatistics(features=WIDTH, targets=1)

    labels = y if kind == "classes" else z[:, :1]
    whole = make()
    whole.add(z, labels)
    with mode():
        parts = [make() for _ in range(3)]
        for part, x, one in zip(parts, z.split(1000), labels.split(1000), strict=True):
            part.add(x * 1.0, one * 1)
        inside = sum(parts)
    parts[0].decay(1.0)
    outside = sum(parts)
    for merged in (inside, outside):
        torch.testing.assert_close(merged.solve().scores(z), whole.solve().scores(z), rtol=1e-4, atol=1e-4)
        merged.add(z, labels)
        merged.decay(0.5)


def test_a_probe_of_another_place_is_not_pushed() -> None:
    act = nn.Tanh()
    net = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 6), act, nn.Linear(6, 2))
    data = TensorDict({"input": torch.randn(200, 4), "row": torch.arange(200)}, [200])
    data["y"] = (data["input"][:, 0] > 0).long()
    blank = {path: LinearProbe(weight=torch.zeros(2, 6), bias=torch.zeros(2), path=path) for path in ("0", "1@0", "2")}
    readout = ProbeReadout({f"of {path}": probe for path, probe in blank.items()})
    with Compose(ActivationCaching(["0", "2", "1@0", "1@1"]), readout).prepare(net) as hooked:
        batch = hooked(data)
        batch["copied"] = batch["cache", "0"].clone()
        fits = {("cache", "0"): ["0"], ("cache", "2"): ["2"], ("cache", "1@0"): ["1@0"], ("cache", "1@1"): []}
        for features, own in [*fits.items(), ("copied", ["0", "1@0", "2"])]:
            probe = OnlineProbe(features=features, label="y", split=GroupSplit("row"))
            probe.update(batch)
            for path in blank:
                if path in own:
                    assert probe.push(hooked.controls, f"probe.of {path}")
                    continue
                before = hooked.controls[f"probe.of {path}.weight"].clone()
                with pytest.raises(InputError, match=f"reads '{path}', and this is of '{features[1]}'"):
                    probe.push(hooked.controls, f"probe.of {path}")
                assert torch.equal(hooked.controls[f"probe.of {path}.weight"], before)


def test_an_interval_is_a_number_where_one_is_asked_for() -> None:
    found = Interval(estimate=0.8437, low=0.8, high=0.88, confidence=0.95, method="t", groups=32, rows=320)
    assert (float(found), round(found, 2), round(found)) == (0.8437, 0.84, 1)
    assert (f"{found:.1%}", f"{found}") == ("84.4%", str(found))

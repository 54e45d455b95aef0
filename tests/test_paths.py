"""Naming a submodule: literal paths, patterns, and what is said when nothing is named."""

from __future__ import annotations

import os
import re
from contextlib import suppress

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl import ActivationCaching
from tdhook_rl.errors import SiteError
from tdhook_rl.sites.paths import find_sites, resolve
from tests.policies import categorical
from tests.seed_page import Model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])
        self.blocks = nn.ModuleDict({"a/0": nn.Linear(2, 2), "b": nn.Sequential(nn.ReLU(), nn.Tanh())})
        self.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize(
    ("path", "canonical"),
    [
        ("layers.5", ["layers.5"]),
        ("layers[5]", ["layers.5"]),
        ("layers[-1]", ["layers.11"]),
        ("layers[1:3]", ["layers.1", "layers.2"]),
        ("layers[::6]", ["layers.0", "layers.6"]),
        ("blocks.<a/0>", ["blocks.a/0"]),
        ("blocks['b'][0]", ["blocks.b.0"]),
        (".head.0", ["head.0"]),
        ("head", ["head"]),
        ("layers[ 2 ]", ["layers.2"]),
        ("layers[-2:]", ["layers.10", "layers.11"]),
        ("layers[2::-1]", ["layers.2", "layers.1", "layers.0"]),
        ("layers.<5>", ["layers.5"]),
        ("<layers>.5", ["layers.5"]),
        ("layers['5']", ["layers.5"]),
        ('blocks["b"].1', ["blocks.b.1"]),
        ("blocks.b[0:2]", ["blocks.b.0", "blocks.b.1"]),
        ("blocks.a/0", ["blocks.a/0"]),
        ("head..0.", ["head.0"]),
        ("[-1]", ["head"]),
        ("[1]['b'][0]", ["blocks.b.0"]),
        ("[0][3]", ["layers.3"]),
    ],
)
def test_literal_paths(path: str, canonical: list[str]) -> None:
    net = Net()
    assert [name for name, _ in resolve(net, path)] == canonical
    for name, module in resolve(net, path):
        assert net.get_submodule(name) is module


@pytest.mark.parametrize(
    "path",
    [
        "__import__('os').environ.update(HACKED='1')",
        "layers[__import__('os').environ.update(HACKED='1')]",
        "layers[0].__class__.__init__",
        "layers.__len__()",
        "head.explode",
        "head[0].explode",
        "explode",
        "layers[0 if True else 1]",
        "layers[0:(2)]",
        "layers[1.0]",
        "layers[0",
        "layers[::0]",
        "layers]0[",
        "<>",
        "head.0.weight",
        "layers[0:2][0]",
        "layers[12]",
        "layers[-13]",
        "layers.-1",
        "",
        "..",
    ],
)
def test_paths_are_parsed_never_evaluated(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trap(Net):
        @property
        def explode(self) -> None:
            raise AssertionError("a path reached a property")

    monkeypatch.delenv("HACKED", raising=False)
    with pytest.raises(SiteError):
        resolve(Trap(), path)
    with suppress(SiteError):  # some mean something as a regular expression, such as a set of characters
        assert all(not site.explicit for site in find_sites(Trap(), path))
    assert "HACKED" not in os.environ


def test_the_paths_of_the_page() -> None:
    model = Model("layers")
    for path in ("layers.5.mlp", "layers[5].mlp", "layers[-3].mlp", "layers[5:6].mlp", "[0].<5>.mlp", "layers.<5>.mlp"):
        assert resolve(model, path) == [("layers.5.mlp", model.layers[5].mlp)]
    assert [name for name, _ in resolve(model, "layers[1:3].attn")] == ["layers.1.attn", "layers.2.attn"]


def test_a_wrapper_is_looked_through() -> None:
    module = TensorDictModule(Net(), in_keys=["x"], out_keys=["y"])
    assert [name for name, _ in resolve(module, "head[0]")] == ["module.head.0"]
    assert [name for name, _ in resolve(categorical(), "0.module[1]")] == ["module.0.module.1"]


def test_a_literal_is_not_a_prefix_but_a_pattern_is_one() -> None:
    net = Net()
    assert [site.path for site in find_sites(net, "layers.1")] == ["layers.1"]
    assert [site.path for site in find_sites(net, r"layers\.1.?$")] == ["layers.1", "layers.10", "layers.11"]
    assert [site.explicit for site in find_sites(net, ["head.0", r"head\.1$|head\.9"])] == [True, False]


def test_results_are_filed_under_the_path_as_written() -> None:
    (site,) = find_sites(Net(), "layers[-1]")
    assert (site.name, site.path) == ("layers[-1]", "layers.11")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("haed.0", r"no submodule of Net matches 'haed\.0'; nearest: 'head\.0'"),
        ("layers.12", "nearest"),
        ("layers[12]", "neither a path|matches"),
        ("layers", r"ModuleList of Net, a container that never runs; nearest: 'layers\.\d+'"),
        ("head[", r"neither a path of Net nor a regular expression"),
        ("__class__.mro()", "no submodule of Net matches"),
    ],
)
def test_what_names_nothing_raises_with_the_nearest(path: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        find_sites(Net(), path)


def test_naming_no_module_raises() -> None:
    with pytest.raises(SiteError, match="at least one"):
        find_sites(Net(), [])


class TwoHeads(nn.Module):
    """An actor and a critic that share a trunk, which has a path in each."""

    def __init__(self) -> None:
        super().__init__()
        trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.actor = nn.Sequential(trunk, nn.Linear(8, 2))
        self.critic = nn.Sequential(trunk, nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.actor(x) + self.critic(x)


def test_a_pattern_catches_a_module_by_each_of_its_paths() -> None:
    net = TwoHeads()
    for path, module in net.named_modules(remove_duplicate=False):
        if path:
            (site,) = find_sites(net, f"{re.escape(path)}$|no such")
            assert (site.path, site.module) == (path, module)
            assert [one.path for one in find_sites(net, path)] == [path]
    assert [site.path for site in find_sites(net, r"critic\..*")] == [
        "critic.0",
        "critic.0.0",
        "critic.0.1",
        "critic.1",
    ]
    assert [site.path for site in find_sites(net, r".*\.0\.")] == ["actor.0.0", "actor.0.1"]  # each once
    data = TensorDict({"input": torch.randn(5, 4)}, batch_size=5)
    with ActivationCaching([r"critic\.0\.1$", "actor.0.1"]).prepare(net) as hooked:
        cache = hooked(data)["cache"]
        assert torch.equal(cache["critic.0.1"], cache["actor.0.1"])

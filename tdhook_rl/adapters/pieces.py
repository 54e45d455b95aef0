"""The pieces of an agent that were named: its actor, its value, what they share."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdhook_rl.adapters.observations import Branch, Through
from tdhook_rl.adapters.sb3_networks import Piece
from tdhook_rl.arguments.callbacks import require_accepts
from tdhook_rl.errors import InputError, nearest, warn


class Pieces:
    """The modules that were named.

    Raises:
        InputError: for a piece that is needed and was not named, and for a name that is not in the module.
    """

    def __init__(self, net: nn.Module, actor: str | None, value: str | None, trunk: str | None, part: Piece) -> None:
        needed = {"actor": [actor], "value": [value], "actor_value": [actor, value]}[part]
        if None in needed:
            raise InputError(f"part={part!r} needs {part.replace('_', '= and ')}=, the path of a module or a method")
        self.paths = {"actor": actor, "value": value, "trunk": trunk}
        self.found = {name: None if path is None else _piece(net, path) for name, path in self.paths.items()}

    @property
    def value(self) -> nn.Module:
        found = self.found["value"]
        assert found is not None
        return found

    def require_called(self, net: nn.Module, reads_action: bool, dims: int) -> None:
        """Raise for pieces that take something else, or that have a memory.

        Raises:
            InputError: says what a piece is called with.
        """
        for name, piece in self.found.items():
            if piece is None:
                continue
            path = self.paths[name]
            if isinstance(piece, nn.RNNBase):
                raise InputError(
                    f"{name}={path!r} is a {type(piece).__name__}, whose memory from_module does not carry: build the "
                    "policy from TorchRL's LSTMModule or GRUModule over it, and the other modules"
                )
            given = ["what trunk= gives" if self.paths["trunk"] and name != "trunk" else "the observations"]
            given += ["the actions"] if reads_action and name == "value" else []
            require_accepts(
                getattr(net, piece.method) if isinstance(piece, Through) else piece, given, f"{name}={path!r}"
            )
            memory = next((one for one in piece.modules() if isinstance(one, nn.RNNBase)), None)
            if memory is not None and dims == 1:
                warn(
                    f"{name}={path!r} may run a {type(memory).__name__}, which reads rows without a dimension of time "
                    "as the steps of one sequence, so that a row would depend on those before it: see that it is given "
                    "one, or build the policy from TorchRL's LSTMModule or GRUModule"
                )

    def looks_up(self) -> bool:
        """Whether a piece that reads the observation has a table that it looks integers up in."""
        first = [self.found["trunk"]] if self.found["trunk"] else [self.found["actor"], self.found["value"]]
        tables = (nn.Embedding, nn.EmbeddingBag)
        return any(isinstance(one, tables) for piece in first if piece is not None for one in piece.modules())

    def say_shared(self) -> None:
        """Warn of weights that two pieces have in common, neither of which is a method."""
        actor, value = self.found["actor"], self.found["value"]
        if self.found["trunk"] is not None or isinstance(actor, Through) or isinstance(value, Through):
            return
        assert actor is not None
        assert value is not None
        common = {id(one) for one in actor.parameters()} & {id(one) for one in value.parameters()}
        if common:
            [path, *_] = [name for name, one in actor.named_parameters() if id(one) in common]
            warn(
                f"actor={self.paths['actor']!r} and value={self.paths['value']!r} share weights ({path!r} of the "
                "actor), and what holds them runs twice: name it by trunk=, and by actor= and value= what comes after "
                "it, as in actor='actor.1'"
            )

    def named(self, name: str) -> dict[str, nn.Module]:
        """A piece under the path that it has in the agent, or under what it is."""
        path, found = self.paths[name], self.found[name]
        if path is None or found is None:
            return {}
        steps = path.split(".")
        if isinstance(found, Through) or path == "forward" or steps[0] in ("observation", "scale"):
            return {name: found}
        for step in reversed(steps[1:]):
            found = Branch(**{step: found})
        return {steps[0]: found}


def _piece(net: nn.Module, path: str) -> nn.Module:
    if path == "forward":
        return net
    found: Any = net
    for step in path.split("."):
        found = getattr(found, step, None)
    if isinstance(found, nn.Module):
        return found
    if callable(found) and "." not in path:
        return Through(net, path)
    known = [name for name, _ in net.named_modules() if name]
    known += [name for name in vars(type(net)) if not name.startswith("_")]
    raise InputError(f"{path!r} is neither a module in {type(net).__name__} nor a method of it; {nearest(path, known)}")

"""Where the passes of one call start: the state and the noise that its forward had.

Every pass over a call starts from here, so that two methods, two targets and both sides of a difference see the same
masks, and those with which the policy acted. A replay draws no action; where it hands on a stored one, the generators
are put to where the draw had left them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from tdhook_rl.errors import listed
from tdhook_rl.internals.torch_names import held_buffers, held_parameters
from tdhook_rl.policies.memory import same_values
from tdhook_rl.replaying.batching import GeneratorState
from tdhook_rl.replaying.scratch import Snapshot, WriteWatch
from tdhook_rl.sites.known import all_modules, batch_statistics, draws_noise, may_draw, may_meet, own_class
from tdhook_rl.sites.runtime import vmap_level

#: In how many passes the generators of Python and NumPy are looked at, reading which costs more than torch's; and in
#: how many calls passes are repeated.
LOOKS = 3


class ForwardEffects:
    """What is known, and learned, of how one policy runs: what it writes, what it draws, whether its rows meet.

    Attributes:
        watch: looks at what it writes.
        unsteady: its modules that may draw, or in which rows may meet.
        draws_others: it draws from the generators of Python or NumPy.
        keeps_input: its forward was seen to leave what it is given as it was.
        same_bits: by the batch size, whether its outputs were the same where its inputs asked for a gradient.
        copies: one pass over copies of the rows may give the gradients of several targets.
        meets: by the training mode, whether an output depends on the other rows, where that had to be found out;
            ``None`` where it could not be.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.watch = WriteWatch(policy)
        #: While it is being found out whether passes can be repeated: looks also beside what the policy holds.
        self.wide: WriteWatch | None = None if self.watch.idle else WriteWatch(policy, outside=True)
        children = all_modules(policy)
        self._modules = [child for _, child in children]
        self.unsteady = [child for _, child in children if may_draw(child) or may_meet(child)]
        self._drawing = [child for _, child in children if may_draw(child)]
        self._meeting = [(path, child) for path, child in children if may_meet(child)]
        tensors = (*held_parameters(policy).values(), *held_buffers(policy).values())
        self.device = next((one.device for one in tensors if one.device.type == "cuda"), None)
        self.draws_others = False
        self.keeps_input = not self.watch.may_write_input
        self.same_bits: dict[torch.Size, bool] = {}
        self.copies = True
        self.meets: dict[tuple[bool, ...], bool | None] = {}
        self.looks = 0
        self.repeats = 0

    def quiet(self) -> bool:
        """Whether its modules are known to draw nothing but actions."""
        return self.watch.idle and not any(draws_noise(child) for child in self._drawing)

    def meeting(self) -> str | None:
        """The module, by name and class, in which rows are known to meet in the present mode."""
        for path, child in self._meeting:
            if batch_statistics(child):
                return f"{path!r} ({own_class(child).__name__})"
        return None

    def state(self) -> str | None:
        """In words, why rows of a batch may be explained by another state than the one they were computed with."""
        reasons = []
        if writes := self.watch.writes:
            names = listed((f"{path!r} ({owner})" for path, owner in writes.items()), 3)
            reasons.append(f"its forward writes {names}, and rows are computed with what is there now")
        path = next((f"{path!r} ({own_class(one).__name__})" for path, one in self._meeting if one.training), None)
        if path is not None:
            reasons.append(f"in training mode {path} normalises by its batch, and rows by its running statistics")
        return "; ".join(reasons) or None

    def kept_tensors(self) -> str | None:
        """Tensors of earlier calls that the policy keeps in attributes, by name, for messages."""
        if self.watch.idle:
            return None
        held = self.watch.begin().held
        buffers = {id(buffer) for _, module in self.watch.modules for buffer in module._buffers.values()}
        names = [f"{path!r} ({owner})" for tensor, path, owner in held.tensors if id(tensor) not in buffers]
        return ", ".join(names[:3]) or None

    def mode(self) -> tuple[bool, ...]:
        return tuple(child.training for child in self._modules)

    def look_at_repeats(self) -> bool:
        """Whether it is still to be seen that two passes over one call compute the same."""
        self.repeats += 1
        if self.repeats > LOOKS:
            self.wide = None
        return not self.watch.idle and self.repeats <= LOOKS

    def look_at_others(self) -> bool:
        """Whether the generators of Python and NumPy are kept in the pass that comes."""
        if self.watch.idle:
            return False
        self.looks += 1
        return self.draws_others or self.looks <= LOOKS


class Start:
    """The start of the passes of one call.

    Attributes:
        drawn: the generators after each draw of an action in the forward, by the ``id`` of the module.
        noisy: whether passes draw, once one has run.
    """

    def __init__(self, effects: ForwardEffects, device: torch.device | None) -> None:
        self.effects = effects
        self.snapshot: Snapshot | None = None if effects.watch.idle else effects.watch.begin()
        self._wide = None if effects.wide is None else effects.wide.begin()
        self.device = device if device is not None and device.type == "cuda" else effects.device
        self.others = effects.look_at_others()
        self._generators = None if effects.quiet() else GeneratorState(self.device, self.others)
        self.drawn: dict[int, list[GeneratorState]] = {}
        self.noisy: bool | None = False if self._generators is None else None
        self._skipped: dict[int, int] = {}  # in the pass under way: how many draws of a module were skipped
        self._since: GeneratorState | None = None  # where noise went on last

    def wide(self) -> AbstractContextManager[None]:
        """A block after which what is beside what the policy holds, too, is as it is now."""
        wide = self.effects.wide
        return nullcontext() if wide is None or self._wide is None else wide.scratch(self._wide)

    def look_wide(self) -> bool:
        """Let passes start, from now on, also from what was beside what the policy holds; whether that is new."""
        if self.effects.wide is None or self._wide is None:
            return False
        self.effects.watch, self.effects.wide = self.effects.wide, None
        self.snapshot, self._wide = self._wide, None
        self.effects.watch.end(self.snapshot)
        return True

    def note_draw(self, module: nn.Module) -> None:
        """In the forward: a module has drawn an action."""
        if self._generators is not None:
            self.drawn.setdefault(id(module), []).append(GeneratorState(self.device, self.others))

    def forward_over(self, given: Mapping[Any, Any], before: Mapping[Any, Any]) -> None:
        """The forward that the passes explain has ended; ``before`` has copies of what it was ``given``."""
        effects = self.effects
        if effects.watch.may_write_input and not effects.keeps_input and vmap_level() < 0:
            effects.keeps_input = all(same_values(given[key], value) for key, value in before.items())
        if self.snapshot is not None:
            self.effects.watch.end(self.snapshot)
        if self._generators is not None and self._generators.others_moved():
            self.effects.draws_others = True

    def skip_draw(self, module: nn.Module) -> None:
        """In a pass: a module has handed on a stored action, after which noise goes on as if it had drawn it."""
        drawn = self.drawn.get(id(module), ())
        skipped = self._skipped.get(id(module), 0)
        if skipped < len(drawn):
            self._skipped[id(module)] = skipped + 1
            self._look()
            self._since = drawn[skipped]
            self._since.restore()

    def _look(self) -> None:
        """Note whether the pass has drawn since it last started or skipped a draw."""
        if not self.noisy and self._since is not None and self._since.moved():
            self.noisy = True
            self.effects.draws_others |= self._since.others_moved()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """One pass: it starts from the state and the noise of the call, and leaves the state as it is now."""
        self._skipped, self._since = {}, self._generators
        if self._generators is not None:
            self._generators.restore()
        with nullcontext() if self.snapshot is None else self.effects.watch.scratch(self.snapshot):
            yield
        self._look()
        self.noisy = bool(self.noisy)

"""CueCorners: a cue decides which of two corners pays; what the agent must know is known exactly.

A 5x5 grid with a goal in two opposite corners and a row of four lights above it. The agent is paid +1 in
corner A if exactly one of the first two lights is on and in corner B otherwise, and -1 in the wrong corner;
each step costs 0.02. The first two lights are relevant only together (their XOR); the last two are never.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

__all__ = ["CueCorners"]

SIDE = 5
BITS = 4
CELLS = SIDE * SIDE
CORNERS = (0, CELLS - 1)  # A, B
STEP_COST = 0.02
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # up, down, left, right


class CueCorners(EnvBase):
    """The environment, batched in torch.

    The state travels in the TensorDict, so that a rollout can start from any state: reset with a TensorDict
    made by :meth:`state`, or set ``auto_reset=False``.

    Args:
        batch_size: how many copies are stepped at once; ``()`` for one.
        max_steps: an episode is truncated after this many steps.
        seed: of the start states.
        device: where the tensors live; as in TorchRL, ``None`` leaves them on the default device and spares
            collectors a cast at every step.

    Keys:
        ``observation``: float, 90 = 3 planes (agent, goals, lights) x 6 rows x 5 columns; the lights are row 0
        of the third plane. ``("concept", "bits")``: the lights, ``(4,)``; ``("concept", "xor")``: of the first
        two; ``("concept", "unneeded_xor")``: of the last two; ``("concept", "paying_corner")``: 0 for A, 1 for
        B; ``("concept", "cell")``: where the agent is, 0 to 24. ``elapsed``: steps so far.

    Example:
        >>> env = CueCorners(batch_size=[3], seed=0)
        >>> data = env.rollout(5, break_when_any_done=False)
        >>> data["observation"].shape, data["concept", "bits"].shape
        (torch.Size([3, 5, 90]), torch.Size([3, 5, 4]))
    """

    batch_locked = False
    n_actions = 4
    observation_features = 3 * (SIDE + 1) * SIDE

    def __init__(
        self,
        *,
        batch_size: tuple[int, ...] | list[int] | torch.Size = (),
        max_steps: int = 30,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        batch_size = torch.Size(batch_size)
        if batch_size.numel() < 1:
            raise ValueError(f"CueCorners needs at least one copy, got batch_size={tuple(batch_size)}")
        super().__init__(device=device, batch_size=batch_size)
        self.max_steps = max_steps
        self._generator = torch.Generator(device=self.device or torch.get_default_device())
        self.set_seed(0 if seed is None else seed)
        shape = self.batch_size
        concepts = Composite(
            bits=Binary(n=BITS, shape=(*shape, BITS), dtype=torch.long),
            xor=Categorical(2, shape=shape),
            unneeded_xor=Categorical(2, shape=shape),
            paying_corner=Categorical(2, shape=shape),
            cell=Categorical(CELLS, shape=shape),
            shape=shape,
        )
        self.observation_spec = Composite(
            observation=Bounded(0.0, 1.0, shape=(*shape, self.observation_features)),
            elapsed=Unbounded(shape=shape, dtype=torch.long),
            concept=concepts,
            shape=shape,
            device=self.device,
        )
        self.state_spec = Composite(
            elapsed=Unbounded(shape=shape, dtype=torch.long), concept=concepts.clone(), shape=shape, device=self.device
        )
        self.action_spec = Categorical(self.n_actions, shape=shape, device=self.device)
        self.reward_spec = Unbounded(shape=(*shape, 1), device=self.device)
        self.done_spec = Composite(
            {key: Categorical(2, shape=(*shape, 1), dtype=torch.bool) for key in ("done", "terminated", "truncated")},
            shape=shape,
            device=self.device,
        )

    # ------------------------------------------------------------------ states

    def state(self, *, cell: Tensor, bits: Tensor, elapsed: Tensor | None = None) -> TensorDict:
        """The TensorDict of given states: what ``reset`` would return there.

        Args:
            cell: ``batch``, 0 to 24, not a goal corner.
            bits: ``batch + (4,)``, zeros and ones.
            elapsed: ``batch``; zero by default.

        Raises:
            ValueError: for cells outside the grid or on a goal, or bits that are not 0 and 1.
        """
        cell, bits = cell.to(self.device, torch.long), bits.to(self.device, torch.long)
        if bits.shape != (*cell.shape, BITS):
            raise ValueError(f"bits has shape {tuple(bits.shape)}, expected {(*cell.shape, BITS)}")
        if bool(((cell < 0) | (cell >= CELLS)).any()):
            raise ValueError(f"cells go from 0 to {CELLS - 1}, got {int(cell.min())} to {int(cell.max())}")
        if bool(((cell == CORNERS[0]) | (cell == CORNERS[1])).any()):
            raise ValueError(f"cells {CORNERS} are the goals, where an episode has ended")
        if bool(((bits != 0) & (bits != 1)).any()):
            raise ValueError("bits are 0 or 1")
        data = self._describe(cell, bits, torch.zeros_like(cell) if elapsed is None else elapsed)
        running = torch.zeros(*cell.shape, 1, dtype=torch.bool, device=self.device)
        return data.update({key: running.clone() for key in ("done", "terminated", "truncated")})

    def all_states(self) -> TensorDict:
        """Every state in which the agent acts: 23 cells x 16 settings of the lights, batch (368,)."""
        free = torch.tensor([cell for cell in range(CELLS) if cell not in CORNERS])
        lights = torch.cartesian_prod(*[torch.tensor([0, 1])] * BITS)
        return self.state(cell=free.repeat_interleave(len(lights)), bits=lights.repeat(len(free), 1))

    def paired_states(self, bit: int = 0) -> tuple[TensorDict, TensorDict]:
        """Every state with the light off, and the same states with only that light on: batch (184,) each."""
        if not 0 <= bit < BITS:
            raise ValueError(f"there are lights 0 to {BITS - 1}, got {bit}")
        states = self.all_states()
        off = states[states["concept", "bits"][:, bit] == 0]
        return off, self.flip(off, bit)

    def flip(self, states: TensorDictBase, bit: int = 0) -> TensorDict:
        """The same states with one light flipped, labels included."""
        bits = states["concept", "bits"].clone()
        bits[..., bit] = 1 - bits[..., bit]
        return self.state(cell=states["concept", "cell"], bits=bits, elapsed=states["elapsed"])

    @classmethod
    def light_features(cls) -> Tensor:
        """Where the four lights are in the observation, ``(4,)``."""
        return 2 * (SIDE + 1) * SIDE + torch.arange(BITS)

    # ------------------------------------------------------------------ EnvBase

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDictBase:
        shape = self.batch_size if tensordict is None or tensordict.is_empty() else tensordict.batch_size
        cell = torch.randint(1, CELLS - 1, shape, generator=self._generator, device=self.device)
        bits = torch.randint(0, 2, (*shape, BITS), generator=self._generator, device=self.device)
        return self._describe(cell, bits, torch.zeros_like(cell))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        cell, bits = tensordict["concept", "cell"], tensordict["concept", "bits"]
        elapsed = tensordict["elapsed"] + 1
        move = MOVES.to(self.device)[tensordict["action"]]
        row = (cell // SIDE + move[..., 0]).clamp(0, SIDE - 1)
        column = (cell % SIDE + move[..., 1]).clamp(0, SIDE - 1)
        cell = row * SIDE + column
        data = self._describe(cell, bits, elapsed)
        in_a, in_b = cell == CORNERS[0], cell == CORNERS[1]
        pays_b = data["concept", "paying_corner"] == 1
        right = torch.where(pays_b, in_b, in_a)
        wrong = torch.where(pays_b, in_a, in_b)
        reward = right.float() - wrong.float() - STEP_COST
        terminated = (in_a | in_b).unsqueeze(-1)
        truncated = (elapsed >= self.max_steps).unsqueeze(-1) & ~terminated
        return data.update(
            {
                "reward": reward.unsqueeze(-1),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            }
        )

    def maybe_reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Start new episodes in the rows that are done; entries that are not the environment's stay."""
        done = tensordict["done"].squeeze(-1)
        if bool(done.any()):
            concept, fresh = tensordict["concept"], self._reset(tensordict)
            began = fresh["concept"]
            for key, value in began.items():
                mask = done.unsqueeze(-1) if value.ndim > done.ndim else done
                concept.set(key, torch.where(mask, value, concept.get(key)))
            tensordict.set("elapsed", tensordict["elapsed"].masked_fill(done, 0))
            tensordict.set(
                "observation", torch.where(done.unsqueeze(-1), fresh["observation"], tensordict["observation"])
            )
            for key in ("done", "terminated", "truncated"):
                tensordict.set(key, torch.zeros_like(tensordict[key]))
        return tensordict

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(int(seed))

    def _describe(self, cell: Tensor, bits: Tensor, elapsed: Tensor) -> TensorDict:
        shape = cell.shape
        planes = torch.zeros(*shape, 3, (SIDE + 1) * SIDE, device=self.device)
        # Row 0 of each plane is the row of lights; the grid starts at row 1.
        planes[..., 0, :].scatter_(-1, (cell + SIDE).unsqueeze(-1), 1.0)
        planes[..., 1, SIDE + CORNERS[0]] = 1.0
        planes[..., 1, SIDE + CORNERS[1]] = 1.0
        planes[..., 2, :BITS] = bits.float()
        xor = bits[..., 0] ^ bits[..., 1]
        return TensorDict(
            {
                "observation": planes.flatten(-2),
                "elapsed": elapsed,
                "concept": TensorDict(
                    {
                        "bits": bits,
                        "xor": xor,
                        "unneeded_xor": bits[..., 2] ^ bits[..., 3],
                        "paying_corner": 1 - xor,
                        "cell": cell,
                    },
                    batch_size=shape,
                ),
            },
            batch_size=shape,
            device=self.device,
        )

"""A steering vector: a direction at one place, what it was extracted from, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import Checked, checked
from tdhook_rl.arguments.keys import required
from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import ArtifactError, InputError, warn
from tdhook_rl.files.stored import module_path, require_free, tensors_named
from tdhook_rl.latent.vectors.activations import root_of, unhooked
from tdhook_rl.latent.vectors.arithmetic import Arithmetic, floats
from tdhook_rl.latent.vectors.combining import terms_of
from tdhook_rl.latent.vectors.contrast import contrast
from tdhook_rl.latent.vectors.extracted import Extracted, as_long_as, chance_score
from tdhook_rl.latent.vectors.fitting import Weights, require_fit, weights_against
from tdhook_rl.latent.vectors.labels import Asked
from tdhook_rl.latent.vectors.origins import TAKEN, DataDigest, facts_given, origin_of
from tdhook_rl.latent.vectors.pairs import mean_difference
from tdhook_rl.latent.vectors.places import Place, path_and_entry, place_name
from tdhook_rl.latent.vectors.probes import probe_direction

#: Of which directions it was said that they were found in other weights.
_SAID: set[tuple[str, ...]] = set()


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SteeringVector(Arithmetic, metaclass=Checked):
    """A direction to add to the output of a module.

    Sums, differences and multiples of directions at one place are directions: ``(a - 0.5 * b) / 2``.

    Args:
        vector: of the shape of the module's features; one number for each channel stands for whole maps.
        path: the module, or a pair of it and the key of an entry that it writes, as :class:`SteeringVectors` takes it.
        facts: where it comes from, saved with it.
        shuffled: what the same extraction finds when labels are shuffled, ``(k, *features)``: the control beside
            random directions.

    The facts of what was extracted are ``source``; ``data``, a digest of the states, and how many there were;
    ``weights``, a digest of the policy's parameters; ``seed`` of the shuffled ones; ``norm``; ``score``, with
    ``score_is`` in words; ``versions``.

    Raises:
        InputError: if a tensor is not finite, or the shuffled ones have other features.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Linear(2, 3)
        >>> pair = [TensorDict({"input": x}, batch_size=1) for x in (torch.ones(1, 2), torch.zeros(1, 2))]
        >>> found = SteeringVector.from_pairs(nn.Sequential(net), "0", *pair)
        >>> torch.allclose(found.vector, net.weight.sum(1))
        True
        >>> torch.allclose((found - found / 2).vector, found.vector / 2)
        True
    """

    vector: Tensor
    path: Place
    facts: Mapping[str, Any] = field(default_factory=dict)
    shuffled: Tensor | None = None

    def __post_init__(self) -> None:
        path_and_entry(self.path, "path= is")  # raises
        require_free(self.facts, TAKEN)
        object.__setattr__(self, "vector", floats(self.vector, "vector"))
        if self.vector.ndim == 0 or self.vector.numel() == 0:
            raise InputError(f"vector= has the shape of a module's features, got {tuple(self.vector.shape)}")
        if self.shuffled is None:
            return
        object.__setattr__(self, "shuffled", floats(self.shuffled, "shuffled"))
        if self.shuffled.shape[1:] != self.vector.shape or not len(self.shuffled):
            raise InputError(
                f"shuffled= is (k, *features) beside a vector of {tuple(self.vector.shape)}, got "
                f"{tuple(self.shuffled.shape)}"
            )

    @property
    def norm(self) -> float:
        """Its length."""
        return float(self.vector.double().norm())

    @property
    def site(self) -> str:
        """Its place as one word, as controls name it: ``"gru:next.recurrent_state"`` for an entry."""
        return place_name(*path_and_entry(self.path, "path= is"))

    @classmethod
    @checked
    def from_pairs(
        cls,
        policy: nn.Module,
        path: Place,
        positive: TensorDictBase,
        negative: TensorDictBase,
        *,
        shuffles: int = 10,
        seed: int = 0,
        facts: Mapping[str, Any] | None = None,
    ) -> SteeringVector:
        """The mean activation of some states minus the mean of others (Turner et al. 2023; Rimsky et al. 2024).

        Args:
            policy: the policy; of a hooked one its methods do not act.
            path: the module whose output is compared, or a pair of it and the key of an entry that it writes.
            positive: states with the concept, of any batch shape; paired states differ in nothing else.
            negative: states without it. As many as positive ones are their partners, in order.
            shuffles: how often to extract it again with the two of each pair exchanged by chance; where there are not
                as many of one as of the other, with all states dealt out anew to two sets of these sizes.
            seed: of these.
            facts: more that is to be known of it, such as ``{"frames": 10_000}`` of training.

        Raises:
            SiteError: if there is no such module, or it writes no such entry.
            InputError: if there are no states, activations are not finite, or the policy reads states together.
        """
        found = mean_difference(policy, path, positive, negative, shuffles, seed)
        return cls._of(policy, path, found, facts, seed=seed)

    @classmethod
    @checked
    def from_contrast(
        cls,
        policy: nn.Module,
        path: Place,
        data: Any,
        where: Asked,
        *,
        positive: float = 1,
        negative: float | None = 0,
        groups: Asked | None = None,
        shuffles: int = 10,
        seed: int = 0,
        batch_size: int | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> SteeringVector:
        """The mean activation of the rows of a buffer that have a concept minus the mean of those that have not.

        Rows are read twice, first for their labels; of activations only sums are kept.

        Args:
            policy, path: as of :meth:`from_pairs`.
            data: what :func:`tdhook_rl.replay.analyze` reads: a buffer, a TensorDict, a folder, a list of TensorDicts,
                a Minari dataset.
            where: which rows have the concept: a function of a batch that gives a truth value for each row, or the key
                of labels.
            positive: the label of rows with the concept.
            negative: the label of those without; ``None``: any other label. Rows of neither, and rows whose label is
                NaN, are left out, and counted in ``other_rows``; those of which the activation is not finite in
                ``not_finite_rows``. Padding is no row.
            groups: rows that are no evidence of their own, such as those of an episode, ``("collector", "traj_ids")``:
                a key of whole numbers, or a function of a batch. Shuffled labels are dealt out to groups then.
            shuffles: how often to extract it again with the labels of all rows permuted, or dealt out to groups.
            seed: of these.
            batch_size: rows read at once.
            facts: more that is to be known of it.

        Raises:
            SiteError: if there is no such module, or it writes no such entry.
            MissingKeyError: if a label or an input of the policy is absent.
            InputError: if the rows have one class only, or labels that are none; as of ``analyze`` for the rest.

        Example:
            >>> from tdhook_rl.envs import CueCorners
            >>> from tdhook_rl.examples.agent import FC2, make_actor
            >>> actor = make_actor()
            >>> data = CueCorners(batch_size=[8]).rollout(20, actor, break_when_any_done=False)
            >>> found = SteeringVector.from_contrast(actor, FC2, data, lambda batch: batch["concept", "bits"][..., 0])
            >>> found.vector.shape, found.facts["positive_rows"] + found.facts["negative_rows"]
            (torch.Size([64]), 160)
        """
        found = contrast(
            policy, path, data, where, positive=positive, negative=negative, groups=groups, shuffles=shuffles,
            seed=seed, batch_size=batch_size,
        )  # fmt: skip
        return cls._of(policy, path, found, facts, seed=seed)

    @classmethod
    @checked
    def from_probe(
        cls,
        policy: nn.Module,
        probe: Any,
        *,
        positive: int | None = None,
        negative: int | None = None,
        scale: Literal["unit", "means"] = "unit",
        shape: Sequence[int] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> SteeringVector:
        """The direction that raises what a fitted probe reads, in units of the activations.

        Args:
            policy: the policy that it was fitted on.
            probe: a :class:`LinearProbe`, or a :class:`tdhook_rl.rollout.OnlineProbe`; of a suite
                ``suite.probe(site, concept)``.
            positive: the class whose score is raised, class 1 unless given; of several labels or numbers which of
                them, the first unless given.
            negative: the class against which it is raised, class 0 unless given.
            scale: ``"unit"``: the norm is 1; ``"means"``: as far along the direction as the means of the two classes
                lie apart in the rows that the probe was fitted on.
            shape: of the module's features, where the probe read them as one flat vector.
            facts: more that is to be known of it.

        Raises:
            SiteError: if the policy has no such module.
            InputError: if there is no probe yet, it has no such class, it does not tell the two apart, or it is not
                known how far they lie apart; if its features are not those of the module.

        Example:
            >>> from tdhook_rl import LinearProbe
            >>> probe = LinearProbe(weight=torch.tensor([[0.0, 1.0], [3.0, 5.0]]), bias=torch.zeros(2), path="0")
            >>> SteeringVector.from_probe(nn.Sequential(nn.Linear(4, 2)), probe).vector
            tensor([0.6000, 0.8000])
        """
        found, path = probe_direction(probe, positive, negative, scale, shape)
        if not path:
            raise InputError("the probe does not say which module it reads: fit it with path=")
        return cls._of(policy, path, found, facts)

    @classmethod
    @checked
    def from_tensor(
        cls, policy: nn.Module, path: Place, vector: Tensor, *, facts: Mapping[str, Any] | None = None
    ) -> SteeringVector:
        """Any tensor as a direction, with the weights that it belongs to.

        Raises:
            SiteError: if there is no such module, or it writes no such entry.
            InputError: if it does not fit the features that the module says it has.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 2))
            >>> SteeringVector.from_tensor(net, "0", net[0].weight[:, 1]).check(net)
            'same'
        """
        return cls._of(policy, path, Extracted(floats(vector, "vector"), None, {"source": "tensor"}), facts)

    @classmethod
    @checked
    def from_addition(
        cls,
        policy: nn.Module,
        path: str,
        data: TensorDictBase,
        *,
        steer_key: str = "steer",
        facts: Mapping[str, Any] | None = None,
    ) -> SteeringVector:
        """What :class:`ActivationAddition` has written under ``(steer_key, path)``, one vector for all rows.

        Raises:
            MissingKeyError: if there is no such entry.
            InputError: if rows have different vectors.
        """
        rows = required(data, (steer_key, path), "SteeringVector.from_addition reads what ActivationAddition wrote,")
        rows = rows.flatten(0, data.ndim - 1) if data.ndim else rows[None]
        if not len(rows) or not torch.equal(rows, rows[:1].expand_as(rows)):
            raise InputError(
                f"{(steer_key, path)!r} holds {len(rows)} rows that are not one vector: ActivationAddition writes the "
                "same for every row of a call; take those of one call"
            )
        digest = DataDigest()
        for root in ("positive", "negative"):
            for key, value in data.get(root, data.empty()).items(True, True):
                digest.add(f"{root} {key}", value)
        extracted = Extracted(rows[0].detach().clone(), None, {"source": "addition", "data": digest.hexdigest()})
        return cls._of(policy, path, extracted, facts)

    @classmethod
    def _of(
        cls,
        policy: nn.Module,
        path: Place,
        found: Extracted,
        more: Mapping[str, Any] | None,
        seed: int | None = None,
    ) -> SteeringVector:
        made = cls(vector=found.vector, path=path, shuffled=found.shuffled)  # raises
        policy = unhooked(policy)
        require_fit(policy, *path_and_entry(path, "path= is"), made.vector.shape)
        score = {} if seed is None else {"seed": seed, **chance_score(made.vector, made.shuffled)}
        own = {**found.facts, **score, "norm": made.norm, **origin_of(policy)}
        return cls(vector=made.vector, path=path, facts=own | facts_given(more), shuffled=made.shuffled)

    @checked
    def random_like(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Random directions of equal norm, ``(count, *features)``: the control of a steering experiment."""
        _require_count(count)
        noise = torch.randn(count, *self.vector.shape, generator=generator)
        norms = noise.reshape(count, -1).norm(dim=1).reshape(count, *(1,) * self.vector.ndim)
        return noise / norms * self.vector.norm().to(noise)

    @checked
    def shuffled_like(self, count: int | None = None) -> Tensor:
        """What the extraction finds with shuffled labels, at equal norm, ``(count, *features)``: the other control.

        Unlike random directions these lie where the activations vary, which is also along the concept: a part of each
        is the vector itself, with a sign of chance (``facts["shuffled_cosine"]`` says how much). ``shuffled`` has them
        as long as they were found.

        Args:
            count: how many; all that there are unless given.

        Raises:
            InputError: if there are none, or fewer; if they are zero, or the vector itself up to their length, as of
                pairs that all differ in one direction.
        """
        _require_count(count)
        there = 0 if self.shuffled is None else len(self.shuffled)
        if self.shuffled is None or (count or 0) > there:
            raise InputError(
                f"{'' if count is None else f'{count} '}shuffled extractions were asked for and this vector has {there}"
                ": extract it by from_pairs or from_contrast with shuffles=, or use random_like"
            )
        return as_long_as(self.vector, self.shuffled[:count])

    @checked
    def check(self, policy: nn.Module) -> Weights:
        """Whether it fits a policy, and whether that has the weights in which it was found.

        :class:`SteeringVectors` does the same when it is prepared: what does not fit is an error there, and other
        weights (an earlier checkpoint of the agent, say) are a warning, once. Devices and types are no matter:
        directions are cast where they are used. Of modules that do not say which features they have, the first call
        tells.

        Returns:
            ``"same"``, ``"others"``, or ``"unknown"`` where the facts do not say which weights it was found in.

        Raises:
            SiteError: if the policy has no such module, or the module writes no such entry.
            InputError: if the module has other features.
        """
        root = root_of(policy)
        require_fit(root, *path_and_entry(self.path, "path= is"), self.vector.shape)
        return weights_against(self.facts, root)

    def say_other_weights(self, policy: nn.Module) -> None:
        """Warn, once for each direction, if the policy has other weights than those in which it was found."""
        said = (self.site, *sorted({str(one["of"].get("weights")) for one in terms_of(self.facts)}))
        if said not in _SAID and weights_against(self.facts, root_of(policy)) == "others":
            _SAID.add(said)
            warn(
                f"the direction at {self.site!r} was found in other weights than the policy has now: in another "
                "checkpoint it may mean something else. Extract it anew, or compare the two with cosines({...})"
            )

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.vector.shape))
        parts = [f"{shape} at {self.site!r}", f"norm {self.norm:.4g}"]
        if isinstance(self.facts.get("source"), str):
            parts.append(f"from {self.facts['source']:.40}")
        if self.shuffled is not None:
            parts.append(f"{len(self.shuffled)} shuffled")
        return f"SteeringVector({', '.join(parts)})"

    @checked
    def save(self, path: str | Path) -> Path:
        """Write safetensors and JSON (see :func:`tdhook_rl.artifacts.save_artifact`)."""
        module, entry = path_and_entry(self.path, "path= is")
        tensors = {"vector": self.vector} | ({} if self.shuffled is None else {"shuffled": self.shuffled})
        place: dict[str, Any] = {"module_path": module}
        if entry is not None:
            place["entry"] = entry if isinstance(entry, str) else list(entry)
        return save_artifact(path, "steering_vector", tensors, {**self.facts, **place})

    @classmethod
    @checked
    def load(cls, path: str | Path) -> SteeringVector:
        """Read a saved vector; nothing is unpickled.

        Raises:
            ArtifactError: if the file is absent, corrupt or not a steering vector.
        """
        tensors, facts = load_artifact(path, "steering_vector")
        both = "shuffled" in tensors
        vector, *shuffled = tensors_named(path, tensors, vector=0, **({"shuffled": 0} if both else {}))
        module = module_path(path, facts)
        if not module:
            raise ArtifactError(f"{path} does not say at which module its vector acts")
        entry = facts.get("entry")
        entry = tuple(entry) if isinstance(entry, list) else entry
        place: Any = module if entry is None else (module, entry)
        facts = {name: facts[name] for name in facts if name not in TAKEN}
        try:
            return cls(vector=vector, path=place, facts=facts, shuffled=shuffled[0] if both else None)
        except InputError as error:
            raise ArtifactError(f"{path} is no steering vector: {error}") from None


def _require_count(count: int | None) -> None:
    if count is not None and count < 0:
        raise InputError(f"count= is how many directions, from 0 on, got {count}")

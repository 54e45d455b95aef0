"""Probes that can be trusted, of many concepts at many sites, from each batch that is collected."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.checked import checked, require_counts
from tdhook_rl.calls.preconditions import require_data
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.latent.probing.linear_probe import LinearProbe
from tdhook_rl.probes.board import CLASSES, Board, Observed, Source
from tdhook_rl.probes.probe_table import ProbeTable
from tdhook_rl.probes.quantities import (
    Future,
    Return,
    course_of,
    label_columns,
    read_label,
    read_of_row,
    require_concepts,
)
from tdhook_rl.probes.site_features import Layout, SiteFeatures
from tdhook_rl.probes.splits import GroupSplit
from tdhook_rl.probes.waiting import Waiting
from tdhook_rl.sites.controls import Controls
from tdhook_rl.statistics.interval import check_confidence


class ProbeSuite:
    """Sites by concepts: what can be read of each activation, beside what makes the figure mean something.

    Each concept is read from the trained network, from an untrained one of the same layers, and from the raw
    observation; and labels that were dealt out to groups by chance are read as well. All are scored on groups
    (episodes, unless told otherwise) that the probes were not fitted on, with intervals by group. Fits are exact
    functions of sums, which decay, and add up over workers; no activation is kept.

    Args:
        policy: the policy or network. Give the hooked policy that collects, where it caches the sites: the activations
            in its batches are read. Otherwise batches are annotated, whatever lies in them under these keys.
        sites: the modules to read: paths or patterns.
        concepts: by name a key, a function of the batch, a :class:`Future` or a :class:`Return`. Integers from 0 to 511
            and booleans are classes; with one dimension more (that of agents or squares aside) several yes-or-no
            labels; floats are numbers, scored by the share of variance explained.
        untrained: the untrained network; unless given an ``untrained_copy`` of the policy; ``False`` for none.
        split: which rows train and which are held out.
        control: the key, or keys, of what labels are dealt out to by chance, such as the state (Hewitt & Liang 2019);
            unless given the last grouping of ``split``.
        penalty: of the probes, on features scaled to variance 1; unless given chosen across halves of the training
            groups, for each concept and site.
        decay: what all sums are multiplied by before each batch; below 1 where the network is learning.
        layout: of activations with squares or agents: ``"flat"``: all in one vector; ``"pooled"``: the mean over them;
            ``"each"``: a row for each, whose labels are the row's, or one for each. By site, or for all.
        units: which axis of an activation holds the units, where modules do not tell.
        input_key: of the raw observation, or a list of keys; unless given all that the policy observes: its inputs
            without the memory that it has written itself.
        every: every how many batches are looked at. A look at the agent of the examples takes a tenth of its PPO
            update, half of which is what the same sums cost by hand (``benchmarks/probe_cost.py``): where the network
            is that small, every tenth batch adds 2%. Where a future is asked for, all are looked at, and the
            probes are solved for and scored in so many.
        most_waiting: how many rows may wait for their future.
        min_rows: a class with fewer held-out rows is not scored.
        confidence: of the intervals.
        seed: of the untrained network.

    Raises:
        SiteError: if a path names no module.
        InputError: for arguments that mean nothing, or if an untrained network has to be given.

    Example:
        >>> from tdhook_rl.envs import CueCorners
        >>> from tdhook_rl.examples.agent import FC2, make_actor
        >>> actor = make_actor()
        >>> suite = ProbeSuite(actor, sites=[FC2], concepts={"light 1": lambda data: data["concept", "bits"][..., 0]},
        ...                    split=GroupSplit(("concept", "cell")))
        >>> suite.update(CueCorners(batch_size=[64]).rollout(20, actor, break_when_any_done=False))["rows"]
        1280.0
        >>> suite.table()[FC2, "light 1"].score
        'accuracy'
    """

    @checked
    def __init__(
        self,
        policy: nn.Module,
        *,
        sites: Sequence[str] | str,
        concepts: Mapping[str, Any],
        untrained: Any = None,
        split: GroupSplit | None = None,
        control: Any = None,
        penalty: float | None = None,
        decay: float = 1.0,
        layout: Layout | Mapping[str, Layout] = "flat",
        units: int | Mapping[str, int] | None = None,
        input_key: NestedKey | list[NestedKey] | None = None,
        every: int = 1,
        most_waiting: int = 100_000,
        min_rows: float = 10,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        check_confidence(confidence)
        require_concepts(concepts)
        if not 0 <= decay <= 1:
            raise InputError(f"a decay factor lies between 0 and 1, got {decay}")
        if penalty is not None and not 0 <= penalty < float("inf"):
            raise InputError(f"a penalty is a number that is not negative, got {penalty}")
        require_counts(every=every)
        if most_waiting < 0:
            raise InputError(f"most_waiting= is a number of rows, got {most_waiting}")
        self.every = every
        self._updates = 0
        self.split = split or GroupSplit()
        self.decay = decay
        self._control = None if control is None else GroupSplit(control)
        self._features = SiteFeatures(
            policy, sites, untrained=untrained, layout=layout, units=units, input_key=input_key, seed=seed  # type: ignore[arg-type]
        )  # fmt: skip
        self._now = {name: one for name, one in concepts.items() if not isinstance(one, Future | Return)}
        asked = {name: one for name, one in concepts.items() if isinstance(one, Future | Return)}
        self._later = Waiting(asked, most_waiting) if asked else None
        self._asked = asked
        self._names = list(concepts)
        self._board = Board(
            groupings=len(self.split.groupings), shuffled=True, penalty=penalty, confidence=confidence,
            min_rows=max(min_rows, 1e-3),
        )  # fmt: skip

    @property
    def sites(self) -> list[str]:
        """The modules that are read."""
        return list(self._features.sites)

    @checked
    def update(self, batch: TensorDictBase) -> dict[str, float]:
        """Learn from the training rows of a batch, and score its held-out rows with the probes that result.

        Every batch is to be given, in the order of collection: trajectories go on from one to the next.

        Returns:
            ``rows``, ``train_rows``, ``held_out_rows`` (padding is no row) and ``waiting``, those whose future has not
            been seen; nothing where the batch was not looked at.

        Raises:
            MissingKeyError: if the batch lacks a concept, a group or an input.
            InputError: for labels or activations of another shape or type than before.
        """
        require_data(batch, "ProbeSuite.update")
        # Sums that were made in inference mode could not be added to outside it.
        with torch.inference_mode(False), torch.no_grad():
            return self._update(batch)

    def table(self) -> ProbeTable:
        """A cell for each site and concept; scores are pooled over batches, with the decay of the fit."""
        left_out = {} if self._later is None else self._later.left_out
        sites = {site: self._features.inputs.get(site) for site in self.sites}
        return self._board.table(sites, left_out)

    def probe(self, site: str, concept: str) -> LinearProbe | None:
        """The fitted probe, to be read out inline, saved, or taken as a direction; ``None`` while there is none.

        Raises:
            InputError: for a site or concept that is not read.
        """
        if site not in self.sites:
            raise InputError(f"no probe reads {site!r}; {nearest(site, self.sites)}")
        known = [name for _, name in self._board.scores()]
        if known and concept not in known:
            raise InputError(f"no probe is of {concept!r}; {nearest(concept, known)}")
        return self._board.probe(concept, Source("trained", site), site)

    def push(self, controls: Controls, name: str, site: str, concept: str) -> bool:
        """Write a probe into the controls of a :class:`ProbeReadout`; running workers read it at once.

        Args:
            controls: of the hooked policy.
            name: of the readout, ``"probe.<name>"``.
            site, concept: which probe.

        Returns:
            whether there is a probe yet.
        """
        found = self.probe(site, concept)
        if found is None:
            return False
        controls.require_place(name, found.path)
        controls.update_(found.controls(name))
        return True

    @torch.inference_mode(False)
    def __add__(self, other: ProbeSuite) -> ProbeSuite:
        """What two workers or shards have seen, together: sums add up, and the probes are solved anew.

        Neither of the two is changed. Rows that wait in one of them are counted as left out, since trajectories of
        several workers may have the same numbers; episodes of the same number count as one group.

        Raises:
            InputError: for suites of other sites, concepts, splits or options.
        """
        for what, own, its in (
            ("sites", self.sites, other.sites),
            ("concepts", self._names, other._names),
            ("split", _facts(self.split), _facts(other.split)),
            ("control", _facts(self._control), _facts(other._control)),
        ):
            if own != its:
                raise InputError(f"only suites of the same {what} add up, got {own} and {its}")
        merged = copy.copy(self)
        merged._board = self._board + other._board
        if self._later is not None and other._later is not None:
            merged._later = self._later.emptied(other._later)
        return merged

    # ------------------------------------------------------------------ inner

    def _update(self, batch: TensorDictBase) -> dict[str, float]:
        due = self._updates % self.every == 0
        self._updates += 1
        if not due and self._later is None:
            return {}
        real = real_rows(batch)
        count = batch.batch_size.numel()
        rows = torch.arange(count) if real is None else real.reshape(-1).cpu().nonzero().squeeze(-1)
        if not len(rows):
            return self._counts(0, 0, 0)
        labels = {name: label_columns(read_label(what, batch), batch)[rows] for name, what in self._now.items()}
        asked = {name: self._quantity(one, batch, rows) for name, one in self._asked.items()}
        codes = [code.reshape(-1).cpu()[rows] for code in self.split.groups(batch)]
        train, held = self.split.masks(codes)
        control = codes[-1] if self._control is None else self._control.groups(batch)[0].reshape(-1).cpu()[rows]
        seen = Observed(self._features.of(batch, rows), codes, train, held, control)
        self._board.decay(self.decay)
        classes = {name: value for name, value in labels.items() if not value.is_floating_point()}
        if classes:
            self._board.add(CLASSES, classes, seen, score=due)
        for name in labels.keys() - classes.keys():
            self._board.add(name, {name: labels[name]}, seen, score=due)
        if self._later is not None:
            self._look_back(batch, rows, seen, asked, due)
        return self._counts(len(rows), int(train.sum()), int(held.sum()))

    def _counts(self, rows: int, train: int, held: int) -> dict[str, float]:
        waiting = 0 if self._later is None else len(self._later)
        return {
            "rows": float(rows),
            "train_rows": float(train),
            "held_out_rows": float(held),
            "waiting": float(waiting),
        }

    def _look_back(
        self, batch: TensorDictBase, rows: Tensor, seen: Observed, asked: Mapping[str, Tensor], due: bool
    ) -> None:
        assert self._later is not None
        table: dict[Any, Tensor] = {
            **{key: value[rows] for key, value in course_of(batch).items()},
            "train": seen.train, "held": seen.held, "control": seen.control,
            **{("asked", name): value for name, value in asked.items()},
            **{("code", place): code for place, code in enumerate(seen.codes)},
            **{("features", source): value for source, value in seen.features.items()},
        }  # fmt: skip
        for name, (known, labels) in self._later.push(table).items():
            own = Observed(
                {source: known["features", source] for source in seen.features},
                [known["code", place] for place in range(len(seen.codes))],
                known["train"], known["held"], known["control"],
            )  # fmt: skip
            self._board.add(name, {name: labels}, own, score=due)

    def _quantity(self, asked: Future | Return, batch: TensorDictBase, rows: Tensor) -> Tensor:
        return label_columns(read_label(read_of_row(asked, batch), batch), batch)[rows]


def _facts(split: GroupSplit | None) -> tuple[Any, ...] | None:
    return None if split is None else (split.groupings, split.held_out, split.seed)

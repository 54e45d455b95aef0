"""Random networks: every method is right or refuses, in every mode (``python -m tests.fuzz`` runs thousands)."""

from __future__ import annotations

import pytest

from tests.fuzz import CHECKS, Outcome, run

#: What may not be refused for a tree of plain modules.
ALWAYS = ("twin_saliency", "twin_paths", "twin_occlusion", "saliency_step", "saliency_batch", "paths", "occlusion")


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_nothing_is_wrong_in_silence(first: int) -> None:
    outcome = Outcome()
    for seed in range(first, first + 10):
        run(seed, "reuse state noise arithmetic" if seed % 2 else "", outcome)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert sum(outcome.counts.values()) == 10 * len(CHECKS)


def test_plain_trees_are_explained_without_a_word() -> None:
    outcome = Outcome()
    for seed in range(1000, 1020):
        for check in ALWAYS:
            run(seed, "", outcome, only=check)
    assert {what for _, what in outcome.counts} == {"right"}, outcome.wrong or outcome.refusals

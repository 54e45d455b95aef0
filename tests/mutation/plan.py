"""What is changed, and which tests are to notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: What `make test` runs.
QUICK = "not slow and not gpu and not matrix and not faults"


@dataclass(frozen=True)
class Group:
    """A part of the package.

    Attributes:
        folder: its files, below ``tdhook_rl``.
        sample: how many of its changes are drawn; all, where ``None``.
        tests: the files whose tests are to notice, and of all examples in docstrings those of the folder; without the
            conformance kit, which takes longer than all others.
        without: files whose tests need what is not installed with the others.
        elsewhere: functions likewise.
    """

    folder: str
    sample: int | None
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()

    def files(self) -> list[str]:
        """Paths relative to the repository."""
        paths = sorted((ROOT / "tdhook_rl" / self.folder).glob("*.py"))
        return [str(path.relative_to(ROOT)) for path in paths if path.name not in self.without]

    def arguments(self) -> list[str]:
        """What pytest is called with to run all that may notice."""
        modules = [f"tdhook_rl.{self.folder.replace('/', '.')}"]
        modules += [path.removesuffix(".py").replace("/", ".") for path in self.files() if "__init__" not in path]
        examples = [f"tests/test_docs.py::test_docstring_examples[{name}]" for name in modules]
        return [*(f"tests/{name}.py" for name in self.tests), *examples, "-m", QUICK]


GROUPS = {
    "replay": Group("replay", None, (
        "test_replay", "test_replay_selection", "test_replay_sources", "test_results_survive", "test_results_pages",
        "test_queries",
        "test_parquet", "test_parquet_rows", "test_probe_grid", "test_buffer_transforms", "test_cli_analyze",
        "test_wrong_arguments", "test_wrong_calls", "test_provenance", "test_small_changes_offline", "test_manifests",
        "test_traceable", "test_report_damage", "faults/test_faults",
    ), ("ray_engine.py", "minari_export.py"), ("Work.on_ray", "_computing")),
    "attribution": Group("attribution", 150, (
        "test_saliency", "test_integrated_gradients", "test_lrp", "test_lrp_computed_layers", "test_lrp_functions",
        "test_perturbation", "test_activation_maximisation", "test_cam_and_guided", "test_guided_functions",
        "test_default_targets", "test_unreached_inputs", "test_oracle_table", "test_wrong_arguments",
        "test_against_captum", "test_recurrent", "test_decisions", "test_nothing_silent", "test_seed_forms",
        "test_exact_checks", "test_small_changes", "test_own_dtype", "test_repeated_modules", "test_missing_rows",
        "test_in_place",
    )),
    "probing": Group("latent/probing", 150, (
        "test_probing", "test_probe_banks", "test_probe_scores", "test_probe_suite", "test_probe_sums",
        "test_probe_features", "test_seed_probing", "test_seed_estimators", "test_artifact_files",
        "test_degenerate_data", "test_gates", "test_gates_in_rollouts",
        "test_wrong_arguments", "test_probe_grid", "test_oracle_table", "test_small_changes", "test_probe_edges",
    )),
}  # fmt: skip

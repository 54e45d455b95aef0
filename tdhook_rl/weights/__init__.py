"""Changing weights of the hooked policy alone: pruning, adapters, task vectors."""

from tdhook_rl.weights.adapters import Adapters
from tdhook_rl.weights.pruning import Pruning
from tdhook_rl.weights.task_vectors import TaskVectors

__all__ = ["Adapters", "Pruning", "TaskVectors"]

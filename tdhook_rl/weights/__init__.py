"""Changing weights of the hooked policy alone: pruning, adapters, task vectors.

Knows the tensors that a hooked policy has of its own; what they compute is for the other methods to show.
"""

from tdhook_rl.weights.adapters import Adapters
from tdhook_rl.weights.pruning import Pruning
from tdhook_rl.weights.task_vectors import TaskVectors

__all__ = ["Adapters", "Pruning", "TaskVectors"]

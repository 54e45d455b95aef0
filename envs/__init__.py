"""Environments whose answers are known: what matters for value and policy, and what does not.

Knows tensors, TorchRL and Gymnasium; nothing of policies or methods.

Importing this package registers the environments with Gymnasium.
"""

from tdhook_rl.envs.base import ConceptEnv
from tdhook_rl.envs.check import Report, check_concept_env
from tdhook_rl.envs.cheese import Cheese
from tdhook_rl.envs.concepts import Concept
from tdhook_rl.envs.cue_corners import CueCorners
from tdhook_rl.envs.cue_grid import CueGrid
from tdhook_rl.envs.gymnasium_face import GymnasiumFace, register
from tdhook_rl.envs.info_labels import ComputedLabels, InfoField, InfoLabels, add_computed_labels, add_info_labels
from tdhook_rl.envs.key_door import KeyDoor
from tdhook_rl.envs.known_value import KnownValue
from tdhook_rl.envs.t_maze import TMaze

__all__ = [
    "Cheese",
    "ComputedLabels",
    "Concept",
    "ConceptEnv",
    "CueCorners",
    "CueGrid",
    "GymnasiumFace",
    "InfoField",
    "InfoLabels",
    "KeyDoor",
    "KnownValue",
    "Report",
    "TMaze",
    "add_computed_labels",
    "add_info_labels",
    "check_concept_env",
    "register",
]

register(KnownValue, CueCorners, CueGrid, TMaze, Cheese, KeyDoor)

"""The intrinsic dimension of a model on a task: training in random subspaces of growing dimension."""

from .dimension import Point
from .options import IntrinsicOptions
from .results import IntrinsicResult
from .subspace import SubspaceModel
from .sweep import measure_intrinsic_dimension

__all__ = ["IntrinsicOptions", "IntrinsicResult", "Point", "SubspaceModel", "measure_intrinsic_dimension"]

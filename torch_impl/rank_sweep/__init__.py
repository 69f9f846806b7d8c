"""Which rank and which weights are enough: one model, data and budget at many ranks and target sets."""

from .options import RankSweepOptions
from .results import RankSweepResult
from .sweep import sweep_ranks

__all__ = ["RankSweepOptions", "RankSweepResult", "sweep_ranks"]

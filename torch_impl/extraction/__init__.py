"""A low-rank adapter from a base and a fully fine-tuned checkpoint."""

from .extract import extract
from .options import ExtractOptions
from .summary import ExtractedTensor, ExtractionSummary, OtherTensor

__all__ = ["ExtractOptions", "ExtractedTensor", "ExtractionSummary", "OtherTensor", "extract"]

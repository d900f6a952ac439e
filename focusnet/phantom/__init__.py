"""Synthetic head-and-neck CTs and their organs, for tests, demos and benchmarks without patient data."""

from .command import main
from .hybrid import make_hybrid
from .render import ALL_ORGANS, FIELDS_OF_VIEW, PAPER_ORGANS, make_phantom

__all__ = ["ALL_ORGANS", "FIELDS_OF_VIEW", "PAPER_ORGANS", "main", "make_hybrid", "make_phantom"]

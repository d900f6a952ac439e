"""Synthetic head-and-neck CTs with their organs, for tests, demonstrations and benchmarks without patient data."""

from .render import ALL_ORGANS, FIELDS_OF_VIEW, PAPER_ORGANS, make_phantom

__all__ = ["ALL_ORGANS", "FIELDS_OF_VIEW", "PAPER_ORGANS", "make_phantom"]

"""The paper's comparisons as commands."""

from .command import main

__all__ = ["main"]

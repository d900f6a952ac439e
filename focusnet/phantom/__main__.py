"""`python -m focusnet.phantom`."""

from ..cli import run
from . import main

run(main)

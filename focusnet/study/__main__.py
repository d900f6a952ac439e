"""`python -m focusnet.study`."""

from ..cli import run
from . import main

run(main)

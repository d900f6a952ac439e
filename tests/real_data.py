"""Where the tests that need real data find it."""

import os
from pathlib import Path

import pytest

REAL = Path(os.environ.get("FOCUSNET_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL} (set FOCUSNET_TEST_DATA)")

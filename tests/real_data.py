"""Where the tests that need real data find it: in the folder that the environment variable FOCUSNET_TEST_DATA names.

- `openkbp/{train,validation}/pt_N/img.nrrd` and `structures/`: OpenKBP (https://github.com/ababier/open-kbp), its CSVs
  converted to PDDCA's layout and cropped to the body; 170 and 33 patients
- `deepmind-oars/{oncologist,radiographer}/<case>/segmentations/`: two observers' contours of 26 scans
  (https://github.com/google-deepmind/tcia-ct-scan-dataset)
- `pddca-labels/0522cNNNN/structures/`: contours of 11 patients of PDDCA 1.4.1
"""

import os
from pathlib import Path

import pytest

_FOLDER = os.environ.get("FOCUSNET_TEST_DATA")
REAL = Path(_FOLDER or "FOCUSNET_TEST_DATA-is-not-set")
needs_real_data = pytest.mark.skipif(
    not _FOLDER, reason="needs real data: set FOCUSNET_TEST_DATA (see tests/real_data.py)"
)

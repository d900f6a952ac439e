"""Where Triton kernels can run: on a GPU, or interpreted."""

import os

import pytest
import torch


def skip_unless_kernels_run() -> None:
    """Skip the test that has neither."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")

"""Every op defined in plain, differentiable PyTorch: the oracle of the tests and the fallback of the kernels."""

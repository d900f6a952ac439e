"""The definition of every op in plain, differentiable PyTorch: the oracle of the tests and the fallback of the kernels."""

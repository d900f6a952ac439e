"""Triton kernels, for CUDA and ROCm; imported when a tensor on such a device first needs one."""

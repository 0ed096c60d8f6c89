"""CUDA: sources that are compiled on first use, their compiler, and the cache of compiled kernels."""

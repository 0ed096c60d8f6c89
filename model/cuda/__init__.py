"""CUDA: sources that are compiled when they are first needed, their compiler, and the kernels kept."""

"""Counting on a CUDA device, and in plain PyTorch if its kernels do not compile."""

"""Counting on a CUDA device, and the same in plain torch where its kernels do not compile."""

"""The operators of the INT8 blocks: the interface, and what computes them on the CPU and on CUDA."""

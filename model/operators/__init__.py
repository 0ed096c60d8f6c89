"""The operators of the forward passes: CPU kernels, plain PyTorch, CUDA."""

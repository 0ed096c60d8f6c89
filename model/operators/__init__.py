"""What the forward passes call: kernels of the host, plain torch, CUDA."""

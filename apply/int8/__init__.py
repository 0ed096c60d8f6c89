"""The INT8 model: arithmetic, weights, a forward pass for each kind of block, operators of CPU and CUDA, its folder."""

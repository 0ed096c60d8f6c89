"""The INT8 model: arithmetic, weights, blocks of both families on host and CUDA, and its folder on disk."""

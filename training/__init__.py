"""How the bundled reference models are made: tokenizer, data, networks, training loop, held-out figures, export.

``python -m training --help`` lists the steps. Training wants a CUDA device and mamba-ssm's scan kernels;
everything else, the networks' plain-torch scans included, runs on a CPU.
"""

"""The floating-point Mamba: names and checkpoints, tokenizer, texts, the forward pass with its observation points,
and the preparation (norm folding, Hadamard rotation) that INT8 quantization starts from.
"""

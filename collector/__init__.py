"""Model and text to one run: taps, counting, accumulation, part files and resume, writing; import of saved tensors."""

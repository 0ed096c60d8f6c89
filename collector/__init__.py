"""Makes a run of a model and a text: taps, counting, accumulation, resume, tables; imports saved tensors."""

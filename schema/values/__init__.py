"""Values and their distributions: quantiles, the INT8 code of a value, buckets of positions, types of arrays."""

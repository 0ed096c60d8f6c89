// Counting of some sites' activations on CUDA, as host/kernels.py on the CPU: per document and group every 16-bit
// pattern, amax and quantiles; per group the largest values; per channel the moments. Compiled at run time
// (counter.py).
//
// KIND      0 float16, 1 bfloat16, 2 float32 rounded to float16, 3 float32 rounded to bfloat16
// HALVINGS  how often the range of patterns is halved, one pass each, so that its counters fit in shared memory
//
// The kernels of a batch of sites run in this order: count_items, reduce_counts, summarise, moments, finish.

#include "counts.cuh"
#include "quantiles.cuh"
#include "moments.cuh"
#include "combine.cuh"

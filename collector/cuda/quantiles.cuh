// Computes each document's amax and quantiles, and the threshold of each group's largest values, from the counts.

#pragma once

#include "site_batch.cuh"

const int THREADS = SIGN / TOGETHER; // per block of `summarise`, each for one range of magnitudes

// Add to `all` the number of some items' spilled values in the `wanted`-th range of EACH magnitudes.
template <u32 EACH>
__device__ __forceinline__ void add_spills(const SiteBatch& b, int first, int last, u32 wanted, u64& all) {
    for (int item = first; item < last; item++) {
        const u32* spills = b.spills + b.spill_first[item];
        for (u32 k = 0; k < b.spill_count[item]; k++) all += (spills[k] & (SIGN - 1)) / EACH == wanted ? 0x8000u : 0u;
    }
}

// The number of a segment's values with magnitudes in a range.
__device__ __forceinline__ u64 in_segment(const SiteBatch& b, int segment, u32 range) {
    const int first = b.segment_first[segment], last = b.segment_first[segment + 1];
    u64 all = 0;
#pragma unroll 4
    for (int item = first; item < last; item++) {
        const u32* ranges = b.ranges + (u64)item * RANGES;
        all += ranges[range] + ranges[range + RANGES / 2];
    }
    add_spills<TOGETHER>(b, first, last, range, all);
    return all;
}

// The number of a segment's values of one magnitude.
__device__ __forceinline__ u64 of_magnitude(const SiteBatch& b, int segment, u32 magnitude) {
    const int first = b.segment_first[segment], last = b.segment_first[segment + 1];
    u64 all = 0;
#pragma unroll 4
    for (int item = first; item < last; item++) {
        const u16* counters = (const u16*)(b.slots + (u64)item * ALL_WORDS);
        all += counters[magnitude] + counters[magnitude + SIGN];
    }
    add_spills<1>(b, first, last, magnitude, all);
    return all;
}

// The sum over this lane and those before it in its warp.
__device__ __forceinline__ u64 upto_lane(u64 mine) {
    const u32 lane = threadIdx.x & 31;
    for (int step = 1; step < 32; step *= 2) {
        const u64 other = __shfl_up_sync(FULL, mine, step);
        if (lane >= step) mine += other;
    }
    return mine;
}

// torch.quantile's interpolation, as quambase.schema.values.distribution.lerp_torch.
__device__ float lerp_torch(float below, float above, float weight) {
    const double step = (double)__fsub_rn(above, below);
    if (weight < 0.5f) return (float)__dadd_rn((double)below, __dmul_rn((double)weight, step));
    return (float)__dadd_rn((double)above, __dmul_rn((double)__fsub_rn(weight, 1.0f), step));
}

// Per site: one block per document and group, one per document (the whole site, if it is divided), and one per group
// (its threshold). The first thread has the largest magnitudes. The prefix sums of the threads' counts tell which range
// contains a wanted rank; then one warp per rank searches that range's magnitudes.
extern "C" __global__ void __launch_bounds__(THREADS) summarise(const __grid_constant__ SiteBatch b) {
    __shared__ u64 upto[THREADS];
    __shared__ u64 of_warps[32];
    __shared__ u64 target[32];
    __shared__ u32 answer[32];
    const int site = part_of(b.summary_first, blockIdx.x);
    const u32 block = blockIdx.x - b.summary_first[site], lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const Shape& s = b.shapes[site];
    const int groups = s.groups, documents = s.documents, quantiles = b.quantiles;
    const int parts = groups == 1 ? 1 : groups + 1;
    const bool of_document = block < (u32)(documents * parts);
    const int document = of_document ? block / parts : 0;
    const int group = of_document ? block % parts : block - documents * parts;
    const bool whole = of_document && group == groups;
    const int first_group = whole ? 0 : group, last_group = whole ? groups : group + 1;
    const u64* call = b.call + (u64)(s.first_group + group) * PATTERNS;

    const u32 mine = THREADS - 1 - threadIdx.x; // its range
    u64 here = 0;
    if (of_document) {
        for (int g = first_group; g < last_group; g++) {
            here += in_segment(b, s.first_segment + g * documents + document, mine);
        }
    } else {
        const u64* ranges = b.call_ranges + (u64)(s.first_group + group) * RANGES;
        here = ranges[mine] + ranges[mine + RANGES / 2];
    }
    const u64 in_warp = upto_lane(here);
    if (lane == 31) of_warps[warp] = in_warp;
    __syncthreads();
    if (warp == 0) of_warps[lane] = upto_lane(of_warps[lane]);
    __syncthreads();
    upto[threadIdx.x] = in_warp + (warp ? of_warps[warp - 1] : 0);
    __syncthreads();

    const u32 finite = THREADS - (u32)b.infinity / TOGETHER; // the first thread whose magnitudes are
    const u64 unfinite = upto[finite - 1];
    const i64 rows = of_document ? s.offsets[document + 1] - s.offsets[document] : s.offsets[documents] - s.offsets[0];
    const i64 width = whole ? s.edges[groups] : s.edges[group + 1] - s.edges[group];
    const i64 total = rows * width - (i64)unfinite;
    float* out = b.sites[site].summaries + ((i64)document * (groups + 1) + group) * (1 + quantiles);
    if (total == 0) {
        if (of_document) {
            const float nan = __uint_as_float(0x7fc00000u);
            if (threadIdx.x <= quantiles) out[threadIdx.x] = nan;
            if (groups == 1 && threadIdx.x <= quantiles) out[1 + quantiles + threadIdx.x] = nan;
        } else if (threadIdx.x < 4) {
            b.thresholds[4 * (s.first_group + group) + threadIdx.x] = 0;
        }
        return;
    }

    // target[k]: the rank of the wanted value, counted from the largest.
    const int targets = of_document ? 1 + 2 * quantiles : 1;
    if (threadIdx.x == 0) target[0] = of_document ? 1 : (total < b.most ? total : b.most);
    if (of_document && threadIdx.x < quantiles) {
        const float position = __fmul_rn(b.probabilities[threadIdx.x], __ll2float_rn(total - 1));
        const i64 below = (i64)position;
        i64 above = (i64)ceilf(position);
        if (above > total - 1) above = total - 1;
        target[1 + 2 * threadIdx.x] = total - below;
        target[2 + 2 * threadIdx.x] = total - above;
    }
    __syncthreads();
    if (warp < (u32)targets) {
        const u64 wanted = target[warp] + unfinite;
        u32 low = finite, high = THREADS - 1; // the first thread whose prefix sum reaches it
        while (low < high) {
            const u32 middle = (low + high) / 2;
            if (upto[middle] >= wanted) high = middle;
            else low = middle + 1;
        }
        const u32 magnitude = TOGETHER * (THREADS - low) - 1 - lane;
        u64 held = 0;
        if (of_document) {
            for (int g = first_group; g < last_group; g++) {
                held += of_magnitude(b, s.first_segment + g * documents + document, magnitude);
            }
        } else {
            held = call[magnitude] + call[magnitude + SIGN];
        }
        const u64 reached = upto[low - 1] + upto_lane(held);
        if (lane == __ffs(__ballot_sync(FULL, reached >= wanted)) - 1) {
            answer[warp] = magnitude;
            if (!of_document) {
                // Too many ties to store: only larger values are emitted, and `finish` finds the ties in order.
                const int ordered = reached - unfinite > CANDIDATES;
                int* threshold = b.thresholds + 4 * (s.first_group + group);
                threshold[0] = magnitude;
                threshold[1] = magnitude + ordered;
                threshold[2] = (int)(b.most - (i64)(reached - held - unfinite));
                threshold[3] = ordered;
            }
        }
    }
    if (!of_document) return;
    __syncthreads();
    if (threadIdx.x <= quantiles) {
        const int k = threadIdx.x;
        float found = pattern_value(answer[0]);
        if (k > 0) {
            const float position = __fmul_rn(b.probabilities[k - 1], __ll2float_rn(total - 1));
            const float weight = __fsub_rn(position, __ll2float_rn((i64)position));
            found = lerp_torch(pattern_value(answer[2 * k - 1]), pattern_value(answer[2 * k]), weight);
        }
        out[k] = found;
        if (groups == 1) out[1 + quantiles + k] = found;
    }
}

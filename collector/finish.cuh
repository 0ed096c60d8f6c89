// The moments of all documents, and the largest values in order.

#pragma once

#include "batch.cuh"

// Add the documents' moments of one channel in document order.
__device__ void combine(const Job& j, const Site& v, int documents, int index) {
    const int channels = j.channels;
    const i64 all = j.groups * documents * channels;
    const i64 start = (i64)(index / channels) * documents * channels + index % channels;
    i64 count = v.count[index], nonfinite = v.nonfinite[index], overflow = v.overflow[index];
    float lowest = v.lowest[index], highest = v.highest[index];
    double total = v.total[index], squares = v.squares[index], mean = v.mean_abs_max[index];
#pragma unroll 8
    for (int document = 0; document < documents; document++) {
        const i64 at = start + (i64)document * channels;
        count += j.partial_counts[at];
        nonfinite += j.partial_counts[all + at];
        overflow += j.partial_counts[2 * all + at];
        lowest = fminf(lowest, j.partial32[at]);
        highest = fmaxf(highest, j.partial32[all + at]);
        total += j.partial64[at];
        squares += j.partial64[all + at];
        mean = fmax(mean, j.partial64[2 * all + at]);
    }
    v.count[index] = count;
    v.nonfinite[index] = nonfinite;
    v.overflow[index] = overflow;
    v.lowest[index] = lowest;
    v.highest[index] = highest;
    v.total[index] = total;
    v.squares[index] = squares;
    v.mean_abs_max[index] = mean;
}

// Write one of a group's largest values at its rank; `row` is counted through the documents.
__device__ void put(const SiteBatch& b, const Shape& s, const Site& v, int group, int rank, u32 pattern, i64 row, i64 place) {
    int low = 0, high = s.documents; // the document whose rows hold `row`
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (s.offsets[middle] <= row) low = middle;
        else high = middle;
    }
    i64* out = v.top + ((i64)group * b.most + rank) * 5;
    out[0] = pattern & (SIGN - 1);
    out[1] = pattern;
    out[2] = v.first + low;
    out[3] = row - s.offsets[low];
    out[4] = place;
}

// Of each site a block per group: the largest, by magnitude, then place. Then a thread per channel.
extern "C" __global__ void __launch_bounds__(256) finish(const __grid_constant__ SiteBatch b) {
    __shared__ u64 keys[CANDIDATES];
    __shared__ u32 patterns[CANDIDATES];
    __shared__ u32 hits[8];
    const int site = part_of(b.finish_first, blockIdx.x), block = blockIdx.x - b.finish_first[site];
    const Shape& s = b.shapes[site];
    const Site& v = b.sites[site];
    const int groups = s.groups, most = b.most;
    if (block >= groups) {
        int job = 0;
        while (b.jobs[job].site != site || !b.jobs[job].summed) job++;
        const Job& j = b.jobs[job];
        const int index = (block - groups) * blockDim.x + threadIdx.x;
        if (index < j.groups * j.channels) combine(j, v, s.documents, index);
        return;
    }
    const int group = block;
    const u64 number = s.first_group + group;
    const u32 found = b.candidate_count[number] < CANDIDATES ? b.candidate_count[number] : CANDIDATES;
    const i64 width = s.edges[group + 1] - s.edges[group];
    for (u32 i = threadIdx.x; i < found; i += blockDim.x) {
        keys[i] = b.candidates[(number * CANDIDATES + i) * 2];
        patterns[i] = (u32)b.candidates[(number * CANDIDATES + i) * 2 + 1];
    }
    __syncthreads();
    if (threadIdx.x == 0) b.candidate_count[number] = 0;
    for (u32 i = threadIdx.x; i < found; i += blockDim.x) {
        const u64 key = keys[i];
        const u32 magnitude = patterns[i] & (SIGN - 1);
        int rank = 0;
        for (u32 j = 0; j < found; j++) {
            const u32 other = patterns[j] & (SIGN - 1);
            rank += other > magnitude || (other == magnitude && keys[j] < key);
        }
        if (rank < most) put(b, s, v, group, rank, patterns[i], key / width, key % width);
    }
    int rank = found < (u32)most ? found : most;
    if (b.thresholds[4 * number + 3]) { // ties, from the first on, until there are enough
        const u32 wanted = b.thresholds[4 * number];
        const i64 values = (s.offsets[s.documents] - s.offsets[0]) * width;
        const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        for (i64 start = 0; start < values && rank < most; start += blockDim.x) {
            const i64 at = start + threadIdx.x, row = s.offsets[0] + at / width, place = at % width;
            u32 pattern = 0;
            bool hit = false;
            if (at < values) {
                pattern = raw_pattern(v.x[row * s.stride + s.members[s.edges[group] + place]]);
                hit = (pattern & (SIGN - 1)) == wanted;
            }
            const u32 mask = __ballot_sync(FULL, hit);
            if (lane == 0) hits[warp] = __popc(mask);
            __syncthreads();
            int mine = rank + __popc(mask & ((1u << lane) - 1));
            for (u32 i = 0; i < blockDim.x / 32; i++) {
                if (i < warp) mine += hits[i];
                rank += hits[i];
            }
            if (hit && mine < most) put(b, s, v, group, mine, pattern, row, place);
            __syncthreads();
        }
    }
    for (int i = 5 * rank + threadIdx.x; i < 5 * most; i += blockDim.x) v.top[(i64)group * most * 5 + i] = -1;
}

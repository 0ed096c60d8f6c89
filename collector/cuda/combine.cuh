// Combines the documents' moments and sorts the largest values.

#pragma once

#include "site_batch.cuh"

struct Sum {
    template <class A, class B> __device__ A operator()(A a, B b) const { return a + b; }
};
struct Least {
    __device__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Greatest {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
    __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

// Combine the documents' values of one quantity of one channel, `step` apart, in document order.
template <class Join, class To, class From>
__device__ __forceinline__ void join_documents(To* to, const From* from, int documents, i64 step) {
    To value = *to;
#pragma unroll 16
    for (int document = 0; document < documents; document++) value = Join()(value, from[document * step]);
    *to = value;
}

const int COMBINED = 32; // channels per block of `finish`; each warp combines one quantity

__device__ void combine(const SiteBatch& b, const Job& j, const Site& v, int documents, int index, int quantity) {
    const i64 step = j.channels, all = j.groups * documents * step;
    const i64 start = (i64)(index / j.channels) * documents * step + index % j.channels;
    if (quantity < 3) {
        i64* to = quantity == 0 ? v.count : quantity == 1 ? v.nonfinite : v.overflow;
        join_documents<Sum>(to + index, b.partial_counts + 3 * j.partial + quantity * all + start, documents, step);
    } else if (quantity < 5) {
        const float* from = b.partial32 + 2 * j.partial + (quantity - 3) * all + start;
        if (quantity == 3) join_documents<Least>(v.lowest + index, from, documents, step);
        else join_documents<Greatest>(v.highest + index, from, documents, step);
    } else {
        const double* from = b.partial64 + 3 * j.partial + (quantity - 5) * all + start;
        if (quantity == 5) join_documents<Sum>(v.total + index, from, documents, step);
        else if (quantity == 6) join_documents<Sum>(v.squares + index, from, documents, step);
        else join_documents<Greatest>(v.mean_abs_max + index, from, documents, step);
    }
}

// Write one of a group's largest values at its rank; `row` is counted over all documents.
__device__ void write_top(
    const SiteBatch& b, const Shape& s, const Site& v, int group, int rank, u32 pattern, i64 row, i64 place
) {
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

// Per site: one block per group sorts its largest values by magnitude, then place; further blocks combine the moments
// of COMBINED channels each.
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
        const int index = (block - groups) * COMBINED + threadIdx.x % COMBINED;
        if (index < j.groups * j.channels) combine(b, j, v, s.documents, index, threadIdx.x / COMBINED);
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
        if (rank < most) write_top(b, s, v, group, rank, patterns[i], key / width, key % width);
    }
    int rank = found < (u32)most ? found : most;
    if (b.thresholds[4 * number + 3]) { // add ties in order until there are enough
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
            if (hit && mine < most) write_top(b, s, v, group, mine, pattern, row, place);
            __syncthreads();
        }
    }
    for (int i = 5 * rank + threadIdx.x; i < 5 * most; i += blockDim.x) v.top[(i64)group * most * 5 + i] = -1;
}

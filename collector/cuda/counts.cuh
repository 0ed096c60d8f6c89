// Counts every pattern of each document and group, and adds them to the run's counts.

#pragma once

#include "site_batch.cuh"

__device__ __forceinline__ bool in_pass(u32 pattern, u32 pass) {
#if HALVINGS == 0
    return true;
#else
    return (pattern >> (16 - HALVINGS)) == pass;
#endif
}

// One in the upper or in the lower half of the counter's word. A product, since predicate registers are few.
__device__ __forceinline__ u32 increment(u32 pattern) { return 1u + (pattern & 1u) * 0xffffu; }

__device__ __forceinline__ u32* counter_of(u32* bins, u32 pattern) { return bins + ((pattern >> 1) & (WORDS - 1)); }

// A counter has reached 0x8000: the first thread to see it subtracts 0x8000 and records that. No counter overflows into
// its neighbour before: after a barrier every counter is below 0x8000, and a block adds at most 1024 * 32 = 0x8000
// before the next.
__device__ __forceinline__ void spill(const SiteBatch& b, u32* bins, u32 item, u32 pattern) {
    const u32 half = 0x8000u * increment(pattern);
    if (atomicAnd(counter_of(bins, pattern), ~half) & half) {
        b.spills[b.spill_first[item] + atomicAdd(&b.spill_count[item], 1u)] = pattern;
    }
}

// Whether an addition made a counter reach 0x8000.
__device__ __forceinline__ bool crossed(u32 before, u32 more) { return (before + more) & ~before & 0x80008000u; }

// Add n of a pattern to its 16-bit counter.
__device__ __forceinline__ void add(const SiteBatch& b, u32* bins, u32 item, u32 pattern, u32 n) {
    const u32 more = n * increment(pattern);
    if (crossed(atomicAdd(counter_of(bins, pattern), more), more)) spill(b, bins, item, pattern);
}

// What a thread counts between two barriers. `ranges` has 8 bits for each vector: the first of its values to count, and
// the one after the last.
struct Share {
    uint4 data[VECTORS];
    u32 ranges;
};

// Iterates over the vectors of a rectangle, each thread from its own first one.
struct Walk {
    const char* base;
    i64 row_bytes, width_bytes;
    int row, rows, row_step;
    u32 vector, vectors, vector_step;

    // Loads the aligned 16 bytes that contain a wanted value; other values in them are skipped.
    __device__ __forceinline__ void next(Share& share) {
        share.ranges = 0;
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
            share.data[k] = make_uint4(0, 0, 0, 0);
            if (row < rows) {
                const char* first = base + row * row_bytes;
                const char* at = (const char*)((u64)first & ~15ull) + 16 * (i64)vector;
                const i64 before = first - at, left = first + width_bytes - at;
                const u32 from = before > 0 ? (u32)before / sizeof(raw) : 0;
                const u32 to = left >= 16 ? PER_VECTOR : left > 0 ? (u32)left / sizeof(raw) : 0;
                if (to > from) {
                    share.data[k] = *(const uint4*)at;
                    share.ranges |= (from | to << 4) << (8 * k);
                }
            }
            vector += vector_step;
            row += row_step;
            if (vector >= vectors) { vector -= vectors; row++; }
        }
    }
};

// Count a share in the table `bins`; if HOT, the pattern `hot` in a register.
template <bool HOT>
__device__ __forceinline__ void count_share(
    const SiteBatch& b, u32* bins, u32 item, u32 pass, const Share& share, u32 hot
) {
    u32 hots = 0;
    u32* idle = bins + (threadIdx.x & 31);
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        const u32 from = share.ranges >> (8 * k) & 15u, to = share.ranges >> (8 * k + 4) & 15u;
        if (to - from == PER_VECTOR) {
            // All additions first, so that they overlap; then one test whether any counter reached 0x8000.
            u32 before[PER_VECTOR], more[PER_VECTOR];
#pragma unroll
            for (int j = 0; j < PER_VECTOR; j++) {
                const u32 pattern = pattern_at(share.data[k], j);
                const bool apart = HOT && pattern == hot, here = !apart && in_pass(pattern, pass);
                hots += apart;
                // A value that is not counted here adds 0, each lane in its own bank: a branch per value would be
                // slower.
                more[j] = here ? increment(pattern) : 0;
                before[j] = atomicAdd(here ? counter_of(bins, pattern) : idle, more[j]);
            }
            bool any = false;
#pragma unroll
            for (int j = 0; j < PER_VECTOR; j++) any |= crossed(before[j], more[j]);
            if (any) {
#pragma unroll 1
                for (int j = 0; j < PER_VECTOR; j++) {
                    const u32 pattern = pattern_at(share.data[k], j);
                    if (in_pass(pattern, pass)) spill(b, bins, item, pattern);
                }
            }
        } else {
#pragma unroll 1
            for (int j = from; j < to; j++) {
                const u32 pattern = pattern_at(share.data[k], j);
                if (HOT && pattern == hot) hots++;
                else if (in_pass(pattern, pass)) add(b, bins, item, pattern, 1);
            }
        }
    }
    if (HOT) {
        hots = warp_sum(hots);
        if ((threadIdx.x & 31) == 0 && hots && in_pass(hot, pass)) add(b, bins, item, hot, hots);
    }
}

// Whether every value of a warp's shares is `hot`, given that each lane's first one is.
__device__ __forceinline__ bool all_alike(const Share& share, u32 hot) {
#if KIND < 2
    const u32 full = 0x80808080u, word = hot | hot << 16;
#else
    const u32 full = 0x40404040u, word = share.data[0].x;
#endif
    u32 other = share.ranges ^ full;
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        const uint4& data = share.data[k];
        other |= (data.x ^ word) | (data.y ^ word) | (data.z ^ word) | (data.w ^ word);
    }
    return __ballot_sync(FULL, other == 0) == FULL;
}

const int MANY = 6; // if so many of a warp's 32 first values are equal, that value is counted in registers

// Count `rows` rows of `width_bytes`, `row_bytes` apart.
__device__ void count_rectangle(
    const SiteBatch& b, u32* bins, u32 item, u32 pass, const char* base, i64 row_bytes, i64 width_bytes, int rows
) {
    const bool aligned = (((u64)base | (u64)row_bytes) & 15) == 0;
    const u32 vectors = (u32)((width_bytes + 15) / 16) + (aligned ? 0 : 1);
    const u32 threads = blockDim.x;
    Walk walk = {
        base, row_bytes, width_bytes, (int)(threadIdx.x / vectors), rows, (int)(threads / vectors),
        threadIdx.x % vectors, vectors, threads % vectors,
    };
    const i64 total = (i64)vectors * rows, step = (i64)threads * VECTORS;
    Share share, ahead;
    walk.next(ahead);
    for (i64 start = 0; start < total; start += step) {
        share = ahead;
        if (start + step < total) walk.next(ahead);
        // Lanes with equal values would contend for one counter: such a value is counted in registers and added once
        // per warp. Zero is tried first.
        const u32 first = pattern_at(share.data[0], 0);
        u32 hot = 0;
        int alike = __popc(__ballot_sync(FULL, first == 0));
        if (alike < MANY) {
            hot = __shfl_sync(FULL, first, 0);
            alike = __popc(__ballot_sync(FULL, first == hot));
        }
        if (alike == 32 && all_alike(share, hot)) {
            if ((threadIdx.x & 31) == 0 && in_pass(hot, pass)) add(b, bins, item, hot, 32 * VECTORS * PER_VECTOR);
        } else if (alike >= MANY) {
            count_share<true>(b, bins, item, pass, share, hot);
        } else {
            count_share<false>(b, bins, item, pass, share, hot);
        }
        __syncthreads();
    }
}

// One block per multiprocessor, 1024 threads; WORDS words of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(1024) count_items(const __grid_constant__ SiteBatch b) {
    extern __shared__ uint4 shared_bins[];
    u32* bins = (u32*)shared_bins;
    for (u32 i = threadIdx.x; i < WORDS / 4; i += blockDim.x) shared_bins[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    const int last = b.block_first[blockIdx.x + 1];
    for (int item = b.block_first[blockIdx.x]; item < last; item++) {
        const Item& of = b.items[item];
        const i64 stride = of.stride;
        const raw* start = b.sites[of.site].x + of.first_row * stride;
        if (threadIdx.x == 0) b.spill_count[item] = 0;
        __syncthreads();
        for (u32 pass = 0; pass < (1u << HALVINGS); pass++) {
            int low = of.low, high = of.high;
            for (int run = of.run; run < of.last_run; run++) {
                if (run > of.run) {
                    low = b.shapes[of.site].runs[2 * run];
                    high = b.shapes[of.site].runs[2 * run + 1];
                }
                const i64 width = high - low, size = sizeof(raw);
                const char* base = (const char*)(start + low);
                const bool joined = width == stride;
                count_rectangle(
                    b, bins, item, pass, base, joined ? 0 : stride * size, width * size * (joined ? of.rows : 1),
                    joined ? 1 : of.rows
                );
            }
            uint4* slot = (uint4*)(b.slots + (u64)item * ALL_WORDS + (u64)pass * WORDS);
            u32* range = b.ranges + (u64)item * RANGES + (u64)pass * (RANGES >> HALVINGS);
            for (u32 i = threadIdx.x; i < WORDS / 4; i += blockDim.x) {
                const uint4 w = shared_bins[i];
                shared_bins[i] = make_uint4(0, 0, 0, 0);
                slot[i] = w;
                u32 sum = (w.x & 0xffffu) + (w.x >> 16) + (w.y & 0xffffu) + (w.y >> 16);
                sum += (w.z & 0xffffu) + (w.z >> 16) + (w.w & 0xffffu) + (w.w >> 16);
                // Four neighbouring threads have one range.
                sum += __shfl_xor_sync(FULL, sum, 1);
                sum += __shfl_xor_sync(FULL, sum, 2);
                if ((threadIdx.x & 3) == 0) range[i / 4] = sum;
            }
            __syncthreads();
        }
    }
}

const int REDUCED = 2 * 2 * 256; // patterns per block of `reduce_counts`

// Two words per thread. 64-bit counters cannot overflow: no memory has that many values.
extern "C" __global__ void __launch_bounds__(256) reduce_counts(const __grid_constant__ SiteBatch b) {
    const u32 pair = blockIdx.x * blockDim.x + threadIdx.x;
    const int site = part_of(b.group_first, blockIdx.y), group = blockIdx.y - b.group_first[site];
    const Shape& s = b.shapes[site];
    const int* firsts = b.segment_first + s.first_segment;
    const int first = firsts[group * s.documents], last = firsts[(group + 1) * s.documents];
    u32 sum[4] = {0, 0, 0, 0}; // of less than 2^17 items
#pragma unroll 8
    for (int item = first; item < last; item++) {
        const uint2 words = ((const uint2*)(b.slots + (u64)item * ALL_WORDS))[pair];
        sum[0] += words.x & 0xffffu;
        sum[1] += words.x >> 16;
        sum[2] += words.y & 0xffffu;
        sum[3] += words.y >> 16;
    }
    // Each thread reads the spills of some items and adds those of the block's patterns.
    __shared__ u32 spilled[REDUCED];
    for (int i = threadIdx.x; i < REDUCED; i += blockDim.x) spilled[i] = 0;
    __syncthreads();
    for (int item = first + (int)threadIdx.x; item < last; item += blockDim.x) {
        const u32* spills = b.spills + b.spill_first[item];
        const u32 count = b.spill_count[item];
        for (u32 i = 0; i < count; i++) {
            if (spills[i] / REDUCED == blockIdx.x) atomicAdd(&spilled[spills[i] % REDUCED], 1u);
        }
    }
    __syncthreads();
    u64* call = b.call + (u64)(s.first_group + group) * PATTERNS + 4 * pair;
    u64* counts = b.sites[site].counts + (u64)group * PATTERNS + 4 * pair;
    u64 all = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u64 total = sum[i] + (u64)spilled[4 * threadIdx.x + i] * 0x8000u;
        call[i] = total;
        if (total) counts[i] += total;
        all += total;
    }
    // Eight neighbouring threads have one range.
#pragma unroll
    for (int step = 1; step < TOGETHER / 4; step *= 2) all += __shfl_xor_sync(FULL, all, step);
    if (threadIdx.x % (TOGETHER / 4) == 0) {
        b.call_ranges[(u64)(s.first_group + group) * RANGES + pair / (TOGETHER / 4)] = all;
    }
}

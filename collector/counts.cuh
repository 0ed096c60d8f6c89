// Counting: of each document and group every pattern, and all of them added to the run's.

#pragma once

#include "batch.cuh"

__device__ __forceinline__ bool in_pass(u32 pattern, u32 pass) {
#if HALVINGS == 0
    return true;
#else
    return (pattern >> (16 - HALVINGS)) == pass;
#endif
}

// Of the counter in the upper half of its word, or in the lower; as a product it needs none of the few predicates.
__device__ __forceinline__ u32 increment(u32 pattern) { return 1u + (pattern & 1u) * 0xffffu; }

__device__ __forceinline__ u32* counter_of(u32* bins, u32 pattern) { return bins + ((pattern >> 1) & (WORDS - 1)); }

// A counter that has come to 0x8000 or beyond: whoever finds it first takes 0x8000 out and notes it. Until then nothing
// carries into the neighbour: after a barrier every counter is below 0x8000, and a block adds at most 1024 * 32 = 0x8000
// before the next.
__device__ __forceinline__ void spill(const SiteBatch& b, u32* bins, u32 item, u32 pattern) {
    const u32 half = 0x8000u * increment(pattern);
    if (atomicAnd(counter_of(bins, pattern), ~half) & half) {
        b.spills[b.spill_first[item] + atomicAdd(&b.spill_count[item], 1u)] = pattern;
    }
}

// Whether an add brought a counter there.
__device__ __forceinline__ bool crossed(u32 before, u32 more) { return (before + more) & ~before & 0x80008000u; }

// Add n of a pattern to its 16-bit counter.
__device__ __forceinline__ void add(const SiteBatch& b, u32* bins, u32 item, u32 pattern, u32 n) {
    const u32 more = n * increment(pattern);
    if (crossed(atomicAdd(counter_of(bins, pattern), more), more)) spill(b, bins, item, pattern);
}

// What a thread counts between two barriers; of vector k the values from..to, of 4 bits each, are wanted.
struct Share {
    uint4 data[VECTORS];
    u32 ranges;
};

// A walk over the vectors of a rectangle, each thread from its own.
struct Walk {
    const char* base;
    i64 row_bytes, width_bytes;
    int row, rows, row_step;
    u32 vector, vectors, vector_step;

    // Loads are the aligned 16 bytes that hold a wanted value; what else is in them is passed over.
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

// Count a share in the table `bins`; if HOT, the value `hot` apart from the others.
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
            // Adds first, so that they overlap; whether any crossed 0x8000 is asked once.
            u32 before[PER_VECTOR], more[PER_VECTOR];
#pragma unroll
            for (int j = 0; j < PER_VECTOR; j++) {
                const u32 pattern = pattern_at(share.data[k], j);
                const bool apart = HOT && pattern == hot, here = !apart && in_pass(pattern, pass);
                hots += apart;
                // What is not counted here adds nothing, each lane in a bank of its own: behind a branch for each value
                // the others would take longer.
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

const int MANY = 6; // of a warp's 32 first values, so that one value is worth counting apart

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
        // A value that many lanes have would make them queue at one counter: it is counted in registers, and the warp's
        // share is added at once. Zeros are looked for first.
        const u32 first = pattern_at(share.data[0], 0);
        u32 hot = 0;
        bool many = __popc(__ballot_sync(FULL, first == 0)) >= MANY;
        if (!many) {
            hot = __shfl_sync(FULL, first, 0);
            many = __popc(__ballot_sync(FULL, first == hot)) >= MANY;
        }
        if (many) count_share<true>(b, bins, item, pass, share, hot);
        else count_share<false>(b, bins, item, pass, share, hot);
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
        const int site = b.items[4 * item], group = b.items[4 * item + 1], rows = b.items[4 * item + 3];
        const Shape& s = b.shapes[site];
        const i64 stride = s.stride;
        const raw* start = b.sites[site].x + b.items[4 * item + 2] * stride;
        const int first_run = s.run_first[group], last_run = s.run_first[group + 1];
        if (threadIdx.x == 0) b.spill_count[item] = 0;
        __syncthreads();
        for (u32 pass = 0; pass < (1u << HALVINGS); pass++) {
            for (int run = first_run; run < last_run; run++) {
                const int low = s.runs[2 * run];
                const i64 width = s.runs[2 * run + 1] - low, size = sizeof(raw);
                const char* base = (const char*)(start + low);
                const bool joined = width == stride;
                count_rectangle(
                    b, bins, item, pass, base, joined ? 0 : stride * size, width * size * (joined ? rows : 1),
                    joined ? 1 : rows
                );
            }
            uint4* slot = (uint4*)(b.slots + (u64)item * ALL_WORDS + (u64)pass * WORDS);
            for (u32 i = threadIdx.x; i < WORDS / 4; i += blockDim.x) {
                slot[i] = shared_bins[i];
                shared_bins[i] = make_uint4(0, 0, 0, 0);
            }
            __syncthreads();
        }
    }
}

// 64-bit counters: no number of values that fit in a memory overflows them.
extern "C" __global__ void __launch_bounds__(256) reduce_counts(const __grid_constant__ SiteBatch b) {
    const u32 word = blockIdx.x * blockDim.x + threadIdx.x;
    const int site = part_of(b.group_first, blockIdx.y), group = blockIdx.y - b.group_first[site];
    const Shape& s = b.shapes[site];
    const int* firsts = b.segment_first + s.first_segment;
    const int first = firsts[group * s.documents], last = firsts[(group + 1) * s.documents];
    u64 low = 0, high = 0;
#pragma unroll 8
    for (int item = first; item < last; item++) {
        const u32 both = b.slots[(u64)item * ALL_WORDS + word];
        low += both & 0xffffu;
        high += both >> 16;
    }
    // Each thread looks at some items' spills, for every word of the block.
    __shared__ u32 spilled[512];
    spilled[threadIdx.x] = spilled[threadIdx.x + 256] = 0;
    __syncthreads();
    for (int item = first + (int)threadIdx.x; item < last; item += blockDim.x) {
        const u32* spills = b.spills + b.spill_first[item];
        const u32 count = b.spill_count[item];
        for (u32 i = 0; i < count; i++) {
            if (spills[i] / 512 == blockIdx.x) atomicAdd(&spilled[spills[i] % 512], 1u);
        }
    }
    __syncthreads();
    low += (u64)spilled[2 * threadIdx.x] * 0x8000u;
    high += (u64)spilled[2 * threadIdx.x + 1] * 0x8000u;
    const u64 at = (u64)group * PATTERNS + 2 * word;
    u64* call = b.call + (u64)s.first_group * PATTERNS;
    u64* counts = b.sites[site].counts;
    call[at] = low;
    call[at + 1] = high;
    if (low) counts[at] += low;
    if (high) counts[at + 1] += high;
}

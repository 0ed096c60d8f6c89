// Counting of some sites' activations on CUDA, the sibling of kernels.py: per document and group every 16-bit pattern,
// amax and quantiles; per group the largest values; per channel the moments. Compiled at run time (cuda_counter.py).
//
// KIND      0 float16, 1 bfloat16, 2 float32 rounded to float16, 3 float32 rounded to bfloat16
// HALVINGS  how often the range of patterns is halved, one pass each, so that its counters fit in shared memory
//
// The kernels of a batch of sites run in this order: count_items, reduce_counts, summarise, moments, finish.

#include "ptx.cuh"

typedef unsigned long long u64;

#if KIND < 2
typedef u16 raw;
#else
typedef float raw;
#endif

const u32 PATTERNS = 65536;
const u32 SIGN = 32768;
const u32 ALL_WORDS = PATTERNS / 2;                 // 32-bit words of a table, two counters each
const u32 WORDS = ALL_WORDS >> HALVINGS;            // of one pass
const u32 FULL = 0xffffffffu;
const int PER_VECTOR = 16 / sizeof(raw);
const int VECTORS = 4;                              // per thread between two barriers: 32 values, or 16 float32
const int CANDIDATES = 1024;
const int SITES = 16;                               // of a batch at most

// Every member of these structs has 8 bytes but the arrays of int at the end of SiteBatch; cuda_counter.py has the same
// lists. Arrays of int are int32. Groups, segments and items are numbered through the sites of a batch: a segment is a
// document of a group, number `first_segment + group documents + document`.

// What of a site depends on its layout, its documents' lengths and its stride only.
struct Shape {
    i64 stride;                 // of x (rows, channels)
    i64 documents, groups, first_group, first_segment;
    const int* offsets;         // (documents + 1,) of rows
    const int* runs;            // (runs, 2) of channels, as SiteLayout.runs
    const int* run_first;       // (groups + 1,)
    const int* members;         // (channels,) group by group
    const int* edges;           // (groups + 1,) of members
    const int* group_of;        // (channels,)
    const int* place_of;        // (channels,) in its group
};

// Whose moments are formed, whose largest values are emitted: a site's rows, or both apart.
struct Job {
    i64 site, states;           // of `site.x`, or, if `states`, of `site.states`
    i64 stride, channels, groups;
    const int* segments;        // (groups documents, 2) first row and last + 1
    i64 lanes;                  // threads along a row, a power of two
    i64 emit, summed;           // whether candidates are emitted, moments are formed
    double* partial64;          // (3, groups documents, channels) total, squares, mean magnitude
    float* partial32;           // (2, ...) lowest, highest
    int* partial_counts;        // (3, ...) used, not finite, overflowing
};

// What of a site is another's in every call.
struct Site {
    const raw* x;
    const raw* states;          // (mgroups documents channels, d_state), where moments are not of x
    i64 first;                  // number of the first document
    u64* counts;                // (groups, PATTERNS), added to
    float* summaries;           // (documents, groups + 1, 1 + quantiles), written
    i64* top;                   // (groups, most, 5), written: as TOP_FIELDS; magnitude -1 where there are fewer
    i64* count;                 // (groups channels,) and so on: added to
    i64* nonfinite;
    i64* overflow;
    float* lowest;
    float* highest;
    double* total;
    double* squares;
    double* mean_abs_max;
};

struct SiteBatch {
    const Shape* shapes;        // (sites,)
    const Job* jobs;            // (jobs,)
    const int* items;           // (items, 4) site, group in it, first row, rows; a block's and a segment's consecutive
    const int* block_first;     // (blocks + 1,) of items
    const int* segment_first;   // (segments + 1,) of items
    u32* slots;                 // (items, ALL_WORDS), written: an item's counters
    const int* spill_first;     // (items + 1,) where an item's spills lie: as many as its values could bring
    u32* spill_count;           // (items,), written
    u32* spills;                // written: a pattern each, 0x8000 more of it
    u64* call;                  // (groups, PATTERNS), written: this call's counts
    int* thresholds;            // (groups, 4), written: the most-th largest magnitude, least one emitted, ties, ordered
    u64* candidates;            // (groups, CANDIDATES, 2) row width + place, pattern
    u32* candidate_count;       // (groups,) zero on entry and on return
    const float* probabilities; // (quantiles,)
    i64 quantiles, most, infinity;
    double limit;               // the smallest magnitude that rounds to infinity
    Site sites[SITES];
    int group_first[SITES + 1];     // where each site's blocks begin: of reduce_counts (in y), of summarise, of finish
    int summary_first[SITES + 1];
    int finish_first[SITES + 1];
    int job_first[2 * SITES + 1];   // and each job's, of moments
};

// Which of the parts of a grid this block is of, and its number there. Parts that are not used begin at the end.
__device__ __forceinline__ int part_of(const int* first, int block) {
    int part = 0;
    while (block >= first[part + 1]) part++;
    return part;
}

// The pattern of a value rounded to nearest even.
__device__ __forceinline__ u32 to_pattern(float f) {
#if KIND == 0 || KIND == 2
    return float_to_half(f);
#else
    u32 bits = __float_as_uint(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#endif
}

__device__ __forceinline__ float pattern_value(u32 pattern) {
#if KIND == 0 || KIND == 2
    return half_to_float((u16)pattern);
#else
    return __uint_as_float(pattern << 16);
#endif
}

__device__ __forceinline__ float raw_value(raw v) {
#if KIND < 2
    return pattern_value(v);
#else
    return v;
#endif
}

__device__ __forceinline__ u32 raw_pattern(raw v) {
#if KIND < 2
    return v;
#else
    return to_pattern(v);
#endif
}

// Of the j-th value, which need not be known when compiled.
__device__ __forceinline__ u32 pattern_at(const uint4& data, int j) {
    const int at = j * sizeof(raw) / 4;
    const u32 word = at < 2 ? (at ? data.y : data.x) : at == 2 ? data.z : data.w;
#if KIND < 2
    return (word >> ((j & 1) * 16)) & 0xffffu;
#else
    return to_pattern(__uint_as_float(word));
#endif
}

// ---------------------------------------------------------------- counting

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

// The sum of a warp's values.
__device__ __forceinline__ u32 warp_sum(u32 value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(FULL, value);
#else
#pragma unroll
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(FULL, value, step);
    return value;
#endif
}

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

// ---------------------------------------------------------------- order statistics

const int TOGETHER = 32;                            // neighbouring magnitudes, of one thread of `summarise`
const int THREADS = SIGN / TOGETHER;

// How many values of a segment have the magnitudes of a thread of `summarise`.
__device__ __forceinline__ u64 in_segment(const SiteBatch& b, int segment, u32 thread) {
    const int first = b.segment_first[segment], last = b.segment_first[segment + 1];
    u64 all = 0;
#pragma unroll 2
    for (int item = first; item < last; item++) {
        const uint4* positive = (const uint4*)(b.slots + (u64)item * ALL_WORDS) + thread * (TOGETHER / 8);
        const uint4* negative = positive + SIGN / 8;
        uint4 words[TOGETHER / 4];
#pragma unroll
        for (int i = 0; i < TOGETHER / 8; i++) {
            words[2 * i] = positive[i];
            words[2 * i + 1] = negative[i];
        }
        u32 here = 0;
#pragma unroll
        for (int i = 0; i < TOGETHER / 4; i++) {
            const uint4 w = words[i];
            here += (w.x & 0xffffu) + (w.x >> 16) + (w.y & 0xffffu) + (w.y >> 16);
            here += (w.z & 0xffffu) + (w.z >> 16) + (w.w & 0xffffu) + (w.w >> 16);
        }
        all += here;
    }
    for (int item = first; item < last; item++) {
        const u32* spills = b.spills + b.spill_first[item];
        for (u32 k = 0; k < b.spill_count[item]; k++) all += (spills[k] & (SIGN - 1)) / TOGETHER == thread ? 0x8000u : 0u;
    }
    return all;
}

// How many values of a segment have one magnitude.
__device__ __forceinline__ u64 of_magnitude(const SiteBatch& b, int segment, u32 magnitude) {
    const int first = b.segment_first[segment], last = b.segment_first[segment + 1];
    u64 all = 0;
#pragma unroll 4
    for (int item = first; item < last; item++) {
        const u16* counters = (const u16*)(b.slots + (u64)item * ALL_WORDS);
        all += counters[magnitude] + counters[magnitude + SIGN];
    }
    for (int item = first; item < last; item++) {
        const u32* spills = b.spills + b.spill_first[item];
        for (u32 k = 0; k < b.spill_count[item]; k++) all += (spills[k] & (SIGN - 1)) == magnitude ? 0x8000u : 0u;
    }
    return all;
}

__device__ __forceinline__ u64 warp_sum64(u64 value) {
#pragma unroll
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(FULL, value, step);
    return value;
}

// What this lane and those before it in its warp hold.
__device__ __forceinline__ u64 upto_lane(u64 mine) {
    const u32 lane = threadIdx.x & 31;
    for (int step = 1; step < 32; step *= 2) {
        const u64 other = __shfl_up_sync(FULL, mine, step);
        if (lane >= step) mine += other;
    }
    return mine;
}

// torch.quantile's interpolation, as quambase.schema.distribution.lerp_torch.
__device__ float lerp_torch(float below, float above, float weight) {
    const double step = (double)__fsub_rn(above, below);
    if (weight < 0.5f) return (float)__dadd_rn((double)below, __dmul_rn((double)weight, step));
    return (float)__dadd_rn((double)above, __dmul_rn((double)__fsub_rn(weight, 1.0f), step));
}

// Of each site a block per document and group, per document (the whole site, where it is divided), and per group (its
// threshold). The first thread has the largest magnitudes. How many values every thread and those before it have says which
// has a wanted rank; a warp each then looks at that one's magnitudes.
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

    const u32 mine = THREADS - 1 - threadIdx.x; // its magnitudes begin at TOGETHER times this
    u64 here = 0;
    if (of_document) {
        for (int g = first_group; g < last_group; g++) {
            here += in_segment(b, s.first_segment + g * documents + document, mine);
        }
    } else {
        // A warp reads what its threads need in turn, so that neighbours read neighbouring counts.
        const u64* counts = call + TOGETHER * (mine + lane) + lane; // the magnitude of this lane among its first thread's
#pragma unroll 8
        for (u32 i = 0; i < 32; i++) {
            const u64 sum = warp_sum64(counts[-(i64)TOGETHER * i] + counts[SIGN - (i64)TOGETHER * i]);
            if (lane == i) here = sum;
        }
    }
    u64 before = upto_lane(here);
    if (lane == 31) of_warps[warp] = before;
    __syncthreads();
    if (warp == 0) of_warps[lane] = upto_lane(of_warps[lane]);
    __syncthreads();
    upto[threadIdx.x] = before + (warp ? of_warps[warp - 1] : 0);
    __syncthreads();

    const u32 finite = THREADS - (u32)b.infinity / TOGETHER; // the first thread whose magnitudes are
    const u64 unfinite = upto[finite - 1];
    const i64 rows = of_document ? s.offsets[document + 1] - s.offsets[document] : s.offsets[documents] - s.offsets[0];
    const i64 width = whole ? s.edges[groups] : s.edges[group + 1] - s.edges[group];
    const i64 total = rows * width - (i64)unfinite;
    float* out = b.sites[site].summaries + ((i64)document * (groups + 1) + group) * (1 + quantiles);
    if (total == 0) {
        if (of_document) {
            if (threadIdx.x <= quantiles) out[threadIdx.x] = __uint_as_float(0x7fc00000u);
            if (groups == 1 && threadIdx.x <= quantiles) out[1 + quantiles + threadIdx.x] = __uint_as_float(0x7fc00000u);
        } else if (threadIdx.x < 4) {
            b.thresholds[4 * (s.first_group + group) + threadIdx.x] = 0;
        }
        return;
    }

    // target[k]: how many of the largest values reach down to the wanted one.
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
        u32 low = finite, high = THREADS - 1; // the first thread that it is reached with
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
                // Too many ties to hold: then only what is larger is emitted, and `finish` looks for the ties in order.
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

// ---------------------------------------------------------------- moments, and where the largest values are

__device__ void emit(const SiteBatch& b, const Shape& s, int channel, int row, u32 pattern) {
    const u32 magnitude = pattern & (SIGN - 1);
    const int group = s.group_of[channel], place = s.place_of[channel];
    const u64 number = s.first_group + group;
    if (magnitude < (u32)b.thresholds[4 * number + 1] || magnitude >= (u32)b.infinity) return;
    const u32 at = atomicAdd(&b.candidate_count[number], 1u);
    if (at >= CANDIDATES) return;
    u64* candidate = b.candidates + (number * CANDIDATES + at) * 2;
    candidate[0] = (u64)row * (u32)(s.edges[group + 1] - s.edges[group]) + (u32)place;
    candidate[1] = pattern;
}

// Two neighbouring channels' values as they lie in memory.
#if KIND < 2
typedef u32 Pair;
__device__ __forceinline__ Pair pair_of(raw first, raw second) { return first | (u32)second << 16; }
__device__ __forceinline__ raw part(Pair pair, int i) { return i ? pair >> 16 : pair & 0xffffu; }
__device__ __forceinline__ raw raw_of(float value) { return to_pattern(value); }
#else
typedef float2 Pair;
__device__ __forceinline__ Pair pair_of(raw first, raw second) { return make_float2(first, second); }
__device__ __forceinline__ raw part(Pair pair, int i) { return i ? pair.y : pair.x; }
__device__ __forceinline__ raw raw_of(float value) { return value; }
#endif

__device__ __forceinline__ float value_of(Pair pair, int i) { return raw_value(part(pair, i)); }

// The lesser and the greater of two values, NaN if one of them is.
__device__ __forceinline__ float lesser(float a, float b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ float greater(float a, float b) { return a > b || a != a ? a : b; }

#if KIND < 2 && __CUDA_ARCH__ >= 800
#if KIND == 0
#define OF_TWO "f16x2"
#else
#define OF_TWO "bf16x2"
#endif
__device__ __forceinline__ Pair lesser(Pair a, Pair b) {
    Pair c;
    asm("min.NaN." OF_TWO " %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ Pair greater(Pair a, Pair b) {
    Pair c;
    asm("max.NaN." OF_TWO " %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
#else
__device__ __forceinline__ Pair lesser(Pair a, Pair b) {
    return pair_of(raw_of(lesser(value_of(a, 0), value_of(b, 0))), raw_of(lesser(value_of(a, 1), value_of(b, 1))));
}
__device__ __forceinline__ Pair greater(Pair a, Pair b) {
    return pair_of(raw_of(greater(value_of(a, 0), value_of(b, 0))), raw_of(greater(value_of(a, 1), value_of(b, 1))));
}
#endif

// A finite value in float64: sign, exponent and mantissa are moved to their places there, subnormal or not, and a product
// makes up for the exponents' different bias. A conversion would take as long as four such products. (What is not finite
// becomes some number.)
__device__ __forceinline__ double exact(Pair pair, int i) {
#if KIND < 2
    const u32 bits = i ? pair : pair << 16, low = 0, places = 0x7fff0000u;
#else
    const u32 bits = __float_as_uint(part(pair, i)), low = bits << 29, places = 0x7fffffffu;
#endif
    const int narrower = KIND == 0 ? 6 : 3; // bits of the exponent
    const u32 high = (u32)((int)bits >> narrower) & (0x80000000u | places >> narrower);
    return __hiloint2double(high, low) * (KIND == 0 ? 0x1p1008 : 0x1p896);
}

// Moments of two channels; the sums mean something where low and high are finite.
struct Columns {
    double total[2] = {0, 0}, squares[2] = {0, 0}, magnitudes[2] = {0, 0};
    Pair low, high;

    __device__ __forceinline__ Columns() {
        const raw largest = raw_of(__uint_as_float(0x7f800000u)), least = raw_of(__uint_as_float(0xff800000u));
        low = pair_of(largest, largest);
        high = pair_of(least, least);
    }

    __device__ __forceinline__ void add(Pair values) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const double v = exact(values, i);
            total[i] += v;
            squares[i] = fma(v, v, squares[i]);
            magnitudes[i] += fabs(v);
        }
    }

    __device__ __forceinline__ void widen(Pair least, Pair largest) {
        low = lesser(low, least);
        high = greater(high, largest);
    }
};

const int ALONG = 4;                    // neighbouring channels of a thread
const int ROWS = KIND < 2 ? 8 : 4;      // whose loads are under way together, while as many are added

struct Quad {
    Pair of[2];
};

// The values of `channels` of them, zeros beyond; where all are loaded at once, `at` is a multiple of four values.
template <bool AT_ONCE> __device__ __forceinline__ Quad load_quad(const raw* at, int channels) {
    Quad quad;
    if (AT_ONCE) {
#if KIND < 2
        const uint2 both = *(const uint2*)at;
        quad.of[0] = both.x, quad.of[1] = both.y;
#else
        const float4 all = *(const float4*)at;
        quad.of[0] = make_float2(all.x, all.y), quad.of[1] = make_float2(all.z, all.w);
#endif
    } else {
        const raw zero = raw_of(0.0f);
        const raw second = channels > 1 ? at[1] : zero, third = channels > 2 ? at[2] : zero;
        quad.of[0] = pair_of(at[0], second);
        quad.of[1] = pair_of(third, channels > 3 ? at[3] : zero);
    }
    return quad;
}

// Add rows row, row + height, ... of some channels to their columns. bounds_of(bound) says beyond what magnitude found(i,
// row, value) sees a value; it is asked once the first rows are under way.
template <bool AT_ONCE, class Bounds, class Found>
__device__ __forceinline__ void accumulate(
    const raw* base, i64 stride, int channels, int row, int last, int height, Columns (&columns)[2], Bounds bounds_of,
    Found found
) {
    const raw* at = base + row * stride;
    const i64 step = height * stride;
    Quad ahead[ROWS];
    if (row + (ROWS - 1) * height < last) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) ahead[k] = load_quad<AT_ONCE>(at + k * step, channels);
    }
    float bound[ALONG];
    bounds_of(bound);
    auto look = [&](int i, int here, raw stored) {
        if (fabsf(raw_value(stored)) > bound[i]) found(i, here, stored);
    };
    for (; row + (ROWS - 1) * height < last; row += ROWS * height, at += ROWS * step) {
        Quad values[ROWS];
#pragma unroll
        for (int k = 0; k < ROWS; k++) values[k] = ahead[k];
        if (row + (2 * ROWS - 1) * height < last) {
#pragma unroll
            for (int k = 0; k < ROWS; k++) ahead[k] = load_quad<AT_ONCE>(at + (ROWS + k) * step, channels);
        }
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            Pair least = values[0].of[pair], largest = least;
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                columns[pair].add(values[k].of[pair]);
                least = lesser(least, values[k].of[pair]);
                largest = greater(largest, values[k].of[pair]);
            }
            columns[pair].widen(least, largest);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // So seldom that they are read again: with a test for each value and all that follows it, this took a
                // tenth more. Where one is NaN, another may still be beyond.
                const int channel = 2 * pair + i;
                if (!(fmaxf(value_of(largest, i), -value_of(least, i)) <= bound[channel]) && channel < channels) {
#pragma unroll 1
                    for (int k = 0; k < ROWS; k++) look(channel, row + k * height, at[k * step + channel]);
                }
            }
        }
    }
    for (; row < last; row += height, at += step) {
        const Quad values = load_quad<AT_ONCE>(at, channels);
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            columns[pair].add(values.of[pair]);
            columns[pair].widen(values.of[pair], values.of[pair]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (2 * pair + i < channels) look(2 * pair + i, row, part(values.of[pair], i));
            }
        }
    }
}

// Of each job a block per segment and run of channels, runs of a segment next to each other, as its rows' bytes are: ALONG
// channels a thread, rows dealt out along the block's other dimension and joined at the end in a fixed order.
extern "C" __global__ void __launch_bounds__(256, 2) moments(const __grid_constant__ SiteBatch b) {
    __shared__ double wide[3 * ALONG][256];
    __shared__ Pair lows[2][256], highs[2][256];
    const int job = part_of(b.job_first, blockIdx.x), block = blockIdx.x - b.job_first[job];
    const Job& j = b.jobs[job];
    const Shape& s = b.shapes[j.site];
    const int lanes = j.lanes, channels = j.channels;
    const i64 stride = j.stride;
    const bool emits = j.emit;
    const int count = j.groups * s.documents; // of segments
    const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = blockDim.x / lanes;
    const int across = ALONG * lanes, runs = (channels + across - 1) / across;
    const int segment = block / runs, start = block % runs * across, column = start + ALONG * tx;
    const int first = j.segments[2 * segment], last = j.segments[2 * segment + 1];
    const raw* all_channels = j.states ? b.sites[j.site].states : b.sites[j.site].x;
    const raw* base = all_channels + column;
    const int mine = channels - column < ALONG ? channels - column : ALONG;
    const bool at_once = mine == ALONG && ((u64)base | stride * sizeof(raw)) % (ALONG * sizeof(raw)) == 0;
    const float infinity = __uint_as_float(0x7f800000u);

    Columns columns[2];
    if (mine > 0) {
        auto bounds_of = [&](float* bound) { // only a larger magnitude can be a candidate
#pragma unroll
            for (int i = 0; i < ALONG; i++) {
                bound[i] = infinity;
                if (!emits || i >= mine) continue;
                const int least = b.thresholds[4 * (s.first_group + s.group_of[column + i]) + 1];
                bound[i] = least ? pattern_value(least - 1) : -1.0f;
            }
        };
        auto found = [&](int i, int row, raw value) { emit(b, s, column + i, row, raw_pattern(value)); };
        if (at_once) accumulate<true>(base, stride, mine, first + ty, last, height, columns, bounds_of, found);
        else accumulate<false>(base, stride, mine, first + ty, last, height, columns, bounds_of, found);
    }
    if (!j.summed) return;
#pragma unroll
    for (int i = 0; i < ALONG; i++) {
        wide[3 * i][threadIdx.x] = columns[i / 2].total[i & 1];
        wide[3 * i + 1][threadIdx.x] = columns[i / 2].squares[i & 1];
        wide[3 * i + 2][threadIdx.x] = columns[i / 2].magnitudes[i & 1];
    }
    for (int pair = 0; pair < 2; pair++) {
        lows[pair][threadIdx.x] = columns[pair].low;
        highs[pair][threadIdx.x] = columns[pair].high;
    }
    for (int half = height / 2; half > 0; half /= 2) {
        __syncthreads();
        if (ty < half) {
            const int other = threadIdx.x + half * lanes;
            for (int i = 0; i < 3 * ALONG; i++) wide[i][threadIdx.x] += wide[i][other];
            for (int pair = 0; pair < 2; pair++) {
                lows[pair][threadIdx.x] = lesser(lows[pair][threadIdx.x], lows[pair][other]);
                highs[pair][threadIdx.x] = greater(highs[pair][threadIdx.x], highs[pair][other]);
            }
        }
    }
    __syncthreads();

    // A channel a thread, so that neighbours write next to each other.
    const i64 all = (i64)count * channels;
    const float limit = (float)b.limit;
    for (int place = threadIdx.x; place < across && start + place < channels; place += blockDim.x) {
        const int i = place % ALONG, from = place / ALONG;
        double sum = wide[3 * i][from], sum_squares = wide[3 * i + 1][from], magnitudes = wide[3 * i + 2][from];
        float lowest = value_of(lows[i / 2][from], i & 1), highest = value_of(highs[i / 2][from], i & 1);
        int used = last - first, unfinite = 0, overflowing = 0;
        if (!(highest < limit && lowest > -limit)) { // or NaN
            lowest = infinity;
            highest = -infinity;
            sum = sum_squares = magnitudes = 0;
            for (int row = first; row < last; row++) {
                const float value = raw_value(all_channels[row * stride + start + place]);
                if (!(fabsf(value) < infinity)) {
                    unfinite++;
                    used--;
                    continue;
                }
                if (fabsf(value) >= limit) overflowing++;
                const double v = value;
                lowest = fminf(lowest, value);
                highest = fmaxf(highest, value);
                sum += v;
                sum_squares = fma(v, v, sum_squares);
                magnitudes += fabs(v);
            }
        }
        const i64 at = (i64)segment * channels + start + place;
        j.partial64[at] = sum;
        j.partial64[all + at] = sum_squares;
        j.partial64[2 * all + at] = used ? magnitudes / used : 0;
        j.partial32[at] = lowest;
        j.partial32[all + at] = highest;
        j.partial_counts[at] = used;
        j.partial_counts[all + at] = unfinite;
        j.partial_counts[2 * all + at] = overflowing;
    }
}

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

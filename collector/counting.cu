// Counting of some sites' activations on CUDA, the sibling of kernels.py: per document and group every 16-bit pattern,
// amax and quantiles; per group the largest values; per channel the moments. Compiled at run time (cuda_counter.py).
//
// KIND      0 float16, 1 bfloat16, 2 float32 rounded to float16, 3 float32 rounded to bfloat16
// HALVINGS  how often the range of patterns is halved, one pass each, so that its counters fit in shared memory
//
// The kernels of a batch of sites run in this order: count_items, reduce_counts, summarise, moments, finish.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

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

__device__ __forceinline__ float half_to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
__device__ __forceinline__ u16 float_to_half(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }

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

__device__ __forceinline__ u32 pattern_at(const uint4& data, int j) {
    const u32 words[4] = {data.x, data.y, data.z, data.w};
#if KIND < 2
    return (words[j >> 1] >> ((j & 1) * 16)) & 0xffffu;
#else
    return to_pattern(__uint_as_float(words[j]));
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

__device__ __forceinline__ u32 increment(u32 pattern) { return pattern & 1 ? 0x10000u : 1u; }

__device__ __forceinline__ u32* counter_of(u32* bins, u32 pattern) { return bins + ((pattern >> 1) & (WORDS - 1)); }

// The add that brought a counter to 0x8000 or beyond takes 0x8000 out and notes it. Until then nothing carries into the
// neighbour: after a barrier every counter is below 0x8000, and a block adds at most 1024 * 32 = 0x8000 before the next.
__device__ __forceinline__ void spill(const SiteBatch& b, u32* bins, u32 item, u32 pattern) {
    atomicSub(counter_of(bins, pattern), 0x8000u * increment(pattern));
    b.spills[b.spill_first[item] + atomicAdd(&b.spill_count[item], 1u)] = pattern;
}

// Add n of a pattern to its 16-bit counter.
__device__ __forceinline__ void add(const SiteBatch& b, u32* bins, u32 item, u32 pattern, u32 n) {
    const u32 more = n * increment(pattern);
    const u32 before = atomicAdd(counter_of(bins, pattern), more);
    if ((before + more) & ~before & (0x8000u * increment(pattern))) spill(b, bins, item, pattern);
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
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        const u32 from = share.ranges >> (8 * k) & 15u, to = share.ranges >> (8 * k + 4) & 15u;
        if (to - from == PER_VECTOR) {
            // Adds first, so that they overlap; whether any crossed 0x8000 is asked once.
            u32 before[PER_VECTOR], crossed = 0;
#pragma unroll
            for (int j = 0; j < PER_VECTOR; j++) {
                const u32 pattern = pattern_at(share.data[k], j);
                before[j] = ~0u;
                if (HOT && pattern == hot) hots++;
                else if (in_pass(pattern, pass)) before[j] = atomicAdd(counter_of(bins, pattern), increment(pattern));
            }
#pragma unroll
            for (int j = 0; j < PER_VECTOR; j++) {
                crossed |= (before[j] + increment(pattern_at(share.data[k], j))) & ~before[j];
            }
            if (crossed & 0x80008000u) {
#pragma unroll
                for (int j = 0; j < PER_VECTOR; j++) {
                    const u32 pattern = pattern_at(share.data[k], j), more = increment(pattern);
                    if ((before[j] + more) & ~before[j] & (0x8000u * more)) spill(b, bins, item, pattern);
                }
            }
        } else {
#pragma unroll
            for (int j = 0; j < PER_VECTOR; j++) {
                if (j < from || j >= to) continue;
                const u32 pattern = pattern_at(share.data[k], j);
                if (HOT && pattern == hot) hots++;
                else if (in_pass(pattern, pass)) add(b, bins, item, pattern, 1);
            }
        }
    }
    if (HOT) {
#pragma unroll
        for (int step = 16; step; step >>= 1) hots += __shfl_xor_sync(FULL, hots, step);
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

// Eight neighbouring magnitudes, in a word of a table two each.
const int TOGETHER = 8;

struct Counts {
    u64 of[TOGETHER];
};

// Counts of the magnitudes TOGETHER quad onwards in one segment.
__device__ __forceinline__ void add_segment(const SiteBatch& b, int segment, u32 quad, Counts& counts) {
    const int first = b.segment_first[segment], last = b.segment_first[segment + 1];
#pragma unroll 2
    for (int item = first; item < last; item++) {
        const uint4* slot = (const uint4*)(b.slots + (u64)item * ALL_WORDS);
        const uint4 positive = slot[quad], negative = slot[quad + SIGN / TOGETHER];
        const u32 words[8] = {positive.x, positive.y, positive.z, positive.w, negative.x, negative.y, negative.z, negative.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            counts.of[2 * (i & 3)] += words[i] & 0xffffu;
            counts.of[2 * (i & 3) + 1] += words[i] >> 16;
        }
        const u32 spilled = b.spill_count[item];
        for (u32 k = 0; k < spilled; k++) {
            const u32 magnitude = b.spills[b.spill_first[item] + k] & (SIGN - 1);
            if (magnitude / TOGETHER != quad) continue;
#pragma unroll
            for (u32 j = 0; j < TOGETHER; j++) counts.of[j] += magnitude % TOGETHER == j ? 0x8000u : 0u;
        }
    }
}

// What the threads before this one hold, and what they all do. sums: 33 words of shared memory.
__device__ u64 before_me(u64 mine, u64* sums, u64& all) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 upto = mine;
    for (int step = 1; step < 32; step *= 2) {
        const u64 other = __shfl_up_sync(FULL, upto, step);
        if (lane >= step) upto += other;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    if (warp == 0) {
        const u64 held = lane < blockDim.x / 32 ? sums[lane] : 0;
        u64 seen = held;
        for (int step = 1; step < 32; step *= 2) {
            const u64 other = __shfl_up_sync(FULL, seen, step);
            if (lane >= step) seen += other;
        }
        sums[lane] = seen - held;
        if (lane == 31) sums[32] = seen;
    }
    __syncthreads();
    all = sums[32];
    return sums[warp] + upto - mine;
}

// torch.quantile's interpolation, as quambase.schema.distribution.lerp_torch.
__device__ float lerp_torch(float below, float above, float weight) {
    const double step = (double)__fsub_rn(above, below);
    if (weight < 0.5f) return (float)__dadd_rn((double)below, __dmul_rn((double)weight, step));
    return (float)__dadd_rn((double)above, __dmul_rn((double)__fsub_rn(weight, 1.0f), step));
}

// Of each site a block per document and group, per document (the whole site, where it is divided), and per group (its threshold).
// Counts are walked from the largest magnitude down, 8192 magnitudes at a time, only as far as a wanted rank lies.
extern "C" __global__ void __launch_bounds__(1024) summarise(const __grid_constant__ SiteBatch b) {
    __shared__ u64 sums[33];
    __shared__ u64 target[32];
    __shared__ u32 answer[32];
    __shared__ u64 beyond[2];
    const int site = part_of(b.summary_first, blockIdx.x);
    const u32 block = blockIdx.x - b.summary_first[site];
    const Shape& s = b.shapes[site];
    const int groups = s.groups, documents = s.documents, quantiles = b.quantiles;
    const int first_segment = s.first_segment;
    const int parts = groups == 1 ? 1 : groups + 1;
    const bool of_document = block < (u32)(documents * parts);
    const int document = of_document ? block / parts : 0;
    const int group = of_document ? block % parts : block - documents * parts;
    const bool whole = of_document && group == groups;

    auto look = [&](u32 quad, Counts& counts) {
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) counts.of[i] = 0;
        if (!of_document) {
            const u64* table = b.call + (u64)(s.first_group + group) * PATTERNS + TOGETHER * quad;
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) counts.of[i] = table[i] + table[i + SIGN];
            return;
        }
        for (int g = whole ? 0 : group; g < (whole ? groups : group + 1); g++) {
            add_segment(b, first_segment + g * documents + document, quad, counts);
        }
    };
    auto sum = [](const Counts& counts) {
        u64 all = 0;
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) all += counts.of[i];
        return all;
    };

    const u32 finite_quads = b.infinity / TOGETHER;
    u64 mine = 0, unfinite, all;
    Counts counts;
    for (u32 quad = finite_quads + threadIdx.x; quad < SIGN / TOGETHER; quad += blockDim.x) {
        look(quad, counts);
        mine += sum(counts);
    }
    before_me(mine, sums, unfinite);
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
    u64 furthest = 0;
    for (int k = 0; k < targets; k++) furthest = target[k] > furthest ? target[k] : furthest;
    u64 seen = 0;
    for (int top = finite_quads; top > 0 && seen < furthest; top -= blockDim.x) {
        const int quad = top - 1 - (int)threadIdx.x;
        u64 here = 0;
        if (quad >= 0) {
            look(quad, counts);
            here = sum(counts);
        }
        u64 before = seen + before_me(here, sums, all);
        seen += all;
        if (here == 0 || before >= furthest) continue;
#pragma unroll
        for (int i = TOGETHER - 1; i >= 0; i--) {
            const u64 upto = before + counts.of[i];
            for (int k = 0; k < targets; k++) {
                if (target[k] <= before || target[k] > upto) continue;
                answer[k] = TOGETHER * quad + i;
                if (!of_document) {
                    beyond[0] = before;
                    beyond[1] = upto;
                }
            }
            before = upto;
        }
    }
    __syncthreads();
    if (!of_document) {
        if (threadIdx.x == 0) {
            // Too many ties to hold: then only what is larger is emitted, and `finish` looks for the ties in order.
            const int ordered = beyond[1] > CANDIDATES;
            int* threshold = b.thresholds + 4 * (s.first_group + group);
            threshold[0] = answer[0];
            threshold[1] = answer[0] + ordered;
            threshold[2] = (int)(b.most - (i64)beyond[0]);
            threshold[3] = ordered;
        }
        return;
    }
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

__device__ void emit(const SiteBatch& b, const Shape& s, int group, int place, int row, u32 pattern) {
    const u32 magnitude = pattern & (SIGN - 1);
    const u64 number = s.first_group + group;
    if (magnitude < (u32)b.thresholds[4 * number + 1] || magnitude >= (u32)b.infinity) return;
    const u32 at = atomicAdd(&b.candidate_count[number], 1u);
    if (at >= CANDIDATES) return;
    u64* candidate = b.candidates + (number * CANDIDATES + at) * 2;
    candidate[0] = (u64)row * (u32)(s.edges[group + 1] - s.edges[group]) + (u32)place;
    candidate[1] = pattern;
}

struct Column {
    double total = 0, squares = 0, magnitudes = 0;
    float low = __uint_as_float(0x7f800000u), high = __uint_as_float(0xff800000u);

    __device__ __forceinline__ void add(float value) {
        const double v = value;
        total += v;
        squares = fma(v, v, squares);
        magnitudes += fabs(v);
    }

    __device__ __forceinline__ void widen(float least, float largest) {
        low = fminf(low, least);
        high = fmaxf(high, largest);
    }
};

const int ROWS = 8; // whose loads are under way together

// Two values as they lie in memory.
#if KIND < 2
typedef u32 Pair;
__device__ __forceinline__ raw part(Pair pair, int i) { return i ? pair >> 16 : pair & 0xffffu; }
#else
typedef float2 Pair;
__device__ __forceinline__ raw part(Pair pair, int i) { return i ? pair.y : pair.x; }
#endif

// Add rows row, row + height, ... of one channel or two to their columns; found(i, row, value) sees what is beyond bound.
template <int WIDE, bool PAIRED, class Found>
__device__ __forceinline__ void accumulate(
    const raw* base, i64 stride, int row, int last, int height, const float* bound, Column* columns, Found found
) {
    const raw* at = base + row * stride;
    const i64 step = height * stride;
    auto look = [&](int i, int here, raw stored) {
        if (fabsf(raw_value(stored)) > bound[i]) found(i, here, stored);
    };
    for (; row + (ROWS - 1) * height < last; row += ROWS * height, at += ROWS * step) {
        raw values[ROWS][WIDE];
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            if (PAIRED) {
                const Pair pair = *(const Pair*)(at + k * step);
                for (int i = 0; i < WIDE; i++) values[k][i] = part(pair, i);
            } else {
                for (int i = 0; i < WIDE; i++) values[k][i] = at[k * step + i];
            }
        }
#pragma unroll
        for (int i = 0; i < WIDE; i++) {
            float least = __uint_as_float(0x7f800000u), largest = __uint_as_float(0xff800000u);
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                const float value = raw_value(values[k][i]);
                columns[i].add(value);
                least = fminf(least, value);
                largest = fmaxf(largest, value);
            }
            columns[i].widen(least, largest);
            // So seldom that they are read again: with a test for each value and all that follows it, this took a tenth more.
            if (fmaxf(largest, -least) > bound[i]) {
#pragma unroll 1
                for (int k = 0; k < ROWS; k++) look(i, row + k * height, at[k * step + i]);
            }
        }
    }
    for (; row < last; row += height, at += step) {
        for (int i = 0; i < WIDE; i++) {
            const float value = raw_value(at[i]);
            columns[i].add(value);
            columns[i].widen(value, value);
            look(i, row, at[i]);
        }
    }
}

// Of each job a block per segment and run of channels: two channels a thread, rows dealt out along the block's other
// dimension and joined at the end in a fixed order.
extern "C" __global__ void __launch_bounds__(256, 4) moments(const __grid_constant__ SiteBatch b) {
    __shared__ double wide[6][256];
    __shared__ float narrow[4][256];
    const int job = part_of(b.job_first, blockIdx.x), block = blockIdx.x - b.job_first[job];
    const Job& j = b.jobs[job];
    const Shape& s = b.shapes[j.site];
    const int lanes = j.lanes, channels = j.channels;
    const i64 stride = j.stride;
    const bool emits = j.emit;
    const int count = j.groups * s.documents; // of segments
    const int tx = threadIdx.x & (lanes - 1), ty = threadIdx.x / lanes, height = blockDim.x / lanes;
    const int segment = block % count, column = (block / count * lanes + tx) * 2;
    const int first = j.segments[2 * segment], last = j.segments[2 * segment + 1];
    const bool one = column < channels, two = column + 1 < channels;
    const raw* base = (j.states ? b.sites[j.site].states : b.sites[j.site].x) + column;
    const bool paired = two && (stride & 1) == 0 && ((u64)base & (2 * sizeof(raw) - 1)) == 0;
    const float infinity = __uint_as_float(0x7f800000u);

    int group[2] = {0, 0}, place[2] = {0, 0};
    float bound[2] = {infinity, infinity}; // only a larger magnitude can be a candidate
    for (int i = 0; i < 2; i++) {
        if (!emits || column + i >= channels) continue;
        group[i] = s.group_of[column + i];
        place[i] = s.place_of[column + i];
        const int least = b.thresholds[4 * (s.first_group + group[i]) + 1];
        bound[i] = least ? pattern_value(least - 1) : -1.0f;
    }
    Column columns[2];
    if (one) {
        auto found = [&](int i, int row, raw value) { emit(b, s, group[i], place[i], row, raw_pattern(value)); };
        if (paired) accumulate<2, true>(base, stride, first + ty, last, height, bound, columns, found);
        else if (two) accumulate<2, false>(base, stride, first + ty, last, height, bound, columns, found);
        else accumulate<1, false>(base, stride, first + ty, last, height, bound, columns, found);
    }
    if (!j.summed) return;
    for (int i = 0; i < 2; i++) {
        wide[3 * i][threadIdx.x] = columns[i].total;
        wide[3 * i + 1][threadIdx.x] = columns[i].squares;
        wide[3 * i + 2][threadIdx.x] = columns[i].magnitudes;
        narrow[2 * i][threadIdx.x] = columns[i].low;
        narrow[2 * i + 1][threadIdx.x] = columns[i].high;
    }
    for (int half = height / 2; half > 0; half /= 2) {
        __syncthreads();
        if (ty < half) {
            const int other = threadIdx.x + half * lanes;
            for (int i = 0; i < 6; i++) wide[i][threadIdx.x] += wide[i][other];
            for (int i = 0; i < 2; i++) {
                narrow[2 * i][threadIdx.x] = fminf(narrow[2 * i][threadIdx.x], narrow[2 * i][other]);
                narrow[2 * i + 1][threadIdx.x] = fmaxf(narrow[2 * i + 1][threadIdx.x], narrow[2 * i + 1][other]);
            }
        }
    }
    if (ty > 0) return;
    const i64 all = (i64)count * channels;
    const float limit = (float)b.limit;
    for (int i = 0; i < 2; i++) {
        if (column + i >= channels) return;
        double sum = wide[3 * i][threadIdx.x], sum_squares = wide[3 * i + 1][threadIdx.x];
        double magnitudes = wide[3 * i + 2][threadIdx.x];
        float lowest = narrow[2 * i][threadIdx.x], highest = narrow[2 * i + 1][threadIdx.x];
        int used = last - first, unfinite = 0, overflowing = 0;
        // The sum of magnitudes is finite exactly when every value is: float64 cannot overflow on float32 values.
        if (!(magnitudes < infinity) || highest >= limit || lowest <= -limit) {
            lowest = infinity;
            highest = -infinity;
            sum = sum_squares = magnitudes = 0;
            for (int row = first; row < last; row++) {
                const float value = raw_value(base[row * stride + i]);
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
        const i64 at = (i64)segment * channels + column + i;
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

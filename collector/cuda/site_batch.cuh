// The arguments of the kernels over a batch of sites, and the values that they count.

#pragma once

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
const int TOGETHER = 32;                            // neighbouring patterns whose counts are also summed: a range
const int RANGES = PATTERNS / TOGETHER;

// Every member of these structs has 8 bytes except those of Item and the arrays of int at the end of SiteBatch;
// site_batch.py has the same lists. Arrays of int are int32. Groups, segments and items are numbered through the sites
// of a batch: a segment is a document of a group, number `first_segment + group documents + document`.

// The part of a site that depends only on its layout, its documents' lengths and its stride.
struct Shape {
    i64 stride;                 // of x (rows, channels)
    i64 documents, groups, first_group, first_segment;
    const int* offsets;         // (documents + 1,) of rows
    const int* runs;            // (runs, 2) of channels, as SiteLayout.runs
    const int* members;         // (channels,) group by group
    const int* edges;           // (groups + 1,) of members
    const int* group_of;        // (channels,)
    const int* place_of;        // (channels,) in its group
};

// What one block counts in one table: `rows` rows of a group's channels. Every member is an int32.
struct __align__(16) Item {
    int site, first_row, rows, stride;
    int run, last_run;          // of the group's channels
    int low, high;              // the first run
};

// Values whose moments are formed, or whose largest are emitted, or both.
struct Job {
    i64 site, states;           // of `site.x`, or, if `states`, of `site.states`
    i64 stride, channels, groups;
    const int* segments;        // (groups documents, 2) first row and last + 1
    i64 lanes;                  // threads along a row, a power of two
    i64 emit, summed;           // whether candidates are emitted, moments are formed
    i64 partial;                // offset of the partial moments (groups documents, channels) of each kind
};

// The part of a site that differs between calls.
struct Site {
    const raw* x;
    const raw* states;          // (documents channels, d_state), if the moments are not those of x
    i64 first;                  // number of the first document
    u64* counts;                // (groups, PATTERNS), added to
    float* summaries;           // (documents, groups + 1, 1 + quantiles), written
    i64* top;                   // (groups, most, 5), written: as TOP_FIELDS; magnitude -1 where there are fewer
    i64* count;                 // (moments of the layout,), as the members below: added to
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
    const Item* items;          // (items,), a block's and a segment's consecutive
    const int* block_first;     // (blocks + 1,) of items
    const int* segment_first;   // (segments + 1,) of items
    u32* slots;                 // (items, ALL_WORDS), written: an item's counters
    u32* ranges;                // (items, RANGES), written: their sums, without spills
    const int* spill_first;     // (items + 1,) offset of an item's spills: space for as many as its values can cause
    u32* spill_count;           // (items,), written
    u32* spills;                // written: a pattern each, which stands for 0x8000 values
    u64* call;                  // (groups, PATTERNS), written: this call's counts
    u64* call_ranges;           // (groups, RANGES), written: their sums
    int* thresholds;            // (groups, 4), written: the most-th largest magnitude, least one emitted, ties, ordered
    u64* candidates;            // (groups, CANDIDATES, 2) row width + place, pattern
    u32* candidate_count;       // (groups,) zero on entry and on return
    double* partial64;          // of each job (3, groups documents, channels) total, squares, mean magnitude
    float* partial32;           // (2, ...) lowest, highest
    int* partial_counts;        // (3, ...) used, not finite, overflowing
    const float* probabilities; // (quantiles,)
    i64 quantiles, most, infinity;
    double limit;               // the smallest magnitude that rounds to infinity
    Site sites[SITES];
    int group_first[SITES + 1];     // first block of each site: of reduce_counts (in y), of summarise, of finish
    int summary_first[SITES + 1];
    int finish_first[SITES + 1];
    int job_first[2 * SITES + 1];   // and of each job: of moments
};

// The part of the grid that a block belongs to. Unused parts begin at the end.
__device__ __forceinline__ int part_of(const int* first, int block) {
    int part = 0;
    while (block >= first[part + 1]) part++;
    return part;
}

// The sum of a warp's values.
template <class T> __device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(FULL, value, step);
    return value;
}
#if __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ u32 warp_sum(u32 value) { return __reduce_add_sync(FULL, value); }
#endif

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

// The pattern of the j-th value; j need not be a compile-time constant.
__device__ __forceinline__ u32 pattern_at(const uint4& data, int j) {
    const int at = j * sizeof(raw) / 4;
    const u32 word = at < 2 ? (at ? data.y : data.x) : at == 2 ? data.z : data.w;
#if KIND < 2
    return (word >> ((j & 1) * 16)) & 0xffffu;
#else
    return to_pattern(__uint_as_float(word));
#endif
}

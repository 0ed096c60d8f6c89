// Computes the moments of every channel and collects candidates for the largest values.

#pragma once

#include "site_batch.cuh"

// Record a value as a candidate for its group's largest, if it reaches the threshold.
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

// Two neighbouring channels' values as in memory; part(pair, i) is the i-th.
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

// A finite value in float64: sign, exponent and mantissa are shifted to their positions, subnormal or not, and a
// product corrects the exponent's bias. A conversion would take as long as four such products. (NaN and infinity give
// some number.)
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

// Moments of two channels; the sums are valid only if low and high are finite.
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

const int ALONG = 4;                    // neighbouring channels per thread
const int ROWS = KIND < 2 ? 8 : 4;      // rows that it adds at a time
const int STAGES = 3;                   // sets of ROWS rows that are in shared memory or being copied
const int FORMING = 256;                // threads per block of `moments`

struct __align__(ALONG * sizeof(raw)) Quad {
    Pair of[2];
};

// Start copying the values of `channels` channels, zeros beyond. AT_ONCE: in one copy; `at` is aligned to a Quad.
template <bool AT_ONCE> __device__ __forceinline__ void fetch(Quad* to, const raw* at, int channels) {
    if (AT_ONCE) {
        copy_async<sizeof(Quad)>(to, at);
    } else {
        const raw zero = raw_of(0.0f);
        const raw second = channels > 1 ? at[1] : zero, third = channels > 2 ? at[2] : zero;
        to->of[0] = pair_of(at[0], second);
        to->of[1] = pair_of(third, channels > 3 ? at[3] : zero);
    }
}

// Add rows row, row + height, ... of some channels to their columns, through the thread's own elements of shared
// memory, FORMING apart. found(i, row, value) is called for magnitudes above bound[i]; bounds_of(bound) sets the
// bounds, after the first copies have started.
template <bool AT_ONCE, class Bounds, class Found>
__device__ __forceinline__ void accumulate(
    const raw* base, i64 stride, int channels, int row, int last, int height, Quad* places, Columns (&columns)[2],
    Bounds bounds_of, Found found
) {
    const i64 step = height * stride;
    const raw* at = base + row * stride;
    int next = row; // the first row that is not being copied yet
    auto fetch_rows = [&](int stage) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            Quad* to = places + (stage * ROWS + k) * FORMING;
            if (next + k * height < last) fetch<AT_ONCE>(to, at + k * step, channels);
        }
        end_copies();
        next += ROWS * height;
        at += ROWS * step;
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) fetch_rows(stage);
    float bound[ALONG];
    bounds_of(bound);
    auto look = [&](int i, int here, const Quad* quad) {
        const raw stored = part(quad->of[i / 2], i & 1);
        if (fabsf(raw_value(stored)) > bound[i]) found(i, here, stored);
    };
    int stage = 0;
    for (; row < last; row += ROWS * height) {
        fetch_rows((stage + STAGES - 1) % STAGES);
        wait_for_copies<STAGES - 1>();
        const Quad* quads = places + stage * ROWS * FORMING;
        stage = (stage + 1) % STAGES;
        if (row + (ROWS - 1) * height < last) {
            Quad values[ROWS];
#pragma unroll
            for (int k = 0; k < ROWS; k++) values[k] = quads[k * FORMING];
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
                    // Rare, so the rows are read again: testing each value took a tenth longer. If one value is NaN,
                    // another may still exceed the bound.
                    const int channel = 2 * pair + i;
                    if (!(fmaxf(value_of(largest, i), -value_of(least, i)) <= bound[channel]) && channel < channels) {
#pragma unroll 1
                        for (int k = 0; k < ROWS; k++) look(channel, row + k * height, quads + k * FORMING);
                    }
                }
            }
        } else {
#pragma unroll 1
            for (int here = row; here < last; here += height, quads += FORMING) {
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    columns[pair].add(quads->of[pair]);
                    columns[pair].widen(quads->of[pair], quads->of[pair]);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        if (2 * pair + i < channels) look(2 * pair + i, here, quads);
                    }
                }
            }
        }
    }
}

// One block per job, segment and run of channels; a segment's runs are consecutive blocks, since their bytes are
// adjacent. ALONG channels per thread; rows are divided along the block's other dimension and combined at the end in a
// fixed order.
extern "C" __global__ void __launch_bounds__(FORMING, 2) moments(const __grid_constant__ SiteBatch b) {
    struct Sums {
        double wide[3 * ALONG][FORMING];
        Pair lows[2][FORMING], highs[2][FORMING];
    };
    const int values = STAGES * ROWS * FORMING * sizeof(Quad), sums = sizeof(Sums); // sums reuse the memory of values
    __shared__ __align__(16) char buffer[values > sums ? values : sums];
    auto& [wide, lows, highs] = *(Sums*)buffer;
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
        Quad* places = (Quad*)buffer + threadIdx.x;
        auto found = [&](int i, int row, raw value) { emit(b, s, column + i, row, raw_pattern(value)); };
        if (at_once) accumulate<true>(base, stride, mine, first + ty, last, height, places, columns, bounds_of, found);
        else accumulate<false>(base, stride, mine, first + ty, last, height, places, columns, bounds_of, found);
    }
    if (!j.summed) return;
    __syncthreads();
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

    // One channel per thread, so that neighbouring threads write neighbouring words.
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
        double* partial64 = b.partial64 + 3 * j.partial + at;
        float* partial32 = b.partial32 + 2 * j.partial + at;
        int* partial_counts = b.partial_counts + 3 * j.partial + at;
        partial64[0] = sum;
        partial64[all] = sum_squares;
        partial64[2 * all] = used ? magnitudes / used : 0;
        partial32[0] = lowest;
        partial32[all] = highest;
        partial_counts[0] = used;
        partial_counts[all] = unfinite;
        partial_counts[2 * all] = overflowing;
    }
}

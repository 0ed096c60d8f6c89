// Counts float16 patterns and sums the squares of their gradients in fixed point, by group and pattern. Compiled at run
// time (squares.py).
//
// PATTERNS  of 16 bits
//
// The kernels of a site run in this order: largest, add_squares, finish. Integers are added, so the order in which
// threads add does not matter.

#include "ptx.cuh"

typedef unsigned long long u64;

const u32 FULL = 0xffffffffu;
const int AHEAD = 4; // values that a thread loads before it adds the first
const int MANY = 6; // if so many of a warp's 32 values are alike, they are added up in registers
const u32 INFINITE = 0x7f800000u; // bits of the smallest float that is not finite

// Iterates over a (rows, width) matrix: AHEAD times load (k, row, column, valid), then as often take (k), so that loads
// overlap. The threads of a warp have neighbouring values and stay together; not `valid` is one beyond the matrix.
template <class Load, class Take>
__device__ __forceinline__ void walk(i64 rows, i64 width, const Load& load, const Take& take) {
    const i64 threads = (i64)gridDim.x * blockDim.x, start = (i64)blockIdx.x * blockDim.x;
    const i64 more_rows = threads / width, more_columns = threads % width, total = rows * width;
    i64 row = (start + threadIdx.x) / width, column = (start + threadIdx.x) % width;
    for (i64 first = start; first < total; first += AHEAD * threads) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            load(k, row, column, row < rows);
            row += more_rows;
            column += more_columns;
            if (column >= width) column -= width, row++;
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) take(k);
    }
}

// The largest magnitude of gradient (rows, width), rows `stride` apart, as the bits of a float; `found` begins at 0.
// Bits of magnitudes are ordered as the magnitudes, infinity and NaN above all.
extern "C" __global__ void __launch_bounds__(256) largest(
    const float* gradient, i64 stride, i64 rows, i64 width, u32* found
) {
    u32 bits[AHEAD], most = 0;
    const auto load = [&](int k, i64 row, i64 column, bool valid) {
        bits[k] = valid ? __float_as_uint(gradient[row * stride + column]) & 0x7fffffffu : 0;
    };
    walk(rows, width, load, [&](int k) { most = bits[k] > most ? bits[k] : most; });
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
        const u32 other = __shfl_xor_sync(FULL, most, offset);
        most = other > most ? other : most;
    }
    if (threadIdx.x % 32 == 0) atomicMax(found, most);
}

// Units per 1: the power of two for which `count` squares of the largest magnitude are just below 2^62.
__device__ __forceinline__ double units_of(u32 largest, i64 count) {
    const double most = __uint_as_float(largest);
    int exponent;
    frexp(most * most * (double)count, &exponent);
    return ldexp(1.0, 62 - exponent);
}

// values, gradient (rows, width), rows `values_stride` and `gradient_stride` apart; group_of (width,); counts, added to,
// and whole, the sums of squares in `units_of` the largest magnitude, (groups, PATTERNS).
extern "C" __global__ void __launch_bounds__(256) add_squares(
    const float* values, i64 values_stride, const float* gradient, i64 gradient_stride, const i64* group_of, i64 rows,
    i64 width, const u32* largest, u64* counts, u64* whole
) {
    const double units = *largest < INFINITE ? units_of(*largest, rows * width) : 0.0;
    float value[AHEAD], slope[AHEAD];
    i64 of_group[AHEAD];
    const auto load = [&](int k, i64 row, i64 column, bool valid) {
        value[k] = valid ? values[row * values_stride + column] : 0.0f;
        slope[k] = valid ? gradient[row * gradient_stride + column] : 0.0f;
        of_group[k] = valid ? group_of[column] * PATTERNS : -1;
    };
    walk(rows, width, load, [&](int k) {
        const bool valid = of_group[k] >= 0;
        const i64 place = valid ? of_group[k] + float_to_half(value[k]) : -1;
        const u64 square = *largest < INFINITE ? (u64)__double2ll_rn((double)slope[k] * (double)slope[k] * units) : 0;
        const i64 hot = __shfl_sync(FULL, place, 0);
        const u32 alike = __ballot_sync(FULL, place == hot);
        const bool together = __popc(alike) >= MANY && place == hot;
        if (__popc(alike) >= MANY) {
            // Threads that add to one place would wait for each other.
            u64 sum = together ? square : 0;
#pragma unroll
            for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(FULL, sum, offset);
            if (threadIdx.x % 32 == 0 && valid) {
                atomicAdd(counts + place, (u64)__popc(alike));
                atomicAdd(whole + place, sum);
            }
        }
        if (valid && !together) {
            atomicAdd(counts + place, (u64)1);
            atomicAdd(whole + place, square);
        }
    });
}

// Adds whole (places,) to gradient_sq (places,) as float64, or NaN if a gradient of the site is not finite. `count`: the
// site's values.
extern "C" __global__ void __launch_bounds__(256) finish(
    const u64* whole, const u32* largest, i64 count, double* gradient_sq, i64 places
) {
    const i64 place = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= places) return;
    if (*largest >= INFINITE) {
        gradient_sq[place] = __uint_as_float(0x7fc00000u);
    } else if (whole[place]) {
        gradient_sq[place] += (double)whole[place] / units_of(*largest, count);
    }
}

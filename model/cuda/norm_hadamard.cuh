// RMS norms and the Hadamard transform over rows of activations, for any storage type. Included by forward.cu
// (activations) and by apply/int8/operators/blocks.cu (codes).
//
// DIM    channels of a row that is gated or transformed: d_inner
// ORDER  order of the Hadamard matrix that is not a power of two, or 1;  BITS: log2 of the power of two;
//        ORDER 2^BITS is DIM, unless nothing is transformed

#include "ptx.cuh"

template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT < 16 ? sizeof(T) * COUNT : 16) Packed {
    T at[COUNT];
};

__device__ __forceinline__ float to_float(u16 half) { return half_to_float(half); }
__device__ __forceinline__ float to_float(float v) { return v; }

// Sums v in float64 over each run of `threads` (a multiple of 32) consecutive threads of a block of up to 1024, and
// returns to each thread the sum of its own run. `partial`: shared memory for 32 values.
__device__ __forceinline__ double block_sum(double v, double* partial, int threads) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    const int first = threadIdx.x / threads * (threads / 32);
    double total = 0.0;
    for (int i = 0; i < threads / 32; i++) total += partial[first + i];
    return total;
}

// residual += x; returns the reciprocal of the sum's root mean square and leaves the row in `line`. One block per row.
// A thread handles COUNT consecutive channels at a time; if COUNT > 1, rows are aligned and padded to a multiple of it.
template <int COUNT, class T>
__device__ __forceinline__ float add_and_measure(
    const T* x, i64 x_stride, float* residual, i64 residual_stride, i64 width, float eps, float* line
) {
    __shared__ double partial[32];
    const T* added = x + blockIdx.x * x_stride;
    float* row = residual + blockIdx.x * residual_stride;
    double squares = 0.0;
    for (int i = threadIdx.x * COUNT; i < width; i += blockDim.x * COUNT) {
        const Packed<T, COUNT> more = *(const Packed<T, COUNT>*)(added + i);
        Packed<float, COUNT> v = *(const Packed<float, COUNT>*)(row + i);
#pragma unroll
        for (int j = 0; j < COUNT; j++) v.at[j] += to_float(more.at[j]);
        *(Packed<float, COUNT>*)(row + i) = v;
        *(Packed<float, COUNT>*)(line + i) = v;
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            if (i + j < width) squares += (double)v.at[j] * (double)v.at[j];
        }
    }
    const float mean = (float)(block_sum(squares, partial, blockDim.x) / (double)width);
    return 1.0f / sqrtf(mean + eps);
}

const int INNER = 1 << BITS;

// In the functions below a block of ROW_THREADS threads handles ROWS rows, the first being `blockIdx.x * ROWS`. They
// are in dynamic shared memory, as Line[ROWS].
const int ROWS = DIM <= 4096 ? 2 : 1;
const int ROW_THREADS = 256;

// A row of DIM floats with an unused word after every 32: without it, threads that each read eight consecutive values
// would conflict on the same banks.
const int LINE = DIM + DIM / 32 + 1;
typedef float Line[LINE];
__device__ __forceinline__ int padded(int i) { return i + (i >> 5); }

template <int COUNT>
__device__ __forceinline__ void butterflies(float (&v)[COUNT]) {
#pragma unroll
    for (int half = 1; half < COUNT; half *= 2)
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (i & half) continue;
            const float low = v[i], high = v[i + half];
            v[i] = low + high;
            v[i + half] = low - high;
        }
}

// Stages of the transform that are applied while rows are read.
const int READ_STAGES = BITS < 3 ? BITS : 3;

// Reads rows of x (rows, DIM), up to eight consecutive values per thread, and applies the first READ_STAGES stages.
template <class T>
__device__ __forceinline__ void read_rows(const T* x, i64 rows, Line* lines) {
    constexpr int COUNT = 1 << READ_STAGES, GROUPS = DIM / COUNT;
    for (int i = threadIdx.x; i < ROWS * GROUPS; i += ROW_THREADS) {
        const i64 row = (i64)blockIdx.x * ROWS + i / GROUPS;
        const int start = i % GROUPS * COUNT;
        if (row >= rows) continue;
        const Packed<T, COUNT> packed = *(const Packed<T, COUNT>*)(x + row * DIM + start);
        float v[COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; k++) v[k] = to_float(packed.at[k]);
        butterflies(v);
#pragma unroll
        for (int k = 0; k < COUNT; k++) lines[i / GROUPS][padded(start + k)] = v[k];
    }
}

// Applies the stages from bit FIRST on, up to four at a time in registers.
template <int FIRST>
__device__ __forceinline__ void remaining_stages(Line* lines) {
    if constexpr (FIRST < BITS) {
        constexpr int STAGES = BITS - FIRST < 4 ? BITS - FIRST : 4, COUNT = 1 << STAGES, GROUPS = DIM / COUNT;
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * GROUPS; i += ROW_THREADS) {
            float* line = lines[i / GROUPS];
            const int group = i % GROUPS;
            const int low = group & ((1 << FIRST) - 1), start = ((group >> FIRST) << (FIRST + STAGES)) | low;
            float v[COUNT];
#pragma unroll
            for (int k = 0; k < COUNT; k++) v[k] = line[padded(start + (k << FIRST))];
            butterflies(v);
#pragma unroll
            for (int k = 0; k < COUNT; k++) line[padded(start + (k << FIRST))] = v[k];
        }
        remaining_stages<FIRST + STAGES>(lines);
    }
}

// Applies the stages from bit FIRST on, in the order of host_kernels.butterflies, and calls put(row, channel, value)
// with every value of the rows times (odd kron H_2^BITS). odd (ORDER, ORDER); `signs`: shared memory for a copy of it.
template <int FIRST, class Put>
__device__ __forceinline__ void finish_rows(Line* lines, const float* odd, float* signs, i64 rows, const Put& put) {
    if constexpr (ORDER > 1) {
        for (int i = threadIdx.x; i < ORDER * ORDER; i += ROW_THREADS) signs[i] = odd[i];
    }
    remaining_stages<FIRST>(lines);
    __syncthreads();
    const i64 first = (i64)blockIdx.x * ROWS;
    if constexpr (ORDER == 1) {
        for (int i = threadIdx.x; i < ROWS * DIM; i += ROW_THREADS) {
            const i64 row = first + i / DIM;
            if (row < rows) put(row, i % DIM, lines[i / DIM][padded(i % DIM)]);
        }
    } else {
        // A thread reads all ORDER inputs of position p and computes all of its outputs or, where rows are long, half
        // of them.
        constexpr int PARTS = ROWS == 2 ? 1 : 2, OUTPUTS = ORDER / PARTS;
        for (int i = threadIdx.x; i < ROWS * PARTS * INNER; i += ROW_THREADS) {
            const int p = i % INNER, begin = i / INNER % PARTS * OUTPUTS;
            const i64 row = first + i / (PARTS * INNER);
            if (row >= rows) continue;
            const float* line = lines[i / (PARTS * INNER)];
            float v[ORDER];
#pragma unroll
            for (int j = 0; j < ORDER; j++) v[j] = line[padded(j * INNER + p)];
#pragma unroll 4
            for (int k = 0; k < OUTPUTS; k++) {
                float total = 0.0f;
#pragma unroll
                for (int j = 0; j < ORDER; j += 4) {
                    const float4 sign = *(const float4*)(signs + (begin + k) * ORDER + j);
                    // Products with +-1 are exact, so contracting them changes nothing.
                    total = fmaf(sign.x, v[j], total);
                    total = fmaf(sign.y, v[j + 1], total);
                    total = fmaf(sign.z, v[j + 2], total);
                    total = fmaf(sign.w, v[j + 3], total);
                }
                put(row, (begin + k) * INNER + p, total);
            }
        }
    }
}

// RMS norm of gated(row, channel) over each of `groups` runs of channels, times weight (DIM,). Calls take(row, channel,
// value, its address in the line) with every value.
template <class Gated, class Take>
__device__ __forceinline__ void gated_norm_rows(
    Line* lines, i64 rows, const float* weight, i64 groups, float eps, const Gated& gated, const Take& take
) {
    __shared__ double partial[32];
    constexpr int SIDE = ROW_THREADS / ROWS; // threads per row
    const int width = DIM / (int)groups, me = threadIdx.x % SIDE;
    const i64 here = (i64)blockIdx.x * ROWS + threadIdx.x / SIDE, row = here < rows ? here : rows - 1;
    float* line = lines[threadIdx.x / SIDE];
    for (int g = 0; g < groups; g++) {
        double squares = 0.0;
        for (int i = g * width + me; i < (g + 1) * width; i += SIDE) {
            const float value = gated(row, i);
            line[padded(i)] = value;
            squares += (double)value * (double)value;
        }
        const float mean = (float)(block_sum(squares, partial, SIDE) / (double)width);
        const float rstd = 1.0f / sqrtf(mean + eps);
        for (int i = g * width + me; i < (g + 1) * width; i += SIDE) {
            take(row, i, line[padded(i)] * rstd * weight[i], &line[padded(i)]);
        }
    }
}

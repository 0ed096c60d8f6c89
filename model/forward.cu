// The Mamba blocks' operators on CUDA, the siblings of kernels.py: packed documents, no padding, float32 inside.
// Compiled at run time (cuda_operators.py).
//
// HALF      1: activations are float16, 0: float32
// WIDTH     taps of the convolution
// and those of scans.cuh.

#include "scans.cuh"

#if HALF
typedef u16 real;
#else
typedef float real;
#endif

__device__ __forceinline__ float get(real v) {
#if HALF
    return half_to_float(v);
#else
    return v;
#endif
}

__device__ __forceinline__ real as_real(float v) {
#if HALF
    return float_to_half(v);
#else
    return v;
#endif
}

const int CONV_ROWS = 16;

// Depthwise causal convolution with bias, then SiLU, each document with zeros before it. A thread has one channel and
// CONV_ROWS rows. x (t, e or more), rows x_stride apart; weight (WIDTH, e), the last row for the current token;
// starts (t,) the first row of each row's document; out (t, e).
extern "C" __global__ void __launch_bounds__(128) conv_silu(
    const real* x, i64 x_stride, const float* weight, const float* bias, const int* starts, i64 rows, i64 channels,
    real* out
) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    const i64 first = (i64)blockIdx.y * CONV_ROWS;
    float taps[WIDTH], window[WIDTH];
#pragma unroll
    for (int k = 0; k < WIDTH; k++) taps[k] = weight[k * channels + channel];
    // window[k] is the value WIDTH - 1 - k rows back, of whichever document.
#pragma unroll
    for (int k = 1; k < WIDTH; k++) {
        const i64 row = first - (WIDTH - k);
        window[k] = row >= 0 ? get(x[row * x_stride + channel]) : 0.0f;
    }
    const float start = bias[channel];
#pragma unroll 4
    for (int i = 0; i < CONV_ROWS; i++) {
        const i64 row = first + i;
        if (row >= rows) return;
#pragma unroll
        for (int k = 1; k < WIDTH; k++) window[k - 1] = window[k];
        window[WIDTH - 1] = get(x[row * x_stride + channel]);
        const int mine = (int)row - starts[row]; // rows of the document before this one
        float total = start;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            if (WIDTH - 1 - k <= mine) total += taps[k] * window[k];
        }
        out[row * channels + channel] = as_real(silu(total));
    }
}

struct Channels {
    typedef real Raw;
    const real *u_start, *delta_start, *bc;
    i64 bc_stride;
    const real* z;
    i64 z_stride, channels;
    real* y;

    __device__ real u_at(i64 row, int channel) const { return u_start[row * channels + channel]; }
    __device__ real delta_at(i64 row, int channel) const { return delta_start[row * channels + channel]; }
    __device__ real z_at(i64 row, int channel) const { return z[row * z_stride + channel]; }
    __device__ real b_c_at(i64 row, int n) const { return bc[row * bc_stride + n]; }
    __device__ float u(real raw) const { return get(raw); }
    __device__ float delta(real raw) const { return get(raw); }
    __device__ float gate(real raw) const { return silu(get(raw)); }
    __device__ float b_c(real raw) const { return get(raw); }
    __device__ void put(i64 row, int channel, float value) const { y[row * channels + channel] = as_real(value); }
};

// u, y (t, e); delta (t, e) without bias; bc (t, 2 STATES) B then C, rows bc_stride apart; z (t, e) rows z_stride apart;
// the rest as in scan_channels.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS) selective_scan(
    const real* u, const real* delta, const real* bc, i64 bc_stride, const real* z, i64 z_stride, const float* a,
    const float* d, const float* bias, const int* offsets, i64 channels, real* y, float* state
) {
    const Channels in = {u, delta, bc, bc_stride, z, z_stride, channels, y};
    scan_channels(in, a, d, bias, offsets, channels, state);
}

struct Head {
    const real *x_at, *b_at, *c_at;
    i64 stride;
    const real* dt_at;
    i64 dt_stride, width;
    real* y;

    __device__ float x(i64 row, i64 column) const { return get(x_at[row * stride + column]); }
    __device__ float skipped(i64 row, i64 column) const { return x(row, column); }
    __device__ float b(i64 row, i64 column) const { return get(b_at[row * stride + column]); }
    __device__ float c(i64 row, i64 column) const { return get(c_at[row * stride + column]); }
    __device__ float dt(i64 row, int head) const { return get(dt_at[row * dt_stride + head]); }
    __device__ void put(i64 row, i64 column, float value) const { y[row * width + column] = as_real(value); }
};

// x (t, heads HEADDIM) rows x_stride apart, b and c (t, ngroups STATES) likewise, dt (t, heads) rows dt_stride apart and
// without bias; y (t, heads HEADDIM); the rest as in scan_head.
extern "C" __global__ void __launch_bounds__(HEADDIM / JOINED * SPLIT) ssd_scan(
    const real* x, const real* b, const real* c, i64 x_stride, const real* dt, i64 dt_stride, const float* a,
    const float* d, const float* bias, const int* offsets, i64 heads, i64 ngroups, real* y, float* state
) {
    const Head in = {x, b, c, x_stride, dt, dt_stride, heads * HEADDIM, y};
    scan_head(in, a, d, bias, offsets, heads, ngroups, state);
}

// Every row times (odd kron H_2^k), times factor, in the order of kernels.butterflies: a block per row, dim floats of
// dynamic shared memory. x, out (rows, dim); odd (order, order).
extern "C" __global__ void __launch_bounds__(256) hadamard(
    const real* x, const float* odd, i64 order, i64 dim, float factor, real* out
) {
    extern __shared__ float line[];
    const int size = dim, inner = dim / order;
    const i64 start = (i64)blockIdx.x * dim;
    for (int i = threadIdx.x; i < size; i += blockDim.x) line[i] = get(x[start + i]);
    __syncthreads();
    for (int half = 1; half < inner; half *= 2) {
        for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
            const int low = (i & ~(half - 1)) * 2 + (i & (half - 1));
            const float first = line[low], second = line[low + half];
            line[low] = first + second;
            line[low + half] = first - second;
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        float total = line[i];
        if (order > 1) {
            total = 0.0f;
            const float* signs = odd + (i / inner) * order;
            for (int j = 0; j < order; j++) total += signs[j] * line[j * inner + i % inner];
        }
        out[start + i] = as_real(total * factor);
    }
}

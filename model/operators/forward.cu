// The Mamba blocks' operators on CUDA, as host_kernels.py on the CPU: packed documents, no padding, arithmetic in
// float32. Compiled at run time (cuda.py).
//
// HALF      1: activations are float16, 0: float32
// WIDTH     taps of the convolution
// LANES     4 if d_model is a multiple of it, else 1
// and those of norm_hadamard.cuh and scans.cuh.

#include "norm_hadamard.cuh"
#include "scans.cuh"

#if HALF
typedef u16 real;
#else
typedef float real;
#endif

__device__ __forceinline__ real as_real(float v) {
#if HALF
    return float_to_half(v);
#else
    return v;
#endif
}

const int CONV_ROWS = 16;

// Depthwise causal convolution with bias, then SiLU, with zeros before each document. One thread per channel and
// CONV_ROWS rows. x (t, e or more), rows x_stride apart; weight (WIDTH, e), the last row for the current token; starts
// (t,) the first row of each row's document; out (t, e).
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
    // window[k] is the value WIDTH - 1 - k rows back, even if it belongs to an earlier document.
#pragma unroll
    for (int k = 1; k < WIDTH; k++) {
        const i64 row = first - (WIDTH - k);
        window[k] = row >= 0 ? to_float(x[row * x_stride + channel]) : 0.0f;
    }
    const float start = bias[channel];
#pragma unroll 4
    for (int i = 0; i < CONV_ROWS; i++) {
        const i64 row = first + i;
        if (row >= rows) return;
#pragma unroll
        for (int k = 1; k < WIDTH; k++) window[k - 1] = window[k];
        window[WIDTH - 1] = to_float(x[row * x_stride + channel]);
        const int mine = (int)row - starts[row]; // rows of the document before this one
        float total = start;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            if (WIDTH - 1 - k <= mine) total += taps[k] * window[k];
        }
        out[row * channels + channel] = as_real(silu(total));
    }
}

// The same for one token of each sequence: x (b, e or more) and window (b, WIDTH - 1, e), the last inputs, oldest first,
// updated. One thread per channel and sequence (blockIdx.y).
extern "C" __global__ void __launch_bounds__(128) conv_step(
    const real* x, i64 x_stride, const float* weight, const float* bias, i64 channels, real* window, real* out
) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    const i64 row = blockIdx.y;
    real* mine = window + row * (WIDTH - 1) * channels + channel;
    const real now = x[row * x_stride + channel];
    float total = bias[channel];
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
        const real value = k < WIDTH - 1 ? mine[k * channels] : now;
        if (k > 0) mine[(k - 1) * channels] = value;
        total += weight[k * channels + channel] * to_float(value);
    }
    out[row * channels + channel] = as_real(silu(total));
}

// A state of any strides, from one sequence, channel and state to the next.
struct State {
    float* first;
    i64 of_sequence, of_channel, of_state;

    __device__ float& here(i64 sequence, i64 channel, int n) const {
        return first[sequence * of_sequence + channel * of_channel + n * of_state];
    }
    __device__ float at(i64 sequence, i64 channel, int n) const { return here(sequence, channel, n); }
    __device__ void put(i64 sequence, i64 channel, int n, float value) const { here(sequence, channel, n) = value; }
};

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
    __device__ float u(real raw) const { return to_float(raw); }
    __device__ float delta(real raw) const { return to_float(raw); }
    __device__ float gate(real raw) const { return silu(to_float(raw)); }
    __device__ float b_c(real raw) const { return to_float(raw); }
    __device__ void put(i64 row, int channel, float value) const { y[row * channels + channel] = as_real(value); }
};

// u, y (t, e); delta (t, e) without bias; bc (t, 2 STATES), B then C, rows bc_stride apart; z (t, e), rows z_stride
// apart; state (documents, e, STATES), of the last tokens; the rest as in scan_channels.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS) selective_scan(
    const real* u, const real* delta, const real* bc, i64 bc_stride, const real* z, i64 z_stride, const float* a,
    const float* d, const float* bias, const int* offsets, i64 channels, real* y, float* state
) {
    const Channels in = {u, delta, bc, bc_stride, z, z_stride, channels, y};
    const auto keep = [=](i64 document, i64 channel, int n, float value) {
        state[(document * channels + channel) * STATES + n] = value;
    };
    scan_channels(in, a, d, bias, offsets, channels, true, keep);
}

// The same for one token of each sequence, t of them; state (t, e, STATES) of the strides `of_...`, updated.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS) scan_step(
    const real* u, const real* delta, const real* bc, i64 bc_stride, const real* z, i64 z_stride, const float* a,
    const float* d, const float* bias, i64 channels, real* y, float* state, i64 of_sequence, i64 of_channel,
    i64 of_state
) {
    const Channels in = {u, delta, bc, bc_stride, z, z_stride, channels, y};
    step_channels(in, State{state, of_sequence, of_channel, of_state}, a, d, bias, channels);
}

struct Head {
    const real *x_at, *b_at, *c_at;
    i64 stride;
    const real* dt_at;
    i64 dt_stride, width;
    real* y;

    __device__ float x(i64 row, i64 column) const { return to_float(x_at[row * stride + column]); }
    __device__ float skipped(i64 row, i64 column) const { return x(row, column); }
    __device__ float b(i64 row, i64 column) const { return to_float(b_at[row * stride + column]); }
    __device__ float c(i64 row, i64 column) const { return to_float(c_at[row * stride + column]); }
    __device__ float dt(i64 row, int head) const { return to_float(dt_at[row * dt_stride + head]); }
    __device__ void put(i64 row, i64 column, float value) const { y[row * width + column] = as_real(value); }
};

// x (t, heads HEADDIM) rows x_stride apart, b and c (t, ngroups STATES) too; dt (t, heads) without bias, rows dt_stride
// apart; y (t, heads HEADDIM); state (documents, heads HEADDIM, STATES), of the last tokens; the rest as in scan_head.
extern "C" __global__ void __launch_bounds__(HEADDIM / JOINED * SPLIT) ssd_scan(
    const real* x, const real* b, const real* c, i64 x_stride, const real* dt, i64 dt_stride, const float* a,
    const float* d, const float* bias, const int* offsets, i64 heads, i64 ngroups, real* y, float* state
) {
    const Head in = {x, b, c, x_stride, dt, dt_stride, heads * HEADDIM, y};
    const auto keep = [=](i64 document, i64 channel, int n, float value) {
        state[(document * heads * HEADDIM + channel) * STATES + n] = value;
    };
    scan_head(in, a, d, bias, offsets, heads, ngroups, true, keep);
}

// The same for one token of each sequence, t of them; state (t, heads HEADDIM, STATES) of the strides `of_...`, updated.
extern "C" __global__ void __launch_bounds__(STEP_THREADS) ssd_step(
    const real* x, const real* b, const real* c, i64 x_stride, const real* dt, i64 dt_stride, const float* a,
    const float* d, const float* bias, i64 heads, i64 ngroups, real* y, float* state, i64 of_sequence, i64 of_channel,
    i64 of_state
) {
    const Head in = {x, b, c, x_stride, dt, dt_stride, heads * HEADDIM, y};
    step_head(in, State{state, of_sequence, of_channel, of_state}, a, d, bias, heads, ngroups);
}

// residual += x, then residual / rms * weight. x, out (rows, width) and residual (rows, width), contiguous; weight
// (width,); `width` floats of dynamic shared memory. One block per row.
extern "C" __global__ void __launch_bounds__(256) add_norm(
    const real* x, float* residual, const float* weight, i64 width, float eps, real* out
) {
    extern __shared__ __align__(16) float line[];
    const float rstd = add_and_measure<LANES>(x, width, residual, width, width, eps, line);
    for (int i = threadIdx.x * LANES; i < width; i += blockDim.x * LANES) {
        Packed<real, LANES> done;
#pragma unroll
        for (int j = 0; j < LANES; j++) done.at[j] = as_real(line[i + j] * rstd * weight[i + j]);
        *(Packed<real, LANES>*)(out + blockIdx.x * width + i) = done;
    }
}

// y SiLU(z) of y (rows, DIM) and z (rows, DIM), rows z_stride apart.
struct Gated {
    const real *y, *z;
    i64 z_stride;

    __device__ float operator()(i64 row, int channel) const {
        return to_float(y[row * DIM + channel]) * silu(to_float(z[row * z_stride + channel]));
    }
};

// Writes transformed rows, times factor, to out (rows, DIM).
struct Scaled {
    real* out;
    float factor;

    __device__ void operator()(i64 row, int channel, float value) const {
        out[row * DIM + channel] = as_real(value * factor);
    }
};

// Every row times (odd kron H), times factor. x, out (rows, DIM); odd (ORDER, ORDER).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) hadamard(
    const real* x, i64 rows, const float* odd, float factor, real* out
) {
    extern __shared__ __align__(16) float line[];
    __shared__ __align__(16) float signs[ORDER * ORDER];
    Line* lines = (Line*)line;
    read_rows(x, rows, lines);
    finish_rows<READ_STAGES>(lines, odd, signs, rows, Scaled{out, factor});
}

// RMS norm of y SiLU(z), as gated_norm_rows; out (rows, DIM).
extern "C" __global__ void __launch_bounds__(ROW_THREADS) gated_norm(
    const real* y, i64 rows, const real* z, i64 z_stride, const float* weight, i64 groups, float eps, real* out
) {
    extern __shared__ __align__(16) float line[];
    const Gated gated = {y, z, z_stride};
    const auto write = [=](i64 row, int i, float value, float*) { out[row * DIM + i] = as_real(value); };
    gated_norm_rows((Line*)line, rows, weight, groups, eps, gated, write);
}

// gated_norm, rounded to `real`, then hadamard.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) gated_norm_hadamard(
    const real* y, i64 rows, const real* z, i64 z_stride, const float* weight, i64 groups, float eps, const float* odd,
    float factor, real* out
) {
    extern __shared__ __align__(16) float line[];
    __shared__ __align__(16) float signs[ORDER * ORDER];
    Line* lines = (Line*)line;
    const Gated gated = {y, z, z_stride};
    const auto keep = [](i64, int, float value, float* place) { *place = to_float(as_real(value)); };
    gated_norm_rows(lines, rows, weight, groups, eps, gated, keep);
    finish_rows<0>(lines, odd, signs, rows, Scaled{out, factor});
}

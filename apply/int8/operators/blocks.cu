// The steps of the INT8 blocks between the products, on CUDA, as host_kernels.py on the CPU. Compiled at run time
// (cuda.py) with -fmad=false, so that no product is contracted with a sum unless written so.
//
// HEADS    1: blocks with heads (Mamba-2), 0: without (Mamba-1)
// WIDTH    taps of the convolution
// and those of model/cuda/norm_hadamard.cuh and model/cuda/scans.cuh.

#include "norm_hadamard.cuh"
#include "scans.cuh"

__device__ __forceinline__ float round_to_half(float f) { return half_to_float(float_to_half(f)); }

// The code of v: half away from zero, saturating. Adds the largest float below a half: a half itself would round
// 0.49999997 up.
__device__ __forceinline__ s8 half_away(float v) { return toward_zero(v + copysignf(0.49999997f, v)); }

// The code of v with a zero point: half away from zero, then shifted, saturating.
__device__ __forceinline__ s8 shifted_code(float v, float zero) {
    const float rounded = truncf(v + copysignf(0.49999997f, v));
    return (s8)(int)fminf(fmaxf(rounded + zero, -128.0f), 127.0f);
}

// The code of silu(v) / divisor, half away from zero, saturating; with the zero point `zero` if SHIFTED. `inverse` is
// about 1 / divisor: the approximations are off by less than 1e-3 where the quotient is within 130, and by 2e-3 within
// 255 (2^-17 of it for the exponential of up to -88, 2^-22 for the rest), so only a quotient nearer to a half is computed
// exactly. Adding 1.5 * 2^23 leaves no fraction bits, so the addition rounds and the code is the sum's last byte:
// conversions to integers run at a quarter of the speed.
template <bool SHIFTED> __device__ __forceinline__ s8 silu_code(float v, float divisor, float inverse, float zero) {
    const float about = v * reciprocal(1.0f + power_of_two(-v * LOG2_E)) * inverse;
    const float low = SHIFTED ? -128.0f - zero : -128.0f, high = SHIFTED ? 127.0f - zero : 127.0f;
    const float shifted = fminf(fmaxf(about, low), high) + 12582912.0f;
    const float rest = fabsf(about - (shifted - 12582912.0f));
    if (fabsf(rest - 0.5f) < (SHIFTED ? 1.0f / 256 : 1.0f / 512)) {
        return SHIFTED ? shifted_code(silu(v) / divisor, zero) : half_away(silu(v) / divisor);
    }
    return (s8)__float_as_int(SHIFTED ? shifted + zero : shifted);
}

// Four codes as floats: made unsigned, a byte is the last byte of the float 2^23 + byte.
__device__ __forceinline__ void code_floats(u32 codes, float (&to)[4]) {
    codes ^= 0x80808080u;
#pragma unroll
    for (int j = 0; j < 4; j++) to[j] = __uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7440 + j)) - 8388736.0f;
}

const int LANES = 4; // channels per thread: rows are padded, and read and written in whole groups of them

// residual += x, then the code (half to even) of residual / rms / scale. x, residual, out (rows, width), each with its
// stride; `width`, rounded up to LANES, floats of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256) norm_to_int8(
    const u16* x, i64 x_stride, float* residual, i64 residual_stride, i64 width, float eps, float scale, s8* out,
    i64 out_stride
) {
    extern __shared__ __align__(16) float line[];
    const float rstd = add_and_measure<LANES>(x, x_stride, residual, residual_stride, width, eps, line);
    for (int i = threadIdx.x * LANES; i < width; i += blockDim.x * LANES) {
        const float4 v = *(const float4*)(line + i);
        *(char4*)(out + blockIdx.x * out_stride + i) = make_char4(
            half_even(v.x * rstd / scale), half_even(v.y * rstd / scale), half_even(v.z * rstd / scale),
            half_even(v.w * rstd / scale)
        );
    }
}

// The same, rounded to float16 instead: the input of a head that is not quantized.
extern "C" __global__ void __launch_bounds__(256) norm_to_half(
    const u16* x, i64 x_stride, float* residual, i64 residual_stride, i64 width, float eps, u16* out, i64 out_stride
) {
    extern __shared__ __align__(16) float line[];
    const float rstd = add_and_measure<LANES>(x, x_stride, residual, residual_stride, width, eps, line);
    for (int i = threadIdx.x * LANES; i < width; i += blockDim.x * LANES) {
        const float4 v = *(const float4*)(line + i);
        *(ushort4*)(out + blockIdx.x * out_stride + i) = make_ushort4(
            float_to_half(v.x * rstd), float_to_half(v.y * rstd), float_to_half(v.z * rstd), float_to_half(v.w * rstd)
        );
    }
}

const int CONV_ROWS = 8;

// Depthwise causal convolution of codes, SiLU, one rounding, half away from zero, with zeros before each document. One
// thread per LANES channels and CONV_ROWS rows, which it loads before it starts. x (t, e or more) and out (t, e), rows
// apart and 4-byte aligned; weight (WIDTH, e) codes, the last row for the current token; scale_wx, bias, scale_out, and,
// if SHIFTED, zero_out (e,); starts (t,) the first row of each row's document.
template <bool SHIFTED> __device__ __forceinline__ void convolve(
    const s8* x, i64 x_stride, const float* weight, const float* scale_wx, const float* bias, const float* scale_out,
    const float* zero_out, const int* starts, i64 rows, i64 channels, s8* out, i64 out_stride
) {
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * LANES;
    if (channel >= channels) return;
    const i64 first = (i64)blockIdx.y * CONV_ROWS;
    u32 codes[WIDTH - 1 + CONV_ROWS]; // the rows before this thread's, even of an earlier document, then its own
    int mine[CONV_ROWS];              // rows of the same document before each
#pragma unroll
    for (int i = 0; i < WIDTH - 1 + CONV_ROWS; i++) {
        const i64 row = first + i - (WIDTH - 1);
        codes[i] = row >= 0 && row < rows ? *(const u32*)(x + row * x_stride + channel) : 0;
    }
#pragma unroll
    for (int i = 0; i < CONV_ROWS; i++) mine[i] = first + i < rows ? (int)(first + i) - starts[first + i] : 0;
    float taps[WIDTH][LANES], window[WIDTH][LANES];
    float scale[LANES], shift[LANES], divisor[LANES], inverse[LANES], zero[LANES];
#pragma unroll
    for (int j = 0; j < LANES; j++) {
        // Rows are padded, so codes beyond the last channel can be read.
        const int at = channel + j < channels ? channel + j : channel;
        scale[j] = scale_wx[at], shift[j] = bias[at], divisor[j] = scale_out[at];
        inverse[j] = 1.0f / divisor[j], zero[j] = SHIFTED ? zero_out[at] : 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) taps[k][j] = weight[k * channels + at];
    }
    // window[k] is WIDTH - 1 - k rows back.
#pragma unroll
    for (int k = 1; k < WIDTH; k++) code_floats(codes[k - 1], window[k]);
#pragma unroll
    for (int i = 0; i < CONV_ROWS; i++) {
#pragma unroll
        for (int k = 1; k < WIDTH; k++)
#pragma unroll
            for (int j = 0; j < LANES; j++) window[k - 1][j] = window[k][j];
        code_floats(codes[WIDTH - 1 + i], window[WIDTH - 1]);
        s8 done[LANES];
#pragma unroll
        for (int j = 0; j < LANES; j++) {
            float total = 0.0f; // products of codes: exact
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                if (WIDTH - 1 - k <= mine[i]) total = fmaf(taps[k][j], window[k][j], total);
            }
            done[j] = silu_code<SHIFTED>(scale[j] * total + shift[j], divisor[j], inverse[j], zero[j]);
        }
        if (first + i < rows) {
            *(char4*)(out + (first + i) * out_stride + channel) = make_char4(done[0], done[1], done[2], done[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(128) conv_silu(
    const s8* x, i64 x_stride, const float* weight, const float* scale_wx, const float* bias, const float* scale_out,
    const float* zero_out, const int* starts, i64 rows, i64 channels, s8* out, i64 out_stride
) {
    convolve<false>(
        x, x_stride, weight, scale_wx, bias, scale_out, zero_out, starts, rows, channels, out, out_stride
    );
}

extern "C" __global__ void __launch_bounds__(128) conv_silu_shifted(
    const s8* x, i64 x_stride, const float* weight, const float* scale_wx, const float* bias, const float* scale_out,
    const float* zero_out, const int* starts, i64 rows, i64 channels, s8* out, i64 out_stride
) {
    convolve<true>(x, x_stride, weight, scale_wx, bias, scale_out, zero_out, starts, rows, channels, out, out_stride);
}

// The convolution of one token of each sequence: the sum starts at the bias and is rounded term by term, as upstream's.
// One thread per channel and sequence (blockIdx.y). x (b, e or more); window (b, WIDTH, e) the last inputs, oldest first,
// updated; out (b, e); the rest as in `convolve`.
template <bool SHIFTED> __device__ __forceinline__ void convolve_next(
    const s8* x, i64 x_stride, const float* weight, const float* scale_wx, const float* bias, const float* scale_out,
    const float* zero_out, i64 channels, s8* window, s8* out, i64 out_stride
) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    const i64 row = blockIdx.y;
    s8* mine = window + row * WIDTH * channels + channel;
    float total = bias[channel];
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
        const s8 code = k < WIDTH - 1 ? mine[(k + 1) * channels] : x[row * x_stride + channel];
        mine[k * channels] = code;
        total += scale_wx[channel] * weight[k * channels + channel] * (float)code;
    }
    const float quotient = silu(total) / scale_out[channel];
    out[row * out_stride + channel] = SHIFTED ? shifted_code(quotient, zero_out[channel]) : half_away(quotient);
}

extern "C" __global__ void __launch_bounds__(128) conv_step(
    const s8* x, i64 x_stride, const float* weight, const float* scale_wx, const float* bias, const float* scale_out,
    const float* zero_out, i64 channels, s8* window, s8* out, i64 out_stride
) {
    convolve_next<false>(x, x_stride, weight, scale_wx, bias, scale_out, zero_out, channels, window, out, out_stride);
}

extern "C" __global__ void __launch_bounds__(128) conv_step_shifted(
    const s8* x, i64 x_stride, const float* weight, const float* scale_wx, const float* bias, const float* scale_out,
    const float* zero_out, i64 channels, s8* window, s8* out, i64 out_stride
) {
    convolve_next<true>(x, x_stride, weight, scale_wx, bias, scale_out, zero_out, channels, window, out, out_stride);
}

const int ROW_WARPS = 4;

// The product of a single row, as upstream's matrix-vector kernel: one warp per output. x (depth,), matrix (columns,
// depth), depth a multiple of 16 and both 16-byte aligned; first, one per column, or, if null, first_of_all; offset, one
// per column, subtracted from the sums unless null.
__device__ __forceinline__ bool row_product(
    const s8* x, const s8* matrix, i64 columns, i64 depth, const float* first, float first_of_all, float second,
    const int* offset, i64& column, float& value
) {
    column = (i64)blockIdx.x * ROW_WARPS + threadIdx.x / 32;
    if (column >= columns) return false; // the whole warp
    const int lane = threadIdx.x % 32;
    int sum = 0;
    for (i64 i = lane * 16; i < depth; i += 32 * 16) {
        const uint4 left = *(const uint4*)(x + i), right = *(const uint4*)(matrix + column * depth + i);
        sum = __dp4a((int)left.x, (int)right.x, sum), sum = __dp4a((int)left.y, (int)right.y, sum);
        sum = __dp4a((int)left.z, (int)right.z, sum), sum = __dp4a((int)left.w, (int)right.w, sum);
    }
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (offset != nullptr) sum -= offset[column];
    value = (float)sum * (first == nullptr ? first_of_all : first[column]) * second;
    return lane == 0;
}

// Codes, saturating, half to even, or half away from zero if `away`.
extern "C" __global__ void __launch_bounds__(ROW_WARPS * 32) row_to_int8(
    const s8* x, const s8* matrix, i64 columns, i64 depth, const float* first, float first_of_all, float second,
    const int* offset, i64 away, s8* out
) {
    i64 column;
    float value;
    if (row_product(x, matrix, columns, depth, first, first_of_all, second, offset, column, value)) {
        out[column] = away ? half_away(value) : half_even(value);
    }
}

extern "C" __global__ void __launch_bounds__(ROW_WARPS * 32) row_to_half(
    const s8* x, const s8* matrix, i64 columns, i64 depth, const float* first, float first_of_all, float second,
    const int* offset, i64 away, u16* out
) {
    i64 column;
    float value;
    if (row_product(x, matrix, columns, depth, first, first_of_all, second, offset, column, value)) {
        out[column] = float_to_half(value);
    }
}

// Writes transformed rows to out (rows, DIM), rows out_stride apart, as codes of factor times the value, half away from
// zero: saturating, or, if `wrap`, modulo 256 as upstream's float to int32 to int8.
struct Codes {
    s8* out;
    i64 out_stride;
    float factor;
    i64 wrap;

    __device__ void operator()(i64 row, int channel, float value) const {
        const float scaled = value * factor;
        out[row * out_stride + channel] = wrap ? (s8)(__float2int_rz(roundf(scaled)) & 255) : half_away(scaled);
    }
};

#if !HEADS

template <bool SHIFTED> struct Channels {
    typedef s8 Raw;
    const s8 *u_start, *delta_start, *bc, *z;
    i64 u_stride, delta_stride, bc_stride, z_stride;
    float u_scale, u_zero, delta_scale, bc_scale;
    const float* gates; // SiLU of every code
    i64 channels;
    u16* y;

    __device__ s8 u_at(i64 row, int channel) const { return u_start[row * u_stride + channel]; }
    __device__ s8 delta_at(i64 row, int channel) const { return delta_start[row * delta_stride + channel]; }
    __device__ s8 z_at(i64 row, int channel) const { return z[row * z_stride + channel]; }
    __device__ s8 b_c_at(i64 row, int n) const { return bc[row * bc_stride + n]; }
    __device__ float u(s8 raw) const { return u_scale * (SHIFTED ? (float)raw - u_zero : (float)raw); }
    __device__ float delta(s8 raw) const { return delta_scale * (float)raw; }
    __device__ float gate(s8 raw) const { return gates[raw + 128]; }
    __device__ float b_c(s8 raw) const { return bc_scale * (float)raw; }
    __device__ void put(i64 row, int channel, float value) const { y[row * channels + channel] = float_to_half(value); }
};

// The states (b, STATES, e) of one token of each sequence, codes half to even. Upstream multiplies a state and its scale
// by 100 before it divides them.
struct State {
    s8* codes;
    float scale;
    i64 channels;

    __device__ s8& here(i64 sequence, i64 channel, int n) const {
        return codes[(sequence * STATES + n) * channels + channel];
    }
    __device__ float at(i64 sequence, i64 channel, int n) const { return scale * (float)here(sequence, channel, n); }
    __device__ void put(i64 sequence, i64 channel, int n, float value) const {
        here(sequence, channel, n) = half_even(value * 1e2f / (scale * 1e2f));
    }
};

// Mamba-1's scan of codes, y (t, e) rounded to float16. u, delta (before bias and softplus), z (t, e) and bc (t, 2
// STATES), B then C: codes, rows apart; state (documents, STATES, e) codes of the states after the last tokens, half away
// from zero, unless null; the rest as in scan_channels.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS) selective_scan(
    const s8* u, i64 u_stride, const s8* delta, i64 delta_stride, const s8* bc, i64 bc_stride, const s8* z,
    i64 z_stride, float u_scale, float u_zero, float delta_scale, float bc_scale, float z_scale, const float* a,
    const float* d, const float* bias, const int* offsets, i64 channels, u16* y, s8* state, float state_scale
) {
    __shared__ float gates[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) gates[i] = silu(z_scale * (float)(i - 128));
    __syncthreads();
    const Channels<false> in = {u, delta, bc, z, u_stride, delta_stride, bc_stride, z_stride, u_scale, u_zero,
                              delta_scale, bc_scale, gates, channels, y};
    const auto keep = [=](i64 document, i64 channel, int n, float value) {
        state[(document * STATES + n) * channels + channel] = half_away(value / state_scale);
    };
    scan_channels(in, a, d, bias, offsets, channels, state != nullptr, keep);
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS) selective_scan_shifted(
    const s8* u, i64 u_stride, const s8* delta, i64 delta_stride, const s8* bc, i64 bc_stride, const s8* z,
    i64 z_stride, float u_scale, float u_zero, float delta_scale, float bc_scale, float z_scale, const float* a,
    const float* d, const float* bias, const int* offsets, i64 channels, u16* y, s8* state, float state_scale
) {
    __shared__ float gates[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) gates[i] = silu(z_scale * (float)(i - 128));
    __syncthreads();
    const Channels<true> in = {u, delta, bc, z, u_stride, delta_stride, bc_stride, z_stride, u_scale, u_zero,
                              delta_scale, bc_scale, gates, channels, y};
    const auto keep = [=](i64 document, i64 channel, int n, float value) {
        state[(document * STATES + n) * channels + channel] = half_away(value / state_scale);
    };
    scan_channels(in, a, d, bias, offsets, channels, state != nullptr, keep);
}

// The same for one token of each sequence; state (b, STATES, e) codes, updated.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS) scan_step(
    const s8* u, i64 u_stride, const s8* delta, i64 delta_stride, const s8* bc, i64 bc_stride, const s8* z,
    i64 z_stride, float u_scale, float u_zero, float delta_scale, float bc_scale, float z_scale, const float* a,
    const float* d, const float* bias, i64 channels, u16* y, s8* state, float state_scale
) {
    __shared__ float gates[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) gates[i] = silu(z_scale * (float)(i - 128));
    __syncthreads();
    const Channels<false> in = {u, delta, bc, z, u_stride, delta_stride, bc_stride, z_stride, u_scale, u_zero,
                              delta_scale, bc_scale, gates, channels, y};
    step_channels(in, State{state, state_scale, channels}, a, d, bias, channels);
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS) scan_step_shifted(
    const s8* u, i64 u_stride, const s8* delta, i64 delta_stride, const s8* bc, i64 bc_stride, const s8* z,
    i64 z_stride, float u_scale, float u_zero, float delta_scale, float bc_scale, float z_scale, const float* a,
    const float* d, const float* bias, i64 channels, u16* y, s8* state, float state_scale
) {
    __shared__ float gates[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) gates[i] = silu(z_scale * (float)(i - 128));
    __syncthreads();
    const Channels<true> in = {u, delta, bc, z, u_stride, delta_stride, bc_stride, z_stride, u_scale, u_zero,
                              delta_scale, bc_scale, gates, channels, y};
    step_channels(in, State{state, state_scale, channels}, a, d, bias, channels);
}

// The Hadamard quantizer: codes of factor * (odd kron H) y. y (rows, DIM) float16; odd (ORDER, ORDER); out (rows, DIM),
// rows out_stride apart.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rotate(
    const u16* y, i64 rows, const float* odd, float factor, i64 wrap, s8* out, i64 out_stride
) {
    extern __shared__ __align__(16) float line[];
    __shared__ __align__(16) float signs[ORDER * ORDER];
    Line* lines = (Line*)line;
    read_rows(y, rows, lines);
    finish_rows<READ_STAGES>(lines, odd, signs, rows, Codes{out, out_stride, factor, wrap});
}

#else

// HALVES: x, B and C are rounded to float16.
template <bool SHIFTED, bool HALVES> struct Head {
    const s8 *x_at, *b_at, *c_at;
    i64 stride;
    const float *x_scales, *b_scales, *c_scales, *x_zeros, *b_zeros, *c_zeros;
    const s8* dt_at;
    i64 dt_stride;
    float dt_scale;
    i64 width;
    u16* y;

    __device__ float value(s8 code, const float* zeros, i64 column) const {
        return SHIFTED ? (float)code - zeros[column] : (float)code;
    }
    __device__ float read(float v) const { return HALVES ? round_to_half(v) : v; }
    __device__ float skipped(i64 row, i64 column) const {
        return x_scales[column] * value(x_at[row * stride + column], x_zeros, column);
    }
    __device__ float x(i64 row, i64 column) const { return read(skipped(row, column)); }
    __device__ float b(i64 row, i64 column) const {
        return read(b_scales[column] * value(b_at[row * stride + column], b_zeros, column));
    }
    __device__ float c(i64 row, i64 column) const {
        return read(c_scales[column] * value(c_at[row * stride + column], c_zeros, column));
    }
    __device__ float dt(i64 row, int head) const { return dt_scale * (float)dt_at[row * dt_stride + head]; }
    __device__ void put(i64 row, i64 column, float value) const { y[row * width + column] = float_to_half(value); }
};

// States (b, e, STATES) as codes, half to even, with a scale per group and state, scales (groups, STATES), and each
// channel's group, groups (e,). Upstream multiplies a state and its scale by 10^6 before it divides them.
struct State {
    s8* codes;
    const float* scales;
    const i64* groups;
    i64 channels;

    __device__ s8& here(i64 sequence, i64 channel, int n) const {
        return codes[(sequence * channels + channel) * STATES + n];
    }
    __device__ float scale(i64 channel, int n) const { return scales[groups[channel] * STATES + n]; }
    __device__ float at(i64 sequence, i64 channel, int n) const {
        return scale(channel, n) * (float)here(sequence, channel, n);
    }
    __device__ void put(i64 sequence, i64 channel, int n, float value) const {
        here(sequence, channel, n) = half_even(value * 1e6f / (scale(channel, n) * 1e6f));
    }
};

// Mamba-2's scan of codes, whose values are rounded to float16 except for the skip connection; y (t, heads HEADDIM)
// rounded to float16. x (t, heads HEADDIM), b and c (t, ngroups STATES): columns of one tensor of codes, rows x_stride
// apart, with a scale and a zero point per column; dt (t, heads) codes, rows dt_stride apart, before bias and softplus;
// state and its scales as in State, of the states after the last tokens, rounded to float16, unless null; the rest as in
// scan_head.
extern "C" __global__ void __launch_bounds__(HEADDIM / JOINED * SPLIT) ssd_scan(
    const s8* x, const s8* b, const s8* c, i64 x_stride, const float* x_scales, const float* b_scales,
    const float* c_scales, const float* x_zeros, const float* b_zeros, const float* c_zeros, const s8* dt,
    i64 dt_stride, float dt_scale, const float* a, const float* d, const float* bias, const int* offsets, i64 heads,
    i64 ngroups, u16* y, s8* state, const float* state_scales, const i64* state_groups
) {
    const Head<false, true> in = {x, b, c, x_stride, x_scales, b_scales, c_scales, x_zeros, b_zeros, c_zeros, dt, dt_stride,
                            dt_scale, heads * HEADDIM, y};
    const State states = {state, state_scales, state_groups, heads * HEADDIM};
    const auto keep = [=](i64 document, i64 channel, int n, float value) {
        states.put(document, channel, n, round_to_half(value));
    };
    scan_head(in, a, d, bias, offsets, heads, ngroups, state != nullptr, keep);
}

extern "C" __global__ void __launch_bounds__(HEADDIM / JOINED * SPLIT) ssd_scan_shifted(
    const s8* x, const s8* b, const s8* c, i64 x_stride, const float* x_scales, const float* b_scales,
    const float* c_scales, const float* x_zeros, const float* b_zeros, const float* c_zeros, const s8* dt,
    i64 dt_stride, float dt_scale, const float* a, const float* d, const float* bias, const int* offsets, i64 heads,
    i64 ngroups, u16* y, s8* state, const float* state_scales, const i64* state_groups
) {
    const Head<true, true> in = {x, b, c, x_stride, x_scales, b_scales, c_scales, x_zeros, b_zeros, c_zeros, dt, dt_stride,
                            dt_scale, heads * HEADDIM, y};
    const State states = {state, state_scales, state_groups, heads * HEADDIM};
    const auto keep = [=](i64 document, i64 channel, int n, float value) {
        states.put(document, channel, n, round_to_half(value));
    };
    scan_head(in, a, d, bias, offsets, heads, ngroups, state != nullptr, keep);
}

// The same for one token of each sequence, of values that are not rounded; state updated.
extern "C" __global__ void __launch_bounds__(STEP_THREADS) ssd_step(
    const s8* x, const s8* b, const s8* c, i64 x_stride, const float* x_scales, const float* b_scales,
    const float* c_scales, const float* x_zeros, const float* b_zeros, const float* c_zeros, const s8* dt,
    i64 dt_stride, float dt_scale, const float* a, const float* d, const float* bias, i64 heads, i64 ngroups, u16* y,
    s8* state, const float* state_scales, const i64* state_groups
) {
    const Head<false, false> in = {x, b, c, x_stride, x_scales, b_scales, c_scales, x_zeros, b_zeros, c_zeros, dt,
                                   dt_stride, dt_scale, heads * HEADDIM, y};
    const State states = {state, state_scales, state_groups, heads * HEADDIM};
    step_head(in, states, a, d, bias, heads, ngroups);
}

extern "C" __global__ void __launch_bounds__(STEP_THREADS) ssd_step_shifted(
    const s8* x, const s8* b, const s8* c, i64 x_stride, const float* x_scales, const float* b_scales,
    const float* c_scales, const float* x_zeros, const float* b_zeros, const float* c_zeros, const s8* dt,
    i64 dt_stride, float dt_scale, const float* a, const float* d, const float* bias, i64 heads, i64 ngroups, u16* y,
    s8* state, const float* state_scales, const i64* state_groups
) {
    const Head<true, false> in = {x, b, c, x_stride, x_scales, b_scales, c_scales, x_zeros, b_zeros, c_zeros, dt,
                                   dt_stride, dt_scale, heads * HEADDIM, y};
    const State states = {state, state_scales, state_groups, heads * HEADDIM};
    step_head(in, states, a, d, bias, heads, ngroups);
}

// Gated norm, rounded to float16, then the Hadamard quantizer: y (rows, DIM) float16; z codes, rows z_stride apart,
// with z_scale; weight (DIM,); the rest as in gated_norm_rows and rotate.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) gated_rotate(
    const u16* y, i64 rows, const s8* z, i64 z_stride, float z_scale, const float* weight, i64 groups, float eps,
    const float* odd, float factor, i64 wrap, s8* out, i64 out_stride
) {
    extern __shared__ __align__(16) float line[];
    __shared__ __align__(16) float signs[ORDER * ORDER];
    __shared__ float gates[256]; // SiLU of every code
    Line* lines = (Line*)line;
    for (int i = threadIdx.x; i < 256; i += ROW_THREADS) gates[i] = silu(z_scale * (float)(i - 128));
    __syncthreads();
    const auto gated = [=](i64 row, int i) {
        return half_to_float(y[row * DIM + i]) * gates[z[row * z_stride + i] + 128];
    };
    const auto keep = [](i64, int, float value, float* place) { *place = round_to_half(value); };
    gated_norm_rows(lines, rows, weight, groups, eps, gated, keep);
    finish_rows<0>(lines, odd, signs, rows, Codes{out, out_stride, factor, wrap});
}

#endif

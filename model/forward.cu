// The Mamba blocks' operators on CUDA, the siblings of kernels.py: packed documents, no padding, float32 inside.
// Compiled at run time (cuda_operators.py).
//
// HALF      1: activations are float16, 0: float32
// STATES    d_state
// HEADDIM   channels of a Mamba-2 head
// SPLIT     threads that share a channel of ssd_scan, a power of two that divides STATES, 32 at most
// JOINED    channels of a thread of ssd_scan, a divisor of HEADDIM
// WIDTH     taps of the convolution

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if HALF
typedef u16 real;
#else
typedef float real;
#endif

__device__ __forceinline__ float half_to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
__device__ __forceinline__ u16 float_to_half(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }

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

// 2^x to 2 ulp, 0 where the result would be subnormal.
__device__ __forceinline__ float power_of_two(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

__device__ __forceinline__ float silu(float v) { return v / (1.0f + expf(-v)); }

// The identity above 20, as in mamba_ssm.
__device__ __forceinline__ float softplus(float v) { return v > 20.0f ? v : log1pf(expf(v)); }

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

const int SCAN_TOKENS = 8;

// Mamba-1's scan with skip connection and gate, as kernels.selective_scan, softplus included. A thread has one channel
// of one document. u, y (t, e); delta (t, e) without bias; bc (t, 2 STATES) B then C, rows bc_stride apart; z (t, e)
// rows z_stride apart; a (STATES, e) negative; d, bias (e,); state (documents, e, STATES), written.
extern "C" __global__ void __launch_bounds__(128) selective_scan(
    const real* u, const real* delta, const real* bc, i64 bc_stride, const real* z, i64 z_stride, const float* a,
    const float* d, const float* bias, const int* offsets, i64 channels, real* y, float* state
) {
    __shared__ float shared_bc[SCAN_TOKENS][2 * STATES];
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    const bool mine = channel < channels;
    const int at = mine ? channel : 0;
    const int document = blockIdx.y;
    float h[STATES], rate[STATES];
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        h[n] = 0.0f;
        rate[n] = a[n * channels + at] * 1.4426950408889634f; // exp(x) = 2^(x log2 e)
    }
    const float skip = d[at], shift = bias[at];
    const int last = offsets[document + 1];
    for (int first = offsets[document]; first < last; first += SCAN_TOKENS) {
        __syncthreads();
        for (int i = threadIdx.x; i < SCAN_TOKENS * 2 * STATES; i += blockDim.x) {
            const int token = i / (2 * STATES), n = i % (2 * STATES);
            shared_bc[token][n] = first + token < last ? get(bc[(first + token) * bc_stride + n]) : 0.0f;
        }
        float in[SCAN_TOKENS], step[SCAN_TOKENS], gate[SCAN_TOKENS];
#pragma unroll
        for (int k = 0; k < SCAN_TOKENS; k++) {
            const i64 row = first + k < last ? first + k : last - 1;
            in[k] = get(u[row * channels + at]);
            step[k] = get(delta[row * channels + at]);
            gate[k] = get(z[row * z_stride + at]);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < SCAN_TOKENS; k++) {
            if (first + k >= last) break;
            const float s = softplus(step[k] + shift);
            const float drive = s * in[k];
            float total = skip * in[k];
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                h[n] = power_of_two(s * rate[n]) * h[n] + shared_bc[k][n] * drive;
                total += shared_bc[k][STATES + n] * h[n];
            }
            if (mine) y[(first + k) * channels + channel] = as_real(total * silu(gate[k]));
        }
    }
    if (!mine) return;
#pragma unroll
    for (int n = 0; n < STATES; n++) state[((i64)document * channels + channel) * STATES + n] = h[n];
}

const int SSD_TOKENS = 16;
const int OWN = STATES / SPLIT;

// Mamba-2's scan with skip connection, not gated, as kernels.ssd_scan, softplus included. A block has one head of one
// document, SPLIT threads JOINED channels of it, thread `part` the states part, part + SPLIT, ... (several channels a
// thread, since reading B and C from shared memory is what bounds it). x (t, heads HEADDIM) rows x_stride apart, b and
// c (t, ngroups STATES) likewise, dt (t, heads) rows dt_stride apart and without bias; a (heads,) negative; y (t, heads
// HEADDIM); state (documents, heads HEADDIM, STATES), written.
extern "C" __global__ void __launch_bounds__(HEADDIM / JOINED * SPLIT) ssd_scan(
    const real* x, const real* b, const real* c, i64 x_stride, const real* dt, i64 dt_stride, const float* a,
    const float* d, const float* bias, const int* offsets, i64 heads, i64 ngroups, real* y, float* state
) {
    __shared__ float shared_b[SSD_TOKENS][STATES], shared_c[SSD_TOKENS][STATES], shared_x[SSD_TOKENS][HEADDIM];
    __shared__ float step[SSD_TOKENS], decay[SSD_TOKENS];
    const int head = blockIdx.x, document = blockIdx.y;
    const int part = threadIdx.x % SPLIT, channel = threadIdx.x / SPLIT * JOINED;
    const u32 lanes = blockDim.x - (threadIdx.x & ~31u);
    const u32 warp = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
    const i64 group = head * ngroups / heads;
    float h[JOINED][OWN];
#pragma unroll
    for (int j = 0; j < JOINED; j++) {
#pragma unroll
        for (int i = 0; i < OWN; i++) h[j][i] = 0.0f;
    }
    const int last = offsets[document + 1];
    for (int first = offsets[document]; first < last; first += SSD_TOKENS) {
        const int tokens = last - first < SSD_TOKENS ? last - first : SSD_TOKENS;
        __syncthreads();
        for (int i = threadIdx.x; i < tokens * STATES; i += blockDim.x) {
            const i64 from = (first + i / STATES) * x_stride + group * STATES + i % STATES;
            shared_b[i / STATES][i % STATES] = get(b[from]);
            shared_c[i / STATES][i % STATES] = get(c[from]);
        }
        for (int i = threadIdx.x; i < tokens * HEADDIM; i += blockDim.x) {
            shared_x[i / HEADDIM][i % HEADDIM] = get(x[(first + i / HEADDIM) * x_stride + head * HEADDIM + i % HEADDIM]);
        }
        for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
            step[i] = softplus(get(dt[(first + i) * dt_stride + head]) + bias[head]);
            decay[i] = expf(step[i] * a[head]);
        }
        __syncthreads();
        for (int k = 0; k < tokens; k++) {
            const float kept = decay[k];
            float in[JOINED], total[JOINED];
#pragma unroll
            for (int j = 0; j < JOINED; j++) {
                in[j] = shared_x[k][channel + j];
                total[j] = 0.0f;
            }
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const float gain = shared_b[k][i * SPLIT + part] * step[k], read = shared_c[k][i * SPLIT + part];
#pragma unroll
                for (int j = 0; j < JOINED; j++) {
                    h[j][i] = kept * h[j][i] + gain * in[j];
                    total[j] += read * h[j][i];
                }
            }
#pragma unroll
            for (int j = 0; j < JOINED; j++) {
#pragma unroll
                for (int offset = SPLIT / 2; offset; offset /= 2) total[j] += __shfl_xor_sync(warp, total[j], offset);
                const i64 at = (first + k) * heads * HEADDIM + head * HEADDIM + channel + j;
                if (part == j % SPLIT) y[at] = as_real(total[j] + d[head] * in[j]);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < JOINED; j++) {
        float* out = state + (((i64)document * heads + head) * HEADDIM + channel + j) * STATES;
#pragma unroll
        for (int i = 0; i < OWN; i++) out[i * SPLIT + part] = h[j][i];
    }
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

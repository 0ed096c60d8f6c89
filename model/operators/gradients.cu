// Gradients of forward.cu's convolution and, for a Mamba-1, of its scan, of float32 activations: packed documents, no
// padding. Compiled at run time (cuda_differentiable.py).
//
// WIDTH   taps of the convolution
// MAMBA1  whether the scan is compiled
// CHUNK   tokens of the scan that one thread computes
// and those of scans.cuh.
//
// No order of additions depends on the device: a sum over threads is a warp's, in a fixed order, or is left to the
// caller.

#include "scans.cuh"

const u32 FULL = 0xffffffffu;

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// The derivative of SiLU at v, whose sigmoid is `share`.
__device__ __forceinline__ float silu_slope(float v, float share) { return share * (1.0f + v * (1.0f - share)); }

const int CONV_ROWS = 16;

// The gradient of conv_silu's x, for `grad` (t, e), that of its output. One thread per channel and CONV_ROWS rows.
// x (t, e or more), rows x_stride apart; weight, bias, starts as in conv_silu; out (t, e).
extern "C" __global__ void __launch_bounds__(128) conv_silu_gradients(
    const float* x, i64 x_stride, const float* weight, const float* bias, const int* starts, const float* grad,
    i64 rows, i64 channels, float* out
) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    const i64 first = (i64)blockIdx.y * CONV_ROWS;
    float taps[WIDTH], window[WIDTH]; // window[k]: the input of WIDTH - 1 - k rows back
    float later[WIDTH];               // later[k]: the gradient before SiLU, of k rows after the one that is written
    int mine[WIDTH];                  // mine[k]: rows of its document before that one
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
        taps[k] = weight[k * channels + channel];
        later[k] = 0.0f, mine[k] = 0;
        const i64 row = first - (WIDTH - k);
        window[k] = row >= 0 ? x[row * x_stride + channel] : 0.0f;
    }
    const float start = bias[channel];
#pragma unroll 4
    for (int i = 0; i < CONV_ROWS + WIDTH - 1; i++) {
        const i64 row = first + i, written = row - (WIDTH - 1);
        if (written >= rows) return;
#pragma unroll
        for (int k = 1; k < WIDTH; k++) {
            window[k - 1] = window[k];
            later[k - 1] = later[k];
            mine[k - 1] = mine[k];
        }
        later[WIDTH - 1] = 0.0f;
        if (row < rows) {
            window[WIDTH - 1] = x[row * x_stride + channel];
            mine[WIDTH - 1] = (int)row - starts[row];
            float total = start;
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                if (WIDTH - 1 - k <= mine[WIDTH - 1]) total += taps[k] * window[k];
            }
            later[WIDTH - 1] = grad[row * channels + channel] * silu_slope(total, sigmoid(total));
        }
        if (i < WIDTH - 1) continue;
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            if (k <= mine[k]) sum += taps[WIDTH - 1 - k] * later[k];
        }
        out[written * channels + channel] = sum;
    }
}

// The scan's gradients. With h the state of a channel and g its gradient, which runs backwards over the tokens:
// g = C s + exp(step A) g of the next token, s = grad SiLU(z) being the gradient of the ungated output
// (host_kernels.selective_scan_gradients). Both recurrences are linear, so chunks of CHUNK tokens are computed side by
// side: scan_chunks as if nothing came in from the neighbouring chunks, join_chunks adds what does, and scan_gradients
// computes every chunk again from there. Its states stay in registers.
#if MAMBA1
const int GRADIENT_THREADS = 128;

struct Scan {
    const float *u, *delta; // (t, e); delta without bias
    const float* bc;        // (t, 2 STATES), B then C, rows bc_stride apart
    i64 bc_stride;
    const float* z;         // (t, e), rows z_stride apart
    i64 z_stride;
    const float* a;         // (STATES, e) negative
    const float *d, *bias;  // (e,)
    const float* grad;      // (t, e), the output's gradient
    i64 channels;
    const int* offsets;
    i64 most;               // chunks per document in the arrays below; a shorter document leaves its last ones unused
    float *states, *adjoints; // (documents most, STATES, e): before join_chunks the state after each chunk, and the
                              // gradient of the one before it; after it, those that come in from the neighbours
    float* steps;           // (documents most, e): the sum of each chunk's steps
};

// A block's chunk: its document's rows `first` to `last`, CHUNK at most. None if first >= last.
struct Rows {
    i64 first, last;
};
__device__ __forceinline__ Rows chunk_rows(const Scan& s) {
    const i64 document = blockIdx.y / s.most, end = s.offsets[document + 1];
    const i64 first = s.offsets[document] + blockIdx.y % s.most * CHUNK;
    return {first, first + CHUNK < end ? first + CHUNK : end};
}

typedef float ChunkBC[CHUNK][2 * STATES];

// What a chunk's tokens are for one channel. Tokens beyond the document, and channels beyond the last, have zeros: they
// change no state and add nothing.
struct Tokens {
    float value[CHUNK], step[CHUNK], slope[CHUNK], gate[CHUNK]; // u; delta after softplus; the gradient of y; z

    __device__ __forceinline__ Tokens(const Scan& s, Rows rows, int channel, bool mine) {
        const float shift = s.bias[channel];
#pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            const i64 row = rows.first + k;
            const bool inside = mine && row < rows.last;
            const i64 at = (inside ? row : rows.first) * s.channels + channel;
            value[k] = inside ? s.u[at] : 0.0f;
            step[k] = inside ? softplus(s.delta[at] + shift) : 0.0f;
            slope[k] = inside ? s.grad[at] : 0.0f;
            gate[k] = s.z[(inside ? row : rows.first) * s.z_stride + channel];
        }
    }
};

// Copies the chunk's B and C to shared memory, zeros beyond its end.
__device__ __forceinline__ void read_b_c(const Scan& s, Rows rows, ChunkBC& shared) {
    for (int i = threadIdx.x; i < CHUNK * 2 * STATES; i += GRADIENT_THREADS) {
        const i64 row = rows.first + i / (2 * STATES);
        shared[i / (2 * STATES)][i % (2 * STATES)] = row < rows.last ? s.bc[row * s.bc_stride + i % (2 * STATES)] : 0.0f;
    }
    __syncthreads();
}

// One thread per channel and chunk (blockIdx.y, documents times `most`).
extern "C" __global__ void __launch_bounds__(GRADIENT_THREADS) scan_chunks(const __grid_constant__ Scan s) {
    __shared__ __align__(16) ChunkBC b_c;
    const int channel = blockIdx.x * GRADIENT_THREADS + threadIdx.x;
    const Rows rows = chunk_rows(s);
    if (rows.first >= rows.last) return;
    read_b_c(s, rows, b_c);
    if (channel >= s.channels) return;
    const Tokens tokens(s, rows, channel, true);
    float h[STATES], g[STATES], since[STATES], sum = 0.0f; // since: the product of the decays since the chunk began
#pragma unroll
    for (int n = 0; n < STATES; n++) h[n] = 0.0f, g[n] = 0.0f, since[n] = 1.0f;
#pragma unroll
    for (int k = 0; k < CHUNK; k++) {
        const float drive = tokens.step[k] * tokens.value[k], ungated = tokens.slope[k] * silu(tokens.gate[k]);
        sum += tokens.step[k];
#pragma unroll
        for (int n = 0; n < STATES; n++) {
            const float decay = power_of_two(tokens.step[k] * (s.a[n * s.channels + channel] * LOG2_E));
            since[n] *= decay;
            h[n] = fmaf(decay, h[n], b_c[k][n] * drive);
            g[n] = fmaf(since[n], b_c[k][STATES + n] * ungated, g[n]);
        }
    }
    s.steps[blockIdx.y * s.channels + channel] = sum;
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        const i64 at = (blockIdx.y * STATES + n) * s.channels + channel;
        s.states[at] = h[n], s.adjoints[at] = g[n];
    }
}

// One thread per state, channel and document (blockIdx.y).
extern "C" __global__ void __launch_bounds__(GRADIENT_THREADS) join_chunks(const __grid_constant__ Scan s) {
    const i64 size = STATES * s.channels, own = (i64)blockIdx.x * GRADIENT_THREADS + threadIdx.x;
    if (own >= size) return;
    const float rate = s.a[own] * LOG2_E;
    const i64 length = s.offsets[blockIdx.y + 1] - s.offsets[blockIdx.y], chunks = (length + CHUNK - 1) / CHUNK;
    const i64 first = blockIdx.y * s.most;
    float h = 0.0f, g = 0.0f;
    for (i64 k = 0; k < chunks; k++) {
        const i64 up = first + k, down = first + chunks - 1 - k;
        const float h_here = s.states[up * size + own], g_here = s.adjoints[down * size + own];
        s.states[up * size + own] = h, s.adjoints[down * size + own] = g;
        h = fmaf(power_of_two(rate * s.steps[up * s.channels + own % s.channels]), h, h_here);
        g = fmaf(power_of_two(rate * s.steps[down * s.channels + own % s.channels]), g, g_here);
    }
}

// The least power of two that is not below count.
__device__ constexpr int power_from(int count) { return count < 2 ? 1 : 2 * power_from((count + 1) / 2); }

// Sums of several values over the lanes of a warp: in each round two lanes exchange half of their values, so each then
// has the sums of the other half, until one is left or all lanes are summed. Lane i has the sums from
// i / LANES_EACH * EACH on.
const int SUMS = power_from(2 * STATES), EACH = SUMS > 32 ? SUMS / 32 : 1, LANES_EACH = SUMS > 32 ? 1 : 32 / SUMS;
__device__ __forceinline__ void warp_sums(float (&v)[SUMS]) {
    int left = SUMS;
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
        if (left == 1) {
            v[0] += __shfl_xor_sync(FULL, v[0], offset);
            continue;
        }
        left /= 2;
        const bool upper = threadIdx.x & offset;
#pragma unroll
        for (int j = 0; j < SUMS / 2; j++) {
            if (j >= left) break;
            const float sent = upper ? v[j] : v[j + left];
            v[j] = (upper ? v[j + left] : v[j]) + __shfl_xor_sync(FULL, sent, offset);
        }
    }
}

// As scan_chunks. Written: grad_u, grad_delta, grad_z (t, e); grad_bc (warps, t, 2 STATES), B then C, a sum over the
// channels of each warp, 32 at most.
extern "C" __global__ void __launch_bounds__(GRADIENT_THREADS) scan_gradients(
    const __grid_constant__ Scan s, i64 rows_in_all, float* grad_u, float* grad_delta, float* grad_z, float* grad_bc
) {
    __shared__ __align__(16) ChunkBC b_c;
    const int channel = blockIdx.x * GRADIENT_THREADS + threadIdx.x;
    const Rows rows = chunk_rows(s);
    if (rows.first >= rows.last) return;
    read_b_c(s, rows, b_c);
    const i64 warp = channel / 32;
    if (warp * 32 >= s.channels) return; // the whole warp
    const bool mine = channel < s.channels;
    const int at = mine ? channel : 0;
    const Tokens tokens(s, rows, at, mine);
    const float skip = s.d[at];
    float rate[STATES], g[STATES], h[CHUNK + 1][STATES], total[CHUNK]; // h[k + 1]: after token k; total: before the gate
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        const i64 place = (blockIdx.y * STATES + n) * s.channels + at;
        rate[n] = s.a[n * s.channels + at] * LOG2_E;
        h[0][n] = s.states[place];
        g[n] = s.adjoints[place];
    }
#pragma unroll
    for (int k = 0; k < CHUNK; k++) {
        const float drive = tokens.step[k] * tokens.value[k];
        total[k] = skip * tokens.value[k];
#pragma unroll
        for (int n = 0; n < STATES; n++) {
            h[k + 1][n] = fmaf(power_of_two(tokens.step[k] * rate[n]), h[k][n], b_c[k][n] * drive);
            total[k] = fmaf(b_c[k][STATES + n], h[k + 1][n], total[k]);
        }
    }
#pragma unroll
    for (int k = CHUNK - 1; k >= 0; k--) {
        const i64 row = rows.first + k;
        const float drive = tokens.step[k] * tokens.value[k], share = sigmoid(tokens.gate[k]);
        const float ungated = tokens.slope[k] * tokens.gate[k] * share;
        float of_drive = 0.0f, of_rate = 0.0f, of_bc[SUMS];
#pragma unroll
        for (int n = 0; n < STATES; n++) {
            const float here = fmaf(b_c[k][STATES + n], ungated, g[n]);
            of_bc[n] = here * drive;
            of_bc[STATES + n] = ungated * h[k + 1][n];
            of_drive = fmaf(here, b_c[k][n], of_drive);
            g[n] = here * power_of_two(tokens.step[k] * rate[n]);
            of_rate = fmaf(g[n] * h[k][n], rate[n], of_rate);
        }
#pragma unroll
        for (int n = 2 * STATES; n < SUMS; n++) of_bc[n] = 0.0f;
        warp_sums(of_bc);
        if (row >= rows.last) continue;
        const int first = threadIdx.x % 32 / LANES_EACH * EACH;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            if (threadIdx.x % LANES_EACH == 0 && first + j < 2 * STATES) {
                grad_bc[(warp * rows_in_all + row) * 2 * STATES + first + j] = of_bc[j];
            }
        }
        if (!mine) continue;
        const i64 place = row * s.channels + channel;
        grad_u[place] = tokens.step[k] * of_drive + skip * ungated;
        // The derivative of softplus is its argument's sigmoid, 1 - exp(-step).
        grad_delta[place] = (of_rate / LOG2_E + of_drive * tokens.value[k]) * -expm1f(-tokens.step[k]);
        grad_z[place] = tokens.slope[k] * total[k] * silu_slope(tokens.gate[k], share);
    }
}
#endif

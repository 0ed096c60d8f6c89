// The scans of both kinds of block, for inputs of any storage type. Included by forward.cu (activations) and by
// apply/int8/operators/blocks.cu (codes). Compiled at run time.
//
// STATES    d_state
// HEADDIM   channels of a Mamba-2 head
// SPLIT     threads that share a channel of scan_head, a power of two that divides STATES, 32 at most
// JOINED    channels per thread of scan_head, a power of two that divides HEADDIM
//
// An `In` reads a row's inputs as float32 and writes its outputs. Arithmetic is float32; sums over the states of a head
// are split over threads, so they run in another order than the CPU's.
//
// The scans over documents call keep (document, channel, state, value) with the states after each one's last token,
// unless `kept` is false. Those of one token per sequence have a `State`: at (sequence, channel, state) reads, put
// (sequence, channel, state, value) writes.

#include "ptx.cuh"

const float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float silu(float v) { return v / (1.0f + expf(-v)); }

// The identity above 20, as in mamba_ssm.
__device__ __forceinline__ float softplus(float v) { return v > 20.0f ? v : log1pf(expf(v)); }

const int SCAN_TOKENS = 8, SCAN_THREADS = 128;

// Mamba-1's scan with skip connection and gate, as host_kernels.selective_scan, softplus included. One thread per
// channel and document (blockIdx.y): two or four threads per channel were slower. a (STATES, channels) negative; d,
// bias (channels,).
//
// In: u_at, delta_at, z_at (row, channel) and b_c_at (row, n), n < 2 STATES, start loading an In::Raw each; u, delta,
// gate (SiLU of z) and b_c convert it to float32, which waits for the load; put (row, channel, y) writes.
template <class In, class Keep>
__device__ __forceinline__ void scan_channels(
    const In& in, const float* a, const float* d, const float* bias, const int* offsets, i64 channels, bool kept,
    const Keep& keep
) {
    typedef typename In::Raw Raw;
    constexpr int CELLS = SCAN_TOKENS * 2 * STATES, FILLS = (CELLS + SCAN_THREADS - 1) / SCAN_THREADS;
    __shared__ __align__(16) float shared[2][SCAN_TOKENS][2 * STATES]; // B, then C
    const int channel = blockIdx.x * SCAN_THREADS + threadIdx.x;
    const bool mine = channel < channels;
    const int at = mine ? channel : 0;
    float h[STATES], rate[STATES];
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        h[n] = 0.0f;
        rate[n] = a[n * channels + at] * LOG2_E; // exp(x) = 2^(x log2 e)
    }
    const float skip = d[at], shift = bias[at];
    const int begin = offsets[blockIdx.y], last = offsets[blockIdx.y + 1];
    // The inputs of the next SCAN_TOKENS tokens are loaded while these are computed.
    Raw u[SCAN_TOKENS], delta[SCAN_TOKENS], z[SCAN_TOKENS], b_c[FILLS];
    auto read = [&](int first) {
#pragma unroll
        for (int k = 0; k < SCAN_TOKENS; k++) {
            const i64 row = first + k < last ? first + k : last - 1;
            u[k] = in.u_at(row, at), delta[k] = in.delta_at(row, at), z[k] = in.z_at(row, at);
        }
#pragma unroll
        for (int k = 0; k < FILLS; k++) {
            const int i = threadIdx.x + k * SCAN_THREADS, token = first + i / (2 * STATES);
            b_c[k] = in.b_c_at(token < last ? token : last - 1, i % (2 * STATES));
        }
    };
    if (begin < last) read(begin);
    int turn = 0;
    for (int first = begin; first < last; first += SCAN_TOKENS, turn ^= 1) {
#pragma unroll
        for (int k = 0; k < FILLS; k++) {
            const int i = threadIdx.x + k * SCAN_THREADS;
            if (CELLS % SCAN_THREADS == 0 || i < CELLS) {
                shared[turn][i / (2 * STATES)][i % (2 * STATES)] = in.b_c(b_c[k]);
            }
        }
        float step[SCAN_TOKENS], value[SCAN_TOKENS], gate[SCAN_TOKENS];
#pragma unroll
        for (int k = 0; k < SCAN_TOKENS; k++) {
            value[k] = in.u(u[k]);
            // A step of 0 leaves the state unchanged for tokens beyond the document.
            step[k] = first + k < last ? softplus(in.delta(delta[k]) + shift) : 0.0f;
            gate[k] = in.gate(z[k]);
        }
        read(first + SCAN_TOKENS);
        __syncthreads(); // no second barrier: the next iteration writes the other half of `shared`
#pragma unroll
        for (int k = 0; k < SCAN_TOKENS; k++) {
            const float drive = step[k] * value[k];
            float total = skip * value[k];
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                h[n] = fmaf(power_of_two(step[k] * rate[n]), h[n], shared[turn][k][n] * drive);
                total = fmaf(shared[turn][k][STATES + n], h[n], total);
            }
            if (mine && first + k < last) in.put(first + k, channel, total * gate[k]);
        }
    }
    if (!mine || !kept) return;
#pragma unroll
    for (int n = 0; n < STATES; n++) keep(blockIdx.y, channel, n, h[n]);
}

// One token of each sequence through Mamba-1's scan with skip connection and gate, as host_kernels.scan_update_int8,
// softplus included. One thread per channel and sequence (blockIdx.y, the row). a (STATES, channels) negative; d, bias
// (channels,); In as in scan_channels. The output reads the states before `put` rounds them.
template <class In, class State>
__device__ __forceinline__ void step_channels(
    const In& in, const State& state, const float* a, const float* d, const float* bias, i64 channels
) {
    const int channel = blockIdx.x * SCAN_THREADS + threadIdx.x;
    if (channel >= channels) return;
    const i64 row = blockIdx.y;
    const float step = softplus(in.delta(in.delta_at(row, channel)) + bias[channel]);
    const float u = in.u(in.u_at(row, channel));
    float h[STATES], total = 0.0f; // all are read before one is written, so that no load waits for a store
#pragma unroll
    for (int n = 0; n < STATES; n++) h[n] = state.at(row, channel, n);
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        const float drive = in.b_c(in.b_c_at(row, n)) * step * u;
        h[n] = h[n] * expf(a[n * channels + channel] * step) + drive;
        total += h[n] * in.b_c(in.b_c_at(row, STATES + n));
    }
#pragma unroll
    for (int n = 0; n < STATES; n++) state.put(row, channel, n, h[n]);
    in.put(row, channel, (total + u * d[channel]) * in.gate(in.z_at(row, channel)));
}

const int SSD_TOKENS = 16;

// Mamba-2's scan with skip connection, not gated, as host_kernels.ssd_scan, softplus included. One block per head
// (blockIdx.x) and document (blockIdx.y). SPLIT threads share JOINED channels, and each has STATES / SPLIT states of
// every one. Several channels per thread reduce the reads of B and C from shared memory, which would limit the speed. a
// (heads,) negative; d, bias (heads,).
//
// In: x (row, column) and skipped (row, column), the skip connection's input; b, c (row, column); dt (row, head); put
// (row, column, y) writes.
template <class In, class Keep>
__device__ __forceinline__ void scan_head(
    const In& in, const float* a, const float* d, const float* bias, const int* offsets, i64 heads, i64 ngroups,
    bool kept, const Keep& keep
) {
    constexpr int OWN = STATES / SPLIT, WIDE = OWN % 4 ? 1 : 4; // consecutive states that are read together
    __shared__ __align__(16) float shared_b[SSD_TOKENS][STATES], shared_c[SSD_TOKENS][STATES]; // B times the step
    __shared__ __align__(16) float shared_x[SSD_TOKENS][HEADDIM], skipped[SSD_TOKENS][HEADDIM];
    __shared__ float step[SSD_TOKENS], decay[SSD_TOKENS];
    const int head = blockIdx.x;
    const int part = threadIdx.x % SPLIT, channel = threadIdx.x / SPLIT * JOINED;
    const u32 lanes = blockDim.x - (threadIdx.x & ~31u);
    const u32 warp = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
    const i64 first_state = head * ngroups / heads * STATES, first_channel = (i64)head * HEADDIM;
    const float skip = d[head];
    // h[j][i]: channel + j, state (i / WIDE * SPLIT + part) * WIDE + i % WIDE, so that neighbouring threads read
    // neighbouring words.
    float h[JOINED][OWN];
#pragma unroll
    for (int j = 0; j < JOINED; j++) {
#pragma unroll
        for (int i = 0; i < OWN; i++) h[j][i] = 0.0f;
    }
    const int last = offsets[blockIdx.y + 1];
    for (int first = offsets[blockIdx.y]; first < last; first += SSD_TOKENS) {
        const int tokens = last - first < SSD_TOKENS ? last - first : SSD_TOKENS;
        __syncthreads();
        for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
            step[i] = softplus(in.dt(first + i, head) + bias[head]);
            decay[i] = expf(step[i] * a[head]);
        }
        for (int i = threadIdx.x; i < tokens * HEADDIM; i += blockDim.x) {
            const i64 row = first + i / HEADDIM, column = first_channel + i % HEADDIM;
            shared_x[i / HEADDIM][i % HEADDIM] = in.x(row, column);
            skipped[i / HEADDIM][i % HEADDIM] = in.skipped(row, column) * skip;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < tokens * STATES; i += blockDim.x) {
            const i64 row = first + i / STATES, column = first_state + i % STATES;
            shared_b[i / STATES][i % STATES] = in.b(row, column) * step[i / STATES];
            shared_c[i / STATES][i % STATES] = in.c(row, column);
        }
        __syncthreads();
        for (int k = 0; k < tokens; k++) {
            const float decay_k = decay[k];
            float x[JOINED], total[JOINED];
#pragma unroll
            for (int j = 0; j < JOINED; j++) {
                x[j] = shared_x[k][channel + j];
                total[j] = 0.0f;
            }
#pragma unroll
            for (int i = 0; i < OWN; i += WIDE) {
                const int at = (i / WIDE * SPLIT + part) * WIDE;
                float b_n[WIDE], c_n[WIDE];
#pragma unroll
                for (int n = 0; n < WIDE; n++) b_n[n] = shared_b[k][at + n], c_n[n] = shared_c[k][at + n];
#pragma unroll
                for (int n = 0; n < WIDE; n++) {
#pragma unroll
                    for (int j = 0; j < JOINED; j++) {
                        h[j][i + n] = fmaf(decay_k, h[j][i + n], b_n[n] * x[j]);
                        total[j] = fmaf(c_n[n], h[j][i + n], total[j]);
                    }
                }
            }
            // Sum over the SPLIT threads: in each round two threads exchange half of their channels, so each then has
            // the sums of the other half, until one channel is left or all threads are summed.
            int count = JOINED, mine = channel;
#pragma unroll
            for (int offset = SPLIT / 2; offset; offset /= 2) {
                if (count > 1) {
                    count /= 2;
                    const bool upper = part & offset;
#pragma unroll
                    for (int j = 0; j < JOINED / 2; j++) {
                        if (j >= count) break;
                        const float sent = upper ? total[j] : total[j + count];
                        total[j] = (upper ? total[j + count] : total[j]) + __shfl_xor_sync(warp, sent, offset);
                    }
                    mine += upper ? count : 0;
                } else {
                    total[0] += __shfl_xor_sync(warp, total[0], offset);
                }
            }
            constexpr int LEFT = JOINED > SPLIT ? JOINED / SPLIT : 1, SAME = JOINED > SPLIT ? 1 : SPLIT / JOINED;
            if (part % SAME == 0) {
#pragma unroll
                for (int j = 0; j < LEFT; j++) {
                    in.put(first + k, first_channel + mine + j, total[j] + skipped[k][mine + j]);
                }
            }
        }
    }
    if (!kept) return;
#pragma unroll
    for (int j = 0; j < JOINED; j++) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            keep(blockIdx.y, first_channel + channel + j, (i / WIDE * SPLIT + part) * WIDE + i % WIDE, h[j][i]);
        }
    }
}

const int STEP_THREADS = 128, STEP_CHANNELS = HEADDIM % 4 ? 1 : 4;

// One token of each sequence through Mamba-2's scan with skip connection, not gated, as host_kernels.ssd_update_int8,
// softplus included. One warp per STEP_CHANNELS channels of a head and sequence (blockIdx.y, the row), whose lanes share
// the states. a (heads,) negative; d, bias (heads,); In as in scan_head. The output reads the states before `put` rounds
// them.
template <class In, class State>
__device__ __forceinline__ void step_head(
    const In& in, const State& state, const float* a, const float* d, const float* bias, i64 heads, i64 ngroups
) {
    constexpr int OWN = (STATES + 31) / 32; // states of each lane: every 32nd
    const i64 first = ((i64)blockIdx.x * (STEP_THREADS / 32) + threadIdx.x / 32) * STEP_CHANNELS;
    if (first >= heads * HEADDIM) return; // the whole warp
    const i64 row = blockIdx.y;
    const int lane = threadIdx.x % 32, head = (int)(first / HEADDIM);
    const i64 first_state = head * ngroups / heads * STATES;
    const float step = softplus(in.dt(row, head) + bias[head]), decay = expf(step * a[head]), skip = d[head];
    float b[OWN], c[OWN], x[STEP_CHANNELS], h[STEP_CHANNELS][OWN]; // all are read before one is written, as above
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int n = lane + i * 32;
        const bool mine = n < STATES;
        b[i] = mine ? in.b(row, first_state + n) * step : 0.0f;
        c[i] = mine ? in.c(row, first_state + n) : 0.0f;
#pragma unroll
        for (int j = 0; j < STEP_CHANNELS; j++) h[j][i] = mine ? state.at(row, first + j, n) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < STEP_CHANNELS; j++) x[j] = in.x(row, first + j);
#pragma unroll
    for (int j = 0; j < STEP_CHANNELS; j++) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            h[j][i] = h[j][i] * decay + b[i] * x[j];
            total += h[j][i] * c[i];
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (lane + i * 32 < STATES) state.put(row, first + j, lane + i * 32, h[j][i]);
        }
#pragma unroll
        for (int offset = 16; offset; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
        if (lane == 0) in.put(row, first + j, total + x[j] * skip);
    }
}

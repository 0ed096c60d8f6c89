// As much of CUDA as our kernels use, in C++: a block's threads take turns, each until it waits for others; blocks follow
// one another. So atomics are what they look like, and no order but one is seen.
// What the two differ in: exp and log1p are the C library's, and nothing is approximate.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static
#define VISIBLE __attribute__((visibility("default")))

struct Place {
    unsigned x, y, z;
};
inline Place threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(4) char4 { signed char x, y, z, w; };
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }
inline char4 make_char4(signed char x, signed char y, signed char z, signed char w) { return {x, y, z, w}; }

template <class To, class From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(unsigned v) { return same_bits<float>(v); }
inline int __float2int_rz(float v) {
    return v >= 2147483648.0f ? 2147483647 : v < -2147483648.0f ? -2147483647 - 1 : (int)v;
}
inline int __float_as_int(float v) { return same_bits<int>(v); }
inline unsigned __float_as_uint(float v) { return same_bits<unsigned>(v); }
inline double __hiloint2double(unsigned high, unsigned low) {
    return same_bits<double>((unsigned long long)high << 32 | low);
}
// Nothing is contracted here (-ffp-contract=off), so these are the plain operations.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline long long __double2ll_rn(double v) { return llrint(v); }
inline float __ll2float_rn(long long v) { return (float)v; }
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) sum += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
    return sum;
}
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __ffs(unsigned v) { return v ? std::countr_zero(v) + 1 : 0; }

inline unsigned atomicAdd(unsigned* at, unsigned more) { return std::exchange(*at, *at + more); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long more) {
    return std::exchange(*at, *at + more);
}
inline unsigned atomicMax(unsigned* at, unsigned other) { return std::exchange(*at, std::max(*at, other)); }
inline unsigned atomicAnd(unsigned* at, unsigned mask) { return std::exchange(*at, *at & mask); }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long both = (unsigned long long)high << 32 | low;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}

// The dynamic shared memory of every kernel is an array of one of these names; it begins as anything may.
alignas(16) inline float line[1 << 16];
alignas(16) inline uint4 shared_bins[1 << 13];

// A thread of a block: a stack of its own, where it last was, and for what it waits.
struct Barrier {
    unsigned expected, arrived = 0, passed = 0;
};
const std::size_t STACK = 256 << 10;
struct Turn {
    std::unique_ptr<char[]> stack{new char[STACK]}; // not cleared: only what is used takes memory
    ucontext_t start;
    jmp_buf at;
    bool started = false, ended = false;
    const Barrier* barrier = nullptr;
    unsigned passed = 0; // waits while the barrier has been passed so often

    bool waits() const { return barrier && barrier->passed == passed; }
};
inline std::vector<Turn> turns;
inline jmp_buf between_turns;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline double exchanged[1024];

inline void wait_at(Barrier& barrier) {
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        barrier.passed++;
        return;
    }
    Turn& turn = turns[threadIdx.x];
    turn.barrier = &barrier;
    turn.passed = barrier.passed;
    if (_setjmp(turn.at) == 0) _longjmp(between_turns, 1);
}

inline void __syncthreads() { wait_at(block_barrier); }

// Every lane's value, as all lanes of this warp gave it.
template <class T, class Found>
inline auto of_warp(T value, Found found) {
    Barrier& warp = warp_barriers[threadIdx.x / 32];
    std::memcpy(&exchanged[threadIdx.x], &value, sizeof(T));
    wait_at(warp);
    const auto result = found([](unsigned lane) {
        T other;
        std::memcpy(&other, &exchanged[threadIdx.x / 32 * 32 + lane], sizeof(T));
        return other;
    });
    wait_at(warp);
    return result;
}

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return of_warp(value, [=](auto of) { return of(threadIdx.x % 32 ^ mask); });
}
template <class T>
inline T __shfl_sync(unsigned, T value, int lane) {
    return of_warp(value, [=](auto of) { return of(lane); });
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned by) {
    return of_warp(value, [=](auto of) { return threadIdx.x % 32 < by ? value : of(threadIdx.x % 32 - by); });
}
inline unsigned __ballot_sync(unsigned, bool mine) {
    return of_warp(mine, [](auto of) {
        unsigned all = 0;
        for (unsigned lane = 0; lane < 32; lane++) all |= (unsigned)of(lane) << lane;
        return all;
    });
}

// Calls a kernel with the arguments that lie in a buffer as its parameters would.
template <class... Arguments>
void call(void (*kernel)(Arguments...), const char* buffer) {
    std::size_t at = 0;
    const auto next = [&]<class T>(T*) {
        at = (at + alignof(T) - 1) / alignof(T) * alignof(T);
        T value;
        std::memcpy(&value, buffer + at, sizeof(T));
        at += sizeof(T);
        return value;
    };
    std::tuple<Arguments...> arguments{next((Arguments*)nullptr)...}; // braces: in order
    std::apply(kernel, arguments);
}

using Kernel = void (*)(const char*);

struct Launch {
    Kernel kernel;
    const char* buffer;
};
inline Launch launched;

inline void run_thread() {
    for (unsigned block = 0; block < gridDim.x * gridDim.y; block++) {
        blockIdx = {block % gridDim.x, block / gridDim.x, 0};
        launched.kernel(launched.buffer);
        __syncthreads(); // of all: then the next block's first thread goes on
    }
    turns[threadIdx.x].ended = true;
    _longjmp(between_turns, 1);
}

inline void run_blocks(Kernel kernel, unsigned across, unsigned down, unsigned threads, const char* buffer) {
    gridDim = {across, down, 1};
    blockDim = {threads, 1, 1};
    launched = {kernel, buffer};
    block_barrier = {threads};
    warp_barriers.clear();
    for (unsigned first = 0; first < threads; first += 32) warp_barriers.push_back({std::min(32u, threads - first)});
    if (turns.size() < threads) turns.resize(threads);
    for (unsigned t = 0; t < threads; t++) turns[t].started = turns[t].ended = false, turns[t].barrier = nullptr;
    for (bool some = true; some;) {
        some = false;
        for (unsigned t = 0; t < threads; t++) {
            Turn& turn = turns[t];
            if (turn.ended) continue;
            some = true;
            if (turn.waits()) continue;
            threadIdx = {t, 0, 0};
            if (_setjmp(between_turns) != 0) continue; // it waits, or has ended
            if (turn.started) _longjmp(turn.at, 1);
            turn.started = true;
            getcontext(&turn.start);
            turn.start.uc_stack = {.ss_sp = turn.stack.get(), .ss_flags = 0, .ss_size = STACK};
            turn.start.uc_link = nullptr;
            makecontext(&turn.start, run_thread, 0);
            setcontext(&turn.start);
        }
    }
}

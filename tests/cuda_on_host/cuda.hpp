// As much of CUDA as the kernels of model/ and apply/ and the gathering of rows use, in C++: a block's threads are threads
// of the host, blocks follow one another.
// What the two differ in: exp and log1p are the C library's, and nothing is approximate.

#include <barrier>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
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
inline thread_local Place threadIdx, blockIdx;
inline Place blockDim, gridDim;

struct alignas(16) float4 { float x, y, z, w; };
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

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long both = (unsigned long long)high << 32 | low;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}

// The dynamic shared memory of every kernel here is an array of floats of this name.
alignas(16) float line[1 << 16];

inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline double exchanged[1024];

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    std::barrier<>& warp = *warp_barriers[threadIdx.x / 32];
    std::memcpy(&exchanged[threadIdx.x], &value, sizeof(T));
    warp.arrive_and_wait();
    T other;
    std::memcpy(&other, &exchanged[threadIdx.x ^ mask], sizeof(T));
    warp.arrive_and_wait();
    return other;
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

inline void run_blocks(Kernel kernel, unsigned across, unsigned down, unsigned threads, const char* buffer) {
    gridDim = {across, down, 1};
    blockDim = {threads, 1, 1};
    block_barrier = std::make_unique<std::barrier<>>(threads);
    warp_barriers.clear();
    for (unsigned first = 0; first < threads; first += 32) {
        warp_barriers.push_back(std::make_unique<std::barrier<>>(std::min(32u, threads - first)));
    }
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; t++) {
        running.emplace_back([=] {
            threadIdx = {t, 0, 0};
            for (unsigned block = 0; block < across * down; block++) {
                blockIdx = {block % across, block / across, 0};
                kernel(buffer);
                __syncthreads();
            }
        });
    }
    for (std::thread& thread : running) thread.join();
}

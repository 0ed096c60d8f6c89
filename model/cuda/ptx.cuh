// The device instructions that the kernels use, as functions. (tests/cuda_on_host has the same in C++, to run the
// kernels without a device.)

#pragma once

typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

// Half to even.
__device__ __forceinline__ u16 float_to_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// 2^x to 2 ulp, 0 where the result would be subnormal.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x to 1 ulp.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Start copying 4, 8 or 16 bytes to shared memory; `wait_for_copies` waits for them. Synchronous before compute
// capability 8.0.
template <int BYTES> __device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    const u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
#else
    for (int i = 0; i < BYTES / 4; i++) ((u32*)shared)[i] = ((const u32*)global)[i];
#endif
}

// Make one group of the copies that this thread started since its last call.
__device__ __forceinline__ void end_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until all but this thread's last `LEFT` groups have been copied.
template <int LEFT> __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// The code of v: half to even, saturating.
__device__ __forceinline__ s8 half_even(float v) {
    int code;
    asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(code) : "f"(v));
    return (s8)code;
}

// The code of v: towards zero, saturating.
__device__ __forceinline__ s8 toward_zero(float v) {
    int code;
    asm("cvt.rzi.sat.s8.f32 %0, %1;" : "=r"(code) : "f"(v));
    return (s8)code;
}

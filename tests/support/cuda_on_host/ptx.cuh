// model/cuda/ptx.cuh in C++.

#pragma once

typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

inline float half_to_float(u16 h) { return (float)same_bits<_Float16>(h); }
inline u16 float_to_half(float f) { return same_bits<u16>((_Float16)f); }
template <int BYTES> inline void copy_async(void* shared, const void* global) { std::memcpy(shared, global, BYTES); }
inline void end_copies() {}
template <int LEFT> inline void wait_for_copies() {}
// As far off as the device's may be (2 and 1 ulp), now up, now down: what must not depend on that is seen to.
inline float power_of_two(float x) { return exp2f(x) * (same_bits<u32>(x) & 1 ? 1.0f - 0x1p-22f : 1.0f + 0x1p-22f); }
inline float reciprocal(float x) { return nextafterf(1.0f / x, same_bits<u32>(x) & 1 ? INFINITY : 0.0f); }
inline s8 half_even(float v) { return (s8)rintf(fminf(fmaxf(v, -128.0f), 127.0f)); }
inline s8 toward_zero(float v) { return (s8)truncf(fminf(fmaxf(v, -128.0f), 127.0f)); }

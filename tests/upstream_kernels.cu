// Upstream Quamba's own kernels as plain kernels of this file, for NVRTC: what its launchers would instantiate. Compiled by
// tests/apply/test_upstream_kernels.py with upstream's csrc/ on the include path.
//
// KERNEL     0 convolution and 1 scan of Quamba 1, 2 Hadamard quantizer, 3 convolution of Quamba 2
// PARAMETERS sizeof of its parameters, as the test has them
// N_CHUNKS   of 3: blocks along a document

#include <cub/block/block_load.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/block/block_store.cuh>
#if __has_include(<cuda/std/algorithm>)
#include <cuda/std/algorithm>
#else // before CUDA 13.1
#include <cuda/std/__algorithm_>
#endif
#include <cuda/std/array>
#include <cuda/std/cstdint>
#include <cuda/std/type_traits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// What of the standard library upstream names.
namespace std {
using namespace cuda::std;
}
namespace at {
using Half = __half;
using BFloat16 = __nv_bfloat16;
} // namespace at
namespace c10 {
template <class T>
struct complex { // nothing that is launched computes with it
    T real_, imag_;
    __device__ complex(T real = 0, T imag = 0) : real_(real), imag_(imag) {}
};
template <class T>
__device__ complex<T> operator*(complex<T>, complex<T>);
template <class T>
__device__ complex<T> operator+(complex<T>, complex<T>);
} // namespace c10

// The launchers around the kernels are parsed, not called.
#define C10_CUDA_CHECK(...)
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
struct CUstream_st;
typedef CUstream_st* cudaStream_t;
#define cudaFuncSetAttribute(...)
// Kernels become functions that those below call.
#undef __global__
#undef __launch_bounds__
#define __global__ __device__
#define __launch_bounds__(...)
#define ENTRY extern "C" __attribute__((global)) void

#if KERNEL == 0
#include "causal_conv1d/quant_causal_conv1d_fwd_kernel.cuh"
typedef QuantConvParamsBase Parameters;
ENTRY conv(Parameters p) {
    quant_causal_conv1d_fwd_kernel<Causal_conv1d_fwd_kernel_traits<64, 4, false, int8_t, int8_t>>(p);
}
#elif KERNEL == 1
#include "selective_scan/quant_sscan_fwd_kernel.cuh"
typedef QuantSSMParams Parameters;
ENTRY scan(Parameters p) {
    quant_sscan_fwd_kernel<Quant_SScan_fwd_kernel_traits<32, 16, 1, false, true, true, true, int8_t, int8_t>>(p);
}
#elif KERNEL == 2
#include "hadamard/quant_hadamard_fwd.cu"
typedef HadamardParamsBase Parameters;
ENTRY hadamard(Parameters p) {
    fast_hadamard_transform_kernel<fast_hadamard_transform_12N_kernel_traits<32, 7, at::Half>>(p);
}
#else
// Its grid has three dimensions, ours two.
struct Place {
    int x, y, z;
};
__device__ Place place() { return {(int)blockIdx.x, (int)blockIdx.y % N_CHUNKS, (int)blockIdx.y / N_CHUNKS}; }
#define blockIdx (place())
#include "causal_conv1d/quamba2_conv1d_fwd_kernel.cuh"
typedef Quamba2ConvParams Parameters;
ENTRY conv2(Parameters p) {
    quamba2_conv1d_channellast_fwd_kernel<quamba2_conv1d_channellast_fwd_kernel_traits<128, 4, 64, true, int8_t, int8_t, 64>>(p);
}
#endif
static_assert(sizeof(Parameters) == PARAMETERS);

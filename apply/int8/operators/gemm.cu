// Products of INT8 codes on the tensor cores, with their epilogue. Compiled at run time (cuda.py).
//
// A block computes BLOCK x BLOCK outputs, with STAGES tiles of DEPTH bytes per row of each operand being loaded. HOPPER
// 1: by wgmma (sm_90a), two warpgroups of 64 rows each; 0: by mma.sync (compute capability 8.0 and later), four warps
// of 64 x 64. The sums are int32, so they do not depend on the order.

typedef signed char s8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

const int BLOCK = 128;
#if HOPPER
const int DEPTH = 128, STAGES = 3, THREADS = 256;
#else
const int DEPTH = 64, STAGES = 4, THREADS = 128;
#endif
const int TILE = BLOCK * DEPTH; // bytes of one operand's tile

// The offset of the 16 bytes `chunk` of a tile's row: permuted so that eight rows' chunks are in different banks, on
// Hopper by wgmma's 128-byte swizzle.
__device__ __forceinline__ u32 place(int row, int chunk) {
    return row * DEPTH + ((chunk ^ (HOPPER ? row & 7 : (row >> 1) & 3)) << 4);
}

// Copies a thread's share of one operand's tiles: 16 bytes of each of COPIES rows, all at the same chunk.
struct Copier {
    static const int CHUNKS = DEPTH / 16, APART = THREADS / CHUNKS, COPIES = BLOCK / APART;
    const s8* from;
    i64 stride; // from one of its rows to the next
    i64 left;   // bytes of a row from the thread's chunk on
    u32 to[COPIES], bytes[COPIES];

    __device__ Copier(const s8* matrix, i64 row_stride, i64 first, i64 rows, i64 depth, u32 shared) {
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        from = matrix + (first + row) * row_stride + chunk * 16;
        stride = row_stride * APART;
        left = depth - chunk * 16;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            to[i] = shared + place(row + i * APART, chunk);
            bytes[i] = first + row + i * APART < rows ? 16 : 0; // zeros beyond
        }
    }

    // Copy the tile of step `step` into stage `stage`.
    __device__ void copy(int step, int stage) const {
        const bool inside = (i64)step * DEPTH < left;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const u32 count = inside ? bytes[i] : 0; // with 0 nothing is read
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to[i] + stage * 2 * TILE),
                         "l"(from + i * stride + step * DEPTH), "r"(count));
        }
    }
};

// Store (sum * first) * second of two neighbouring columns, rounded once from float32: to codes half to even,
// saturating. (Adding 1.5 * 2^23 leaves no fraction bits, so the addition rounds, and the code is the sum's last byte:
// conversions to integers run at a quarter of the speed.)
__device__ __forceinline__ void store(s8* at, float left, float right) {
    const float shifter = 12582912.0f;
    const u32 low = __float_as_uint(fminf(fmaxf(left, -128.0f), 127.0f) + shifter);
    const u32 high = __float_as_uint(fminf(fmaxf(right, -128.0f), 127.0f) + shifter);
    *(u16*)at = (u16)__byte_perm(low, high, 0x0040);
}

__device__ __forceinline__ void store(u16* at, float left, float right) {
    u32 halves;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(right), "f"(left));
    *(u32*)at = halves;
}

template <bool OFFSET> struct Scaling {
    const float* first; // one per column, or, if null, first_of_all
    float first_of_all, second;
    const int* offset; // if OFFSET, subtracted from the sums of each column

    __device__ int sum(int sum, i64 column, i64 columns) const {
        return OFFSET && column < columns ? sum - offset[column] : sum;
    }
    __device__ float factor(i64 column, i64 columns) const {
        return first == nullptr ? first_of_all : (column < columns ? first[column] : 0.0f);
    }
};

// Write a warp's sums of eight columns, in the layout of mma and wgmma: rows lane / 4 and lane / 4 + 8, two columns
// each.
template <typename T, bool OFFSET>
__device__ __forceinline__ void write_sums(
    const int* sums, T* tile, int pitch, int row, int column, i64 first_column, i64 columns,
    const Scaling<OFFSET>& scaling
) {
    const int lane = threadIdx.x % 32;
    row += lane / 4, column += lane % 4 * 2;
    const float left = scaling.factor(first_column + column, columns);
    const float right = scaling.factor(first_column + column + 1, columns);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const float one = (float)scaling.sum(sums[2 * k], first_column + column, columns);
        const float other = (float)scaling.sum(sums[2 * k + 1], first_column + column + 1, columns);
        store(tile + (row + k * 8) * pitch + column, __fmul_rn(__fmul_rn(one, left), scaling.second),
              __fmul_rn(__fmul_rn(other, right), scaling.second));
    }
}

#if HOPPER

// wgmma's descriptor of a tile: its address, groups of eight rows 1024 bytes apart, 128-byte swizzle.
__device__ __forceinline__ u64 describe(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// Adds to the sums the product of 64 rows of a and 128 of b, over 32 bytes of each.
__device__ __forceinline__ void multiply(int (&d)[16][4], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1;"
        : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]), "+r"(d[1][0]), "+r"(d[1][1]), "+r"(d[1][2]),
          "+r"(d[1][3]), "+r"(d[2][0]), "+r"(d[2][1]), "+r"(d[2][2]), "+r"(d[2][3]), "+r"(d[3][0]), "+r"(d[3][1]),
          "+r"(d[3][2]), "+r"(d[3][3]), "+r"(d[4][0]), "+r"(d[4][1]), "+r"(d[4][2]), "+r"(d[4][3]), "+r"(d[5][0]),
          "+r"(d[5][1]), "+r"(d[5][2]), "+r"(d[5][3]), "+r"(d[6][0]), "+r"(d[6][1]), "+r"(d[6][2]), "+r"(d[6][3]),
          "+r"(d[7][0]), "+r"(d[7][1]), "+r"(d[7][2]), "+r"(d[7][3]), "+r"(d[8][0]), "+r"(d[8][1]), "+r"(d[8][2]),
          "+r"(d[8][3]), "+r"(d[9][0]), "+r"(d[9][1]), "+r"(d[9][2]), "+r"(d[9][3]), "+r"(d[10][0]), "+r"(d[10][1]),
          "+r"(d[10][2]), "+r"(d[10][3]), "+r"(d[11][0]), "+r"(d[11][1]), "+r"(d[11][2]), "+r"(d[11][3]),
          "+r"(d[12][0]), "+r"(d[12][1]), "+r"(d[12][2]), "+r"(d[12][3]), "+r"(d[13][0]), "+r"(d[13][1]),
          "+r"(d[13][2]), "+r"(d[13][3]), "+r"(d[14][0]), "+r"(d[14][1]), "+r"(d[14][2]), "+r"(d[14][3]),
          "+r"(d[15][0]), "+r"(d[15][1]), "+r"(d[15][2]), "+r"(d[15][3])
        : "l"(a), "l"(b));
}

#else

__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

__device__ __forceinline__ void multiply(int (&sum)[4], const u32 (&a)[4], u32 low, u32 high) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high));
}

#endif

// out[row, column] = (sum_k a[row, k] b[column, k] * first[column]) * second in float32, rounded once to T. a (rows,
// depth) rows a_stride apart, b (columns, depth); depth a positive multiple of 16 and every row of a and out 16-byte
// aligned: a's padding is multiplied by zeros of b. out (rows, columns) rows out_stride apart, padded to 16 bytes.
template <typename T, bool OFFSET>
__device__ __forceinline__ void product(
    const s8* a, i64 a_stride, const s8* b, i64 rows, i64 columns, i64 depth, const Scaling<OFFSET> scaling, T* out,
    i64 out_stride
) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const i64 first_row = (i64)blockIdx.y * BLOCK, first_column = (i64)blockIdx.x * BLOCK;
    const int warp = threadIdx.x / 32, steps = (int)((depth + DEPTH - 1) / DEPTH);
    const Copier of_a(a, a_stride, first_row, rows, depth, base);
    const Copier of_b(b, depth, first_column, columns, depth, base + TILE);
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) of_a.copy(step, step), of_b.copy(step, step);
        asm volatile("cp.async.commit_group;");
    }
#if HOPPER
    int sums[16][4];
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) sums[i][k] = 0;
#else
    const int lane = threadIdx.x % 32, warp_row = warp / 2 * 64, warp_column = warp % 2 * 64;
    // This lane's row of the matrices that ldmatrix loads: of a, rows 0-15 and then their other 16 bytes; of b, two
    // halves of eight rows and then of the next eight.
    const int a_row = warp_row + lane % 16, a_chunk = lane / 16;
    const int b_row = warp_column + lane / 16 * 8 + lane % 8, b_chunk = lane / 8 % 2;
    int sums[4][8][4];
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) sums[i][j][k] = 0;
#endif
    int stage = 0;
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        // Makes the copies visible to wgmma, which reads shared memory through the async proxy.
        if (HOPPER) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        const int next = stage == 0 ? STAGES - 1 : stage - 1;
        if (step + STAGES - 1 < steps) of_a.copy(step + STAGES - 1, next), of_b.copy(step + STAGES - 1, next);
        asm volatile("cp.async.commit_group;");
        const u32 a_tile = base + stage * 2 * TILE, b_tile = a_tile + TILE;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
#if HOPPER
        const u64 left = describe(a_tile + warp / 4 * 64 * DEPTH), right = describe(b_tile);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < DEPTH / 32; k++) multiply(sums, left + k * 2, right + k * 2);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#else
#pragma unroll
        for (int k = 0; k < DEPTH / 32; k++) {
            u32 left[4][4], right[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) load_matrices(left[i], a_tile + place(a_row + i * 16, k * 2 + a_chunk));
#pragma unroll
            for (int j = 0; j < 4; j++) load_matrices(right[j], b_tile + place(b_row + j * 16, k * 2 + b_chunk));
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    multiply(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
                }
        }
#endif
    }
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    const int PITCH = BLOCK + 16 / sizeof(T);
    T* lines = (T*)shared; // outputs, staged so that whole rows are written
#if HOPPER
#pragma unroll
    for (int i = 0; i < 16; i++) {
        write_sums(sums[i], lines, PITCH, warp * 16, i * 8, first_column, columns, scaling);
    }
#else
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int row = warp_row + i * 16, column = warp_column + j * 8;
            write_sums(sums[i][j], lines, PITCH, row, column, first_column, columns, scaling);
        }
#endif
    __syncthreads();
    const int PIECE = 16 / sizeof(T);
    for (int i = threadIdx.x; i < BLOCK * BLOCK / PIECE; i += THREADS) {
        const int row = i / (BLOCK / PIECE), column = i % (BLOCK / PIECE) * PIECE;
        if (first_row + row < rows && first_column + column < columns) {
            T* to = out + (first_row + row) * out_stride + first_column + column;
            *(uint4*)to = *(const uint4*)(lines + row * PITCH + column);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) product_to_int8(
    const s8* a, i64 a_stride, const s8* b, i64 rows, i64 columns, i64 depth, const float* first, float first_of_all,
    float second, const int* offset, s8* out, i64 out_stride
) {
    const Scaling<false> scaling = {first, first_of_all, second, offset};
    product(a, a_stride, b, rows, columns, depth, scaling, out, out_stride);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) product_to_int8_less(
    const s8* a, i64 a_stride, const s8* b, i64 rows, i64 columns, i64 depth, const float* first, float first_of_all,
    float second, const int* offset, s8* out, i64 out_stride
) {
    const Scaling<true> scaling = {first, first_of_all, second, offset};
    product(a, a_stride, b, rows, columns, depth, scaling, out, out_stride);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) product_to_half(
    const s8* a, i64 a_stride, const s8* b, i64 rows, i64 columns, i64 depth, const float* first, float first_of_all,
    float second, const int* offset, u16* out, i64 out_stride
) {
    const Scaling<false> scaling = {first, first_of_all, second, offset};
    product(a, a_stride, b, rows, columns, depth, scaling, out, out_stride);
}

// Copies rows of several tensors, as float32. Compiled at run time (gather.py).
//
// PIECES  largest number of tensors per launch
// CHUNK   values per block

#include "ptx.cuh"

// gather.py declares the same members; each has 8 bytes, except the array of int.
struct Piece {
    const void* x;    // float16 if `half`, else float32; values of a row contiguous, rows `stride` apart
    const i64* rows;  // rows to copy
    i64 stride, width, half;
    float* out;       // (rows, width)
};

struct Pieces {
    Piece at[PIECES];
    int first[PIECES + 1]; // first block of each piece; unused pieces begin at the end
};

extern "C" __global__ void __launch_bounds__(256) gather(const __grid_constant__ Pieces pieces) {
    int number = 0;
    while (blockIdx.x >= pieces.first[number + 1]) number++;
    const Piece& piece = pieces.at[number];
    const i64 block = blockIdx.x - pieces.first[number], width = piece.width, chunks = (width + CHUNK - 1) / CHUNK;
    const i64 row = block / chunks, start = block % chunks * CHUNK;
    const i64 stop = start + CHUNK < width ? start + CHUNK : width;
    const i64 from = piece.rows[row] * piece.stride;
    for (i64 i = start + threadIdx.x; i < stop; i += blockDim.x) {
        piece.out[row * width + i] =
            piece.half ? half_to_float(((const u16*)piece.x)[from + i]) : ((const float*)piece.x)[from + i];
    }
}

// Rows by index: out[l] = x[index[l]]. One block a row.
#include "platform.cuh"

struct GatherRowsArgs {
    bf16* out;              // [L, out_stride]
    const bf16* x;          // [T, x_stride]
    const uint32_t* index;  // [L]
    uint32_t chunks;        // 8 columns each
    uint32_t out_stride, x_stride;
    uint32_t unused;
};

KERNEL(gather_rows, GatherRowsArgs, 128, 1) {
    const uint4* from = reinterpret_cast<const uint4*>(args.x + uint64_t(args.index[blockIdx.x]) * args.x_stride);
    uint4* to = reinterpret_cast<uint4*>(args.out + uint64_t(blockIdx.x) * args.out_stride);
    for (uint32_t c = threadIdx.x; c < args.chunks; c += blockDim.x) to[c] = from[c];
}

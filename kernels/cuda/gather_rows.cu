// Rows by index: out[l] = x[index[l]]. One block a row.
#include "platform.cuh"

KERNEL(gather_rows) {
    const uint4* from = reinterpret_cast<const uint4*>(args.x + uint64_t(args.index[blockIdx.x]) * args.x_stride);
    uint4* to = reinterpret_cast<uint4*>(args.out + uint64_t(blockIdx.x) * args.out_stride);
    for (uint32_t c = threadIdx.x; c < args.chunks; c += blockDim.x) to[c] = from[c];
}

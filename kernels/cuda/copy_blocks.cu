// Copies KV blocks, every place of a page: cache[place][to] = cache[place][from].
//
// Grid (pairs, places): where all layers' shares of a page have one size, the cache holds them place by place, else page by
// page, and there is one place. No destination occurs twice or as a source, so the order does not matter.
#include "platform.cuh"

KERNEL(copy_blocks) {
    uint4* place = args.cache + blockIdx.y * args.chunks_per_place;
    const uint4* from = place + uint64_t(args.pairs[2 * blockIdx.x]) * args.chunks_per_block;
    uint4* to = place + uint64_t(args.pairs[2 * blockIdx.x + 1]) * args.chunks_per_block;
    for (uint32_t c = threadIdx.x; c < args.chunks_per_block; c += blockDim.x) to[c] = from[c];
}

// Copies KV blocks, every layer: cache[layer][to] = cache[layer][from].
//
// Grid (pairs, layers). No destination occurs twice or as a source, so the order does not matter.
#include "platform.cuh"

struct CopyBlocksArgs {
    uint4* cache;           // [layers][blocks][chunks_per_block]
    const uint32_t* pairs;  // [pairs][2]: from, to
    uint64_t chunks_per_layer;
    uint32_t chunks_per_block;  // 16 bytes each
    uint32_t unused;
};

KERNEL(copy_blocks, CopyBlocksArgs, 256, 1) {
    uint4* layer = args.cache + blockIdx.y * args.chunks_per_layer;
    const uint4* from = layer + uint64_t(args.pairs[2 * blockIdx.x]) * args.chunks_per_block;
    uint4* to = layer + uint64_t(args.pairs[2 * blockIdx.x + 1]) * args.chunks_per_block;
    for (uint32_t c = threadIdx.x; c < args.chunks_per_block; c += blockDim.x) to[c] = from[c];
}

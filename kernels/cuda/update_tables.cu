// Applies a step's changes to the block tables: table[index[i]] = block[i]. No index occurs twice.
#include "platform.cuh"

KERNEL(update_tables) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < args.n) args.tables[args.changes[2 * i]] = args.changes[2 * i + 1];
}

// Applies a step's changes to the block-table matrix: table[index[i]] = block[i]. No index occurs twice.
#include "platform.cuh"

struct UpdateTablesArgs {
    uint32_t* tables;         // [max_sequences][max_blocks_per_sequence]
    const uint32_t* changes;  // [n][2]: index of the entry, block
    uint32_t n;
    uint32_t unused;
};

KERNEL(update_tables, UpdateTablesArgs, 128, 1) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < args.n) args.tables[args.changes[2 * i]] = args.changes[2 * i + 1];
}

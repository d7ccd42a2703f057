// Rows of the embedding table: out[t] = table[token[t]].
//
// One block a token. A token whose high bit is set names a row of the step before, whose draw is read from the device:
// the host may not know it yet.
#include "platform.cuh"

struct EmbedArgs {
    bf16* out;                 // [T, out_stride]
    const bf16* table;         // [vocabulary, table_stride]
    const uint32_t* tokens;    // [T]
    const uint32_t* previous;  // [L of the step before]: what was drawn
    uint32_t chunks;           // 8 columns each; padding columns are zeros
    uint32_t out_stride, table_stride;
    uint32_t unused;
};

constexpr uint32_t SAMPLED = 0x80000000;

KERNEL(embed, EmbedArgs, 128, 1) {
    uint32_t token = args.tokens[blockIdx.x];
    if (token & SAMPLED) token = args.previous[token & ~SAMPLED];
    const uint4* from = reinterpret_cast<const uint4*>(args.table + uint64_t(token) * args.table_stride);
    uint4* to = reinterpret_cast<uint4*>(args.out + uint64_t(blockIdx.x) * args.out_stride);
    for (uint32_t c = threadIdx.x; c < args.chunks; c += blockDim.x) to[c] = from[c];
}

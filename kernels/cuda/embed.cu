// Rows of the embedding table: out[t] = table[token[t]] * scale.
//
// One block a token. A token whose high bit is set names a row of logits of the step before, whose sample is read from the
// device: the host may not know it yet.
#include "platform.cuh"

KERNEL(embed) {
    uint32_t token = args.tokens[blockIdx.x];
    if (token & SAMPLED) token = args.previous[token & ~SAMPLED];
    const uint4* from = reinterpret_cast<const uint4*>(args.table + uint64_t(token) * args.table_stride);
    uint4* to = reinterpret_cast<uint4*>(args.out + uint64_t(blockIdx.x) * args.out_stride);
    for (uint32_t c = threadIdx.x; c < args.chunks; c += blockDim.x) {
        uint4 columns = from[c];
        if (args.scale != 1.0f) {
            float x[8];
            unpack(x, columns);
            for (int i = 0; i < 8; ++i) x[i] *= args.scale;
            columns = pack(x);
        }
        to[c] = columns;
    }
}

// Rotary position embedding of queries and keys, in place (arXiv 2104.09864, in the halves' order of Transformers), fused
// with the append of keys and values to the paged cache.
//
// One block a token; a position of all ones is inert. The angle is a binary32 product, as in Transformers; sine and
// cosine are computed once a pair and used by every head. 16 bytes a load and store.
#include "kv_cache.cuh"

struct RopeAppendArgs {
    KvCache cache;
    bf16* qkv;                         // [T, stride]: query heads, key heads, value heads
    const uint32_t* positions;         // [T]
    const uint32_t* rows;              // [T]: rows of the block tables
    const float* inverse_frequencies;  // [head_dim / 2]
    uint32_t n_heads;
    uint32_t stride;
    float scale;
    uint32_t unused;
};

// Shared memory: head_dim floats.
KERNEL(rope_append, RopeAppendArgs, 128, 1) {
    const uint32_t position = args.positions[blockIdx.x];
    if (position == 0xffffffff) return;
    const KvCache& cache = args.cache;
    const uint32_t half = cache.head_dim / 2;
    float* sines = reinterpret_cast<float*>(shared_memory());
    float* cosines = sines + half;
    for (uint32_t i = threadIdx.x; i < half; i += blockDim.x) {
        const float angle = __fmul_rn(float(position), args.inverse_frequencies[i]);
        sincosf(angle, &sines[i], &cosines[i]);
        sines[i] *= args.scale;
        cosines[i] *= args.scale;
    }
    __syncthreads();

    const uint32_t row = args.rows[blockIdx.x];
    uint4* token = reinterpret_cast<uint4*>(args.qkv + uint64_t(blockIdx.x) * args.stride);
    uint4* layer = reinterpret_cast<uint4*>(cache.layer);
    const uint32_t head_chunks = cache.head_dim / 8, half_chunks = half / 8;
    const uint32_t n_rotated = (args.n_heads + cache.n_kv_heads) * half_chunks;
    for (uint32_t c = threadIdx.x; c < n_rotated; c += blockDim.x) {
        const uint32_t head = c / half_chunks, chunk = c % half_chunks;
        uint4* at = token + head * head_chunks + chunk;
        float a[8], b[8];
        unpack(a, at[0]);
        unpack(b, at[half_chunks]);
        for (int i = 0; i < 8; ++i) {
            const float sine = sines[8 * chunk + i], cosine = cosines[8 * chunk + i];
            const float low = a[i] * cosine - b[i] * sine;
            b[i] = b[i] * cosine + a[i] * sine;
            a[i] = low;
        }
        const uint4 low = pack(a), high = pack(b);
        at[0] = low;
        at[half_chunks] = high;
        if (head >= args.n_heads) {
            uint4* key = layer + key_chunk(cache, row, position, head - args.n_heads) + chunk;
            key[0] = low;
            key[half_chunks] = high;
        }
    }
    const uint4* values = token + (args.n_heads + cache.n_kv_heads) * head_chunks;
    const uint32_t n_values = cache.n_kv_heads * head_chunks;
    for (uint32_t c = threadIdx.x; c < n_values; c += blockDim.x) {
        const uint32_t head = c / head_chunks, chunk = c % head_chunks;
        layer[key_chunk(cache, row, position, head) + value_offset(cache) + chunk] = values[c];
    }
}

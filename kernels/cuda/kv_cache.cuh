// Where a token lies in the paged KV cache of one layer: [block][K|V][kv head][slot][dim], bfloat16
// (PagedAttention, arXiv 2309.06180).
#pragma once

#include "platform.cuh"

struct KvCache {
    bf16* layer;                // block 0 of the layer
    const uint32_t* tables;     // [max_sequences][table_width]
    uint32_t table_width;
    uint32_t block_size;        // slots of a block: 8 to 128
    uint32_t block_size_magic;  // ceil(2^32 / block_size): position / block_size is one multiplication, exact below 2^25
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t unused;
};

/// Chunks of 8 elements (16 bytes) from the start of the layer to the key of a position; its value lies
/// `value_offset` further.
static __device__ inline uint32_t key_chunk(const KvCache& cache, uint32_t row, uint32_t position, uint32_t head) {
    const uint32_t index = __umulhi(position, cache.block_size_magic);
    const uint32_t slot = position - index * cache.block_size;
    const uint32_t block = cache.tables[uint64_t(row) * cache.table_width + index];
    return ((block * 2 * cache.n_kv_heads + head) * cache.block_size + slot) * (cache.head_dim / 8);
}

/// Chunks from a key to the value of the same position.
static __device__ inline uint32_t value_offset(const KvCache& cache) {
    return cache.n_kv_heads * cache.block_size * (cache.head_dim / 8);
}

/// Starts a warp's copies of `n` consecutive tokens of one head: their keys to `keys`, their values to `values`, rows
/// `stride` elements apart. Tokens at or past `length` become zeros. The warp looks each token's block up once.
template <int D, int n, int stride>
static __device__ inline void load_tokens(bf16* keys, bf16* values, const KvCache& cache, uint32_t row, uint32_t head,
                                          uint32_t first, uint32_t length) {
    static_assert(n * D / 8 % 32 == 0, "every lane copies the same number of chunks");
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t token = first + lane % n;
    const uint32_t mine = token < length ? key_chunk(cache, row, token, head) : 0;
    const uint4* layer = reinterpret_cast<const uint4*>(cache.layer);
    const uint32_t to_value = value_offset(cache);
#pragma unroll
    for (int i = 0; i < n * D / 8 / 32; ++i) {
        const uint32_t chunk = i * 32 + lane;
        const uint32_t t = chunk / (D / 8), c = chunk % (D / 8);
        const bool valid = first + t < length;
        const uint32_t from = __shfl_sync(ALL_LANES, mine, t) + c;
        copy_async_16(keys + t * stride + c * 8, layer + from, valid);
        copy_async_16(values + t * stride + c * 8, layer + from + (valid ? to_value : 0), valid);
    }
}

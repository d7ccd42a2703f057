// Where a token lies in the paged KV cache of one layer: [page][K|V][kv head][slot][dim], bfloat16
// (PagedAttention, arXiv 2309.06180). Pages are `page_rows` rows of head_dim elements apart: other layers may lie between.
#pragma once

#include "platform.cuh"

/// Rows of head_dim elements from the start of the layer to the key of a position; its value lies `value_rows` further.
static __device__ inline uint32_t key_row(const KvCache& cache, uint32_t row, uint32_t position, uint32_t head) {
    const uint32_t index = __umulhi(position, cache.block_size_magic);
    const uint32_t slot = position - index * cache.block_size;
    const uint32_t block = cache.tables[uint64_t(row) * cache.table_width + index];
    return block * cache.page_rows + head * cache.block_size + slot;
}

/// Rows from a key to the value of the same position.
static __device__ inline uint32_t value_rows(const KvCache& cache) { return cache.n_kv_heads * cache.block_size; }

/// The first position that a query at `position` sees.
static __device__ inline uint32_t first_visible(uint32_t position, uint32_t window) {
    return position >= window ? position - window + 1 : 0;
}

/// Starts a warp's copies of `n` consecutive tokens of one head: their keys to `keys`, their values to `values`, rows
/// `stride` elements apart. Tokens that are not in [begin, end) become zeros, and nothing of them is read. The warp looks
/// each token's block up once.
/// Where registers are scarce, a value's address is computed anew rather than from its key's.
template <int D, int n, int stride, bool registers_are_scarce>
static __device__ inline void load_tokens(bf16* keys, bf16* values, const KvCache& cache, uint32_t row, uint32_t head,
                                          uint32_t first, uint32_t begin, uint32_t end) {
    static_assert(n * D / 8 % 32 == 0, "every lane copies the same number of chunks");
    constexpr uint32_t none = 0xffffffff;
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t token = first + lane % n;
    // Before `begin` the difference wraps round and is large.
    const uint32_t mine = token - begin < end - begin ? key_row(cache, row, token, head) : none;
    const char* layer = reinterpret_cast<const char*>(cache.layer);
    const uint32_t to_value = value_rows(cache);
#pragma unroll
    for (int i = 0; i < n * D / 8 / 32; ++i) {
        const uint32_t chunk = i * 32 + lane;
        const uint32_t t = chunk / (D / 8), c = chunk % (D / 8);
        const uint32_t from = __shfl_sync(ALL_LANES, mine, t);
        const char* key = layer + c * 16 + uint64_t(from) * (D * 2);  // not looked at where there is none
        copy_async_16(keys + t * stride + c * 8, key, from != none);
        const char* value = registers_are_scarce ? layer + c * 16 + uint64_t(from + to_value) * (D * 2)
                                                 : key + uint64_t(to_value) * (D * 2);
        copy_async_16(values + t * stride + c * 8, value, from != none);
    }
}

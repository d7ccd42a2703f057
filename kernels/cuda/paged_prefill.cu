// Causal attention of prefill chunks over the paged KV cache, the chunk's own tokens included (they are appended before).
//
// Grid (tiles of the plan, kv heads); 8 warps of 16 rows. A row is one query head of one token: the heads of a group
// stand side by side, so that K and V are read once for all of them. Tiles of 64 keys (32 from head size 192) at absolute
// positions, double-buffered by asynchronous copies. A row's result depends on its position only, not on the chunking.
//
// Measured on an H100 (32/8 heads, size 128, block 16, causal): 2k 170 TFLOP/s, 8k 243, 16k 254; PyTorch's attention on
// contiguous inputs gave 393, 616 and 660 in the same run. mma.sync is limited to about 60 % of the tensor cores' peak.
#include "attention_tile.cuh"
#include "kv_cache.cuh"

struct PrefillTile {
    uint32_t row;             // of the block tables
    uint32_t first_token;     // of the span: row of qkv and out
    uint32_t n_tokens;        // of the span
    uint32_t first_position;  // of the span
    uint32_t first_row;       // of the tile, in rows of (token of the span, head of the group)
    uint32_t unused;
};

struct PagedPrefillArgs {
    KvCache cache;
    bf16* out;                 // [T, out_stride]: n_heads heads
    const bf16* qkv;           // [T, qkv_stride]: query heads first, rotated
    const PrefillTile* tiles;  // [grid x]
    uint32_t out_stride, qkv_stride;
    uint32_t n_heads;
    float scale_log2;  // scale * log2(e)
};

constexpr int PREFILL_WARPS = 8;
constexpr int PREFILL_ROWS = PREFILL_WARPS * 16;

/// Keys of a tile.
template <int D>
constexpr int prefill_keys = D <= 128 ? 64 : 32;

/// Starts the copies of one tile of keys and values. Tokens at or past `length` become zeros.
template <int D>
static __device__ inline void load_prefill_tile(bf16* keys, const KvCache& cache, uint32_t row, uint32_t head,
                                                uint32_t first, uint32_t length) {
    constexpr uint32_t n_chunks = prefill_keys<D> * D / 8;
    const uint4* layer = reinterpret_cast<const uint4*>(cache.layer);
    const uint32_t to_value = value_offset(cache);
    bf16* values = keys + prefill_keys<D> * row_stride<D>;
#pragma unroll
    for (uint32_t chunk = threadIdx.x; chunk < n_chunks; chunk += PREFILL_WARPS * 32) {
        const uint32_t t = chunk / (D / 8), c = chunk % (D / 8);
        const bool valid = first + t < length;
        const uint32_t from = valid ? key_chunk(cache, row, first + t, head) + c : 0;
        copy_async_16(keys + t * row_stride<D> + c * 8, layer + from, valid);
        copy_async_16(values + t * row_stride<D> + c * 8, layer + from + (valid ? to_value : 0), valid);
    }
}

/// Shared memory: the tile's query rows, then two stages of (keys, values).
template <int D>
static __device__ inline void paged_prefill(const PagedPrefillArgs& args) {
    constexpr int n_keys = prefill_keys<D>;
    constexpr int stage_elements = 2 * n_keys * row_stride<D>;
    const KvCache& cache = args.cache;
    const PrefillTile tile = args.tiles[blockIdx.x];
    const uint32_t kv_head = blockIdx.y;
    const uint32_t group = args.n_heads / cache.n_kv_heads;
    const uint32_t n_rows = min(tile.n_tokens * group - tile.first_row, uint32_t(PREFILL_ROWS));
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bf16* shared_queries = reinterpret_cast<bf16*>(shared_memory());
    bf16* ring = shared_queries + PREFILL_ROWS * row_stride<D>;

    // Where a row of the tile lies in qkv and out, and its position.
    const auto token_of = [&](uint32_t r) { return (tile.first_row + r) / group; };
    const auto head_of = [&](uint32_t r) { return kv_head * group + (tile.first_row + r) % group; };
    const uint32_t length = tile.first_position + token_of(n_rows - 1) + 1;  // keys that the last row sees
    const uint32_t n_tiles = (length + n_keys - 1) / n_keys;

    load_prefill_tile<D>(ring, cache, tile.row, kv_head, 0, length);
    copy_async_commit();
    for (uint32_t chunk = threadIdx.x; chunk < PREFILL_ROWS * D / 8; chunk += blockDim.x) {
        const uint32_t r = chunk / (D / 8), c = chunk % (D / 8);
        uint4 query{0, 0, 0, 0};
        if (r < n_rows)
            query = *reinterpret_cast<const uint4*>(args.qkv + uint64_t(tile.first_token + token_of(r)) * args.qkv_stride +
                                                    head_of(r) * D + c * 8);
        *reinterpret_cast<uint4*>(shared_queries + r * row_stride<D> + c * 8) = query;
    }
    __syncthreads();
    const Queries<D> queries(shared_queries + warp * 16 * row_stride<D>);
    Accumulator<D> accumulator;
    const uint32_t my_rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
    // Rows past the end see what the last one sees; they are not written.
    const uint32_t limits[2] = {tile.first_position + token_of(min(my_rows[0], n_rows - 1)),
                                tile.first_position + token_of(min(my_rows[1], n_rows - 1))};
    const uint32_t first_limit = tile.first_position + token_of(min(warp * 16, n_rows - 1));
    const uint32_t last_limit = tile.first_position + token_of(min(warp * 16 + 15, n_rows - 1));

    for (uint32_t j = 0; j < n_tiles; ++j) {
        copy_async_wait<0>();
        __syncthreads();  // Tile j is there for all, and all are done with tile j - 1.
        if (j + 1 < n_tiles)
            load_prefill_tile<D>(ring + (j + 1) % 2 * stage_elements, cache, tile.row, kv_head, (j + 1) * n_keys, length);
        copy_async_commit();
        const uint32_t first = j * n_keys;
        if (first > last_limit) continue;  // Nothing in it is visible to this warp.
        const bf16* keys = ring + j % 2 * stage_elements;
        float s[n_keys / 8][4];
        scores<D>(s, queries, keys);
        const bool whole = first + n_keys - 1 <= first_limit;
#pragma unroll
        for (int n = 0; n < n_keys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t position = first + n * 8 + lane % 4 * 2 + i % 2;
                s[n][i] = whole || position <= limits[i / 2] ? s[n][i] * args.scale_log2 : MINUS_INFINITY;
            }
        accumulator.add(s, keys + n_keys * row_stride<D>);
    }
    accumulator.finish();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (my_rows[r] >= n_rows) continue;
        const float inverse = 1.0f / accumulator.l[r];
        uint32_t* out = reinterpret_cast<uint32_t*>(
            args.out + uint64_t(tile.first_token + token_of(my_rows[r])) * args.out_stride + head_of(my_rows[r]) * D);
#pragma unroll
        for (int d = 0; d < D / 8; ++d)
            out[d * 4 + lane % 4] = pack_bf16(accumulator.o[d][2 * r] * inverse, accumulator.o[d][2 * r + 1] * inverse);
    }
}

KERNEL(paged_prefill_64, PagedPrefillArgs, 256, 1) { paged_prefill<64>(args); }
KERNEL(paged_prefill_80, PagedPrefillArgs, 256, 1) { paged_prefill<80>(args); }
KERNEL(paged_prefill_96, PagedPrefillArgs, 256, 1) { paged_prefill<96>(args); }
KERNEL(paged_prefill_128, PagedPrefillArgs, 256, 1) { paged_prefill<128>(args); }
KERNEL(paged_prefill_192, PagedPrefillArgs, 256, 1) { paged_prefill<192>(args); }
KERNEL(paged_prefill_256, PagedPrefillArgs, 256, 1) { paged_prefill<256>(args); }

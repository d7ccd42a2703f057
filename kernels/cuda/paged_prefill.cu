// Causal attention of prefill chunks over the paged KV cache, the chunk's own tokens included (they are appended before).
//
// Grid (tiles of the plan, kv heads); 4 warps of 32 rows (16 from head size 192). A row is one query head of one token: the
// heads of a group stand side by side, so that K and V are read once for all of them. Tiles of 64 keys (32 from head size
// 192) at absolute positions, double-buffered by asynchronous copies. A row's result depends on its position only, not on
// the chunking. Layers with a window or a soft cap (`local`) have kernels of their own: they start at the first tile of keys
// that the first row sees.
//
// Measured: e2e/gpu/RESULTS.md. mma.sync is limited to about 60 % of the tensor cores' peak.
#include "attention_tile.cuh"
#include "kv_cache.cuh"

/// Starts the copies of one tile of keys and values, an equal part by each warp.
template <int D>
static __device__ inline void load_prefill_tile(bf16* keys, const KvCache& cache, uint32_t row, uint32_t head,
                                                uint32_t first, uint32_t begin, uint32_t end) {
    constexpr int n = prefill_keys<D> / PREFILL_WARPS;
    const uint32_t mine = threadIdx.x / 32 * n;
    bf16* values = keys + prefill_keys<D> * row_stride<D>;
    load_tokens<D, n, row_stride<D>, true>(keys + mine * row_stride<D>, values + mine * row_stride<D>, cache, row, head,
                                     first + mine, begin, end);
}

/// Shared memory: the tile's query rows, then two stages of (keys, values), then each row's limit.
template <int D, bool local>
static __device__ inline void paged_prefill(const PagedPrefillArgs& args) {
    constexpr int n_keys = prefill_keys<D>, M = prefill_tiles<D>;
    constexpr int stage_elements = 2 * n_keys * row_stride<D>;
    static_assert((prefill_rows<D> * row_stride<D> + 2 * stage_elements) * sizeof(bf16) +
                          prefill_rows<D> * sizeof(uint32_t) == prefill_shared_bytes<D>,
                  "what a launch brings holds all of it");
    const KvCache& cache = args.cache;
    const PrefillTile tile = args.tiles[blockIdx.x];
    const uint32_t kv_head = blockIdx.y;
    const uint32_t group = args.n_heads / cache.n_kv_heads;
    const uint32_t n_rows = min(tile.n_tokens * group - tile.first_row, uint32_t(prefill_rows<D>));
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bf16* shared_queries = reinterpret_cast<bf16*>(shared_memory());
    bf16* ring = shared_queries + prefill_rows<D> * row_stride<D>;

    // Where a row of the tile lies in qkv and out, and its position.
    const auto token_of = [&](uint32_t r) { return (tile.first_row + r) / group; };
    const auto head_of = [&](uint32_t r) { return kv_head * group + (tile.first_row + r) % group; };
    const uint32_t length = tile.first_position + token_of(n_rows - 1) + 1;  // keys that the last row sees
    const uint32_t n_tiles = (length + n_keys - 1) / n_keys;
    // The first key that the first row sees, and its tile.
    const uint32_t begin = local ? first_visible(tile.first_position + token_of(0), args.window) : 0;
    const uint32_t first_tile = begin / n_keys;

    load_prefill_tile<D>(ring + first_tile % 2 * stage_elements, cache, tile.row, kv_head, first_tile * n_keys, begin, length);
    copy_async_commit();
    for (uint32_t chunk = threadIdx.x; chunk < prefill_rows<D> * D / 8; chunk += blockDim.x) {
        const uint32_t r = chunk / (D / 8), c = chunk % (D / 8);
        uint4 query{0, 0, 0, 0};
        if (r < n_rows)
            query = *reinterpret_cast<const uint4*>(args.qkv + uint64_t(tile.first_token + token_of(r)) * args.qkv_stride +
                                                    head_of(r) * D + c * 8);
        *reinterpret_cast<uint4*>(shared_queries + r * row_stride<D> + c * 8) = query;
    }
    // The last position that each row sees; rows past the end see what the last one sees, and are not written.
    uint32_t* limits = reinterpret_cast<uint32_t*>(ring + 2 * stage_elements);
    for (uint32_t r = threadIdx.x; r < uint32_t(prefill_rows<D>); r += blockDim.x)
        limits[r] = tile.first_position + token_of(min(r, n_rows - 1));
    __syncthreads();
    const uint32_t warp_row = warp * 16 * M;
    const Queries<D, M> queries(shared_queries + warp_row * row_stride<D>);
    Accumulator<D, M> accumulator;
    // Row r of this lane, of 2 M.
    const auto my_row = [&](int m, int r) { return warp_row + m * 16 + r * 8 + lane / 4; };

    for (uint32_t j = first_tile; j < n_tiles; ++j) {
        copy_async_wait<0>();
        __syncthreads();  // Tile j is there for all, and all are done with tile j - 1.
        if (j + 1 < n_tiles)
            load_prefill_tile<D>(ring + (j + 1) % 2 * stage_elements, cache, tile.row, kv_head, (j + 1) * n_keys, begin,
                                 length);
        copy_async_commit();
        const uint32_t first = j * n_keys;
        if (first > limits[warp_row + 16 * M - 1]) continue;  // Nothing in it is visible to this warp.
        const bf16* keys = ring + j % 2 * stage_elements;
        float s[M][n_keys / 8][4];
        scores(s, queries, keys);
        if constexpr (local)
            if (args.tanh_scale != 0.0f) cap_scores(s, args.tanh_scale);
        // Every row of this warp sees all of it.
        const bool whole = first + n_keys - 1 <= limits[warp_row] &&
                           (!local || first >= first_visible(limits[warp_row + 16 * M - 1], args.window));
        // ptxas keeps all in registers for sm_80 if the masking is branched around, for sm_90a if it is not.
        if (AT_LEAST_SM_90 || !whole) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const uint32_t limit = limits[my_row(m, r)];
                    const uint32_t lowest = local ? first_visible(limit, args.window) : 0;
#pragma unroll
                    for (int n = 0; n < n_keys / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const uint32_t key = first + n * 8 + lane % 4 * 2 + i;
                            if (!whole && (key > limit || (local && key < lowest))) s[m][n][2 * r + i] = MINUS_INFINITY;
                        }
                }
        }
        accumulator.add(s, keys + n_keys * row_stride<D>, args.scale_log2);
    }
    accumulator.finish();

#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t row = my_row(m, r);
            if (row >= n_rows) continue;
            const float inverse = 1.0f / accumulator.l[m][r];
            uint32_t* out = reinterpret_cast<uint32_t*>(
                args.out + uint64_t(tile.first_token + token_of(row)) * args.out_stride + head_of(row) * D);
#pragma unroll
            for (int d = 0; d < D / 8; ++d)
                out[d * 4 + lane % 4] =
                    pack_bf16(accumulator.o[m][d][2 * r] * inverse, accumulator.o[m][d][2 * r + 1] * inverse);
        }
}

KERNEL(paged_prefill_64) { paged_prefill<64, false>(args); }
KERNEL(paged_prefill_80) { paged_prefill<80, false>(args); }
KERNEL(paged_prefill_96) { paged_prefill<96, false>(args); }
KERNEL(paged_prefill_128) { paged_prefill<128, false>(args); }
KERNEL(paged_prefill_192) { paged_prefill<192, false>(args); }
KERNEL(paged_prefill_256) { paged_prefill<256, false>(args); }

KERNEL(paged_prefill_local_64) { paged_prefill<64, true>(args); }
KERNEL(paged_prefill_local_80) { paged_prefill<80, true>(args); }
KERNEL(paged_prefill_local_96) { paged_prefill<96, true>(args); }
KERNEL(paged_prefill_local_128) { paged_prefill<128, true>(args); }
KERNEL(paged_prefill_local_192) { paged_prefill<192, true>(args); }
KERNEL(paged_prefill_local_256) { paged_prefill<256, true>(args); }

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

/// The query rows of a tile: one is a query head of a token of the span.
struct TileRows {
    PrefillTile tile;
    uint32_t kv_head, group, n;

    template <int D>
    static __device__ inline TileRows of(const PagedPrefillArgs& args) {
        const PrefillTile tile = args.tiles[blockIdx.x];
        const uint32_t group = args.n_heads / args.cache.n_kv_heads;
        return {tile, blockIdx.y, group, min(tile.n_tokens * group - tile.first_row, uint32_t(prefill_rows<D>))};
    }

    /// Of the span.
    __device__ uint32_t token(uint32_t r) const { return (tile.first_row + r) / group; }
    __device__ uint32_t head(uint32_t r) const { return kv_head * group + (tile.first_row + r) % group; }
    __device__ uint32_t position(uint32_t r) const { return tile.first_position + token(r); }
};

/// Writes what the tile's rows gave, or what the keys of its part gave. It reads the tile anew: the loop before it has no
/// registers to keep it in.
template <int D, bool local>
static __device__ inline void store_rows(const PagedPrefillArgs& args, const Accumulator<D, prefill_tiles<D>>& accumulator) {
    const TileRows rows = TileRows::of<D>(args);
    const uint32_t n_parts = local ? 1 : rows.tile.n_parts;
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < prefill_tiles<D>; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t row = (threadIdx.x / 32 * prefill_tiles<D> + m) * 16 + r * 8 + lane / 4;
            if (row >= rows.n) continue;
            const float(&o)[D / 8][4] = accumulator.o[m];
            if (n_parts == 1) {
                const float inverse = 1.0f / accumulator.l[m][r];
                const uint64_t token = rows.tile.first_token + rows.token(row);
                uint32_t* out = reinterpret_cast<uint32_t*>(args.out + token * args.out_stride + rows.head(row) * D);
#pragma unroll
                for (int d = 0; d < D / 8; ++d)
                    out[d * 4 + lane % 4] = pack_bf16(o[d][2 * r] * inverse, o[d][2 * r + 1] * inverse);
                continue;
            }
            const uint64_t partial = rows.tile.first_partial + rows.token(row) * n_parts;
            const uint64_t at = partial * args.n_heads + rows.head(row);
            float2* out = reinterpret_cast<float2*>(args.partial_out + at * D);
#pragma unroll
            for (int d = 0; d < D / 8; ++d) out[d * 4 + lane % 4] = float2{o[d][2 * r], o[d][2 * r + 1]};
            if (lane % 4 == 0) {
                args.partial_softmax[2 * at] = accumulator.top[m][r] * args.scale_log2;
                args.partial_softmax[2 * at + 1] = accumulator.l[m][r];
            }
        }
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
    const TileRows rows = TileRows::of<D>(args);
    const PrefillTile& tile = rows.tile;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bf16* shared_queries = reinterpret_cast<bf16*>(shared_memory());
    bf16* ring = shared_queries + prefill_rows<D> * row_stride<D>;

    // Past the last key of the part that the last row sees.
    const uint32_t length = min(rows.position(rows.n - 1) + 1, tile.end_key);
    const uint32_t n_tiles = (length + n_keys - 1) / n_keys;
    // Keys before it are not looked at: no row sees them. (A part begins with a whole tile.)
    const uint32_t begin = local ? first_visible(rows.position(0), args.window) : 0;
    const uint32_t first_tile = (local ? begin : tile.first_key) / n_keys;

    load_prefill_tile<D>(ring + first_tile % 2 * stage_elements, cache, tile.row, rows.kv_head, first_tile * n_keys, begin, length);
    copy_async_commit();
    for (uint32_t chunk = threadIdx.x; chunk < prefill_rows<D> * D / 8; chunk += blockDim.x) {
        const uint32_t r = chunk / (D / 8), c = chunk % (D / 8);
        uint4 query{0, 0, 0, 0};
        if (r < rows.n)
            query = *reinterpret_cast<const uint4*>(args.qkv + uint64_t(tile.first_token + rows.token(r)) * args.qkv_stride +
                                                    rows.head(r) * D + c * 8);
        *reinterpret_cast<uint4*>(shared_queries + r * row_stride<D> + c * 8) = query;
    }
    // The last position that each row sees; rows past the end see what the last one sees, and are not written.
    uint32_t* limits = reinterpret_cast<uint32_t*>(ring + 2 * stage_elements);
    for (uint32_t r = threadIdx.x; r < uint32_t(prefill_rows<D>); r += blockDim.x)
        limits[r] = rows.position(min(r, rows.n - 1));
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
            load_prefill_tile<D>(ring + (j + 1) % 2 * stage_elements, cache, tile.row, rows.kv_head, (j + 1) * n_keys, begin,
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
    store_rows<D, local>(args, accumulator);
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

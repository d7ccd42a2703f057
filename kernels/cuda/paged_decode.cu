// Attention of single tokens over the paged KV cache of their sequence (flash decoding: split over the KV length).
//
// Grid (split-KV tiles, kv heads * tiles of 16 grouped query heads); 4 warps. A split-KV tile is a partition of what one
// token sees, up to 256 consecutive positions: the host lists them, so that a crowd of unequal lengths leaves no block
// without work. What is wholly before the window is not listed. A partition's tiles of 16 keys go to the warps in turn, and
// every tile of K and V is read once for all query heads of its group. Each warp runs its own pipeline of asynchronous
// copies. Warps are merged in order, partitions by combine_split_kv in a fixed order: the result depends on the absolute
// positions only, not on the batch or the grid.
//
// Measured: e2e/gpu/RESULTS.md.
#include "attention_tile.cuh"
#include "kv_cache.cuh"

static_assert(PARTITION % DECODE_TILE == 0, "a tile lies in one partition");

/// Elements of a tile of keys, or of values.
template <int D>
constexpr int decode_tile_elements = DECODE_TILE * row_stride<D>;

/// Shared memory: the 16 query rows, then each warp's ring of (keys, values), reused for the warps' results
/// ([16][row_stride] floats each, just one stage), then [warps][16] maxima and sums.
template <int D, bool alone>
static __device__ inline void paged_decode(const PagedDecodeArgs& args) {
    constexpr int stages = decode_stages<D, alone>;
    constexpr int stage_elements = 2 * decode_tile_elements<D>;
    constexpr int result_stride = row_stride<D>;  // Rows of the accumulator lie in different banks here too.
    static_assert(stage_elements * sizeof(bf16) == 16 * result_stride * sizeof(float), "a warp's result is one stage");
    static_assert((16 * row_stride<D> + DECODE_WARPS * stages * stage_elements) * sizeof(bf16) +
                          DECODE_WARPS * 16 * 2 * sizeof(float) == decode_shared_bytes<D, alone>,
                  "what a launch brings holds all of it");
    const KvCache& cache = args.cache;
    const SplitKvTile part = args.tiles[blockIdx.x];
    const uint32_t length = part.length;
    if (part.start >= length) return;  // inert
    // The positions of the partition that the token sees, and the tile that the first of them is in.
    const uint32_t seen_from = first_visible(length - 1, args.window);
    const uint32_t begin = max(part.start, seen_from), end = min(part.start + PARTITION, length);
    const uint32_t start = begin / DECODE_TILE * DECODE_TILE;
    const uint32_t group = args.n_heads / cache.n_kv_heads;
    const uint32_t head_tiles = (group + 15) / 16;
    const uint32_t kv_head = blockIdx.y / head_tiles;
    const uint32_t first_in_group = blockIdx.y % head_tiles * 16;
    const uint32_t n_rows = min(group - first_in_group, 16u);
    const uint32_t first_head = kv_head * group + first_in_group;
    const uint32_t warp = threadIdx.x / 32;

    bf16* shared_queries = reinterpret_cast<bf16*>(shared_memory());
    bf16* rings = shared_queries + 16 * row_stride<D>;
    bf16* ring = rings + warp * stages * stage_elements;
    float* maxima = reinterpret_cast<float*>(rings + DECODE_WARPS * stages * stage_elements);
    float* sums = maxima + DECODE_WARPS * 16;

    // The warp's tiles: warp, warp + 4, ...
    const uint32_t n_tiles = (end - start + DECODE_TILE - 1) / DECODE_TILE;
    const auto load = [&](uint32_t j) {
        const uint32_t tile = warp + j * DECODE_WARPS;
        bf16* keys = ring + j % stages * stage_elements;
        if (tile < n_tiles)
            load_tokens<D, DECODE_TILE, row_stride<D>, false>(keys, keys + decode_tile_elements<D>, cache, part.row, kv_head,
                                                       start + tile * DECODE_TILE, begin, end);
        copy_async_commit();
    };
#pragma unroll
    for (int j = 0; j < stages - 1; ++j) load(j);

    const bf16* query = args.qkv + uint64_t(part.token) * args.qkv_stride + first_head * D;
    for (uint32_t chunk = threadIdx.x; chunk < 16 * D / 8; chunk += blockDim.x) {
        const uint32_t r = chunk / (D / 8), c = chunk % (D / 8);
        *reinterpret_cast<uint4*>(shared_queries + r * row_stride<D> + c * 8) =
            r < n_rows ? *reinterpret_cast<const uint4*>(query + r * D + c * 8) : uint4{0, 0, 0, 0};
    }
    __syncthreads();
    const Queries<D, 1> queries(shared_queries);
    Accumulator<D, 1> accumulator;
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t j = 0; warp + j * DECODE_WARPS < n_tiles; ++j) {
        copy_async_wait<stages - 2>();
        __syncwarp();  // This tile is there for all lanes, and all are done with the tile before.
        load(j + stages - 1);
        const bf16* keys = ring + j % stages * stage_elements;
        float s[1][DECODE_TILE / 8][4];
        scores(s, queries, keys);
        if (args.tanh_scale != 0.0f) cap_scores(s, args.tanh_scale);
        // Counted from `begin`: what is before it wraps round and is large.
        const uint32_t first = start + (warp + j * DECODE_WARPS) * DECODE_TILE - begin;
#pragma unroll
        for (uint32_t n = 0; n < DECODE_TILE / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t position = first + n * 8 + lane % 4 * 2 + i % 2;
                s[0][n][i] = position < end - begin ? s[0][n][i] : MINUS_INFINITY;
            }
        accumulator.add(s, keys + decode_tile_elements<D>, args.scale_log2);
    }
    accumulator.finish();
    copy_async_wait<0>();
    __syncwarp();  // The ring is free.

    float* result = reinterpret_cast<float*>(ring);
#pragma unroll
    for (uint32_t r = 0; r < 2; ++r) {
        const uint32_t row = lane / 4 + r * 8;
        if (row >= n_rows) break;  // of no head
#pragma unroll
        for (int d = 0; d < D / 8; ++d)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                result[row * result_stride + d * 8 + lane % 4 * 2 + i] = accumulator.o[0][d][2 * r + i];
        if (lane % 4 == 0) {
            maxima[warp * 16 + row] = accumulator.top[0][r] * args.scale_log2;
            sums[warp * 16 + row] = accumulator.l[0][r];
        }
    }
    __syncthreads();

    for (uint32_t e = threadIdx.x; e < n_rows * D; e += blockDim.x) {
        const uint32_t r = e / D, d = e % D;
        float top = MINUS_INFINITY;
        for (uint32_t w = 0; w < DECODE_WARPS; ++w) top = fmaxf(top, maxima[w * 16 + r]);
        float o = 0.0f, l = 0.0f;
        for (uint32_t w = 0; w < DECODE_WARPS; ++w) {
            const float share = power_of_two(maxima[w * 16 + r] - top);
            o += share * reinterpret_cast<const float*>(rings + w * stages * stage_elements)[r * result_stride + d];
            l += share * sums[w * 16 + r];
        }
        const uint32_t head = first_head + r;
        if (seen_from / PARTITION == (length - 1) / PARTITION) {  // the only partition
            args.out[uint64_t(part.token) * args.out_stride + head * D + d] = to_bf16(o / l);
            continue;
        }
        const uint64_t at = uint64_t(blockIdx.x) * args.n_heads + head;
        args.partial_out[at * D + d] = o;
        if (d == 0) {
            args.partial_softmax[2 * at] = top;
            args.partial_softmax[2 * at + 1] = l;
        }
    }
}

KERNEL(paged_decode_64) { paged_decode<64, false>(args); }
KERNEL(paged_decode_80) { paged_decode<80, false>(args); }
KERNEL(paged_decode_96) { paged_decode<96, false>(args); }
KERNEL(paged_decode_128) { paged_decode<128, false>(args); }
KERNEL(paged_decode_192) { paged_decode<192, false>(args); }
KERNEL(paged_decode_256) { paged_decode<256, false>(args); }

KERNEL(paged_decode_alone_64) { paged_decode<64, true>(args); }
KERNEL(paged_decode_alone_80) { paged_decode<80, true>(args); }
KERNEL(paged_decode_alone_96) { paged_decode<96, true>(args); }
KERNEL(paged_decode_alone_128) { paged_decode<128, true>(args); }
KERNEL(paged_decode_alone_192) { paged_decode<192, true>(args); }
KERNEL(paged_decode_alone_256) { paged_decode<256, true>(args); }

// Grid (heads, sequences); whole warps that hold one group of head_dim threads, or COMBINE_GROUPS where a sequence of the
// step may have more than COMBINE_TOGETHER tiles. Such a sequence's tiles are shared out, g, g + COMBINE_GROUPS, ..., to
// the groups, whose sums are summed in order; a shorter one's are summed in order by the first. The order depends on its
// own length only. Shared memory: a result for each group, then the maximum of each tile of the longest sequence.
KERNEL(combine_split_kv) {
    const SplitKvSequence sequence = args.sequences[blockIdx.y];
    const uint32_t n = sequence.n_tiles;
    if (n <= 1) return;  // inert, or paged_decode wrote the result
    const uint32_t head_dim = args.cache.head_dim;
    const uint32_t group = threadIdx.x / head_dim, d = threadIdx.x % head_dim;
    const uint64_t first = uint64_t(sequence.first_tile) * args.n_heads + blockIdx.x;
    const float* softmax = args.partial_softmax + 2 * first;
    const float* partial = args.partial_out + first * head_dim;
    const uint32_t step = 2 * args.n_heads;
    bf16* out = args.out + uint64_t(sequence.token) * args.out_stride + blockIdx.x * head_dim;
    float top = MINUS_INFINITY, o = 0.0f, l = 0.0f;

    if (n <= COMBINE_TOGETHER) {
        if (group != 0) return;
        // All is asked for before any of it is used: the time is one trip to the cache.
        float maxima[COMBINE_TOGETHER], sums[COMBINE_TOGETHER], parts[COMBINE_TOGETHER];
#pragma unroll
        for (uint32_t p = 0; p < COMBINE_TOGETHER; ++p) {
            const bool there = p < n;
            maxima[p] = there ? softmax[p * step] : MINUS_INFINITY;
            sums[p] = there ? softmax[p * step + 1] : 0.0f;
            parts[p] = there ? partial[uint64_t(p) * args.n_heads * head_dim + d] : 0.0f;
        }
#pragma unroll
        for (uint32_t p = 0; p < COMBINE_TOGETHER; ++p) top = fmaxf(top, maxima[p]);
#pragma unroll
        for (uint32_t p = 0; p < COMBINE_TOGETHER; ++p) {
            const float share = power_of_two(maxima[p] - top);
            o += share * parts[p];
            l += share * sums[p];
        }
        out[d] = to_bf16(o / l);
        return;
    }
    float* results = reinterpret_cast<float*>(shared_memory());  // [COMBINE_GROUPS][head_dim + 1], the last a sum
    float* maxima = results + COMBINE_GROUPS * (head_dim + 1);
    for (uint32_t p = threadIdx.x; p < n; p += blockDim.x) maxima[p] = softmax[p * step];
    __syncthreads();
    for (uint32_t p = threadIdx.x % 32; p < n; p += 32) top = fmaxf(top, maxima[p]);
    for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, lanes));
    if (group >= COMBINE_GROUPS) return;
#pragma unroll 16
    for (uint32_t p = group; p < n; p += COMBINE_GROUPS) {
        const float share = power_of_two(maxima[p] - top);
        o += share * partial[uint64_t(p) * args.n_heads * head_dim + d];
        l += share * softmax[p * step + 1];
    }
    results[group * (head_dim + 1) + d] = o;
    if (d == 0) results[group * (head_dim + 1) + head_dim] = l;
    __syncthreads();
    if (group != 0) return;
    for (uint32_t g = 1; g < COMBINE_GROUPS; ++g) {
        o += results[g * (head_dim + 1) + d];
        l += results[g * (head_dim + 1) + head_dim];
    }
    out[d] = to_bf16(o / l);
}

// Products of rows with the weight of their expert: out[r] = weight[expert of r] * x[r], sums in f32. Rows are grouped by
// expert (group_by_expert), whose tiles are looked up here, so that the host needs to know nothing of the routing and a step
// can be captured.
//
// Grid (tiles at most, columns / 64); 4 warps, each 32 x 32 of a tile of 64 rows x 64 columns; 64 elements of the sums a
// stage, three stages of asynchronous copies, mma.m16n8k16. A sum's order depends on `inner` only.
// Not tuned: no wgmma, no TMA, one tile's size for all numbers of rows.
#include "platform.cuh"

constexpr uint32_t GROUPED_STRIDE = GROUPED_INNER + 8;  // 16 bytes of padding: ldmatrix reads from different banks
constexpr uint32_t GROUPED_STAGE = (GROUPED_ROWS + GROUPED_COLS) * GROUPED_STRIDE;
static_assert(GROUPED_STAGES * GROUPED_STAGE * sizeof(bf16) == GROUPED_SHARED_BYTES, "what a launch brings holds all of it");
static_assert(GROUPED_ROWS == 64 && GROUPED_COLS == 64, "each of 4 warps has 32 x 32");
constexpr uint32_t GROUPED_CHUNKS = GROUPED_INNER / 8;                       // of a row in a stage
constexpr uint32_t GROUPED_COPIES = GROUPED_ROWS * GROUPED_CHUNKS / 128;     // of x, and of the weight, by each thread
constexpr uint32_t GROUPED_ROW_STEP = 128 / GROUPED_CHUNKS;                  // rows from copy to copy of a thread

// Shared memory: stages of [64 rows of x][64 of the weight], GROUPED_STRIDE elements each.
KERNEL(grouped_gemm) {
    if (blockIdx.x >= *args.n_tiles) return;
    const ExpertTile tile = args.tiles[blockIdx.x];
    const uint32_t first_col = blockIdx.y * GROUPED_COLS;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bf16* ring = reinterpret_cast<bf16*>(shared_memory());

    // A thread copies the same chunk of the same rows in every stage.
    const uint32_t my_row = threadIdx.x / GROUPED_CHUNKS, my_element = threadIdx.x % GROUPED_CHUNKS * 8;
    const bf16* x[GROUPED_COPIES];
#pragma unroll
    for (uint32_t i = 0; i < GROUPED_COPIES; ++i) {
        const uint32_t r = my_row + i * GROUPED_ROW_STEP;
        uint32_t row = tile.first_row;
        if (r < tile.n_rows) row += r;
        if (args.pairs_per_token != 0) row = args.pairs[row] / args.pairs_per_token;
        x[i] = args.x + uint64_t(row) * args.x_stride + my_element;
    }
    const bf16* weight =
        args.weight + (uint64_t(tile.expert) * args.cols + first_col + my_row) * args.weight_stride + my_element;
    const uint32_t n_steps = (args.inner + GROUPED_INNER - 1) / GROUPED_INNER;
    const auto load = [&](uint32_t step) {
        if (step < n_steps) {
            const uint32_t from = step * GROUPED_INNER;
            const bool there = from + my_element < args.inner;
            bf16* to = ring + step % GROUPED_STAGES * GROUPED_STAGE + my_row * GROUPED_STRIDE + my_element;
#pragma unroll
            for (uint32_t i = 0; i < GROUPED_COPIES; ++i) {
                const uint32_t r = i * GROUPED_ROW_STEP;
                const bool row_there = there && my_row + r < tile.n_rows;
                copy_async_16(to + r * GROUPED_STRIDE, row_there ? x[i] + from : args.x, row_there);
                const bool col_there = there && first_col + my_row + r < args.cols;
                copy_async_16(to + (GROUPED_ROWS + r) * GROUPED_STRIDE,
                              col_there ? weight + uint64_t(r) * args.weight_stride + from : args.weight, col_there);
            }
        }
        copy_async_commit();
    };
#pragma unroll
    for (uint32_t step = 0; step < GROUPED_STAGES - 1; ++step) load(step);

    const uint32_t warp_row = warp / 2 * 32, warp_col = warp % 2 * 32;
    float sums[2][4][4] = {};
    for (uint32_t step = 0; step < n_steps; ++step) {
        copy_async_wait<GROUPED_STAGES - 2>();
        __syncthreads();  // This stage is there for all, and all are done with the stage before.
        load(step + GROUPED_STAGES - 1);
        const bf16* rows = ring + step % GROUPED_STAGES * GROUPED_STAGE;
        const bf16* a_from = rows + (warp_row + lane % 16) * GROUPED_STRIDE + lane / 16 * 8;
        const bf16* b_from = rows + (GROUPED_ROWS + warp_col + lane % 8 + lane / 16 * 8) * GROUPED_STRIDE + lane / 8 % 2 * 8;
#pragma unroll
        for (uint32_t k = 0; k < GROUPED_INNER; k += 16) {
            uint32_t a[2][4], b[2][4];
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                load_matrices(a[i], a_from + i * 16 * GROUPED_STRIDE + k);
                load_matrices(b[i], b_from + i * 16 * GROUPED_STRIDE + k);
            }
#pragma unroll
            for (uint32_t m = 0; m < 2; ++m)
#pragma unroll
                for (uint32_t n = 0; n < 4; ++n) multiply_add(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
    }
    copy_async_wait<0>();

#pragma unroll
    for (uint32_t m = 0; m < 2; ++m)
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t r = warp_row + m * 16 + half * 8 + lane / 4;
            if (r >= tile.n_rows) continue;
            uint32_t row = tile.first_row + r;
            if (args.pairs_per_token == 0) row = args.pairs[row];
            bf16* out = args.out + uint64_t(row) * args.out_stride;
#pragma unroll
            for (uint32_t n = 0; n < 4; ++n) {
                const uint32_t col = first_col + warp_col + n * 8 + lane % 4 * 2;
                const float low = sums[m][n][2 * half], high = sums[m][n][2 * half + 1];
                if (col + 1 < args.cols)
                    *reinterpret_cast<uint32_t*>(out + col) = pack_bf16(low, high);
                else if (col < args.cols)
                    out[col] = to_bf16(low);
            }
        }
}

// Sorts pairs (token, place among its experts) by expert, in order within an expert, and cuts each expert's pairs into tiles:
// a counting sort whose result depends on the pairs only. Grid (experts).
//
// Every block counts all pairs, so that it knows where its expert begins without waiting for another block. Not tuned: each
// block reads the experts of all pairs three times, from the L2 cache.
#include "platform.cuh"

/// The sum over the threads of the block up to this one; `sums` holds a word a warp.
static __device__ inline uint32_t scan_of_group(uint32_t* sums, uint32_t x) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t before = __shfl_sync(ALL_LANES, x, lane >= step ? lane - step : 0);
        if (lane >= step) x += before;
    }
    if (lane == 31) sums[warp] = x;
    __syncthreads();
    for (uint32_t w = 0; w < warp; ++w) x += sums[w];
    return x;
}

// Shared memory: a word an expert, their pairs; then a word a warp.
KERNEL(group_by_expert) {
    uint32_t* counts = reinterpret_cast<uint32_t*>(shared_memory());
    uint32_t* sums = counts + args.n_experts;
    const uint32_t mine = blockIdx.x;
    for (uint32_t e = threadIdx.x; e < args.n_experts; e += GROUP_THREADS) counts[e] = 0;
    __syncthreads();
    for (uint32_t p = threadIdx.x; p < args.n_pairs; p += GROUP_THREADS)
        if (args.chosen[p] != INERT) atomicAdd(&counts[args.chosen[p]], 1u);
    __syncthreads();

    // Where the expert's pairs and tiles begin. Each warp finds the same.
    uint32_t first_pair = 0, first_tile = 0;
    for (uint32_t e = threadIdx.x % 32; e < mine; e += 32) {
        first_pair += counts[e];
        first_tile += (counts[e] + GROUPED_ROWS - 1) / GROUPED_ROWS;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        first_pair += __shfl_xor_sync(ALL_LANES, first_pair, lanes);
        first_tile += __shfl_xor_sync(ALL_LANES, first_tile, lanes);
    }
    const uint32_t count = counts[mine], n_tiles = (count + GROUPED_ROWS - 1) / GROUPED_ROWS;
    for (uint32_t t = threadIdx.x; t < n_tiles; t += GROUP_THREADS)
        args.tiles[first_tile + t] = {mine, first_pair + t * GROUPED_ROWS, min(count - t * GROUPED_ROWS, GROUPED_ROWS), 0};
    if (mine == args.n_experts - 1 && threadIdx.x == 0) *args.n_tiles = first_tile + n_tiles;

    // A thread has a run of consecutive pairs.
    const uint32_t run = (args.n_pairs + GROUP_THREADS - 1) / GROUP_THREADS;
    const uint32_t from = min(threadIdx.x * run, args.n_pairs), to = min(from + run, args.n_pairs);
    uint32_t n = 0;
    for (uint32_t p = from; p < to; ++p) n += args.chosen[p] == mine;
    uint32_t at = first_pair + scan_of_group(sums, n) - n;
    for (uint32_t p = from; p < to; ++p)
        if (args.chosen[p] == mine) args.pairs[at++] = p;
}

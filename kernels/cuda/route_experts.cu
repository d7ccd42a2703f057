// Which experts each token takes, and with which share (Mixtral, arXiv 2401.04088): softmax over all logits, then the top_k
// largest, ties to the lowest index, in falling order; their shares divided by their sum where that is wanted.
//
// A warp a token. Sums: each lane's experts in order, then a butterfly over the lanes: nothing depends on the batch.
#include "sampling.cuh"

KERNEL(route_experts) {
    const uint32_t token = blockIdx.x * ROUTE_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= args.n_tokens) return;
    const bf16* router = args.router + uint64_t(token) * args.stride;
    uint32_t* chosen = args.chosen + uint64_t(token) * args.top_k;
    float* shares = args.shares + uint64_t(token) * args.top_k;
    if (args.positions[token] == INERT) {
        for (uint32_t k = lane; k < args.top_k; k += 32) {
            chosen[k] = INERT;
            shares[k] = 0.0f;
        }
        return;
    }
    float max = MINUS_INFINITY;
    for (uint32_t e = lane; e < args.n_experts; e += 32) max = fmaxf(max, to_float(router[e]));
    for (int lanes = 16; lanes > 0; lanes /= 2) max = fmaxf(max, __shfl_xor_sync(ALL_LANES, max, lanes));
    float sum = 0.0f;
    for (uint32_t e = lane; e < args.n_experts; e += 32) sum += expf(to_float(router[e]) - max);
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);

    uint64_t last = ~uint64_t(0);  // the key of the expert chosen last
    float total = 0.0f;
    for (uint32_t k = 0; k < args.top_k; ++k) {
        uint64_t best = 0;
        for (uint32_t e = lane; e < args.n_experts; e += 32) {
            const uint64_t key = order_key(to_float(router[e]), e);
            if (key < last && key > best) best = key;
        }
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            const uint64_t other = __shfl_xor_sync(ALL_LANES, best, lanes);
            best = other > best ? other : best;
        }
        last = best;
        const float share = expf(to_float(router[key_id(best)]) - max) / sum;
        total += share;
        if (lane == 0) {
            chosen[k] = key_id(best);
            shares[k] = share;
        }
    }
    if (args.renormalize != 0 && lane == 0)
        for (uint32_t k = 0; k < args.top_k; ++k) shares[k] /= total;
}

// Rows of logits as tokens are sampled from them: of each row that has an edit a copy, changed as kernels/src/sampling/edit.rs
// does it, bit for bit: tokens that are not allowed are minus infinity, then biases are added, then seen tokens penalised.
// The rows themselves stay as they are: log-probabilities are theirs.
//
// One block a row. No token stands twice among a row's biases, or among its seen tokens.
#include "platform.cuh"

KERNEL(edit_logits) {
    const EditRow row = args.rows[blockIdx.x];
    const float* logits = args.logits + uint64_t(row.row) * args.stride;
    float* edited = args.edited + uint64_t(args.first + blockIdx.x) * args.stride;
    const uint32_t n = args.vocabulary;

    if (row.allowed == NO_MASK) {
        for (uint32_t id = threadIdx.x; id < n; id += blockDim.x) edited[id] = logits[id];
    } else {
        const uint32_t* words = args.words + row.allowed;
        for (uint32_t id = threadIdx.x; id < n; id += blockDim.x)
            edited[id] = words[id / 32] >> id % 32 & 1 ? logits[id] : MINUS_INFINITY;
    }
    __syncthreads();
    const uint32_t* biases = args.words + row.biases;
    for (uint32_t i = threadIdx.x; i < row.n_biases; i += blockDim.x) {
        float& logit = edited[biases[2 * i]];
        logit = __fadd_rn(logit, __uint_as_float(biases[2 * i + 1]));
    }
    __syncthreads();
    const uint32_t* seen = args.words + row.seen;
    for (uint32_t i = threadIdx.x; i < row.n_seen; i += blockDim.x) {
        float& place = edited[seen[2 * i]];
        const uint32_t n_outputs = seen[2 * i + 1];
        float logit = place;
        logit = logit > 0.0f ? __fdiv_rn(logit, row.repetition) : __fmul_rn(logit, row.repetition);
        if (n_outputs > 0) {
            logit = __fsub_rn(logit, __fmul_rn(row.frequency, __uint2float_rn(n_outputs)));
            logit = __fsub_rn(logit, row.presence);
        }
        place = logit;
    }
}

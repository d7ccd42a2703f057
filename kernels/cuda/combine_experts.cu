// out[t] = sum over the experts of t of share * result, from the largest share to the smallest. One block a token; the token
// of an inert row has no experts and becomes zeros.
#include "platform.cuh"

KERNEL(combine_experts) {
    const uint64_t first = uint64_t(blockIdx.x) * args.top_k;
    uint4* out = reinterpret_cast<uint4*>(args.out + uint64_t(blockIdx.x) * args.out_stride);
    const uint32_t n = args.chosen[first] == INERT ? 0 : args.top_k;
    for (uint32_t c = threadIdx.x; c < args.chunks; c += blockDim.x) {
        float sum[8] = {};
        for (uint32_t k = 0; k < n; ++k) {
            const float share = args.shares[first + k];
            float x[8];
            unpack(x, reinterpret_cast<const uint4*>(args.results + (first + k) * args.results_stride)[c]);
            for (int i = 0; i < 8; ++i) sum[i] += share * x[i];
        }
        out[c] = pack(sum);
    }
}

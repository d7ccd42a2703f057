// RMSNorm (arXiv 1910.07467), alone or fused with the addition that comes before it in a transformer:
//   residual += x;  out = residual / sqrt(mean(residual^2) + epsilon) * weight
//
// One block of 256 threads a row. The sum's order depends on the width only: each thread's chunks of 8 columns in order,
// then a butterfly over the lanes, then the warps in order. Padding columns are zeros and stay zeros.
#include "platform.cuh"

constexpr int NORM_THREADS = NORM_WARPS * 32;

// Shared memory: NORM_WARPS floats.
KERNEL(rms_norm) {
    float* sums = reinterpret_cast<float*>(shared_memory());
    const uint4* x = reinterpret_cast<const uint4*>(args.x + uint64_t(blockIdx.x) * args.x_stride);
    uint4* residual =
        args.residual ? reinterpret_cast<uint4*>(args.residual + uint64_t(blockIdx.x) * args.residual_stride) : nullptr;
    uint4* out = reinterpret_cast<uint4*>(args.out + uint64_t(blockIdx.x) * args.out_stride);

    float sum = 0.0f;
    for (uint32_t c = threadIdx.x; c < args.chunks; c += NORM_THREADS) {
        float v[8];
        unpack(v, x[c]);
        if (residual) {
            float r[8];
            unpack(r, residual[c]);
            for (int i = 0; i < 8; ++i) r[i] += v[i];
            const uint4 rounded = pack(r);
            residual[c] = rounded;
            unpack(v, rounded);  // The norm is of what the residual keeps.
        }
        for (int i = 0; i < 8; ++i) sum += v[i] * v[i];
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
    for (uint32_t w = 0; w < NORM_WARPS; ++w) total += sums[w];
    const float inverse = 1.0f / sqrtf(total / float(args.cols) + args.epsilon);

    const uint4* source = residual ? residual : x;
    const uint4* weights = reinterpret_cast<const uint4*>(args.weight);
    for (uint32_t c = threadIdx.x; c < args.chunks; c += NORM_THREADS) {
        float v[8];
        unpack(v, source[c]);
        const uint4 low = weights[2 * c], high = weights[2 * c + 1];
        const uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        for (int i = 0; i < 8; ++i) v[i] = v[i] * inverse * __uint_as_float(w[i]);
        out[c] = pack(v);
    }
}

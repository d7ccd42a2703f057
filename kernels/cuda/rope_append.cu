// Rotary position embedding of queries and keys, in place (arXiv 2104.09864, in the halves' order of Transformers), fused
// with the norms of single heads where a layer has them, and with the append of keys and values to the paged cache.
//
// One block a token; a position of all ones is inert. The angle is an f32 product, as in Transformers; sine and
// cosine are computed once a pair and used by every head. 16 bytes a load and store.
#include "kv_cache.cuh"

/// Whole heads turned, no norms: a thread takes 8 pairs at a time.
static __device__ inline void turn_heads(const RopeAppendArgs& args, uint4* token, uint4* layer, const float* sines,
                                         const float* cosines, uint32_t row, uint32_t position) {
    const KvCache& cache = args.cache;
    const uint32_t head_chunks = cache.head_dim / 8, half_chunks = head_chunks / 2;
    const uint32_t n_rotated = (args.n_heads + cache.n_kv_heads) * half_chunks;
    for (uint32_t c = threadIdx.x; c < n_rotated; c += blockDim.x) {
        const uint32_t head = c / half_chunks, chunk = c % half_chunks;
        uint4* at = token + head * head_chunks + chunk;
        float a[8], b[8];
        unpack(a, at[0]);
        unpack(b, at[half_chunks]);
        for (int i = 0; i < 8; ++i) {
            const float sine = sines[8 * chunk + i], cosine = cosines[8 * chunk + i];
            const float low = a[i] * cosine - b[i] * sine;
            b[i] = b[i] * cosine + a[i] * sine;
            a[i] = low;
        }
        const uint4 low = pack(a), high = pack(b);
        at[0] = low;
        at[half_chunks] = high;
        if (head >= args.n_heads) {
            uint4* key = layer + uint64_t(key_row(cache, row, position, head - args.n_heads)) * head_chunks + chunk;
            key[0] = low;
            key[half_chunks] = high;
        }
    }
}

/// Any number of pairs, with or without norms: a warp takes a head at a time, a lane 8 of its elements. `staged` is the
/// warp's, head_dim floats. The norm's sum is each lane's 8 squares in order, then a butterfly over the lanes.
static __device__ inline void norm_and_turn_heads(const RopeAppendArgs& args, uint4* token, uint4* layer, const float* sines,
                                                  const float* cosines, float* staged, uint32_t row, uint32_t position) {
    const KvCache& cache = args.cache;
    const uint32_t head_chunks = cache.head_dim / 8, n = args.n_frequencies;
    const uint32_t lane = threadIdx.x % 32, n_rotated = args.n_heads + cache.n_kv_heads;
    for (uint32_t head = threadIdx.x / 32; head < n_rotated; head += ROPE_WARPS) {
        const bool mine = lane < head_chunks;
        uint4* at = token + head * head_chunks + lane;
        float x[8] = {};
        if (mine) unpack(x, *at);
        if (args.query_norm) {
            const float* weight = head < args.n_heads ? args.query_norm : args.key_norm;
            float sum = 0.0f;
            for (int i = 0; i < 8; ++i) sum += x[i] * x[i];
            for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
            const float inverse = 1.0f / sqrtf(sum / float(cache.head_dim) + args.epsilon);
            if (mine)
                for (int i = 0; i < 8; ++i) x[i] = x[i] * inverse * weight[lane * 8 + i];
        }
        if (mine)
            for (int i = 0; i < 8; ++i) staged[lane * 8 + i] = x[i];
        __syncwarp();
        if (mine) {
            for (int i = 0; i < 8; ++i) {
                const uint32_t e = lane * 8 + i;
                if (e < n)
                    x[i] = x[i] * cosines[e] - staged[e + n] * sines[e];
                else if (e < 2 * n)
                    x[i] = x[i] * cosines[e - n] + staged[e - n] * sines[e - n];
            }
            const uint4 turned = pack(x);
            *at = turned;
            if (head >= args.n_heads)
                layer[uint64_t(key_row(cache, row, position, head - args.n_heads)) * head_chunks + lane] = turned;
        }
        __syncwarp();  // The stage is free.
    }
}

// Shared memory: head_dim floats, sines and cosines; then head_dim floats a warp.
KERNEL(rope_append) {
    const uint32_t position = args.positions[blockIdx.x];
    if (position == INERT) return;
    const KvCache& cache = args.cache;
    float* sines = reinterpret_cast<float*>(shared_memory());
    float* cosines = sines + cache.head_dim / 2;
    for (uint32_t i = threadIdx.x; i < args.n_frequencies; i += blockDim.x) {
        const float angle = __fmul_rn(float(position), args.inverse_frequencies[i]);
        sincosf(angle, &sines[i], &cosines[i]);
        sines[i] *= args.scale;
        cosines[i] *= args.scale;
    }
    __syncthreads();

    const uint32_t row = args.rows[blockIdx.x];
    uint4* token = reinterpret_cast<uint4*>(args.qkv + uint64_t(blockIdx.x) * args.stride);
    uint4* layer = reinterpret_cast<uint4*>(cache.layer);
    const uint32_t head_chunks = cache.head_dim / 8;
    if (!args.query_norm && args.n_frequencies == cache.head_dim / 2)
        turn_heads(args, token, layer, sines, cosines, row, position);
    else
        norm_and_turn_heads(args, token, layer, sines, cosines, cosines + cache.head_dim / 2 + threadIdx.x / 32 * cache.head_dim,
                            row, position);
    const uint4* values = token + (args.n_heads + cache.n_kv_heads) * head_chunks;
    const uint32_t n_values = cache.n_kv_heads * head_chunks;
    for (uint32_t c = threadIdx.x; c < n_values; c += blockDim.x) {
        const uint32_t head = c / head_chunks, chunk = c % head_chunks;
        layer[uint64_t(key_row(cache, row, position, head) + value_rows(cache)) * head_chunks + chunk] = values[c];
    }
}

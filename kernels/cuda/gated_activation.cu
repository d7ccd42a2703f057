// out[t] = activation(gate[t]) * up[t], where gate_up[t] holds the gate first (Shazeer, arXiv 2002.05202). SiLU, or GELU by
// tanh (Hendrycks and Gimpel, arXiv 1606.08415).
//
// Grid (rows, pieces of 8 * 128 columns).
#include "platform.cuh"

static __device__ inline float gated(uint32_t activation, float gate, float up) {
    if (activation == SILU) return gate / (1.0f + expf(-gate)) * up;
    const float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (1.0f + tanhf(inner)) * up;
}

KERNEL(gated_activation) {
    const bf16* gate = args.gate_up + uint64_t(blockIdx.x) * args.in_stride;
    const bf16* up = gate + args.n;
    bf16* out = args.out + uint64_t(blockIdx.x) * args.out_stride;
    const uint32_t first = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (args.n % 8 == 0) {  // Then `up` is aligned to 16 bytes, and no chunk is partial.
        if (first >= args.n) return;
        float g[8], u[8];
        unpack(g, *reinterpret_cast<const uint4*>(gate + first));
        unpack(u, *reinterpret_cast<const uint4*>(up + first));
        for (int i = 0; i < 8; ++i) g[i] = gated(args.activation, g[i], u[i]);
        *reinterpret_cast<uint4*>(out + first) = pack(g);
        return;
    }
    for (uint32_t i = first; i < first + 8 && i < args.n; ++i)
        out[i] = to_bf16(gated(args.activation, to_float(gate[i]), to_float(up[i])));
}

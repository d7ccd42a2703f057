// The tile loop's arithmetic, shared by decode and prefill: 16 query rows of one warp against a tile of keys and values
// in shared memory, on the tensor cores, with the softmax kept online (arXiv 2205.14135, 2307.08691).
//
// Layout of a warp's 16 x 8 accumulator: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
// Rows in shared memory are `row_stride<D>` elements apart: 16 bytes of padding put the 8 rows that ldmatrix reads at
// once into different banks. What it does not know: where rows come from, which positions they have, who merges.
#pragma once

#include "platform.cuh"

template <int D>
constexpr int row_stride = D + 8;

constexpr float MINUS_INFINITY = -__builtin_huge_valf();

/// 16 query rows, [16][D] in shared memory; kept in registers where there is room for them.
template <int D>
struct Queries {
    static constexpr bool in_registers = D <= 128;
    uint32_t fragments[in_registers ? D / 16 : 1][4];
    const bf16* mine;  // what this lane names to ldmatrix

    __device__ explicit Queries(const bf16* shared) {
        const uint32_t lane = threadIdx.x % 32;
        mine = shared + (lane % 16) * row_stride<D> + lane / 16 * 8;
        if constexpr (in_registers) {
#pragma unroll
            for (int k = 0; k < D / 16; ++k) load_matrices(fragments[k], mine + k * 16);
        }
    }

    /// Columns 16 k to 16 k + 15.
    __device__ void get(uint32_t (&a)[4], int k) const {
        if constexpr (in_registers) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = fragments[k][i];
        } else {
            load_matrices(a, mine + k * 16);
        }
    }
};

/// s[16][8 N] = queries * keys^T; keys are [8 N][D].
template <int D, int N>
static __device__ inline void scores(float (&s)[N][4], const Queries<D>& queries, const bf16* keys) {
    static_assert(N % 2 == 0, "ldmatrix brings 16 keys at a time");
    const uint32_t lane = threadIdx.x % 32;
    const bf16* mine = keys + (lane % 8 + lane / 16 * 8) * row_stride<D> + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t a[4];
        queries.get(a, k);
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            uint32_t b[4];
            load_matrices(b, mine + n * 16 * row_stride<D> + k * 16);
            multiply_add(s[2 * n], a, b[0], b[1]);
            multiply_add(s[2 * n + 1], a, b[2], b[3]);
        }
    }
}

/// The running softmax of 16 rows: o = sum of exp2(s - m) v, l this lane's share of the sum of exp2(s - m).
template <int D>
struct Accumulator {
    float o[D / 8][4];
    float m[2], l[2];

    __device__ Accumulator() {
#pragma unroll
        for (int d = 0; d < D / 8; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[d][i] = 0.0f;
        m[0] = m[1] = MINUS_INFINITY;
        l[0] = l[1] = 0.0f;
    }

    /// Takes a tile in: scores already scaled to powers of two, masked ones -infinity; values are [8 N][D].
    template <int N>
    __device__ void add(float (&s)[N][4], const bf16* values) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = m[r];
#pragma unroll
            for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            const float base = top == MINUS_INFINITY ? 0.0f : top;  // a row that has seen nothing yet
            const float shrink = power_of_two(m[r] - base);
            m[r] = top;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    s[n][2 * r + i] = power_of_two(s[n][2 * r + i] - base);
                    sum += s[n][2 * r + i];
                }
            l[r] = l[r] * shrink + sum;
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                o[d][2 * r] *= shrink;
                o[d][2 * r + 1] *= shrink;
            }
        }
        const uint32_t lane = threadIdx.x % 32;
        const bf16* mine = values + lane % 16 * row_stride<D> + lane / 16 * 8;
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            // The accumulator's layout of two 16 x 8 tiles is the factor's layout of one 16 x 16 tile.
            const uint32_t p[4] = {pack_bf16(s[2 * n][0], s[2 * n][1]), pack_bf16(s[2 * n][2], s[2 * n][3]),
                                   pack_bf16(s[2 * n + 1][0], s[2 * n + 1][1]),
                                   pack_bf16(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                uint32_t b[4];
                load_matrices_transposed(b, mine + n * 16 * row_stride<D> + d * 16);
                multiply_add(o[2 * d], p, b[0], b[1]);
                multiply_add(o[2 * d + 1], p, b[2], b[3]);
            }
        }
    }

    /// Sums l over the four lanes that share a row.
    __device__ void finish() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            l[r] += __shfl_xor_sync(ALL_LANES, l[r], 1);
            l[r] += __shfl_xor_sync(ALL_LANES, l[r], 2);
        }
    }
};

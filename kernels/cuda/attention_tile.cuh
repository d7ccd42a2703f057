// The tile loop's arithmetic, shared by decode and prefill: M times 16 query rows of one warp against a tile of keys and
// values in shared memory, on the tensor cores, with the softmax kept online (arXiv 2205.14135, 2307.08691). Every key and
// value that a warp reads from shared memory serves all M tiles of its rows: that read, not the product, is the limit.
//
// Layout of a warp's 16 x 8 accumulator: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
// Rows in shared memory are `row_stride<D>` elements apart: 16 bytes of padding put the 8 rows that ldmatrix reads at
// once into different banks. What it does not know: where rows come from, which positions they have, who merges.
#pragma once

#include "platform.cuh"

template <int D>
constexpr int row_stride = D + 8;

/// 16 M query rows, [16 M][D] in shared memory; kept in registers where there is room for them.
template <int D, int M>
struct Queries {
    static constexpr bool in_registers = D * M <= 128;
    uint32_t fragments[in_registers ? D / 16 : 1][M][4];
    const bf16* mine;  // what this lane names to ldmatrix

    __device__ explicit Queries(const bf16* shared) {
        const uint32_t lane = threadIdx.x % 32;
        mine = shared + (lane % 16) * row_stride<D> + lane / 16 * 8;
        if constexpr (in_registers) {
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
#pragma unroll
                for (int m = 0; m < M; ++m) load(fragments[k][m], k, m);
        }
    }

    __device__ void load(uint32_t (&a)[4], int k, int m) const {
        load_matrices(a, mine + m * 16 * row_stride<D> + k * 16);
    }

    /// Columns 16 k to 16 k + 15 of tile m.
    __device__ void get(uint32_t (&a)[4], int k, int m) const {
        if constexpr (in_registers) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = fragments[k][m][i];
        } else {
            load(a, k, m);
        }
    }
};

/// s[M][16][8 N] = queries * keys^T; keys are [8 N][D].
template <int D, int M, int N>
static __device__ inline void scores(float (&s)[M][N][4], const Queries<D, M>& queries, const bf16* keys) {
    static_assert(N % 2 == 0, "ldmatrix brings 16 keys at a time");
    const uint32_t lane = threadIdx.x % 32;
    const bf16* mine = keys + (lane % 8 + lane / 16 * 8) * row_stride<D> + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) queries.get(a[m], k, m);
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            uint32_t b[4];
            load_matrices(b, mine + n * 16 * row_stride<D> + k * 16);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                multiply_add(s[m][2 * n], a[m], b[0], b[1]);
                multiply_add(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/// Soft cap: s becomes tanh(s * scale), 1 - 2 / (e^2x + 1) within 2^-21; the cap itself is a factor of what comes after.
template <int M, int N>
static __device__ inline void cap_scores(float (&s)[M][N][4], float scale) {
    const float exponent = scale * 2.8853900818f;  // 2 log2(e)
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = 1.0f - quotient(2.0f, 1.0f + power_of_two(s[m][n][i] * exponent));
}

/// The running softmax of 16 M rows: o = sum of exp2(scale (s - top)) v, l this lane's share of the sum of those powers.
template <int D, int M>
struct Accumulator {
    float o[M][D / 8][4];
    float top[M][2], l[M][2];

    __device__ Accumulator() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int d = 0; d < D / 8; ++d)
#pragma unroll
                for (int i = 0; i < 4; ++i) o[m][d][i] = 0.0f;
            top[m][0] = top[m][1] = MINUS_INFINITY;
            l[m][0] = l[m][1] = 0.0f;
        }
    }

    /// Takes a tile in: masked scores are -infinity; values are [8 N][D]; `scale` > 0 makes scores powers of two.
    template <int N>
    __device__ void add(float (&s)[M][N][4], const bf16* values, float scale) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float now = top[m][r];
#pragma unroll
                for (int n = 0; n < N; ++n) now = fmaxf(now, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, 1));
                now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, 2));
                const float base = now == MINUS_INFINITY ? 0.0f : now * scale;  // a row that has seen nothing yet
                const float shrink = power_of_two(top[m][r] * scale - base);
                top[m][r] = now;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        s[m][n][2 * r + i] = power_of_two(s[m][n][2 * r + i] * scale - base);
                        sum += s[m][n][2 * r + i];
                    }
                l[m][r] = l[m][r] * shrink + sum;
#pragma unroll
                for (int d = 0; d < D / 8; ++d) {
                    o[m][d][2 * r] *= shrink;
                    o[m][d][2 * r + 1] *= shrink;
                }
            }
        const uint32_t lane = threadIdx.x % 32;
        const bf16* mine = values + lane % 16 * row_stride<D> + lane / 16 * 8;
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            // The accumulator's layout of two 16 x 8 tiles is the factor's layout of one 16 x 16 tile.
            uint32_t p[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    p[m][i] = pack_bf16(s[m][2 * n + i / 2][i % 2 * 2], s[m][2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                uint32_t b[4];
                load_matrices_transposed(b, mine + n * 16 * row_stride<D> + d * 16);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply_add(o[m][2 * d], p[m], b[0], b[1]);
                    multiply_add(o[m][2 * d + 1], p[m], b[2], b[3]);
                }
            }
        }
    }

    /// Sums l over the four lanes that share a row.
    __device__ void finish() {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                l[m][r] += __shfl_xor_sync(ALL_LANES, l[m][r], 1);
                l[m][r] += __shfl_xor_sync(ALL_LANES, l[m][r], 2);
            }
    }
};

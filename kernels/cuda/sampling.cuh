// The arithmetic of sampling, bit for bit that of kernels/src/sampling: every operation is an integer's, a comparison or
// one correctly rounded f32 operation (the `_rn` intrinsics are never fused).
#pragma once

#include "platform.cuh"

/// Units of fixed-point mass in 1.
constexpr float MASS_ONE = 1099511627776.0f;
constexpr float LN_2_HIGH = 0.6933594f;
constexpr float LN_2_LOW = -2.1219444e-4f;
/// Adding and subtracting it rounds to the nearest integer, ties to even.
constexpr float ROUNDER = 12582912.0f;

/// e^x; 0 below -87 and for NaN, e^88 above 88.
static __device__ inline float exact_exp(float x) {
    float inside = x > -87.0f ? x : -87.0f;
    inside = inside < 88.0f ? inside : 88.0f;
    const float n = __fsub_rn(__fadd_rn(__fmul_rn(inside, 1.44269504f), ROUNDER), ROUNDER);
    const float r = __fsub_rn(__fsub_rn(inside, __fmul_rn(n, LN_2_HIGH)), __fmul_rn(n, LN_2_LOW));
    float p = 1.0f / 5040.0f;
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 720.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 120.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 24.0f);
    p = __fadd_rn(__fmul_rn(p, r), 1.0f / 6.0f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
    const uint32_t exponent = __float_as_uint(__fadd_rn(n, ROUNDER)) - __float_as_uint(ROUNDER) + 127;
    const float power = __uint_as_float(exponent << 23);
    return x > -87.0f ? __fmul_rn(p, power) : 0.0f;
}

/// ln x of a positive normal number.
static __device__ inline float exact_ln(float x) {
    constexpr uint32_t sqrt_half_bits = 0x3f3504f3;
    const uint32_t shifted = __float_as_uint(x) - sqrt_half_bits;
    const float e = float(int32_t(shifted) >> 23);
    const float m = __uint_as_float((shifted & 0x007fffff) + sqrt_half_bits);
    const float f = __fsub_rn(m, 1.0f);
    const float s = __fdiv_rn(f, __fadd_rn(2.0f, f));
    const float z = __fmul_rn(s, s);
    float p = 2.0f / 9.0f;
    p = __fadd_rn(__fmul_rn(p, z), 2.0f / 7.0f);
    p = __fadd_rn(__fmul_rn(p, z), 2.0f / 5.0f);
    p = __fadd_rn(__fmul_rn(p, z), 2.0f / 3.0f);
    p = __fadd_rn(__fmul_rn(p, __fmul_rn(z, s)), __fadd_rn(s, s));
    return __fadd_rn(__fmul_rn(e, LN_2_HIGH), __fadd_rn(__fmul_rn(e, LN_2_LOW), p));
}

/// Philox4x32-10 (Salmon et al., SC 2011): four random words for a counter under a key, in place.
static __device__ inline void philox4x32_10(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t low = uint64_t(c[0]) * 0xD2511F53u, high = uint64_t(c[2]) * 0xCD9E8D57u;
        c[0] = uint32_t(high >> 32) ^ c[1] ^ key0;
        c[1] = uint32_t(high);
        c[2] = uint32_t(low >> 32) ^ c[3] ^ key1;
        c[3] = uint32_t(low);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

/// A standard Gumbel variate from 23 random bits.
static __device__ inline float gumbel(uint32_t word) {
    const float uniform = __fmul_rn(__fadd_rn(float(word >> 9), 0.5f), 1.0f / 8388608.0f);
    return -exact_ln(-exact_ln(uniform));
}

static __device__ inline float scaled(float logit, float max, float temperature) {
    return __fdiv_rn(__fsub_rn(logit, max), temperature);
}

/// Fixed-point mass of an exponent.
static __device__ inline uint64_t mass_of(float exponent) {
    return __float2ull_rz(__fmul_rn(exact_exp(exponent), MASS_ONE));
}

/// The bits of a number (not NaN), mapped so that integers order as numbers do; -0 is +0.
static __device__ inline uint32_t ordered_bits(float x) {
    const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

/// A score and its token: larger is better, the lower token among equals.
static __device__ inline uint64_t score_key(float score, uint32_t id) {
    return uint64_t(ordered_bits(score)) << 32 | uint32_t(~id);
}

/// A token's place in the order of falling logits; NaN is last.
static __device__ inline uint64_t order_key(float logit, uint32_t id) {
    return logit != logit ? uint64_t(uint32_t(~id)) : score_key(logit, id);
}

static __device__ inline uint32_t key_id(uint64_t key) { return ~uint32_t(key); }

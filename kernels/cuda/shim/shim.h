// Runs a kernel's source on a CPU: what a .cu file needs of CUDA, emulated exactly enough to prove indexing, barriers
// and arithmetic without a GPU.
//
// One fiber a thread, switched only where CUDA's threads may meet: __syncthreads, warp collectives, the kernel's end.
// Each turn takes the fibers in another random order while one warp lags as far as barriers let it, so that a missing
// barrier shows. Shared memory is a heap block of exactly the launch's size, filled with NaN. An asynchronous copy
// happens no earlier than the wait that awaits it, so that a missing wait shows. What is not emulated: memory ordering
// (a warp collective orders its lanes' memory here), banks, several blocks at once, sm_90's own copies.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __device__
#define __forceinline__ inline

#define KERNEL(name)                                                                                   \
    static void name##_thread(const name##_interface::Args& args);                                     \
    extern "C" void name(const void* args) {                                                           \
        name##_thread(*static_cast<const name##_interface::Args*>(args));                              \
    }                                                                                                  \
    extern "C" const uint32_t name##_args_bytes = sizeof(name##_interface::Args);                      \
    static void name##_thread(const name##_interface::Args& args)

struct uint4 {
    uint32_t x, y, z, w;
};

struct float2 {
    float x, y;
};

namespace shim {

struct Index {
    uint32_t x, y, z;
};

extern thread_local Index thread_index, block_index, block_size;
unsigned char* shared_memory();
void block_barrier();
void warp_barrier();
/// Publishes up to 64 bytes of this lane to its warp, and waits for all of it. The result holds 64 bytes a lane, until
/// the warp's next barrier.
const unsigned char* warp_publish(const void* mine, uint32_t bytes);
void copy_async(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(uint32_t newest);
[[noreturn]] void fail(const char* what);

template <typename T>
T shuffle(uint32_t lanes, T mine, uint32_t from) {
    if (lanes != 0xffffffff) fail("a shuffle that not all lanes take part in");
    const unsigned char* all = warp_publish(&mine, sizeof(T));
    T theirs;
    std::memcpy(&theirs, all + 64 * (from % 32), sizeof(T));
    warp_barrier();
    return theirs;
}

inline float half_to_float(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

inline uint32_t round_to_bf16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <bool transposed>
void load_matrices(uint32_t (&out)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix of a row that is not aligned to 16 bytes");
    const unsigned char* all = warp_publish(&row, sizeof row);
    const uint32_t lane = thread_index.x % 32;
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        const auto element = [&](uint32_t r, uint32_t c) {
            const uint16_t* from;
            std::memcpy(&from, all + 64 * (8 * matrix + r), sizeof from);
            return uint32_t(from[c]);
        };
        const uint32_t a = lane / 4, b = lane % 4 * 2;
        out[matrix] = transposed ? element(b, a) | element(b + 1, a) << 16 : element(a, b) | element(a, b + 1) << 16;
    }
    warp_barrier();
}

}  // namespace shim

#define threadIdx shim::thread_index
#define blockIdx shim::block_index
#define blockDim shim::block_size

inline unsigned char* shared_memory() { return shim::shared_memory(); }
inline void __syncthreads() { shim::block_barrier(); }
inline void __syncwarp() { shim::warp_barrier(); }

template <typename T>
T __shfl_xor_sync(uint32_t lanes, T x, int mask) {
    return shim::shuffle(lanes, x, shim::thread_index.x % 32 ^ uint32_t(mask));
}

template <typename T>
T __shfl_sync(uint32_t lanes, T x, uint32_t from) {
    return shim::shuffle(lanes, x, from);
}

template <typename T>
T atomicAdd(T* at, T x) {
    const T before = *at;
    *at += x;
    return before;
}

template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}

inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __ull2float_rn(uint64_t x) { return float(x); }
inline float __uint2float_rn(uint32_t x) { return float(x); }
inline uint64_t __float2ull_rz(float x) { return uint64_t(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)(a)*b >> 64); }

inline float power_of_two(float x) { return exp2f(x); }
inline float quotient(float a, float b) { return a / b; }
inline uint32_t pack_bf16(float low, float high) { return shim::round_to_bf16(low) | shim::round_to_bf16(high) << 16; }
inline void load_matrices(uint32_t (&out)[4], const void* row) { shim::load_matrices<false>(out, row); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) { shim::load_matrices<true>(out, row); }
inline void copy_async_16(void* to, const void* from, bool valid) { shim::copy_async(to, from, valid); }
inline void copy_async_commit() { shim::copy_async_commit(); }
template <int newest>
inline void copy_async_wait() {
    shim::copy_async_wait(newest);
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const unsigned char* all = shim::warp_publish(mine, sizeof mine);
    const auto word = [&](uint32_t lane, uint32_t i) {
        uint32_t bits;
        std::memcpy(&bits, all + 64 * lane + 4 * i, 4);
        return bits;
    };
    const uint32_t lane = shim::thread_index.x % 32;
    for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (uint32_t k = 0; k < 16; k += 2) {
            const uint32_t x = word(row * 4 + k % 8 / 2, i / 2 + k / 8 * 2);
            const uint32_t y = word(column * 4 + k % 8 / 2, 4 + k / 8);
            d[i] += shim::half_to_float(x & 0xffff) * shim::half_to_float(y & 0xffff);
            d[i] += shim::half_to_float(x >> 16) * shim::half_to_float(y >> 16);
        }
    }
    shim::warp_barrier();
}

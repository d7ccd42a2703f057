// What a kernel's source sees of the machine: CUDA, or the shim that runs the same source on a CPU (shim/shim.h).
//
// Every kernel is defined with KERNEL, takes one struct of arguments and has its shared memory sized at the launch, so
// that both kinds of launch are alike: a name, a grid, a block, bytes of shared memory, bytes of arguments. The struct, the
// launch bounds and all constants that Rust needs too come from interface.h, which build.rs writes.
#pragma once

#include <cstdint>

/// A bfloat16's bits.
using bf16 = uint16_t;

#ifdef KVASIR_SHIM
#include "shim/shim.h"

#include "interface.h"
constexpr bool AT_LEAST_SM_90 = true;
#else

#include "interface.h"

#if __CUDA_ARCH__ >= 900
constexpr bool AT_LEAST_SM_90 = true;
#else
constexpr bool AT_LEAST_SM_90 = false;
#endif

// A kernel may be launched while the one before it still runs (programmatic dependent launch, CUDA C++ programming guide,
// section 6.4): it first lets the next one start likewise, then waits until all before it are done and written.
static __device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900  // Older assemblers refuse the instructions.
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#define KERNEL(name)                                                                                     \
    static __device__ __forceinline__ void name##_block(const name##_interface::Args& args);             \
    extern "C" __global__ void __launch_bounds__(name##_interface::threads, name##_interface::blocks)    \
        name(const __grid_constant__ name##_interface::Args args) {                                      \
        wait_for_previous_kernel();                                                                      \
        name##_block(args);                                                                              \
    }                                                                                                    \
    static __device__ __forceinline__ void name##_block(const name##_interface::Args& args)

extern __shared__ __align__(16) unsigned char kvasir_shared_memory[];

/// The dynamic shared memory of the block.
static __device__ inline unsigned char* shared_memory() { return kvasir_shared_memory; }

/// Copies 16 bytes from global to shared memory without waiting, or writes 16 zero bytes where `valid` is false.
static __device__ inline void copy_async_16(void* shared, const void* global, bool valid) {
    const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

/// Closes the thread's group of copies.
static __device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until all but the `newest` groups of this thread are in shared memory.
template <int newest>
static __device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

/// Loads four 8 x 8 matrices of 16-bit elements; lane `8 i + r` names row `r` of matrix `i`.
static __device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
    const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
}

/// The same, each matrix transposed.
static __device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    const uint32_t from = uint32_t(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
}

/// `d += a * b`: a 16 x 16 (rows), b 16 x 8 (columns), bfloat16; d 16 x 8, f32.
static __device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// 2^x, with a relative error below 2^-22; 0 for -infinity.
static __device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// a / b within two units of the last place, for b below 2^126; 0 where b is infinite.
static __device__ inline float quotient(float a, float b) { return __fdividef(a, b); }

/// Two floats rounded to the nearest bfloat16, `low` in the lower half.
static __device__ inline uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

#endif

constexpr float MINUS_INFINITY = -__builtin_huge_valf();
constexpr uint32_t ALL_LANES = 0xffffffff;

static __device__ inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x) << 16); }
static __device__ inline float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
static __device__ inline float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }
static __device__ inline bf16 to_bf16(float x) { return bf16(pack_bf16(x, 0.0f) & 0xffff); }

/// Eight bfloat16 as f32.
static __device__ inline void unpack(float (&out)[8], const uint4& x) {
    out[0] = low_half(x.x), out[1] = high_half(x.x), out[2] = low_half(x.y), out[3] = high_half(x.y);
    out[4] = low_half(x.z), out[5] = high_half(x.z), out[6] = low_half(x.w), out[7] = high_half(x.w);
}

/// Eight f32 rounded to bfloat16.
static __device__ inline uint4 pack(const float (&x)[8]) {
    return uint4{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
}

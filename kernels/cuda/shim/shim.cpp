// The shim's scheduler: blocks one after another, the threads of a block as fibers on the caller's thread.
#include "shim.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#ifndef __x86_64__
#error "the shim switches fibers in x86-64 assembly; other machines need their own kvasir_shim_switch"
#endif

// Saves the callee's registers and the stack pointer in *from, and goes on where `to` was saved.
extern "C" void kvasir_shim_switch(void** from, void* to);
asm(R"(
.text
.globl kvasir_shim_switch
.type kvasir_shim_switch, @function
kvasir_shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kvasir_shim_switch, .-kvasir_shim_switch
)");

namespace shim {

thread_local Index thread_index, block_index, block_size;

namespace {

constexpr size_t STACK_BYTES = 256 * 1024;

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

/// A meeting of the live fibers of a block or a warp.
struct Barrier {
    uint32_t expected = 0, arrived = 0;
    uint64_t generation = 0;

    void check() {
        if (expected > 0 && arrived == expected) {
            arrived = 0;
            ++generation;
        }
    }
};

struct Fiber {
    void* stack_pointer = nullptr;
    Barrier* waits_for = nullptr;
    uint64_t generation = 0;
    bool done = false;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;
};

struct Warp {
    Barrier barrier;
    alignas(16) unsigned char mail[32 * 64];
};

struct Block {
    void (*kernel)(const void*);
    const void* args;
    unsigned char* shared;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    void* scheduler = nullptr;
    uint32_t current = 0;
};

thread_local Block* block;

struct Stacks {
    unsigned char* base = nullptr;
    size_t bytes = 0;
    ~Stacks() {
        if (base) munmap(base, bytes);
    }
    unsigned char* take(size_t wanted) {
        if (wanted > bytes) {
            if (base) munmap(base, bytes);
            void* mapped = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (mapped == MAP_FAILED) fail("no memory for the fibers' stacks");
            base = static_cast<unsigned char*>(mapped);
            bytes = wanted;
        }
        return base;
    }
};

thread_local Stacks stacks;

Fiber& current() { return block->fibers[block->current]; }

void yield() { kvasir_shim_switch(&current().stack_pointer, block->scheduler); }

void wait_at(Barrier& barrier) {
    Fiber& fiber = current();
    fiber.waits_for = &barrier;
    fiber.generation = barrier.generation;
    ++barrier.arrived;
    barrier.check();
    yield();
}

void fiber_main() {
    block->kernel(block->args);
    Fiber& fiber = current();
    fiber.done = true;
    // Threads that are gone are not waited for.
    Barrier& warp = block->warps[block->current / 32].barrier;
    --warp.expected;
    warp.check();
    --block->barrier.expected;
    block->barrier.check();
    yield();
    fail("a finished fiber was resumed");
}

uint64_t next_random(uint64_t& state) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

void run_block(uint64_t& random) {
    const uint32_t n = uint32_t(block->fibers.size());
    unsigned char* base = stacks.take(n * STACK_BYTES);
    std::vector<uint32_t> order(n);
    for (uint32_t i = 0; i < n; ++i) {
        order[i] = i;
        // The first switch pops six registers and returns into fiber_main, with the stack aligned as after a call.
        void** top = reinterpret_cast<void**>(base + (i + 1) * STACK_BYTES - 64);
        top[-1] = nullptr;
        top[-2] = reinterpret_cast<void*>(&fiber_main);
        for (int r = 3; r <= 8; ++r) top[-r] = nullptr;
        block->fibers[i].stack_pointer = &top[-8];
    }
    // One warp stands still for as long as the others get on without it: whoever reads or writes too early shows.
    const uint32_t n_warps = uint32_t(block->warps.size()), none = n_warps;
    uint32_t frozen = none;
    uint32_t live = n;
    while (live > 0) {
        for (uint32_t i = n - 1; i > 0; --i) std::swap(order[i], order[next_random(random) % (i + 1)]);
        bool progress = false;
        for (const uint32_t i : order) {
            Fiber& fiber = block->fibers[i];
            if (fiber.done || i / 32 == frozen) continue;
            if (fiber.waits_for && fiber.waits_for->generation == fiber.generation) continue;
            fiber.waits_for = nullptr;
            progress = true;
            block->current = i;
            thread_index = {i, 0, 0};
            kvasir_shim_switch(&block->scheduler, fiber.stack_pointer);
            live -= fiber.done;
        }
        if (progress && frozen == none)
            frozen = uint32_t(next_random(random) % n_warps);
        else if (!progress && frozen == none)
            fail("deadlock: threads wait at a barrier that others never reach");
        else if (!progress)
            frozen = none;
    }
}

}  // namespace

void fail(const char* what) {
    std::fprintf(stderr, "shim: block (%u, %u, %u), thread %u: %s\n", block_index.x, block_index.y, block_index.z,
                 thread_index.x, what);
    std::abort();
}

unsigned char* shared_memory() { return block->shared; }
void block_barrier() { wait_at(block->barrier); }
void warp_barrier() { wait_at(block->warps[block->current / 32].barrier); }

const unsigned char* warp_publish(const void* mine, uint32_t bytes) {
    Warp& warp = block->warps[block->current / 32];
    if (warp.barrier.expected != 32) fail("a warp collective without all 32 lanes");
    std::memcpy(warp.mail + 64 * (block->current % 32), mine, bytes);
    warp_barrier();
    return warp.mail;
}

void copy_async(void* shared, const void* global, bool valid) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
        fail("an asynchronous copy that is not aligned to 16 bytes");
    current().open.push_back({shared, global, valid});
}

void copy_async_commit() {
    Fiber& fiber = current();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void copy_async_wait(uint32_t newest) {
    Fiber& fiber = current();
    while (fiber.groups.size() > newest) {
        for (const Copy& copy : fiber.groups.front()) {
            if (copy.valid)
                std::memcpy(copy.to, copy.from, 16);
            else
                std::memset(copy.to, 0, 16);
        }
        fiber.groups.erase(fiber.groups.begin());
    }
}

}  // namespace shim

/// Runs every block of a launch, in order. `seed` orders the threads.
extern "C" void kvasir_shim_launch(void (*kernel)(const void*), const uint32_t grid[3], uint32_t threads,
                                   uint32_t shared_bytes, const void* args, uint64_t seed) {
    using namespace shim;
    uint64_t random = seed * 0x9E3779B97F4A7C15u | 1;
    block_size = {threads, 1, 1};
    for (uint32_t z = 0; z < grid[2]; ++z)
        for (uint32_t y = 0; y < grid[1]; ++y)
            for (uint32_t x = 0; x < grid[0]; ++x) {
                block_index = {x, y, z};
                Block here;
                here.kernel = kernel;
                here.args = args;
                here.shared = static_cast<unsigned char*>(std::malloc(shared_bytes));  // aligned to 16 bytes
                if (!here.shared && shared_bytes) fail("no memory for the block's shared memory");
                std::memset(here.shared, 0xff, shared_bytes);
                here.fibers.resize(threads);
                here.warps.resize((threads + 31) / 32);
                for (uint32_t i = 0; i < threads; ++i) ++here.warps[i / 32].barrier.expected;
                here.barrier.expected = threads;
                block = &here;
                run_block(random);
                block = nullptr;
                std::free(here.shared);
            }
}

// Hopper's bulk copies (TMA without a tensor map) and the barriers in shared memory on which they complete.
#pragma once

#include <cstdint>

namespace copd::cuda::hopper {

__device__ __forceinline__ uint32_t address(const void* shared) { return __cvta_generic_to_shared(shared); }

// Makes a barrier whose phases end with one arrival and all the bytes that it announced.
__device__ __forceinline__ void init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier)) : "memory");
}

// Shows new barriers to the copy engine; a __syncthreads shows them to the block.
__device__ __forceinline__ void publish() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// Puts what this thread has written to shared memory before copies into it that a barrier comes before.
__device__ __forceinline__ void settle() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Arrives, and announces the bytes of the copies that follow.
__device__ __forceinline__ void expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
                 : "memory");
}

// Copies a multiple of 16 bytes between addresses that are multiples of 16.
__device__ __forceinline__ void copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            address(shared)),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(address(barrier))
        : "memory");
}

// Waits until the phase of this parity has ended.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
    uint32_t ended = 0;
    while (!ended)
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(ended)
            : "r"(address(barrier)), "r"(parity)
            : "memory");
}

}  // namespace copd::cuda::hopper

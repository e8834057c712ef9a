// A GPU made of CPU threads, just enough of one for csrc/row_kernels.cuh: blocks, clusters, shuffles, shared memory that
// other blocks of the cluster can read, and bulk copies that an engine completes later and out of order. What is wrong
// with barriers or with the ring of segments shows here as a wrong number, a hang, or a report of ThreadSanitizer.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
using std::max;
using std::memcpy;
using std::min;

struct Dim {
    unsigned x = 0;
};
struct int2 {
    int x, y;
};
struct int4 {
    int x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
struct __half {
    _Float16 bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
inline __half __float2half_rn(float x) { return {(_Float16)x}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return {uint16_t(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace emulated {

struct Block {
    std::barrier<> together;
    std::vector<std::unique_ptr<std::barrier<>>> warps;
    std::vector<uint32_t> exchange;
    char* shared;

    Block(int threads, char* shared) : together(threads), exchange(threads), shared(shared) {
        for (int i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<std::barrier<>>(32));
    }
};

struct Cluster {
    std::barrier<> together;
    std::deque<Block> blocks;
    explicit Cluster(int threads) : together(threads) {}
};

inline thread_local Cluster* cluster;
inline thread_local Block* block;
inline thread_local unsigned rank;

// Copies wait in a bag, and are taken out at random.
class Engine {
  public:
    Engine() : worker([this] { work(); }) {}
    ~Engine() {
        {
            std::lock_guard lock(mutex);
            stopping = true;
        }
        some.notify_one();
        worker.join();
    }
    void add(std::function<void()> copy) {
        {
            std::lock_guard lock(mutex);
            bag.push_back(std::move(copy));
        }
        some.notify_one();
    }

  private:
    std::vector<std::function<void()>> bag;
    std::mutex mutex;
    std::condition_variable some;
    bool stopping = false;
    std::mt19937 random{7};
    std::thread worker;

    void work() {
        for (;;) {
            std::unique_lock lock(mutex);
            some.wait(lock, [this] { return stopping || !bag.empty(); });
            if (bag.empty()) return;
            std::swap(bag[random() % bag.size()], bag.back());
            auto copy = std::move(bag.back());
            bag.pop_back();
            lock.unlock();
            copy();
        }
    }
};
inline Engine* engine;

}  // namespace emulated

inline thread_local Dim threadIdx, blockIdx, gridDim;
inline void __syncthreads() { emulated::block->together.arrive_and_wait(); }
inline uint32_t __shfl_down_sync(unsigned, uint32_t word, int offset) {
    auto& block = *emulated::block;
    auto& warp = *block.warps[threadIdx.x / 32];
    block.exchange[threadIdx.x] = word;
    warp.arrive_and_wait();
    unsigned from = threadIdx.x % 32 + offset < 32 ? threadIdx.x + offset : threadIdx.x;
    word = block.exchange[from];
    warp.arrive_and_wait();
    return word;
}

namespace cooperative_groups {
struct Cluster {
    void sync() const { emulated::cluster->together.arrive_and_wait(); }
    unsigned block_rank() const { return emulated::rank; }
    template <class X> const X* map_shared_rank(const X* mine, int rank) const {
        auto offset = (const char*)mine - emulated::block->shared;
        return (const X*)(emulated::cluster->blocks[rank].shared + offset);
    }
};
inline Cluster this_cluster() { return {}; }
}  // namespace cooperative_groups

// Takes the place of csrc/hopper.cuh. A barrier counts phases in its upper half, bytes that are still to come in its
// lower half.
namespace copd::cuda::hopper {
inline std::atomic_ref<uint64_t> state(uint64_t* barrier) { return std::atomic_ref<uint64_t>(*barrier); }
constexpr uint64_t PHASE = uint64_t(1) << 32;
inline void init(uint64_t* barrier) { state(barrier) = 0; }
inline void publish() {}
inline void settle() {}
inline void expect(uint64_t* barrier, int bytes) { state(barrier) += bytes ? bytes : PHASE; }
inline void copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
    emulated::engine->add([=] {
        memcpy(shared, global, bytes);
        auto left = state(barrier).fetch_sub(bytes) - bytes;
        if ((left & (PHASE - 1)) == 0) state(barrier) += PHASE;
    });
}
inline void wait(uint64_t* barrier, uint32_t parity) {
    while ((state(barrier).load() >> 32 & 1) == parity) std::this_thread::yield();
}
}  // namespace copd::cuda::hopper

namespace emulated {

// Runs kernel(shared memory of its block) on `clusters` clusters of `blocks` blocks, one cluster after the other.
template <class Kernel> void launch(int clusters, int blocks, int threads, size_t shared_bytes, Kernel kernel) {
    Engine own;
    engine = &own;
    for (int c = 0; c < clusters; ++c) {
        Cluster group(blocks * threads);
        std::vector<std::vector<double>> memory(blocks, std::vector<double>(shared_bytes / sizeof(double) + 1));
        for (auto& bytes : memory) group.blocks.emplace_back(threads, (char*)bytes.data());
        std::vector<std::thread> all;
        for (int b = 0; b < blocks; ++b)
            for (int t = 0; t < threads; ++t)
                all.emplace_back([&, b, t] {
                    cluster = &group, block = &group.blocks[b], rank = b;
                    threadIdx.x = t, blockIdx.x = c * blocks + b, gridDim.x = clusters * blocks;
                    kernel(block->shared);
                });
        for (auto& thread : all) thread.join();
    }
}

}  // namespace emulated

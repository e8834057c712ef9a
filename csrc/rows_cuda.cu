// Rows on a GPU. Two ways to read a row, one way to work on it:
//
//   FromMemory   a block a row, each sweep reads device memory again: any architecture, type, alignment and width
//   FromCluster  sm_90 and later: the blocks of a cluster hold a row of every head in their shared memory, so a logit is
//                read from device memory once. Bulk copies fill a ring of segments and complete on its mbarriers; a
//                segment is refilled for a later row as soon as the last sweep is through with it.
//
// A row's sums merge in a fixed order (threads, warps, blocks), and no result depends on timing.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "rows.h"
#include "table.h"

namespace copd::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int MAX_TEACHERS = 16;

template <class S> struct Sides {
    Side<S> s, t;
};

template <class S> __device__ Sides<S> merge(const Sides<S>& a, const Sides<S>& b) {
    return {merge(a.s, b.s), merge(a.t, b.t)};
}

template <class S> __device__ JsdSums<S> merge(const JsdSums<S>& a, const JsdSums<S>& b) {
    return {a.to_teacher + b.to_teacher, a.to_student + b.to_student, a.moment + b.moment};
}

// What a kernel is told, by value.
template <class S, class Out> struct Work {
    const S* z;  // (H, R, V)
    int64_t R, V;
    int student, T;
    int teachers[MAX_TEACHERS];
    S beta, cap;
    const S* weight;  // (T, R)
    S* value;         // (T, R)
    Out* dlogits;     // (R, V)
    bool aligned;     // rows start at multiples of 16 bytes

    const int64_t* tokens;  // (R,), of logprob
    S* results[3];
    const S* upstream[3];

    __device__ const S* row(int head, int64_t r) const { return z + (head * R + r) * V; }
};

// Shared memory of a block beside the logits.
template <class S> struct Scratch {
    Sides<S> sides[WARPS];
    JsdSums<S> sums[WARPS];
    Sides<S> partial_sides[2][MAX_TEACHERS];
    JsdSums<S> partial_sums[2][MAX_TEACHERS];
    Pair<S> pairs[MAX_TEACHERS];
    RowGradient<S> gradient;
};

// --- reading a row --------------------------------------------------------------------------------

template <class S> struct FromMemory {
    static constexpr int N = sizeof(S) == 4 ? 8 : 2;  // columns a thread and tile
    const S* base;
    int64_t R, V;
    bool aligned;

    template <class Out> __device__ FromMemory(const Work<S, Out>& work)
        : base(work.z), R(work.R), V(work.V), aligned(work.aligned) {}

    __device__ int64_t first_row() const { return blockIdx.x; }
    __device__ int64_t row_step() const { return gridDim.x; }
    __device__ int64_t begin() const { return 0; }
    __device__ int64_t end() const { return V; }
    __device__ void wait(int) {}
    __device__ void release(int) {}
    __device__ void finish_row(bool) { __syncthreads(); }
    __device__ void finish() {}
    template <class X> __device__ X combined(const X (&partial)[2][MAX_TEACHERS], int turn, int count) {
        __syncthreads();
        return partial[turn][(int)threadIdx.x < count ? threadIdx.x : 0];
    }

    __device__ void load(int, int head, int64_t r, int64_t col, S (&x)[N]) const {
        const S* from = base + (head * R + r) * V + col;
        if (aligned && col + N <= V) {
            constexpr int STEP = 16 / sizeof(S);
#pragma unroll
            for (int i = 0; i < N; i += STEP) {
                int4 bits = *reinterpret_cast<const int4*>(from + i);
                memcpy(&x[i], &bits, 16);
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] = col + i < V ? from[i] : -INFINITE<S>;
        }
    }
};

constexpr int SEGMENT = THREADS * 4;  // columns that a block's threads read at once

// The cut of a row for a cluster: `slice` columns a block, in segments; `slots` segments of all heads fit its memory.
struct Ring {
    int blocks, slice, segments, slots, heads;
    size_t bytes() const { return (size_t)slots * (heads * SEGMENT * sizeof(float) + sizeof(uint64_t)); }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
struct FromCluster {
    static constexpr int N = 4;
    const float* z;
    int64_t R, V;
    Ring ring;
    float* buffer;       // [slots][heads][SEGMENT]
    uint64_t* barriers;  // [slots]
    int64_t row, step;   // the cluster's current row and the way to its next
    int start, stop;     // columns of this block
    int slot = 0;        // of the row's first segment
    uint32_t parity = 0; // of that slot's barrier

    template <class Out> __device__ FromCluster(const Work<float, Out>& work, const Ring& ring, float* shared)
        : z(work.z), R(work.R), V(work.V), ring(ring), buffer(shared),
          barriers(reinterpret_cast<uint64_t*>(shared + ring.slots * ring.heads * SEGMENT)),
          row(blockIdx.x / ring.blocks), step(gridDim.x / ring.blocks) {
        start = min((int64_t)cg::this_cluster().block_rank() * ring.slice, V);
        stop = min((int64_t)start + ring.slice, V);
        if (threadIdx.x == 0) {
            for (int i = 0; i < ring.slots; ++i)
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barriers + i)) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            for (int i = 0; i < ring.slots; ++i) request(i);
        }
        __syncthreads();
    }

    __device__ static uint32_t address(const void* shared) { return __cvta_generic_to_shared(shared); }
    __device__ int64_t first_row() const { return row; }
    __device__ int64_t row_step() const { return step; }
    __device__ int64_t begin() const { return start; }
    __device__ int64_t end() const { return stop; }

    // Thread 0 asks for the segment that comes `ahead` of this row's first one, if there is one.
    __device__ void request(int ahead) {
        int64_t from_row = row + ahead / ring.segments * step;
        if (from_row >= R) return;
        int place = (slot + ahead) % ring.slots, col = start + ahead % ring.segments * SEGMENT;
        int bytes = max(0, min(SEGMENT, stop - col)) * (int)sizeof(float);
        uint32_t barrier = address(barriers + place);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes * ring.heads)
                     : "memory");
        for (int head = 0; head < ring.heads && bytes; ++head) {
            const float* from = z + (head * R + from_row) * V + col;
            uint32_t to = address(buffer + (place * ring.heads + head) * SEGMENT);
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                : "memory");
        }
    }

    // Waits for segment i of this row.
    __device__ void wait(int i) {
        int place = slot + i;
        bool wrapped = place >= ring.slots;
        uint32_t barrier = address(barriers + (wrapped ? place - ring.slots : place)), arrived = 0;
        while (!arrived)
            asm volatile(
                "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                : "=r"(arrived)
                : "r"(barrier), "r"(parity ^ (uint32_t)wrapped)
                : "memory");
    }

    __device__ void load(int i, int head, int64_t, int64_t, float (&x)[N]) const {
        int place = slot + i;
        place = place >= ring.slots ? place - ring.slots : place;
        const float* from = buffer + (place * ring.heads + head) * SEGMENT + threadIdx.x * N;
        float4 four = *reinterpret_cast<const float4*>(from);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    }

    // Every thread is through with segment i: its slot takes a later one.
    __device__ void release(int i) {
        __syncthreads();
        if (threadIdx.x == 0) request(i + ring.slots);
    }

    __device__ void finish_row(bool released) {
        __syncthreads();
        for (int i = 0; i < ring.segments && !released && threadIdx.x == 0; ++i)
            request(i + ring.slots);
        row += step;
        slot += ring.segments;
        if (slot >= ring.slots) slot -= ring.slots, parity ^= 1;
    }

    // No block may leave while another reads its shared memory.
    __device__ void finish() { cg::this_cluster().sync(); }

    // Thread j < count gets partial[turn][j] of all blocks, merged in their order. Whoever writes this copy again has
    // passed the barrier of the other copy's turn, which every reader reached after reading.
    template <class X> __device__ X combined(const X (&partial)[2][MAX_TEACHERS], int turn, int count) {
        auto cluster = cg::this_cluster();
        cluster.sync();
        int j = (int)threadIdx.x < count ? threadIdx.x : 0;
        X all = partial[turn][j];
        if ((int)threadIdx.x < count) {
            all = *cluster.map_shared_rank(&partial[turn][j], 0);
            for (int rank = 1; rank < ring.blocks; ++rank)
                all = merge(all, *cluster.map_shared_rank(&partial[turn][j], rank));
        }
        return all;
    }
};
#endif

// --- working on a row -----------------------------------------------------------------------------

// Merges what the threads of a block hold; thread 0 gets it.
template <class X> __device__ X reduce(X x, X (&shared)[WARPS]) {
    auto from_lane = [](X mine, int offset) {
        X theirs;
        constexpr int WORDS = sizeof(X) / 4;
        uint32_t words[WORDS];
        memcpy(words, &mine, sizeof(X));
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = __shfl_down_sync(~0u, words[i], offset);
        memcpy(&theirs, words, sizeof(X));
        return theirs;
    };
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int offset = 16; offset; offset /= 2) x = merge(x, from_lane(x, offset));
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    if (warp == 0) {
        x = shared[lane % WARPS];
#pragma unroll
        for (int offset = WARPS / 2; offset; offset /= 2) x = merge(x, from_lane(x, offset));
    }
    return x;
}

__device__ void narrow(float x, float& y) { y = x; }
__device__ void narrow(double x, double& y) { y = x; }
// saturates rather than overflow
__device__ void narrow(float x, __half& y) { y = __float2half_rn(x != x ? x : fminf(fmaxf(x, -65504.0f), 65504.0f)); }
__device__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

template <class S, class Out, int N>
__device__ void store(Out* to, const S (&x)[N], bool aligned, int64_t room) {
    constexpr int BYTES = N * sizeof(Out) < 16 ? N * sizeof(Out) : 16, STEP = BYTES / sizeof(Out);
    alignas(16) Out y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(x[i], y[i]);
    if (aligned && room >= N) {
#pragma unroll
        for (int i = 0; i < N; i += STEP) {
            if constexpr (BYTES == 16) *reinterpret_cast<int4*>(to + i) = *reinterpret_cast<const int4*>(y + i);
            else *reinterpret_cast<int2*>(to + i) = *reinterpret_cast<const int2*>(y + i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (i < room) to[i] = y[i];
    }
}

// Calls f(tile number, first column) for this thread's columns, tile by tile.
template <class Rows, class F> __device__ void sweep(Rows& rows, F f) {
    int i = 0;
    for (int64_t tile = rows.begin(); tile < rows.end(); tile += THREADS * Rows::N, ++i)
        f(i, tile + threadIdx.x * Rows::N);
}

template <Divergence D, class S, class Out, class Rows>
__device__ void kl_rows(Rows& rows, const Work<S, Out>& work, Scratch<S>& shared) {
    constexpr int N = Rows::N;
    constexpr bool P = D == Divergence::reverse || D == Divergence::symmetric;
    constexpr bool Q = D == Divergence::forward || D == Divergence::symmetric;
    int turn = 0;
    for (int64_t r = rows.first_row(); r < work.R; r += rows.row_step(), turn ^= 1) {
        for (int j = 0; j < work.T; ++j) {
            Sides<S> sides;
            sweep(rows, [&](int i, int64_t col) {
                if (j == 0) rows.wait(i);
                if (col >= rows.end()) return;
                S s[N], t[N];
                rows.load(i, work.student, r, col, s);
                rows.load(i, work.teachers[j], r, col, t);
                fold<P>(sides.s, s, t, (Index<S>)col, 1);
                fold<Q>(sides.t, t, s, (Index<S>)col, 1);
            });
            sides = reduce(sides, shared.sides);
            if (threadIdx.x == 0) shared.partial_sides[turn][j] = sides;
        }
        Sides<S> sides = rows.combined(shared.partial_sides, turn, work.T);
        int own = threadIdx.x;
        if (own < work.T) {
            Pair<S> pair;
            pair.s = sides.s, pair.t = sides.t;
            prepare(D, work.beta, pair);
            pair.weight = work.weight ? work.weight[own * work.R + r] : S(0);
            if (D != Divergence::jsd && rows.begin() == 0) work.value[own * work.R + r] = value(D, pair);
            shared.pairs[own] = pair;
        }
        __syncthreads();
        if constexpr (D == Divergence::jsd) {
            for (int j = 0; j < work.T; ++j) {
                JsdSums<S> sums;
                const Pair<S> pair = shared.pairs[j];
                sweep(rows, [&](int i, int64_t col) {
                    if (col >= rows.end()) return;
                    S s[N], t[N];
                    rows.load(i, work.student, r, col, s);
                    rows.load(i, work.teachers[j], r, col, t);
#pragma unroll
                    for (int n = 0; n < N; ++n) jsd_term(sums, s[n], t[n], (Index<S>)(col + n), pair, work.beta);
                });
                sums = reduce(sums, shared.sums);
                if (threadIdx.x == 0) shared.partial_sums[turn][j] = sums;
            }
            JsdSums<S> sums = rows.combined(shared.partial_sums, turn, work.T);
            if (own < work.T) {
                S divergence = settle(sums, work.beta, shared.pairs[own]);
                if (rows.begin() == 0) work.value[own * work.R + r] = divergence;
            }
            __syncthreads();
        }
        if (work.dlogits) {
            if (threadIdx.x == 0) shared.gradient = RowGradient<S>(D, shared.pairs, work.T, work.cap);
            __syncthreads();
            const RowGradient<S> gradient = shared.gradient;
            Out* out = work.dlogits + r * work.V;
            sweep(rows, [&](int i, int64_t col) {
                if (col < rows.end()) {
                    S s[N], a[N] = {}, b[N] = {};
                    rows.load(i, work.student, r, col, s);
                    for (int j = 0; j < work.T; ++j) {
                        const Pair<S>& pair = shared.pairs[j];
                        if (pair.weight == 0) continue;
                        S t[N];
                        rows.load(i, work.teachers[j], r, col, t);
#pragma unroll
                        for (int n = 0; n < N; ++n) teach<D>(s[n], t[n], pair, work.beta, a[n], b[n]);
                    }
#pragma unroll
                    for (int n = 0; n < N; ++n) a[n] = dlogit(s[n], a[n], b[n], gradient);
                    store(out + col, a, work.aligned, work.V - col);
                    if (gradient.top >= col && gradient.top < col + N) narrow(at_top(gradient), out[gradient.top]);
                }
                rows.release(i);
            });
        }
        rows.finish_row(work.dlogits != nullptr);
    }
    rows.finish();
}

template <class S, class Out, class Rows>
__device__ void logprob_rows(Rows& rows, const Work<S, Out>& work, Scratch<S>& shared) {
    constexpr int N = Rows::N;
    int turn = 0;
    for (int64_t r = rows.first_row(); r < work.R; r += rows.row_step(), turn ^= 1) {
        Sides<S> sides;
        sweep(rows, [&](int i, int64_t col) {
            rows.wait(i);
            if (col >= rows.end()) return;
            S x[N], nothing[N] = {};
            rows.load(i, 0, r, col, x);
            fold<true>(sides.s, x, nothing, (Index<S>)col, 1);
        });
        sides = reduce(sides, shared.sides);
        if (threadIdx.x == 0) shared.partial_sides[turn][0] = sides;
        sides = rows.combined(shared.partial_sides, turn, 1);
        if (threadIdx.x == 0) shared.pairs[0].s = sides.s;
        __syncthreads();
        const Side<S> side = shared.pairs[0].s;
        int64_t token = work.tokens[r];
        if (!work.dlogits && threadIdx.x == 0 && rows.begin() == 0) {
            work.results[0][r] = (work.row(0, r)[token] - side.max) - side.norm();
            work.results[1][r] = side.norm() - side.mean();
            work.results[2][r] = side.max + side.norm();
        }
        if (work.dlogits) {
            const LogProbGradient<S> gradient(side, (Index<S>)token, work.upstream[0][r], work.upstream[1][r],
                                              work.upstream[2][r], work.cap);
            Out* out = work.dlogits + r * work.V;
            sweep(rows, [&](int i, int64_t col) {
                if (col < rows.end()) {
                    S x[N];
                    rows.load(i, 0, r, col, x);
#pragma unroll
                    for (int n = 0; n < N; ++n) x[n] = dlogit(x[n], (Index<S>)(col + n), gradient);
                    store(out + col, x, work.aligned, work.V - col);
                    if (gradient.top >= col && gradient.top < col + N) narrow(at_top(gradient), out[gradient.top]);
                }
                rows.release(i);
            });
        }
        rows.finish_row(work.dlogits != nullptr);
    }
    rows.finish();
}

// --- kernels --------------------------------------------------------------------------------------

template <class S> __device__ Scratch<S>& scratch() {
    __shared__ alignas(16) unsigned char bytes[sizeof(Scratch<S>)];
    return *reinterpret_cast<Scratch<S>*>(bytes);
}

template <Divergence D, class S, class Out>
__global__ void __launch_bounds__(THREADS, 1) kl_from_memory(const __grid_constant__ Work<S, Out> work) {
    FromMemory<S> rows(work);
    kl_rows<D>(rows, work, scratch<S>());
}

template <class S, class Out>
__global__ void __launch_bounds__(THREADS, 1) logprob_from_memory(const __grid_constant__ Work<S, Out> work) {
    FromMemory<S> rows(work);
    logprob_rows(rows, work, scratch<S>());
}

template <Divergence D, class Out>
__global__ void __launch_bounds__(THREADS, 1)
    kl_from_cluster(const __grid_constant__ Work<float, Out> work, const __grid_constant__ Ring ring) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) float buffer[];
    FromCluster rows(work, ring, buffer);
    kl_rows<D>(rows, work, scratch<float>());
#endif
}

template <class Out>
__global__ void __launch_bounds__(THREADS, 1)
    logprob_from_cluster(const __grid_constant__ Work<float, Out> work, const __grid_constant__ Ring ring) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) float buffer[];
    FromCluster rows(work, ring, buffer);
    logprob_rows(rows, work, scratch<float>());
#endif
}

// --- launching ------------------------------------------------------------------------------------

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name) {
    int device, number;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&number, name, device), "cudaDeviceGetAttribute");
    return number;
}

// The smallest cluster whose blocks hold a row of all heads with a fifth to spare for the next row, else the smallest
// that holds it at all; no blocks if none does.
Ring cut(int64_t V, int heads, size_t shared_bytes) {
    Ring best{0, 0, 0, 0, heads};
    size_t slot_bytes = heads * SEGMENT * sizeof(float) + sizeof(uint64_t);
    int slots = shared_bytes / slot_bytes;
    for (int blocks : {1, 2, 4, 8, 16}) {
        int64_t slice = (V + blocks - 1) / blocks;
        slice = (slice + 3) / 4 * 4;  // bulk copies take multiples of 16 bytes
        int64_t segments = (slice + SEGMENT - 1) / SEGMENT;
        if (segments > slots) continue;
        if (!best.blocks) best = {blocks, (int)slice, (int)segments, slots, heads};
        if (slots * 5 >= segments * 6) return {blocks, (int)slice, (int)segments, slots, heads};
    }
    return best;
}

template <class Kernel, class Arguments>
bool launch_cluster(Kernel kernel, const Arguments& work, int heads, uintptr_t stream) {
    cudaFuncAttributes own;
    check(cudaFuncGetAttributes(&own, kernel), "cudaFuncGetAttributes");
    size_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - own.sharedSizeBytes;
    Ring ring = cut(work.V, heads, most);
    if (!ring.blocks) return false;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ring.bytes()), "shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
    cudaLaunchAttribute size;
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {(unsigned)ring.blocks, 1, 1};
    cudaLaunchConfig_t config{dim3(ring.blocks), dim3(THREADS), ring.bytes(), (cudaStream_t)stream, &size, 1};
    // as many clusters as run at once; each takes its share of the rows
    static std::mutex mutex;
    static std::map<std::tuple<const void*, int, size_t, int>, int> known;
    int device, clusters;
    check(cudaGetDevice(&device), "cudaGetDevice");
    {
        std::lock_guard lock(mutex);
        auto [found, fresh] = known.try_emplace({(const void*)kernel, ring.blocks, ring.bytes(), device}, 0);
        if (fresh) check(cudaOccupancyMaxActiveClusters(&found->second, kernel, &config), "cluster occupancy");
        clusters = found->second;
    }
    if (clusters == 0) return false;
    config.gridDim = dim3(unsigned(std::min<int64_t>(clusters, work.R) * ring.blocks));
    check(cudaLaunchKernelEx(&config, kernel, work, ring), "launch");
    return true;
}

template <class Kernel, class Arguments> void launch_blocks(Kernel kernel, const Arguments& work, uintptr_t stream) {
    kernel<<<dim3(unsigned(std::min<int64_t>(work.R, 1 << 30))), THREADS, 0, (cudaStream_t)stream>>>(work);
    check(cudaGetLastError(), "launch");
}

template <class S, class Out> Work<S, Out> work_on(const Logits& logits, const Gradient& gradient) {
    Work<S, Out> work{};
    work.z = (const S*)logits.z, work.R = logits.R, work.V = logits.V;
    work.cap = S(gradient.cap), work.dlogits = (Out*)gradient.dlogits;
    work.aligned = logits.V * sizeof(S) % 16 == 0 && (uintptr_t)logits.z % 16 == 0
        && logits.V * sizeof(Out) % 8 == 0 && (uintptr_t)gradient.dlogits % 16 == 0;
    return work;
}

// Bulk copies and clusters want sm_90, rows at multiples of 16 bytes, and a row that is worth a cluster.
template <class S, class Out> bool fits_clusters(const Work<S, Out>& work) {
    return sizeof(S) == 4 && work.aligned && work.V >= 4 * SEGMENT
        && attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
}

template <Divergence D, class S, class Out> void run_kl(const KlArguments& args, uintptr_t stream) {
    auto work = work_on<S, Out>(args.logits, args.gradient);
    if (args.T > MAX_TEACHERS)
        throw std::invalid_argument("kl: teachers must number at most 16 for backend 'native' on CUDA; use 'torch'");
    work.student = args.student, work.T = args.T, work.beta = S(args.beta);
    for (int j = 0; j < args.T; ++j) work.teachers[j] = args.teachers[j];
    work.weight = (const S*)args.weight, work.value = (S*)args.value;
    if constexpr (sizeof(S) == 4)
        if (fits_clusters(work) && launch_cluster(kl_from_cluster<D, Out>, work, args.logits.heads, stream)) return;
    launch_blocks(kl_from_memory<D, S, Out>, work, stream);
}

template <class S, class Out> void run_logprob(const LogProbArguments& args, uintptr_t stream) {
    auto work = work_on<S, Out>(args.logits, args.gradient);
    work.tokens = args.tokens;
    void* results[] = {args.logp, args.entropy, args.lse};
    const void* upstream[] = {args.dlogp, args.dentropy, args.dlse};
    for (int i = 0; i < 3; ++i) work.results[i] = (S*)results[i], work.upstream[i] = (const S*)upstream[i];
    if constexpr (sizeof(S) == 4)
        if (fits_clusters(work) && launch_cluster(logprob_from_cluster<Out>, work, 1, stream)) return;
    launch_blocks(logprob_from_memory<S, Out>, work, stream);
}

// Calls f with the type of dlogits.
template <class S, class F> void with_output(Type type, F f) {
    if constexpr (sizeof(S) == 4) {
        if (type == Type::float16) return f(__half{});
        if (type == Type::bfloat16) return f(__nv_bfloat16{});
    }
    f(S{});
}

template <class S> void kl_of(const KlArguments& args, uintptr_t stream) {
    with_output<S>(args.gradient.type, [&](auto out) {
        using Out = decltype(out);
        switch ((Divergence)args.divergence) {
            case Divergence::reverse: return run_kl<Divergence::reverse, S, Out>(args, stream);
            case Divergence::forward: return run_kl<Divergence::forward, S, Out>(args, stream);
            case Divergence::symmetric: return run_kl<Divergence::symmetric, S, Out>(args, stream);
            case Divergence::jsd: return run_kl<Divergence::jsd, S, Out>(args, stream);
        }
    });
}

}  // namespace

void kl(const KlArguments& args, uintptr_t stream) {
    args.logits.type == Type::float64 ? kl_of<double>(args, stream) : kl_of<float>(args, stream);
}

void logprob(const LogProbArguments& args, uintptr_t stream) {
    if (args.logits.type == Type::float64) return run_logprob<double, double>(args, stream);
    with_output<float>(args.gradient.type, [&](auto out) { run_logprob<float, decltype(out)>(args, stream); });
}

}  // namespace copd::cuda

// Kernels of row_kernels.cuh and their launches: from memory on any GPU, from a cluster's shared memory where that fits.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "row_kernels.cuh"

namespace copd::cuda {
namespace {

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

template <class S>
__global__ void __launch_bounds__(THREADS) complete_from_memory(const __grid_constant__ Work<S, S> work) {
    complete_rows(work);
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

template <class Kernel, class Arguments>
bool launch_cluster(Kernel kernel, const Arguments& work, int heads, uintptr_t stream) {
    cudaFuncAttributes own;
    check(cudaFuncGetAttributes(&own, kernel), "cudaFuncGetAttributes");
    size_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - own.sharedSizeBytes;
    Ring ring = cut(work.V, heads, most);
    if (!ring.blocks) return false;
    cudaLaunchAttribute size;
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {(unsigned)ring.blocks, 1, 1};
    cudaLaunchConfig_t config{dim3(ring.blocks), dim3(THREADS), ring.bytes(), (cudaStream_t)stream, &size, 1};
    // as many clusters as run at once; each takes its share of the rows
    static std::mutex mutex;
    static std::map<std::tuple<const void*, int, size_t, int>, int> known;
    static std::set<std::pair<const void*, int>> allowed;  // kernels that may take all of a device's shared memory
    int device, clusters;
    check(cudaGetDevice(&device), "cudaGetDevice");
    {
        std::lock_guard lock(mutex);
        if (!allowed.contains({(const void*)kernel, device})) {
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
            allowed.insert({(const void*)kernel, device});
        }
        std::tuple place{(const void*)kernel, ring.blocks, ring.bytes(), device};
        if (auto found = known.find(place); found != known.end()) {
            clusters = found->second;
        } else {
            // a query that fails is asked again next time
            check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cluster occupancy");
            known[place] = clusters;
        }
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
    work.z = (S*)logits.z, work.R = logits.R, work.V = logits.V;
    work.stride = logits.stride, work.out_stride = gradient.stride;
    work.cap = S(gradient.cap), work.caps = (const S*)gradient.caps, work.dlogits = (Out*)gradient.dlogits;
    work.aligned = logits.stride * sizeof(S) % 16 == 0 && (uintptr_t)logits.z % 16 == 0
        && gradient.stride * sizeof(Out) % 16 == 0 && (uintptr_t)gradient.dlogits % 16 == 0;
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
    work.student = args.student, work.T = args.T, work.mixture = Mixture<S>(args.beta);
    for (int j = 0; j < args.T; ++j) work.teachers[j] = args.teachers[j];
    set_raw(work, args.logits.raw);
    work.weight = (const S*)args.weight, work.value = (S*)args.value;
    work.weight_stride = args.weight_stride, work.value_stride = args.value_stride;
    if constexpr (sizeof(S) == 4)
        if (fits_clusters(work) && launch_cluster(kl_from_cluster<D, Out>, work, args.logits.heads, stream)) return;
    launch_blocks(kl_from_memory<D, S, Out>, work, stream);
}

template <class S, class Out> void run_logprob(const LogProbArguments& args, uintptr_t stream) {
    auto work = work_on<S, Out>(args.logits, args.gradient);
    set_raw(work, args.logits.raw);
    work.top = args.top, work.tokens = args.tokens;
    void* side[] = {args.max, args.tail, args.moment};
    const void* upstream[] = {args.dlogp, args.dentropy, args.dlse};
    for (int i = 0; i < 3; ++i) work.side[i] = (S*)side[i], work.upstream[i] = (const S*)upstream[i];
    if constexpr (sizeof(S) == 4)
        if (fits_clusters(work) && launch_cluster(logprob_from_cluster<Out>, work, 1, stream)) return;
    launch_blocks(logprob_from_memory<S, Out>, work, stream);
}

template <class S> void run_complete(const Logits& logits, uintptr_t stream) {
    auto work = work_on<S, S>(logits, {});
    set_raw(work, logits.raw);
    launch_blocks(complete_from_memory<S>, work, stream);
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

void complete(const Logits& logits, uintptr_t stream) {
    logits.type == Type::float64 ? run_complete<double>(logits, stream) : run_complete<float>(logits, stream);
}

std::pair<int, int> versions() {
    int driver;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    return {CUDART_VERSION, driver};
}

}  // namespace copd::cuda

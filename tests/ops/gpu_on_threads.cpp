// csrc/row_kernels.cuh on a GPU made of threads, called through ctypes by test_native_gpu.py.
#define COPD_ISA cuda
#define COPD_THREADS 64
#include "gpu_on_threads.h"

#include "row_kernels.cuh"

using namespace copd::cuda;

namespace {

// What the logits of the calls that follow lack.
copd::Raw raw{};

// Emulated blocks have little shared memory, so that short rows need clusters and a ring that turns.
template <class S, class Out, class Body> void run(Work<S, Out> work, int heads, int clusters, size_t shared, Body body) {
    if (clusters == 0) {
        emulated::launch(3, 1, THREADS, sizeof(Scratch<S>), [&](char* memory) {
            FromMemory<S> rows(work);
            body(rows, work, *(Scratch<S>*)memory);
        });
    } else if constexpr (sizeof(S) == 4) {
        Ring ring = cut(work.V, heads, shared);
        if (!ring.blocks) return;
        emulated::launch(clusters, ring.blocks, THREADS, sizeof(Scratch<S>) + ring.bytes() + 16, [&](char* memory) {
            FromCluster rows(work, ring, (float*)(memory + (sizeof(Scratch<S>) + 15) / 16 * 16));
            body(rows, work, *(Scratch<S>*)memory);
        });
    }
}

template <class S, class Out> void kl(int divergence, Work<S, Out> work, int heads, int clusters, size_t shared) {
    auto with = [&](auto d) {
        run(work, heads, clusters, shared,
            [](auto& rows, auto& work, auto& scratch) { kl_rows<decltype(d)::value>(rows, work, scratch); });
    };
    switch (Divergence(divergence)) {
        case Divergence::reverse: return with(std::integral_constant<Divergence, Divergence::reverse>{});
        case Divergence::forward: return with(std::integral_constant<Divergence, Divergence::forward>{});
        case Divergence::symmetric: return with(std::integral_constant<Divergence, Divergence::symmetric>{});
        case Divergence::jsd: return with(std::integral_constant<Divergence, Divergence::jsd>{});
    }
}

template <class S, class Out>
Work<S, Out> work_on(void* z, long R, long V, long stride, double cap, void* dlogits) {
    Work<S, Out> work{};
    work.z = (S*)z, work.R = R, work.V = V, work.cap = S(cap), work.dlogits = (Out*)dlogits;
    work.stride = stride, work.out_stride = stride;
    work.aligned = stride * sizeof(S) % 16 == 0 && stride * sizeof(Out) % 16 == 0;
    return work;
}

template <class S, class F> void with_output(int type, F f) {
    if constexpr (sizeof(S) == 4) {
        if (type == 2) return f(__half{});
        if (type == 3) return f(__nv_bfloat16{});
    }
    f(S{});
}

template <class S>
void kl_as(void* z, int heads, long R, long V, long stride, int student, const int* teachers, int T, int divergence,
           double beta, const void* weight, double cap, void* dlogits, int type, void* value, int clusters,
           long shared) {
    with_output<S>(type, [&](auto out) {
        auto work = work_on<S, decltype(out)>(z, R, V, stride, cap, dlogits);
        work.student = student, work.T = T, work.mixture = Mixture<S>(beta), work.weight = (const S*)weight;
        std::copy(teachers, teachers + T, work.teachers);
        set_raw(work, raw);
        work.value = (S*)value, work.weight_stride = work.value_stride = R;
        kl(divergence, work, heads, clusters, shared);
    });
}

template <class S>
void logprob_as(void* z, long R, long V, long stride, void* const* side, int64_t* top,
                const int64_t* tokens, void* const* upstream, double cap, void* dlogits,
                int type, int clusters, long shared) {
    with_output<S>(type, [&](auto out) {
        auto work = work_on<S, decltype(out)>(z, R, V, stride, cap, dlogits);
        work.top = top, work.tokens = tokens;
        set_raw(work, raw);
        for (int i = 0; i < 3; ++i) work.side[i] = (S*)side[i], work.upstream[i] = (const S*)upstream[i];
        run(work, 1, clusters, shared,
            [](auto& rows, auto& work, auto& scratch) { logprob_rows(rows, work, scratch); });
    });
}

}  // namespace

// `clusters` of 0 takes the path from memory; types are those of csrc/table.h.
extern "C" {
void set_raw_logits(const int* heads, int count, const void* bias, long bias_stride, const double* caps,
                    const void* temperature) {
    raw = {heads, count, bias, bias_stride, caps, temperature};
}

int cluster_blocks(long V, int heads, long shared, int segment) { return cut(V, heads, shared, segment).blocks; }

void kl_float(void* z, int heads, long R, long V, long stride, int student, const int* teachers, int T, int divergence,
              double beta, const void* weight, double cap, void* dlogits, int type, void* value, int clusters,
              long shared) {
    kl_as<float>(z, heads, R, V, stride, student, teachers, T, divergence, beta, weight, cap, dlogits, type, value, clusters,
                 shared);
}
void kl_double(void* z, int heads, long R, long V, long stride, int student, const int* teachers, int T, int divergence,
               double beta, const void* weight, double cap, void* dlogits, int type, void* value, int clusters,
               long shared) {
    kl_as<double>(z, heads, R, V, stride, student, teachers, T, divergence, beta, weight, cap, dlogits, type, value, clusters,
                  shared);
}
void logprob_float(void* z, long R, long V, long stride, void* const* side, int64_t* top,
                const int64_t* tokens, void* const* upstream, double cap,
                   void* dlogits, int type, int clusters, long shared) {
    logprob_as<float>(z, R, V, stride, side, top, tokens, upstream, cap, dlogits, type, clusters, shared);
}
void complete_float(float* z, long R, long V, long stride) {
    auto work = work_on<float, float>(z, R, V, stride, 0, nullptr);
    set_raw(work, raw);
    emulated::launch(3, 1, THREADS, 0, [&](char*) { complete_rows(work); });
}
void logprob_double(void* z, long R, long V, long stride, void* const* side, int64_t* top,
                const int64_t* tokens, void* const* upstream, double cap,
                    void* dlogits, int type, int clusters, long shared) {
    logprob_as<double>(z, R, V, stride, side, top, tokens, upstream, cap, dlogits, type, clusters, shared);
}
}

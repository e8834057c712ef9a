// Rows on a CPU: OpenMP over rows. A row of every head fits the second-level cache, so that the few passes over it read
// memory once. Compiled once for each COPD_ISA; bindings.cpp picks one at run time.

#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "passes.h"
#include "table.h"

namespace copd::COPD_ISA {
namespace {

// What row r of some heads lacks, done where it is: the sweeps that follow find it in cache.
template <class S> void complete(const Logits& logits, int64_t r) {
    const auto& [heads, count, biases, bias_stride, caps, temperatures] = logits.raw;
    for (int i = 0; i < count; ++i) {
        S* row = (S*)logits.z + (heads[i] * logits.R + r) * logits.stride;
        const S* bias = biases ? (const S*)biases + heads[i] * bias_stride : nullptr;
        const S cap = S(caps[heads[i]]), temperature = temperatures ? ((const S*)temperatures)[r] : S(0);
        for (int64_t col = 0; col < logits.V; col += N * WIDTH<S>) {
            auto tile = load(row, col, logits.V, S(0));
            const Tile<S> offset = bias ? load(bias, col, logits.V, S(0)) : Tile<S>{};
            for (int n = 0; n < N; ++n) tile.x[n] = completed(tile.x[n], offset.x[n], cap, temperature);
            store(row, col, logits.V, tile);
        }
    }
}

// The student's softcap over temperature in a row.
template <class S> S cap_of(const Gradient& gradient, int64_t r) {
    return gradient.caps ? ((const S*)gradient.caps)[r] : S(gradient.cap);
}

// One thread does what takes less time than waking another.
int threads_for(int64_t heads, const Logits& logits, int threads) {
    return heads * logits.R * logits.V < (1 << 15) ? 1 : threads;
}

template <Divergence D, class S, class Out> void kl_rows(const KlArguments& args, int threads) {
    const auto [z, type, heads, R, V, stride, raw] = args.logits;
    constexpr bool P = D != Divergence::forward && D != Divergence::jsd;
    constexpr bool Q = D == Divergence::forward || D == Divergence::symmetric;
    const Mixture<S> m(args.beta);
    const bool learns = args.gradient.dlogits;
    // allocated here, where a failure can be thrown
    std::unique_ptr<Pair<S>[]> all_pairs(new Pair<S>[threads * args.T]);
    std::vector<Scratch<S>> rooms;
    for (int i = 0; i < threads; ++i) rooms.emplace_back(V, learns && D != Divergence::forward, learns && Q);
#pragma omp parallel num_threads(threads)
    {
        Pair<S>* pairs = all_pairs.get() + omp_get_thread_num() * args.T;
        const Scratch<S>& room = rooms[omp_get_thread_num()];
#pragma omp for schedule(static)
        for (int64_t r = 0; r < R; ++r) {
            auto row_of = [&](int head) { return (const S*)z + (head * R + r) * stride; };
            complete<S>(args.logits, r);
            const S* student = row_of(args.student);
            Side<S> own = top_of(student, V);
            weigh<false>(student, V, own, room.p);
            bool anew = true;  // no teacher has asked for anything
            for (int j = 0; j < args.T; ++j) {
                const S* teacher = row_of(args.teachers[j]);
                Pair<S>& pair = pairs[j];
                pair.s = own;
                pair.weight = args.weight ? ((const S*)args.weight)[j * args.weight_stride + r] : S(0);
                S* a = pair.weight == 0 ? nullptr : room.a;
                measure<P, Q>(student, teacher, V, pair, room, a, anew);
                prepare(D, m, pair);
                if (Q && room.b && pair.weight != 0) take_off(V, pair, room.q, room.b, anew);
                ((S*)args.value)[j * args.value_stride + r] = D == Divergence::jsd
                    ? settle(jsd_sums(student, teacher, V, pair, m, room, a, anew), m, pair)
                    : value(D, pair);
                anew &= pair.weight == 0;
            }
            if (!learns) continue;
            RowGradient<S> row(D, pairs, args.T, cap_of<S>(args.gradient, r));
            Out* out = (Out*)args.gradient.dlogits + r * args.gradient.stride;
            differentiate(student, V, room, row, out);
        }
    }
}

template <class S, class Out> void logprob_rows(const LogProbArguments& args, int threads) {
    const auto [z, type, heads, R, V, stride, raw] = args.logits;
    S *max = (S*)args.max, *tail = (S*)args.tail, *moment = (S*)args.moment;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < R; ++r) {
        const S* row = (const S*)z + r * stride;
        complete<S>(args.logits, r);
        if (!args.gradient.dlogits) {
            Side<S> side = top_of(row, V);
            weigh<true>(row, V, side, (S*)nullptr);
            side = side.distribution();
            max[r] = side.max, args.top[r] = side.top, tail[r] = side.tail, moment[r] = side.moment;
            continue;
        }
        auto at = [r](const void* numbers) { return ((const S*)numbers)[r]; };
        const Side<S> side{max[r], (Index<S>)args.top[r], tail[r], S(0), moment[r]};
        LogProbGradient<S> gradient(side, (Index<S>)args.tokens[r], at(args.dlogp), at(args.dentropy), at(args.dlse),
                                    cap_of<S>(args.gradient, r));
        Out* out = (Out*)args.gradient.dlogits + r * args.gradient.stride;
        for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
            auto tile = load(row, col, V, -INFINITE<S>);
            for (int i = 0; i < N; ++i)
                tile.x[i] = dlogit(tile.x[i], columns<S>(col + i * WIDTH<S>), gradient);
            store(out, col, V, tile);
        }
        if (gradient.top >= 0) out[gradient.top] = narrow(at_top(gradient), Out{});
    }
}

// Calls f with the number type, the type of dlogits and, for kl, the divergence as template arguments.
template <class S, class F> void with_output(Type type, F f) {
    switch (type) {
        case Type::float16: if constexpr (sizeof(S) == 4) f(Half{}); break;
        case Type::bfloat16: if constexpr (sizeof(S) == 4) f(Brain{}); break;
        default: f(S{});
    }
}

template <class S> void kl_of(const KlArguments& args, int threads) {
    with_output<S>(args.gradient.type, [&](auto out) {
        using Out = decltype(out);
        switch ((Divergence)args.divergence) {
            case Divergence::reverse: return kl_rows<Divergence::reverse, S, Out>(args, threads);
            case Divergence::forward: return kl_rows<Divergence::forward, S, Out>(args, threads);
            case Divergence::symmetric: return kl_rows<Divergence::symmetric, S, Out>(args, threads);
            case Divergence::jsd: return kl_rows<Divergence::jsd, S, Out>(args, threads);
        }
    });
}

template <class S> void logprob_of(const LogProbArguments& args, int threads) {
    with_output<S>(args.gradient.type, [&](auto out) { logprob_rows<S, decltype(out)>(args, threads); });
}

// --- top-k ----------------------------------------------------------------------------------------

template <class S> struct Entry {
    S z;
    int64_t col;
};

// a ranks before b: the larger logit, and among equals the lower column
template <class S> bool ranks_before(const Entry<S>& a, const Entry<S>& b) {
    return a.z > b.z || (a.z == b.z && a.col < b.col);
}

// The columns of the k largest logits in ascending order; returns how many there are (NaN is none of them).
template <class S> int64_t top_k(const S* row, int64_t V, int64_t k, Entry<S>* heap) {
    int64_t size = 0;
    for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
        int64_t end = std::min<int64_t>(V, col + N * WIDTH<S>);
        if (size == k) {
            auto tile = load(row, col, V, -INFINITE<S>);
            auto larger = tile.x[0] > heap[0].z;
            for (int i = 1; i < N; ++i) larger |= tile.x[i] > heap[0].z;
            if (!any(larger)) continue;
        }
        for (int64_t i = col; i < end; ++i) {
            Entry<S> entry{row[i], i};
            if (entry.z != entry.z) continue;
            if (size < k) {
                heap[size++] = entry;
                std::push_heap(heap, heap + size, ranks_before<S>);
            } else if (entry.z > heap[0].z) {
                std::pop_heap(heap, heap + k, ranks_before<S>);
                heap[k - 1] = entry;
                std::push_heap(heap, heap + k, ranks_before<S>);
            }
        }
    }
    std::sort(heap, heap + size, [](const Entry<S>& a, const Entry<S>& b) { return a.col < b.col; });
    return size;
}

// The largest k and both divergences while a row of each head is at hand.
template <class S> void agreement_of(const AgreementArguments& args, int threads) {
    const auto [z, type, heads, R, V, stride, raw] = args.logits;
    const int64_t k = args.k;
    std::unique_ptr<Entry<S>[]> heaps(new Entry<S>[threads * 2 * k]);
    std::vector<Scratch<S>> rooms;
    for (int i = 0; i < threads; ++i) rooms.emplace_back(V, false, false);
#pragma omp parallel num_threads(threads)
    {
        Entry<S>*mine = heaps.get() + omp_get_thread_num() * 2 * k, *theirs = mine + k;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < R; ++r) {
            auto row_of = [&](int head) { return (const S*)z + (head * R + r) * stride; };
            const Scratch<S>& room = rooms[omp_get_thread_num()];
            complete<S>(args.logits, r);
            int64_t size = top_k(row_of(args.student), V, k, mine);
            Side<S> own = top_of(row_of(args.student), V);
            weigh<false>(row_of(args.student), V, own, room.p);
            for (int j = 0; j < args.T; ++j) {
                int64_t other_size = top_k(row_of(args.teachers[j]), V, k, theirs), common = 0;
                for (int64_t a = 0, b = 0; a < size && b < other_size;) {
                    int64_t left = mine[a].col, right = theirs[b].col;
                    common += left == right;
                    a += left <= right;
                    b += right <= left;
                }
                Pair<S> pair;
                pair.s = own;
                measure<true, true>(row_of(args.student), row_of(args.teachers[j]), V, pair, room, (S*)nullptr, true);
                prepare(Divergence::symmetric, Mixture<S>(), pair);
                ((S*)args.overlap)[j * R + r] = S(common) / S(k);
                ((S*)args.forward)[j * R + r] = value(Divergence::forward, pair);
                ((S*)args.reverse)[j * R + r] = value(Divergence::reverse, pair);
            }
        }
    }
}

// --- what bindings.cpp sees -----------------------------------------------------------------------

void kl(const KlArguments& args, int threads) {
    threads = threads_for(1 + args.T, args.logits, threads);
    args.logits.type == Type::float64 ? kl_of<double>(args, threads) : kl_of<float>(args, threads);
}

void logprob(const LogProbArguments& args, int threads) {
    threads = threads_for(1, args.logits, threads);
    args.logits.type == Type::float64 ? logprob_of<double>(args, threads) : logprob_of<float>(args, threads);
}

void agreement(const AgreementArguments& args, int threads) {
    threads = threads_for(1 + args.T, args.logits, threads);
    args.logits.type == Type::float64 ? agreement_of<double>(args, threads) : agreement_of<float>(args, threads);
}

template <class S> void complete_rows(const Logits& logits, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < logits.R; ++r) complete<S>(logits, r);
}

void complete(const Logits& logits, int threads) {
    threads = threads_for(1, logits, threads);
    logits.type == Type::float64 ? complete_rows<double>(logits, threads) : complete_rows<float>(logits, threads);
}

}  // namespace

extern const CpuRows rows;
const CpuRows rows{kl, logprob, agreement, complete};

}  // namespace copd::COPD_ISA

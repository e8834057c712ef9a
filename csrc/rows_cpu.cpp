// Rows on a CPU: OpenMP over rows, vectors along a row. A row of every head fits the second-level cache, so that the
// few sweeps over it read memory once. Compiled once for each COPD_ISA; bindings.cpp picks one at run time.

#include <omp.h>

#include <algorithm>
#include <memory>

#include "rows.h"
#include "table.h"

namespace copd::COPD_ISA {
namespace {

// vectors a lane folds at a time
constexpr int N = 8;

template <class S> struct Tile {
    Vector<S> x[N];
};

// Columns col .. of a row of V; past its end, `fill`.
template <class S> COPD_FN Tile<S> load(const S* row, int64_t col, int64_t V, S fill) {
    Tile<S> tile;
    constexpr int64_t COLUMNS = N * WIDTH<S>;
    if (V - col >= COLUMNS) {
        std::memcpy(&tile, row + col, sizeof tile);
    } else {
        for (auto& x : tile.x) x = Vector<S>{} + fill;
        std::memcpy(&tile, row + col, (V - col) * sizeof(S));
    }
    return tile;
}

inline float narrow(float x, float) { return x; }
inline double narrow(double x, double) { return x; }

struct Half {
    _Float16 bits;
};
struct Brain {
    uint16_t bits;
};
// beyond its range a number becomes infinite, never a wrong finite one
inline Half narrow(float x, Half) { return {(_Float16)x}; }
inline Brain narrow(float x, Brain) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}

template <class S, class Out> COPD_FN void store(Out* row, int64_t col, int64_t V, const Tile<S>& tile) {
    int64_t count = std::min<int64_t>(V - col, N * WIDTH<S>);
    if constexpr (sizeof(Out) == sizeof(S)) {
        std::memcpy(row + col, &tile, count * sizeof(S));
    } else {
        S numbers[N * WIDTH<S>];
        std::memcpy(numbers, &tile, sizeof tile);
        for (int64_t i = 0; i < count; ++i) row[col + i] = narrow(numbers[i], Out{});
    }
}

template <class S> COPD_FN Index<Vector<S>> columns(int64_t col) {
    Index<Vector<S>> lanes;
    for (int i = 0; i < WIDTH<S>; ++i) lanes[i] = i;
    return lanes + (Index<S>)col;
}

// The sides of a row's lanes, put together.
template <class S> Side<S> gathered(const Side<Vector<S>>& lanes) {
    Side<S> all;
    for (int i = 0; i < WIDTH<S>; ++i) {
        Side<S> lane{lanes.max[i], lanes.top[i], lanes.tail[i], lanes.cross[i], lanes.moment[i]};
        all = i ? merge(all, lane) : lane;
    }
    return all;
}

template <class S> S gathered(Vector<S> lanes) {
    S sum = 0;
    for (int i = 0; i < WIDTH<S>; ++i) sum += lanes[i];
    return sum;
}

// Student and teacher in one sweep; a moment only where the divergence asks for it.
template <bool OF_STUDENT, bool OF_TEACHER, class S>
void measure(const S* student, const S* teacher, int64_t V, Pair<S>& pair) {
    Side<Vector<S>> s, t;
    for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
        auto z = load(student, col, V, -INFINITE<S>), other = load(teacher, col, V, -INFINITE<S>);
        auto lanes = columns<S>(col);
        fold<OF_STUDENT>(s, z.x, other.x, lanes, WIDTH<S>);
        fold<OF_TEACHER>(t, other.x, z.x, lanes, WIDTH<S>);
    }
    pair.s = gathered<S>(s), pair.t = gathered<S>(t);
}

template <class S> Side<S> measure(const S* row, int64_t V) {
    Side<Vector<S>> side;
    const Tile<S> nothing{};
    for (int64_t col = 0; col < V; col += N * WIDTH<S>)
        fold<true>(side, load(row, col, V, -INFINITE<S>).x, nothing.x, columns<S>(col), WIDTH<S>);
    return gathered<S>(side);
}

// `lesson`, if any, is what the teachers so far ask of each column, and takes this one's part: the gradient then needs no
// logarithm again.
template <class S>
JsdSums<S> jsd_sums(const S* student, const S* teacher, int64_t V, const Pair<S>& pair, const Mixture<S>& m,
                    S* lesson) {
    JsdSums<Vector<S>> sums;
    const S weight = m.student * pair.weight;
    if (weight == 0) lesson = nullptr;
    for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
        auto s = load(student, col, V, -INFINITE<S>), t = load(teacher, col, V, -INFINITE<S>);
        Tile<S> u;
        for (int i = 0; i < N; ++i)
            u.x[i] = jsd_term(sums, s.x[i], t.x[i], columns<S>(col + i * WIDTH<S>), pair, m);
        if (!lesson) continue;
        auto a = load(lesson, col, V, S(0));
        for (int i = 0; i < N; ++i) a.x[i] += weight * u.x[i];
        store(lesson, col, V, a);
    }
    return {gathered<S>(sums.to_teacher), gathered<S>(sums.to_student), gathered<S>(sums.moment)};
}

template <Divergence D, class S, class Out>
void differentiate(const S* student, const S* const* teachers, int T, int64_t V, const Pair<S>* pairs,
                   const RowGradient<S>& row, const Mixture<S>& m, const S* lesson, Out* out) {
    for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
        auto s = load(student, col, V, -INFINITE<S>);
        Tile<S> a{}, b{};
        if constexpr (D == Divergence::jsd) a = load(lesson, col, V, S(0));
        for (int j = 0; D != Divergence::jsd && j < T; ++j) {
            if (pairs[j].weight == 0) continue;
            auto t = load(teachers[j], col, V, -INFINITE<S>);
            for (int i = 0; i < N; ++i) teach<D>(s.x[i], t.x[i], pairs[j], m, a.x[i], b.x[i]);
        }
        for (int i = 0; i < N; ++i) a.x[i] = dlogit(s.x[i], a.x[i], b.x[i], row);
        store(out, col, V, a);
    }
    if (row.top >= 0) out[row.top] = narrow(at_top(row), Out{});
}

// One thread does what takes less time than waking another.
int threads_for(int64_t heads, const Logits& logits, int threads) {
    return heads * logits.R * logits.V < (1 << 15) ? 1 : threads;
}

template <Divergence D, class S, class Out> void kl_rows(const KlArguments& args, int threads) {
    const auto [z, type, heads, R, V, stride] = args.logits;
    constexpr bool P = D != Divergence::forward && D != Divergence::jsd;
    constexpr bool Q = D == Divergence::forward || D == Divergence::symmetric;
    const Mixture<S> m(args.beta);
    // allocated here, where a failure can be thrown, in one piece a thread
    const bool learns = D == Divergence::jsd && args.gradient.dlogits;
    std::unique_ptr<Pair<S>[]> all_pairs(new Pair<S>[threads * args.T]);
    std::unique_ptr<const S*[]> all_teachers(new const S*[threads * args.T]);
    std::unique_ptr<S[]> lessons(learns ? new S[threads * V] : nullptr);
#pragma omp parallel num_threads(threads)
    {
        Pair<S>* pairs = all_pairs.get() + omp_get_thread_num() * args.T;
        const S** teachers = all_teachers.get() + omp_get_thread_num() * args.T;
        S* lesson = learns ? lessons.get() + omp_get_thread_num() * V : nullptr;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < R; ++r) {
            auto row_of = [&](int head) { return (const S*)z + (head * R + r) * stride; };
            const S* student = row_of(args.student);
            if (lesson) std::fill_n(lesson, V, S(0));
            for (int j = 0; j < args.T; ++j) {
                teachers[j] = row_of(args.teachers[j]);
                Pair<S>& pair = pairs[j];
                measure<P, Q>(student, teachers[j], V, pair);
                prepare(D, m, pair);
                pair.weight = args.weight ? ((const S*)args.weight)[j * args.weight_stride + r] : S(0);
                ((S*)args.value)[j * args.value_stride + r] = D == Divergence::jsd
                    ? settle(jsd_sums(student, teachers[j], V, pair, m, lesson), m, pair)
                    : value(D, pair);
            }
            if (!args.gradient.dlogits) continue;
            RowGradient<S> row(D, pairs, args.T, S(args.gradient.cap));
            Out* out = (Out*)args.gradient.dlogits + r * args.gradient.stride;
            differentiate<D>(student, teachers, args.T, V, pairs, row, m, lesson, out);
        }
    }
}

template <class S, class Out> void logprob_rows(const LogProbArguments& args, int threads) {
    const auto [z, type, heads, R, V, stride] = args.logits;
    S *max = (S*)args.max, *tail = (S*)args.tail, *moment = (S*)args.moment;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < R; ++r) {
        const S* row = (const S*)z + r * stride;
        if (!args.gradient.dlogits) {
            Side<S> side = measure(row, V).distribution();
            max[r] = side.max, args.top[r] = side.top, tail[r] = side.tail, moment[r] = side.moment;
            continue;
        }
        auto at = [r](const void* numbers) { return ((const S*)numbers)[r]; };
        const Side<S> side{max[r], (Index<S>)args.top[r], tail[r], S(0), moment[r]};
        LogProbGradient<S> gradient(side, (Index<S>)args.tokens[r], at(args.dlogp), at(args.dentropy), at(args.dlse),
                                    S(args.gradient.cap));
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
    const auto [z, type, heads, R, V, stride] = args.logits;
    const int64_t k = args.k;
    std::unique_ptr<Entry<S>[]> heaps(new Entry<S>[threads * 2 * k]);
#pragma omp parallel num_threads(threads)
    {
        Entry<S>*mine = heaps.get() + omp_get_thread_num() * 2 * k, *theirs = mine + k;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < R; ++r) {
            auto row_of = [&](int head) { return (const S*)z + (head * R + r) * stride; };
            int64_t size = top_k(row_of(args.student), V, k, mine);
            for (int j = 0; j < args.T; ++j) {
                int64_t other_size = top_k(row_of(args.teachers[j]), V, k, theirs), common = 0;
                for (int64_t a = 0, b = 0; a < size && b < other_size;) {
                    int64_t left = mine[a].col, right = theirs[b].col;
                    common += left == right;
                    a += left <= right;
                    b += right <= left;
                }
                Pair<S> pair;
                measure<true, true>(row_of(args.student), row_of(args.teachers[j]), V, pair);
                prepare(Divergence::symmetric, Mixture<S>(), pair);
                ((S*)args.overlap)[j * R + r] = S(common) / S(k);
                ((S*)args.forward)[j * R + r] = value(Divergence::forward, pair);
                ((S*)args.reverse)[j * R + r] = value(Divergence::reverse, pair);
            }
        }
    }
}

// --- softcap --------------------------------------------------------------------------------------

template <class S> void softcap_of(const SoftcapArguments& args, int threads) {
    const auto [z, type, heads, R, V, stride] = args.logits;
    const S cap = S(args.cap);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < R; ++r) {
        S* row = (S*)z + r * stride;
        for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
            auto tile = load(row, col, V, S(0));
            for (auto& x : tile.x) x = soft_capped(x, cap);
            store(row, col, V, tile);
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

void softcap(const SoftcapArguments& args, int threads) {
    threads = threads_for(1, args.logits, threads);
    args.logits.type == Type::float64 ? softcap_of<double>(args, threads) : softcap_of<float>(args, threads);
}

}  // namespace

extern const CpuRows rows;
const CpuRows rows{kl, logprob, agreement, softcap};

}  // namespace copd::COPD_ISA

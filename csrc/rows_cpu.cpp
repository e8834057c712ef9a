// Rows on a CPU: OpenMP over rows, vectors along a row. A row of every head fits the second-level cache, so that the
// few sweeps over it read memory once; what an exponential gave is kept there for the next. Compiled once for each COPD_ISA; bindings.cpp picks one at run time.

#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "rows.h"
#include "table.h"

namespace copd::COPD_ISA {
namespace {

// vectors a lane folds at a time
constexpr int N = 8;

template <class S> struct Tile {
    Vector<S> x[N];
};

template <class S> COPD_FN Tile<S> load(const S* from) {
    Tile<S> tile;
    for (int i = 0; i < N; ++i) tile.x[i] = *(const Loose<S>*)(from + i * WIDTH<S>);
    return tile;
}

// Columns col .. of a row of V; past its end, `fill`.
template <class S> COPD_FN Tile<S> load(const S* row, int64_t col, int64_t V, S fill) {
    constexpr int64_t COLUMNS = N * WIDTH<S>;
    if (V - col >= COLUMNS) return load(row + col);
    // apart, or the compiler would keep every tile in memory
    S numbers[COLUMNS];
    std::fill_n(numbers, COLUMNS, fill);
    std::memcpy(numbers, row + col, (V - col) * sizeof(S));
    return load(numbers);
}

template <class S> COPD_FN void store(S* to, const Tile<S>& tile) {
    for (int i = 0; i < N; ++i) *(Loose<S>*)(to + i * WIDTH<S>) = tile.x[i];
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
    constexpr int64_t COLUMNS = N * WIDTH<S>;
    const int64_t count = std::min<int64_t>(V - col, COLUMNS);
    if constexpr (sizeof(Out) == sizeof(S)) {
        if (count == COLUMNS) return store(row + col, tile);
    }
    S numbers[COLUMNS];
    store(numbers, tile);
    for (int64_t i = 0; i < count; ++i) row[col + i] = narrow(numbers[i], Out{});
}

template <class S> COPD_FN Index<Vector<S>> columns(int64_t col) {
    Index<Vector<S>> lanes;
    for (int i = 0; i < WIDTH<S>; ++i) lanes[i] = i;
    return lanes + (Index<S>)col;
}

template <class S> S gathered(Vector<S> lanes) {
    S sum = 0;
    for (int i = 0; i < WIDTH<S>; ++i) sum += lanes[i];
    return sum;
}

template <class S> COPD_FN Vector<S> total(const Tile<S>& tile) {
    Vector<S> sum = tile.x[0];
    for (int i = 1; i < N; ++i) sum += tile.x[i];
    return sum;
}

// The largest logit and its column, before anything is summed: every sum is then measured from the top token at once.
template <class S> Side<S> top_of(const S* row, int64_t V) {
    Vector<S> lanes = Vector<S>{} - INFINITE<S>;
    for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
        auto tile = load(row, col, V, -INFINITE<S>);
        // a NaN is no maximum, and is seen in the sums
        for (auto& x : tile.x) x = larger(x, Vector<S>{} - INFINITE<S>);
        for (int half = N / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) tile.x[i] = larger(tile.x[i], tile.x[i + half]);
        lanes = larger(tile.x[0], lanes);
    }
    Side<S> side;
    for (int i = 0; i < WIDTH<S>; ++i) side.max = larger(lanes[i], side.max);
    if (side.max == -INFINITE<S>) return side;
    for (int64_t col = 0; side.top < 0; col += N * WIDTH<S>) {
        auto tile = load(row, col, V, -INFINITE<S>);
        auto found = tile.x[0] == side.max;
        for (int i = 1; i < N; ++i) found |= tile.x[i] == side.max;
        if (!any(found)) continue;
        while (row[col] != side.max) ++col;
        side.top = (Index<S>)col;
    }
    return side;
}

// The tail; `mass`, if any, takes exp(z - max) of every column. With MOMENT also that of the row beside no other one.
template <bool MOMENT, class S> void weigh(const S* row, int64_t V, Side<S>& side, S* mass) {
    // a row without any mass has no finite largest logit to subtract
    const S base = side.max == -INFINITE<S> ? S(0) : side.max;
    Vector<S> tail{}, moment{};
    for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
        Tile<S> e, term, z = load(row, col, V, -INFINITE<S>);
        for (int i = 0; i < N; ++i) {
            auto x = z.x[i] - base;
            e.x[i] = exp_(x);
            if constexpr (MOMENT) term.x[i] = e.x[i] == 0 ? Vector<S>{} : e.x[i] * x;
        }
        if (mass) store(mass, col, V, e);
        // the top token is not of the tail
        if (uint64_t(side.top - col) < N * WIDTH<S>)
            for (int i = 0; i < N; ++i)
                e.x[i] = columns<S>(col + i * WIDTH<S>) == side.top ? Vector<S>{} : e.x[i];
        tail += total(e);
        if constexpr (MOMENT) moment += total(term);
    }
    side.tail = gathered<S>(tail), side.moment = gathered<S>(moment);
}

// Sum of mass ((z - other) - (max - cross)), which is 0 at the top token. A column without mass counts nothing however
// far the other side is. `lesson`, if any, takes `weight` times each difference: anew, or beside what is there.
template <class S>
S moment_of(const S* row, const S* other, int64_t V, const Side<S>& side, const S* mass, S weight, S* lesson, bool anew) {
    const S offset = side.max - side.cross;
    auto sum_up = [&]<bool CAREFUL>() {
        Vector<S> sum{};
        for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
            auto z = load(row, col, V, S(0)), o = load(other, col, V, S(0)), e = load(mass, col, V, S(0));
            for (int i = 0; i < N; ++i) {
                z.x[i] = (z.x[i] - o.x[i]) - offset;
                auto term = e.x[i] * z.x[i];
                if constexpr (CAREFUL) {
                    auto nothing = (e.x[i] == 0) | (columns<S>(col + i * WIDTH<S>) == side.top);
                    term = nothing ? Vector<S>{} : term;
                }
                o.x[i] = term;
            }
            sum += total(o);
            if (CAREFUL || !lesson) continue;
            auto a = anew ? Tile<S>{} : load(lesson, col, V, S(0));
            for (int i = 0; i < N; ++i) a.x[i] += weight * z.x[i];
            store(lesson, col, V, a);
        }
        return gathered<S>(sum);
    };
    const S sum = sum_up.template operator()<false>();
    // infinite or NaN: a logit is
    return sum - sum == 0 ? sum : sum_up.template operator()<true>();
}

// One thread's numbers of a row, V of each kind: exp(z - max) of the student and of a teacher, and what the teachers so
// far ask of each column, which multiplies p (a) or is taken off (b): the gradient needs no exponential again.
template <class S> struct Scratch {
    std::unique_ptr<S[]> memory;
    S *p = nullptr, *q = nullptr, *a = nullptr, *b = nullptr;

    Scratch(int64_t V, bool wants_a, bool wants_b) : memory(new S[(2 + wants_a + wants_b) * V]) {
        p = memory.get(), q = p + V;
        if (wants_a) a = q + V;
        if (wants_b) b = q + V * (1 + wants_a);
    }
};

template <class S> S at(const S* row, Index<S> col) { return col < 0 ? S(0) : row[col]; }

// What student and teacher are beside each other; of the student, everything that no teacher changes is known.
template <bool OF_STUDENT, bool OF_TEACHER, class S>
void measure(const S* student, const S* teacher, int64_t V, Pair<S>& pair, const Scratch<S>& room, S* a, bool anew) {
    pair.t = top_of(teacher, V);
    // the reverse divergence alone asks for no mass of the teacher's
    weigh<false>(teacher, V, pair.t, OF_TEACHER || !OF_STUDENT ? room.q : nullptr);
    pair.s.cross = at(teacher, pair.s.top), pair.t.cross = at(student, pair.t.top);
    if constexpr (OF_STUDENT)
        pair.s.moment = moment_of(student, teacher, V, pair.s, room.p, pair.weight, a, anew);
    if constexpr (OF_TEACHER)
        pair.t.moment = moment_of(teacher, student, V, pair.t, room.q, S(0), (S*)nullptr, true);
}

template <class S>
JsdSums<S> jsd_sums(const S* student, const S* teacher, int64_t V, const Pair<S>& pair, const Mixture<S>& m,
                    const Scratch<S>& room, S* lesson, bool anew) {
    JsdSums<Vector<S>> sums;
    const S weight = m.student * pair.weight;
    for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
        auto s = load(student, col, V, -INFINITE<S>), t = load(teacher, col, V, -INFINITE<S>);
        auto p = load(room.p, col, V, S(0)), q = load(room.q, col, V, S(0));
        Tile<S> u;
        for (int i = 0; i < N; ++i)
            u.x[i] = jsd_term(sums, s.x[i], t.x[i], columns<S>(col + i * WIDTH<S>), pair, m,
                              [&](auto lower) { return lower ? q.x[i] : p.x[i]; });
        if (!lesson) continue;
        auto a = anew ? Tile<S>{} : load(lesson, col, V, S(0));
        for (int i = 0; i < N; ++i) a.x[i] += weight * u.x[i];
        store(lesson, col, V, a);
    }
    return {gathered<S>(sums.to_teacher), gathered<S>(sums.to_student), gathered<S>(sums.moment)};
}

// b += the teacher's share of each column
template <class S> void take_off(int64_t V, const Pair<S>& pair, const S* q, S* b, bool anew) {
    const S share = pair.weight * pair.t.p_top();
    for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
        auto sum = anew ? Tile<S>{} : load(b, col, V, S(0)), e = load(q, col, V, S(0));
        for (int i = 0; i < N; ++i) sum.x[i] += share * e.x[i];
        store(b, col, V, sum);
    }
}

template <class S, class Out>
void differentiate(const S* student, int64_t V, const Scratch<S>& room, const RowGradient<S>& row, Out* out) {
    for (int64_t col = 0; col < V; col += N * WIDTH<S>) {
        auto p = load(room.p, col, V, S(0));
        Tile<S> a{}, b{}, z{};
        if (room.a) a = load(room.a, col, V, S(0));
        if (room.b) b = load(room.b, col, V, S(0));
        if (row.cap != 0) z = load(student, col, V, S(0));
        for (int i = 0; i < N; ++i) a.x[i] = dlogit_of(p.x[i], z.x[i], a.x[i], b.x[i], row);
        store(out, col, V, a);
    }
    if (row.top >= 0) out[row.top] = narrow(at_top(row), Out{});
}

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

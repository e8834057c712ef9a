// Passes over a row on a CPU, vectors along it: its top token first, then sums measured from that. What an exponential
// gave is kept for the next pass, while the row is in the second-level cache.
#pragma once

#include <algorithm>
#include <memory>

#include "rows.h"

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

}  // namespace
}  // namespace copd::COPD_ISA

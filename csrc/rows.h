// The mathematics of a row of logits, one text for the vector lanes of a CPU and the threads of a GPU.
//
// F is what one lane holds: a number on a GPU, a vector of numbers on a CPU. S is a plain number. A GPU reads a row from
// memory as seldom as it can: each lane folds the columns it is given into a `Side`, and sides merge exactly, in a fixed
// order. A CPU has the row in its cache and finds the top token first (passes.h). Everything is measured from a
// distribution's own top token, because differences from there do not cancel. With p the softmax of z, c its top token,
// and x = z - t against another distribution's logits t (x = z if there is none),
//
//     tail   = sum_{v != c} exp(z_v - z_c)                  1 - p_c = tail / (1 + tail), exact for p_c -> 1
//     moment = sum_{v != c} exp(z_v - z_c) (x_v - x_c)      E_p[x] = x_c + moment / (1 + tail)
//
// from which the functions below make every divergence and its gradient. A NaN in any column is a NaN in the tail, and
// nothing takes it out again. copd_kernels/rows/stats.py is the same in PyTorch; copd_kernels/reference.py says what
// they mean.
#pragma once

#include "lanes.h"

namespace copd::COPD_ISA {

enum class Divergence { reverse, forward, symmetric, jsd };

// stands for an infinite log-ratio: finite, so that zero mass times it is zero
template <class S> inline constexpr S FAR = S(1e30);
template <class S> inline constexpr S INFINITE = S(HUGE_VALF);
template <class S> inline constexpr S NOT_A_NUMBER = S(__builtin_nanf(""));

// --- statistics -----------------------------------------------------------------------------------

// One distribution seen from its top token, beside another one.
template <class F> struct Side {
    F max = F{} - INFINITE<Number<F>>;  // largest logit
    Index<F> top = Index<F>{} - 1;      // its column, the lowest among equals; -1 where nothing has mass
    F tail = F{};                       // sum over all other columns of exp(z - max)
    F cross = F{};                      // the other distribution's logit at `top`
    F moment = F{};                     // sum over all other columns of exp(z - max) ((z - other) - (max - cross))

    COPD_FN F p_top() const { return 1 / (1 + tail); }
    COPD_FN F norm() const { return log1p_(tail); }
    COPD_FN F mean() const { return moment / (1 + tail); }

    // A row with an infinite logit or without any mass is none: its tail, and all that is made from it, is NaN.
    COPD_FN Side distribution() const {
        Side side = *this;
        if (max - max != 0) side.tail = NOT_A_NUMBER<F>;
        return side;
    }
};

// What a tile adds to the tail and the moment. CAREFUL leaves the top token out, and a column without mass counts nothing
// however far the other side is; without it the top token must be elsewhere.
template <bool MOMENT, bool CAREFUL, int N, class F>
COPD_FN void sum_up(const Side<F>& side, const F (&z)[N], const F (&other)[N], Index<F> col, int step, F& tail,
                    F& moment) {
    // a lane without any mass has no finite largest logit to subtract
    F base = side.max == -INFINITE<Number<F>> ? F{} : side.max;
    F offset = side.max - side.cross;
    tail = F{}, moment = F{};
    for (int i = 0; i < N; ++i) {
        F e = exp_(z[i] - base);
        if constexpr (CAREFUL) e = col + i * step == side.top ? F{} : e;
        tail += e;
        if constexpr (MOMENT) {
            F term = e * ((z[i] - other[i]) - offset);
            if constexpr (CAREFUL) term = e == 0 ? F{} : term;
            moment += term;
        }
    }
}

// Adds N columns a lane: z, and `other` at the same columns col, col + step, ... A lane's columns come in ascending
// order. A column of z = -inf counts nothing, which is how the caller fills up the last tile.
template <bool MOMENT, int N, class F>
COPD_FN void fold(Side<F>& side, const F (&z)[N], const F (&other)[N], Index<F> col, int step) {
    F max = z[0];
    for (int i = 1; i < N; ++i) max = larger(z[i], max);
    auto grew = max > side.max;
    bool careful = any(grew);
    if (careful) {
        F cross = other[N - 1];
        Index<F> top = col + (N - 1) * step;
        for (int i = N - 2; i >= 0; --i) {
            cross = z[i] == max ? other[i] : cross;
            top = z[i] == max ? col + i * step : top;
        }
        // the old top joins the others, and all of them are measured from the new one
        F scale = exp_(side.max - max);
        F moved = scale * (side.moment + (1 + side.tail) * ((side.max - side.cross) - (max - cross)));
        // mass where the other side has none
        moved = side.cross == -INFINITE<Number<F>> ? F{} + INFINITE<Number<F>> : moved;
        side.moment = grew ? (scale > 0 ? moved : F{}) : side.moment;
        side.tail = grew ? scale * (1 + side.tail) : side.tail;
        side.max = grew ? max : side.max;
        side.cross = grew ? cross : side.cross;
        side.top = grew ? top : side.top;
    }
    F tail, moment;
    if (!careful) {
        sum_up<MOMENT, false>(side, z, other, col, step, tail, moment);
        careful = any(moment - moment != 0);  // infinite or NaN: a logit is
    }
    if (careful) sum_up<MOMENT, true>(side, z, other, col, step, tail, moment);
    side.tail += tail;
    if constexpr (MOMENT) side.moment += moment;
}

// The side of the columns of both.
template <class S> COPD_FN Side<S> merge(const Side<S>& a, const Side<S>& b) {
    bool first = a.max > b.max || (a.max == b.max && a.top <= b.top);
    // field by field: a choice of addresses would put both into memory
    auto choose = [](bool a_wins, const Side<S>& a, const Side<S>& b) {
        return Side<S>{a_wins ? a.max : b.max, a_wins ? a.top : b.top, a_wins ? a.tail : b.tail,
                       a_wins ? a.cross : b.cross, a_wins ? a.moment : b.moment};
    };
    const Side<S> keep = choose(first, a, b), move = choose(!first, a, b);
    Side<S> side = keep;
    S scale = move.max == -INFINITE<S> ? S(0) : exp_(move.max - keep.max);
    S shift = (move.max - move.cross) - (keep.max - keep.cross);
    S moved = scale * (move.moment + (1 + move.tail) * shift);
    // mass where the other side has none
    moved = move.cross == -INFINITE<S> ? INFINITE<S> : moved;
    side.moment += scale > 0 ? moved : S(0);
    side.tail += scale * (1 + move.tail);
    return side;
}

// --- values ---------------------------------------------------------------------------------------

// log(1 + tail) of a less that of b; of nearly equal rows the quotient keeps what the difference would lose
template <class S> COPD_FN S norm_gap(const Side<S>& a, const Side<S>& b) {
    S grown = (a.tail - b.tail) / (1 + b.tail);
    return grown > S(-0.5) && grown < 1 ? log1p_(grown) : a.norm() - b.norm();
}

// KL(a || b) but for norm_gap(b, a): infinite where b has no mass at a's top token (elsewhere the moment is)
template <class S> COPD_FN S excess(const Side<S>& a, const Side<S>& b) {
    return a.cross == -INFINITE<S> ? INFINITE<S> : (b.max - a.cross) + a.mean();
}

// m = teacher * q + student * p; both shares are given, because one less the other may be nothing in fp32.
template <class S> struct Mixture {
    S teacher = 0, student = 0;

    Mixture() = default;
    explicit Mixture(double beta) : teacher(S(beta)), student(S(1 - beta)) {}

    // m is nearly one of the two, and differences from that one must not be taken of larger numbers
    COPD_FN bool one_sided() const { return teacher < S(0.1) || student < S(0.1); }
};

// u = log(p / m), w = log(q / m) for r = log(p / q); exact near 0, finite throughout. Returns the smaller of p and q over
// the larger.
template <class F> COPD_FN F log_mix(F r, const Mixture<Number<F>>& m, F& u, F& w) {
    constexpr auto FAR_ = FAR<Number<F>>;
    r = r > FAR_ ? F{} + FAR_ : r;
    r = r < -FAR_ ? F{} - FAR_ : r;
    r = r != r ? F{} : r;
    auto lower = r < 0;
    F near = lower ? r : -r, ratio, less = expm1_(near, ratio);
    F share = lower ? F{} + m.student : F{} + m.teacher;
    F grown = share * less;
    if (!m.one_sided()) {
        F mix = log1p_(grown);  // log of m over the larger
        u = (lower ? r : F{}) - mix;
        w = (lower ? F{} : -r) - mix;
        return ratio;
    }
    F other = lower ? F{} + m.teacher : F{} + m.student;
    F mix = grown > Number<F>(-0.5) ? log1p_(grown) : log_(other + share * ratio);
    // log of m over the smaller, by itself while it is near 0
    F beyond = -other * less / ratio;
    F small = near - mix, direct = -log1p_(beyond);
    small = beyond < 1 ? direct : small;
    u = lower ? small : -mix;
    w = lower ? -mix : small;
    return ratio;
}

// Sums over a row that the JSD needs once the norms of both sides are known.
template <class F> struct JsdSums {
    F to_teacher = F{};  // sum q log(q / m)
    F to_student = F{};  // sum p log(p / m)
    F moment = F{};      // sum p (u - u_c), c the student's top token
};

// What one student and one teacher mean to each other in one row.
template <class S> struct Pair {
    Side<S> s, t;
    S gap = 0;     // log(1 + tail) of the student less the teacher's; NaN if either is no distribution
    S weight = 0;  // of this pair in the gradient
    S offset = 0;  // what the gradient's x (or u) is measured from: its value at the student's top token
    S mean = 0;    // expectation of that under p

    COPD_FN S ratio_at_top() const { return -(s.cross - t.max) - gap; }

    // p - q at the student's top token, from the tails where both have the same one
    COPD_FN S top_difference() const {
        return s.top == t.top ? t.tail * t.p_top() - s.tail * s.p_top()
                              : s.p_top() - exp_(s.cross - t.max - t.norm());
    }
};

template <class S> COPD_FN S value(Divergence d, const Pair<S>& pair) {
    S reverse = excess(pair.s, pair.t), forward = excess(pair.t, pair.s);
    if (d == Divergence::reverse) return reverse - pair.gap;
    if (d == Divergence::forward) return forward + pair.gap;
    return (reverse + forward) + 0 * pair.gap;  // the norms cancel
}

template <class S> COPD_FN void prepare(Divergence d, const Mixture<S>& m, Pair<S>& pair) {
    pair.s = pair.s.distribution(), pair.t = pair.t.distribution();
    pair.gap = norm_gap(pair.s, pair.t);
    pair.offset = pair.s.max - pair.s.cross;
    pair.mean = pair.s.mean() + 0 * pair.gap;
    S unused;
    if (d == Divergence::jsd) log_mix(pair.ratio_at_top(), m, pair.offset, unused);
}

template <class F, class S> COPD_FN F log_ratio(F s, F t, const Pair<S>& pair) {
    return (s - pair.s.max) - (t - pair.t.max) - pair.gap;
}

// Adds a column; returns u less its value at the student's top token. `mass` says exp(t - max) where the teacher is the
// larger one, or else exp(s - max).
template <class F, class S, class Mass>
COPD_FN F jsd_term(JsdSums<F>& sums, F s, F t, Index<F> col, const Pair<S>& pair, const Mixture<S>& m, Mass mass) {
    F u, w, r = log_ratio(s, t, pair);
    F ratio = log_mix<F>(r, m, u, w);
    auto lower = r < 0;
    F most = mass(lower) * (lower ? F{} + pair.t.p_top() : F{} + pair.s.p_top());
    F least = most * ratio;
    F p = lower ? least : most, q = lower ? most : least;
    sums.to_teacher += q * w;
    sums.to_student += p * u;
    u -= pair.offset;
    F term = p * u;
    sums.moment += col == pair.s.top ? F{} : term;
    return u;
}

// Takes what the sums say; returns the divergence.
template <class S> COPD_FN S settle(const JsdSums<S>& sums, const Mixture<S>& m, Pair<S>& pair) {
    pair.mean = sums.moment + 0 * pair.gap;
    pair.weight *= m.student;
    return (m.teacher * sums.to_teacher + m.student * sums.to_student) + 0 * pair.gap;
}

// --- raw logits -----------------------------------------------------------------------------------

// cap tanh(z / cap), as precise near 0 as z is
template <class F, class S> COPD_FN F soft_capped(F z, S cap) {
    F x = z * (1 / cap);
    F less = expm1_(2 * (x < 0 ? x : -x));
    F t = cap * (less / (2 + less));  // -cap tanh |x|
    return x > 0 ? -t : t;
}

// cap and temperature are the row's, 0 for none
template <class F, class S> COPD_FN F completed(F z, F bias, S cap, S temperature) {
    z += bias;
    if (cap != 0) z = soft_capped(z, cap);
    return temperature == 0 ? z : z / temperature;
}

// --- gradients ------------------------------------------------------------------------------------

// Per-row numbers that turn logits into the student's gradient, summed over its teachers j.
//
//     reverse    g_v = p_v (sum_j w_j (x_jv - x_jc) - centre)                 x_j = z - t_j
//     forward    g_v = -p_v centre - sum_j w_j q_jv
//     symmetric  g_v = p_v (sum_j w_j (x_jv - x_jc) - centre) - sum_j w_j q_jv
//     jsd        g_v = p_v (sum_j w_j (u_jv - u_jc) - centre)                 u_j = log(p / m_j), w_j times 1 - beta
//
// and at the student's top token, where all of these cancel, at_top. A row without weight has p_top 0: its gradient is 0
// whatever its logits are.
template <class S> struct RowGradient {
    S max = 0, p_top = 0;
    Index<S> top = 0;
    S centre = 0, at_top = 0;
    S cap = 0;  // the student's softcap; 0 for none

    RowGradient() = default;
    COPD_FN RowGradient(Divergence d, const Pair<S>* pairs, int T, S cap) : cap(cap) {
        max = pairs[0].s.max, top = pairs[0].s.top;
        S total = 0, forward = 0;
        for (int j = 0; j < T; ++j) {
            // a masked row's statistics may be infinite or NaN: its weight of zero must win
            if (pairs[j].weight == 0) continue;
            p_top = pairs[0].s.p_top();
            total += pairs[j].weight;
            centre += pairs[j].weight * pairs[j].mean;
            if (d == Divergence::forward || d == Divergence::symmetric)
                forward += pairs[j].weight * pairs[j].top_difference();
        }
        at_top = -centre * p_top;
        if (d == Divergence::forward) centre = -total, at_top = forward;
        if (d == Divergence::symmetric) centre -= total, at_top += forward;
    }
};

// Adds teacher `pair` to what multiplies p (a) and to what is taken off (b).
template <Divergence D, class F, class S>
COPD_FN void teach(F s, F t, const Pair<S>& pair, const Mixture<S>& m, F& a, F& b) {
    if constexpr (D == Divergence::jsd) {
        F u, w;
        log_mix<F>(log_ratio(s, t, pair), m, u, w);
        a += pair.weight * (u - pair.offset);
    }
    if constexpr (D == Divergence::reverse || D == Divergence::symmetric)
        a += pair.weight * ((s - t) - pair.offset);
    if constexpr (D == Divergence::forward || D == Divergence::symmetric)
        b += (pair.weight * pair.t.p_top()) * exp_(t - pair.t.max);
}

template <class F, class S> COPD_FN F through_cap(F g, F z, S cap) {
    F ratio = z / cap;
    return g * (1 - ratio * ratio);
}

// Everywhere but at the top token, where the caller writes `at_top` through the cap; e = exp(s - max).
template <class F, class S> COPD_FN F dlogit_of(F e, F s, F a, F b, const RowGradient<S>& row) {
    if (row.p_top == 0) return F{};
    F p = e * row.p_top;
    F g = p * (a - row.centre);
    g = (p == 0 ? F{} : g) - b;  // no mass: nothing, however large a is
    return row.cap == 0 ? g : through_cap(g, s, row.cap);
}

template <class F, class S> COPD_FN F dlogit(F s, F a, F b, const RowGradient<S>& row) {
    return dlogit_of(exp_(s - row.max), s, a, b, row);
}

// The gradient at the top token, through the cap.
template <class Row> COPD_FN auto at_top(const Row& row) {
    return row.cap == 0 || row.p_top == 0 ? row.at_top : through_cap(row.at_top, row.max, row.cap);
}

// --- log-probabilities ----------------------------------------------------------------------------

// g_v = dlogp (1[v = token] - p_v) - dentropy p_v (log p_v + entropy) + dlse p_v
template <class S> struct LogProbGradient {
    S max, p_top, mean, dlogp, dentropy, dlse, at_top, cap;
    Index<S> top, token;

    COPD_FN LogProbGradient(const Side<S>& side, Index<S> token, S dlogp, S dentropy, S dlse, S cap)
        : max(side.max), p_top(0), mean(side.mean()), dlogp(dlogp), dentropy(dentropy), dlse(dlse), at_top(0),
          cap(cap), top(side.top), token(token) {
        if (dlogp == 0 && dentropy == 0 && dlse == 0) return;  // without weight, as above
        p_top = side.p_top();
        S own = token == side.top ? side.tail * p_top : -p_top;
        at_top = dlogp * own + (dentropy * mean + dlse) * p_top;
    }
};

// Everywhere but at the top token, as above.
template <class F, class S> COPD_FN F dlogit(F z, Index<F> col, const LogProbGradient<S>& row) {
    if (row.p_top == 0) return F{};
    F x = z - row.max;
    F p = exp_(x) * row.p_top;
    F g = p * ((row.dlse - row.dlogp) - row.dentropy * (x - row.mean));
    g = p == 0 ? F{} : g;
    g += col == row.token ? F{} + row.dlogp : F{};
    return row.cap == 0 ? g : through_cap(g, z, row.cap);
}

}  // namespace copd::COPD_ISA

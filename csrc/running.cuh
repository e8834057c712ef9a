// What a thread keeps of the columns it reads, and how a block's threads join it. No branch while reading: of a warp's 32
// threads nearly always one meets a new largest logit, and all would pay for its way. What is rare is made again when
// the row is through.
#pragma once

#include "rows.h"

namespace copd::cuda {
namespace {

#ifndef COPD_THREADS
#define COPD_THREADS 512
#endif
constexpr int THREADS = COPD_THREADS, WARPS = THREADS / 32;

// what is read beyond the row, and the maximum before any mass: finite, so that differences are
template <class S> inline constexpr S LOWEST = S(-3e38);

enum class Moment { none, of_difference, of_logits };  // of nothing, z - other, or z itself

// The group, N neighbouring columns, that holds the top token is kept apart from the tail, which therefore never has
// the top's 1 in it.
template <Moment M, class S, int N> struct Running {
    S max = LOWEST<S>;
    Index<S> first = -1;      // where the top's group starts
    S tail = 0, held = 0;     // sums of exp(z - max): outside that group, and in it
    S offset = 0, moment = 0; // z - other at the top, and the sum of exp(z - max) (z - other - offset)

    __device__ void add(const S (&z)[N], const S (&other)[N], Index<S> col) {
        S largest = z[0];
#pragma unroll
        for (int i = 1; i < N; ++i) largest = larger(z[i], largest);
        bool grew = largest > max;
        S top = grew ? largest : max, scale = exp_(max - top), whole = tail + held, mass = 0, terms = 0;
        S at = M == Moment::of_logits ? top : offset;
        if constexpr (M == Moment::of_difference)
#pragma unroll
            for (int i = N - 1; i >= 0; --i) at = grew && z[i] == largest ? z[i] - other[i] : at;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            S e = exp_(z[i] - top);
            mass += e;
            if constexpr (M == Moment::of_logits) terms += e * (z[i] - at);
            if constexpr (M == Moment::of_difference) terms += e * ((z[i] - other[i]) - at);
        }
        if constexpr (M != Moment::none) moment = scale * (moment + whole * (offset - at)) + terms;
        tail = grew ? scale * whole : tail + mass;
        held = grew ? mass : held;
        first = grew ? col : first;
        max = top, offset = at;
    }

    // Of the group at `first`, read again. A moment that is not finite tells that a logit is infinite, NaN or without
    // mass on one side only: `side` then says nothing.
    __device__ bool settle(const S (&z)[N], const S (&other)[N], Side<S>& side) const {
        side = {};
        if (first < 0 || !(moment - moment == 0)) return false;
        S cross = 0, rest = tail;
        Index<S> top = -1;
#pragma unroll
        for (int i = N - 1; i >= 0; --i) {
            cross = z[i] == max ? other[i] : cross;
            top = z[i] == max ? first + i : top;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) rest += first + i == top ? S(0) : exp_(z[i] - max);
        side = {max, top, rest, cross, moment};
        return true;
    }
};

template <class S> struct Sides {
    Side<S> s, t;
};

template <class S> __device__ Sides<S> merge(const Sides<S>& a, const Sides<S>& b) {
    return {merge(a.s, b.s), merge(a.t, b.t)};
}

template <class S> __device__ JsdSums<S> merge(const JsdSums<S>& a, const JsdSums<S>& b) {
    return {a.to_teacher + b.to_teacher, a.to_student + b.to_student, a.moment + b.moment};
}

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

}  // namespace
}  // namespace copd::cuda

// What one lane computes with: a number on a GPU, a vector register of a CPU. A CPU's vectors take arithmetic and
// comparisons from the compiler's vector extension (GCC, Clang); exp, expm1 and log1p are here. Their width follows from
// what the file is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Code for different processors lives in one library: a namespace each keeps the linker from mixing it up.
#ifndef COPD_ISA
#define COPD_ISA plain
#endif

#ifdef __CUDACC__
#define COPD_FN __device__ __forceinline__
#else
#define COPD_FN inline __attribute__((always_inline))
#endif

namespace copd::COPD_ISA {

template <class F> struct LaneOf {
    using Number = F;
    using Index = int32_t;
};
template <> struct LaneOf<double> {
    using Number = double;
    using Index = int64_t;
};
template <class F> using Index = typename LaneOf<F>::Index;
template <class F> using Number = typename LaneOf<F>::Number;

#ifdef __CUDACC__
// Two instructions. Its relative error grows with |x|, but what has mass is near 0: |x| exp(x) <= 0.37.
COPD_FN float exp_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}
#else
COPD_FN float exp_(float x) { return ::expf(x); }
#endif
COPD_FN double exp_(double x) { return ::exp(x); }
COPD_FN float expm1_(float x) { return ::expm1f(x); }
COPD_FN double expm1_(double x) { return ::expm1(x); }
// both exp(x) - 1 and exp(x), for x <= 0
template <class F> COPD_FN F expm1_(F x, F& e) {
    e = exp_(x);
    return expm1_(x);
}
COPD_FN float log1p_(float x) { return ::log1pf(x); }
COPD_FN double log1p_(double x) { return ::log1p(x); }
COPD_FN float log_(float x) { return ::logf(x); }
COPD_FN double log_(double x) { return ::log(x); }
COPD_FN bool any(bool x) { return x; }
template <class F> COPD_FN F larger(F a, F b) { return a > b ? a : b; }

#ifndef __CUDACC__

#if defined(__AVX512F__)
inline constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
inline constexpr int VECTOR_BYTES = 32;
#else
inline constexpr int VECTOR_BYTES = 16;
#endif

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t Longs __attribute__((vector_size(VECTOR_BYTES)));

template <> struct LaneOf<Floats> {
    using Number = float;
    using Index = Ints;
};
template <> struct LaneOf<Doubles> {
    using Number = double;
    using Index = Longs;
};
// the same where a row happens to begin
typedef float LooseFloats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef double LooseDoubles __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
template <class S> struct VectorOf;
template <> struct VectorOf<float> { using Type = Floats; using Loose = LooseFloats; };
template <> struct VectorOf<double> { using Type = Doubles; using Loose = LooseDoubles; };
template <class S> using Vector = typename VectorOf<S>::Type;
template <class S> using Loose = typename VectorOf<S>::Loose;
template <class S> inline constexpr int WIDTH = VECTOR_BYTES / sizeof(S);

template <class I> COPD_FN bool any_lane(I mask) {
#ifdef __AVX512F__
    return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    I none{};
    return std::memcmp(&mask, &none, sizeof mask) != 0;
#endif
}
COPD_FN bool any(Ints mask) { return any_lane(mask); }
COPD_FN bool any(Longs mask) { return any_lane(mask); }

// How a number is laid out, and the coefficients that its precision needs.
template <class F> struct Format;
template <> struct Format<Floats> {
    static constexpr int MANTISSA = 23, BIAS = 127, TERMS = 7, LOG_TERMS = 4;
    // below LOWEST exp is 0 even as a subnormal number; LN2_HIGH times any exponent is exact
    static constexpr float LOWEST = -104, LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    static constexpr int32_t ROOT_HALF = 0x3f3504f3;
};
template <> struct Format<Doubles> {
    static constexpr int MANTISSA = 52, BIAS = 1023, TERMS = 13, LOG_TERMS = 10;
    static constexpr double LOWEST = -746, LOG2E = 1.4426950408889634, LN2_HIGH = 0.693147180369123816490,
                            LN2_LOW = 1.90821492927058770002e-10;
    static constexpr int64_t ROOT_HALF = 0x3fe6a09e667f3bcd;
};

// 2**n for n in [-BIAS, BIAS]: 2**-BIAS comes out as 0
template <class F> COPD_FN F power_of_two(Index<F> n) {
    return (F)((n + Format<F>::BIAS) << Format<F>::MANTISSA);
}

// y * 2**n for a whole number n >= -2 BIAS, rounded once
#ifdef __AVX512F__
COPD_FN Floats scaled(Floats y, Floats n) { return (Floats)_mm512_scalef_ps((__m512)y, (__m512)n); }
COPD_FN Doubles scaled(Doubles y, Doubles n) { return (Doubles)_mm512_scalef_pd((__m512d)y, (__m512d)n); }
#else
template <class F> COPD_FN F scaled(F y, F n) {
    // in two halves, so that results below the smallest normal number are reached
    Index<F> whole = __builtin_convertvector(n, Index<F>), half = whole >> 1;
    return y * power_of_two<F>(half) * power_of_two<F>(whole - half);
}
#endif

struct Taylor {
    double of_exp[16] = {1};
    constexpr Taylor() {
        for (int k = 1; k < 16; ++k) of_exp[k] = of_exp[k - 1] / k;
    }
};
inline constexpr Taylor TAYLOR;

// x = n log 2 + r, n whole; returns exp(r) - 1 by its Taylor series, |r| <= log(2) / 2
template <class F> COPD_FN F reduced(F x, F& n) {
    using K = Format<F>;
    using S = Number<F>;
    x = x < K::LOWEST ? F{} + K::LOWEST : x;
    // adding and taking off 1.5 * 2**MANTISSA rounds to a whole number
    constexpr S ROUND = S(3) * S(int64_t(1) << (K::MANTISSA - 1));
    n = (x * K::LOG2E + ROUND) - ROUND;
    F r = (x - n * K::LN2_HIGH) - n * K::LN2_LOW;
    F sum = F{} + S(TAYLOR.of_exp[K::TERMS]);
    for (int k = K::TERMS - 1; k > 1; --k) sum = r * sum + S(TAYLOR.of_exp[k]);
    return r + r * r * sum;
}

// exp(x) for x <= 0, within two units in the last place; 0 where it is not a normal number, NaN for NaN
template <class F> COPD_FN F exp_nonpositive(F x) {
    F n, p = reduced(x, n);
    return scaled(1 + p, n);
}
COPD_FN Floats exp_(Floats x) { return exp_nonpositive(x); }
COPD_FN Doubles exp_(Doubles x) { return exp_nonpositive(x); }

// exp(x) - 1 for x <= 0, and exp(x) for next to nothing
template <class F> COPD_FN F expm1_nonpositive(F x, F& e) {
    F n, p = reduced(x, n), scale = scaled(F{} + 1, n);
    e = scale * (1 + p);
    return scale * p + (scale - 1);
}
COPD_FN Floats expm1_(Floats x, Floats& e) { return expm1_nonpositive(x, e); }
COPD_FN Doubles expm1_(Doubles x, Doubles& e) { return expm1_nonpositive(x, e); }
template <class F> COPD_FN F expm1_(F x) {
    F e;
    return expm1_(x, e);
}

// log(w + lost) for w > 0: w = 2**k (1 + f), and log(1 + f) = 2 atanh(f / (2 + f)) by its series
template <class F> COPD_FN F log_of(F w, F lost) {
    using K = Format<F>;
    using S = Number<F>;
    using I = Index<F>;
    I k = ((I)w - K::ROOT_HALF) >> K::MANTISSA;
    F scale = power_of_two<F>(-k);
    F f = (w * scale - 1) + lost * scale;
    F s = f / (2 + f), square = s * s;
    F sum = F{} + S(1) / S(2 * K::LOG_TERMS + 1);
    for (int i = K::LOG_TERMS - 1; i > 0; --i) sum = S(1) / S(2 * i + 1) + square * sum;
    F log_f = 2 * s + 2 * s * square * sum;
    F n = __builtin_convertvector(k, F);
    return (n * K::LN2_HIGH + log_f) + n * K::LN2_LOW;
}
COPD_FN Floats log_(Floats x) { return log_of(x, Floats{}); }
COPD_FN Doubles log_(Doubles x) { return log_of(x, Doubles{}); }
// with what the rounding of 1 + y takes off
COPD_FN Floats log1p_(Floats y) { return log_of(1 + y, y - ((1 + y) - 1)); }
COPD_FN Doubles log1p_(Doubles y) { return log_of(1 + y, y - ((1 + y) - 1)); }

#endif  // __CUDACC__

}  // namespace copd::COPD_ISA

// What bindings.cpp calls: the same functions for every processor, and the arguments they share.
#pragma once

#include <cstdint>

namespace copd {

enum class Type { float32, float64, float16, bfloat16 };

// What logits lack when a GEMM has made them: those of some heads become cap tanh((z + bias) / cap) / temperature where
// they are, before anything else is made of them.
struct Raw {
    const int* heads;
    int count;
    const void* bias;         // (H, V), rows bias_stride apart; null for none
    int64_t bias_stride;
    const double* caps;       // (H,), 0 for none
    const void* temperature;  // (R,); null for none
};

// A chunk's logits (H, R, V), rows `stride` numbers apart and heads R rows, float32 or float64; per-token numbers are in
// the same type.
struct Logits {
    void* z;
    Type type;
    int heads;
    int64_t R, V, stride;
    Raw raw;
};

// The gradient (R, V) with respect to the student's logits before its softcap; null for none. It may be those logits.
struct Gradient {
    void* dlogits;
    Type type;
    int64_t stride;  // from row to row
    double cap;  // the student's softcap over temperature; 0 for none
    const void* caps;  // (R,) of them, one a row; null where all are `cap`
};

struct KlArguments {
    Logits logits;
    int student;
    const int* teachers;  // T heads
    int T;
    int divergence;      // of rows.h
    double beta;         // of jsd
    const void* weight;  // (T, R), of the gradient alone; null without one
    Gradient gradient;
    void* value;  // (T, R)
    int64_t weight_stride, value_stride;  // from teacher to teacher
};

// Statistics of each row, or from them the gradient of its log-probability, entropy and logsumexp.
struct LogProbArguments {
    Logits logits;
    void *max, *tail, *moment;            // (R,), of rows.h: written, or read where a gradient is asked for
    int64_t* top;                         // (R,), likewise
    const int64_t* tokens;                // (R,), of the gradient
    const void *dlogp, *dentropy, *dlse;  // (R,) upstream; null where there is none
    Gradient gradient;
};

struct AgreementArguments {
    Logits logits;
    int student;
    const int* teachers;
    int T;
    int64_t k;
    void *overlap, *forward, *reverse;  // (T, R)
};

// A GEMM's operand seen as (outer, K), rows of the left one or columns of the right one: float32, float16 or bfloat16
// numbers, number k of the i-th at i * stride + k * k_stride. One of the strides is 1.
struct Operand {
    const void* data;
    Type type;
    int64_t stride, k_stride;
};

// out (M, N) float32, rows out_stride apart, = alpha a b, or += that.
struct GemmArguments {
    int64_t M, N, K;
    Operand a, b;
    float* out;
    int64_t out_stride;
    float alpha;
    bool accumulate;
    int parts;  // bf16 numbers that a float32 is multiplied as, 1 or 2
};

struct CpuRows {
    void (*kl)(const KlArguments&, int threads);
    void (*logprob)(const LogProbArguments&, int threads);
    void (*agreement)(const AgreementArguments&, int threads);
    void (*complete)(const Logits&, int threads);
};

}  // namespace copd

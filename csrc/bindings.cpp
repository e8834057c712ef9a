// copd_kernels._C, a table of contents: addresses and sizes in, nothing out. No libtorch: copd_kernels/rows/native.py
// takes the tensors apart and checks them; what is repeated here protects memory.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "table.h"

namespace py = pybind11;

namespace copd {

namespace plain { extern const CpuRows rows; }
#ifdef COPD_X86
namespace avx2 { extern const CpuRows rows; }
namespace avx512 { extern const CpuRows rows; }
#endif
#ifdef COPD_AMX
namespace amx {
bool available();
void gemm(const GemmArguments&, int threads);
}
#endif

#ifdef COPD_CUDA
namespace cuda {
void kl(const KlArguments&, uintptr_t stream);
void logprob(const LogProbArguments&, uintptr_t stream);
void complete(const Logits&, uintptr_t stream);
std::pair<int, int> versions();
}
#endif

namespace {

// The widest instructions this processor has; COPD_ISA asks for fewer.
std::pair<const char*, const CpuRows*> choose() {
    const char* asked = std::getenv("COPD_ISA");
    std::string isa = asked ? asked : "";
    if (!isa.empty() && isa != "plain" && isa != "avx2" && isa != "avx512" && isa != "amx")
        throw std::runtime_error("COPD_ISA must be plain, avx2, avx512 or amx; got '" + isa + "'");
#ifdef COPD_X86
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512cd");
#ifdef COPD_AMX
    // rows have no use for it, GEMMs do
    if (avx512 && (isa.empty() || isa == "amx") && amx::available()) return {"amx", &avx512::rows};
#endif
    if (avx512 && (isa.empty() || isa == "avx512")) return {"avx512", &avx512::rows};
    if (avx2 && (isa.empty() || isa == "avx2")) return {"avx2", &avx2::rows};
#endif
    if (!isa.empty() && isa != "plain") throw std::runtime_error("COPD_ISA: this processor has no " + isa);
    return {"plain", &plain::rows};
}

const std::pair<const char*, const CpuRows*>& cpu() {
    static const auto chosen = choose();
    return chosen;
}

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

Type type_of(const std::string& name) {
    if (name == "float32") return Type::float32;
    if (name == "float64") return Type::float64;
    if (name == "float16") return Type::float16;
    require(name == "bfloat16", "type must be float32, float64, float16 or bfloat16");
    return Type::bfloat16;
}

// A stride of 0 stands for the size of what it steps over: nothing lies between.
int64_t stride_of(int64_t stride, int64_t size) {
    require(stride == 0 || stride >= size, "a stride must be 0 or at least what it steps over");
    return stride ? stride : size;
}

// Heads whose logits are raw, and of all heads the address of their biases and the way from one to the next, softcaps
// and the address of the rows' temperatures; an address of 0 is none.
using RawTuple = std::tuple<std::vector<int>, uintptr_t, int64_t, std::vector<double>, uintptr_t>;

Logits logits_of(uintptr_t z, const std::string& type, int heads, int64_t R, int64_t V, int64_t stride,
                 const RawTuple& lacks) {
    require(type == "float32" || type == "float64", "logits must be float32 or float64");
    require(heads > 0 && R >= 0 && V > 0 && V < INT32_MAX, "sizes must be positive, V below 2**31");
    require(R == 0 || z, "logits must not be null");
    const auto& [raw, bias, bias_stride, caps, temperature] = lacks;
    for (int head : raw) require(head >= 0 && head < heads && head < (int)caps.size(), "raw must be among the heads");
    return {(void*)z, type_of(type), heads, R, V, stride_of(stride, V),
            {raw.data(), (int)raw.size(), (const void*)bias, bias_stride, caps.data(), (const void*)temperature}};
}

Gradient gradient_of(const Logits& logits, uintptr_t dlogits, const std::string& type, double cap, uintptr_t caps,
                     int64_t stride) {
    Gradient gradient{(void*)dlogits, type_of(type), stride_of(stride, logits.V), cap, (const void*)caps};
    bool same = gradient.type == logits.type;
    require(same || (logits.type == Type::float32 && gradient.type != Type::float64),
            "dlogits must have the logits' type, or be 16 bits wide");
    return gradient;
}

void check_heads(const Logits& logits, int student, const std::vector<int>& teachers) {
    require(!teachers.empty(), "teachers must not be empty");
    require(student >= 0 && student < logits.heads, "student must be one of the heads");
    for (int j : teachers) require(j >= 0 && j < logits.heads, "teachers must be among the heads");
}

const Logits& logits_in(const Logits& logits) { return logits; }
template <class Arguments> const Logits& logits_in(const Arguments& args) { return args.logits; }

// Runs on the CPU with `place` threads, or on the current GPU in the stream `place`.
template <class Arguments>
void call(bool on_cuda, uintptr_t place, const Arguments& args, void (*CpuRows::*on_cpu)(const Arguments&, int),
          void (*kernel)(const Arguments&, uintptr_t)) {
    if (logits_in(args).R == 0) return;
    py::gil_scoped_release release;
    if (on_cuda) {
        if (!kernel) throw std::runtime_error("the CUDA part is not built; run `COPD_CUDA=1 pip install -e .`");
        kernel(args, place);
    } else {
        (cpu().second->*on_cpu)(args, (int)place);
    }
}

#ifdef COPD_CUDA
constexpr auto kl_kernel = cuda::kl;
constexpr auto logprob_kernel = cuda::logprob;
constexpr auto complete_kernel = cuda::complete;
constexpr auto cuda_versions = cuda::versions;
constexpr bool HAS_CUDA = true;
#else
constexpr void (*kl_kernel)(const KlArguments&, uintptr_t) = nullptr;
constexpr void (*logprob_kernel)(const LogProbArguments&, uintptr_t) = nullptr;
constexpr void (*complete_kernel)(const Logits&, uintptr_t) = nullptr;
std::pair<int, int> cuda_versions() { return {0, 0}; }
constexpr bool HAS_CUDA = false;
#endif

void kl(uintptr_t z, const std::string& type, int heads, int64_t R, int64_t V, int student,
        const std::vector<int>& teachers, int divergence, double beta, uintptr_t weight, double cap, uintptr_t dlogits,
        const std::string& dlogits_type, uintptr_t value, bool on_cuda, uintptr_t place, int64_t weight_stride,
        int64_t value_stride, int64_t stride, int64_t dlogits_stride, uintptr_t caps, const RawTuple& raw) {
    Logits logits = logits_of(z, type, heads, R, V, stride, raw);
    check_heads(logits, student, teachers);
    require(divergence >= 0 && divergence < 4, "divergence must be in 0..3");
    require(R == 0 || value, "value must not be null");
    require(!dlogits || weight, "a gradient needs weights");
    KlArguments args{logits, student, teachers.data(), (int)teachers.size(), divergence, beta, (const void*)weight,
                     gradient_of(logits, dlogits, dlogits_type, cap, caps, dlogits_stride), (void*)value,
                     stride_of(weight_stride, R), stride_of(value_stride, R)};
    call(on_cuda, place, args, &CpuRows::kl, kl_kernel);
}

void logprob(uintptr_t z, const std::string& type, int64_t R, int64_t V, const std::vector<uintptr_t>& side,
             uintptr_t top, uintptr_t tokens, const std::vector<uintptr_t>& upstream, double cap, uintptr_t dlogits,
             const std::string& dlogits_type, bool on_cuda, uintptr_t place, int64_t stride, int64_t dlogits_stride,
             uintptr_t caps, const RawTuple& raw) {
    Logits logits = logits_of(z, type, 1, R, V, stride, raw);
    require(side.size() == 3 && upstream.size() == (dlogits ? 3 : 0), "there must be three numbers a row");
    for (uintptr_t x : {side[0], side[1], side[2], top}) require(R == 0 || x, "statistics must not be null");
    for (uintptr_t x : upstream) require(R == 0 || (x && tokens), "tokens and upstream must not be null");
    for (int64_t r = 0; r < R && dlogits && !on_cuda; ++r) {
        int64_t token = ((const int64_t*)tokens)[r], at = ((const int64_t*)top)[r];
        require(token >= 0 && token < V, "tokens must be in 0..V-1");
        require(at >= -1 && at < V, "top must be in -1..V-1");
    }
    LogProbArguments args{logits, (void*)side[0], (void*)side[1], (void*)side[2], (int64_t*)top,
                          (const int64_t*)tokens, nullptr, nullptr, nullptr,
                          gradient_of(logits, dlogits, dlogits_type, cap, caps, dlogits_stride)};
    if (dlogits)
        args.dlogp = (const void*)upstream[0], args.dentropy = (const void*)upstream[1],
        args.dlse = (const void*)upstream[2];
    call(on_cuda, place, args, &CpuRows::logprob, logprob_kernel);
}

void agreement(uintptr_t z, const std::string& type, int heads, int64_t R, int64_t V, int student,
               const std::vector<int>& teachers, int64_t k, uintptr_t overlap, uintptr_t forward, uintptr_t reverse,
               int threads, int64_t stride, const RawTuple& raw) {
    Logits logits = logits_of(z, type, heads, R, V, stride, raw);
    check_heads(logits, student, teachers);
    require(k > 0 && k <= V, "k must be in 1..V");
    require(R == 0 || (overlap && forward && reverse), "results must not be null");
    AgreementArguments args{logits, student, teachers.data(), (int)teachers.size(), k,
                            (void*)overlap, (void*)forward, (void*)reverse};
    py::gil_scoped_release release;
    cpu().second->agreement(args, threads);
}

void complete(uintptr_t z, const std::string& type, int64_t R, int64_t V, bool on_cuda, uintptr_t place, int64_t stride,
              const RawTuple& raw) {
    call(on_cuda, place, logits_of(z, type, 1, R, V, stride, raw), &CpuRows::complete, complete_kernel);
}

#ifdef COPD_AMX
Operand operand_of(uintptr_t data, const std::string& type, std::pair<int64_t, int64_t> strides) {
    require(type != "float64", "operands must be float32, float16 or bfloat16");
    require(strides.first == 1 || strides.second == 1, "one of an operand's strides must be 1");
    require(data, "operands must not be null");
    return {(const void*)data, type_of(type), strides.first, strides.second};
}

void gemm(int64_t M, int64_t N, int64_t K, uintptr_t a, const std::string& a_type, std::pair<int64_t, int64_t> a_strides,
          uintptr_t b, const std::string& b_type, std::pair<int64_t, int64_t> b_strides, uintptr_t out,
          int64_t out_stride, double alpha, bool accumulate, int parts, int threads) {
    require(std::string(cpu().first) == "amx", "this processor has no AMX, or COPD_ISA asks for less");
    require(M >= 0 && N >= 0 && K >= 0 && threads > 0, "sizes must not be negative");
    require(parts == 1 || parts == 2, "parts must be 1 or 2");
    if (M == 0 || N == 0) return;
    require(out && (M == 1 || out_stride >= N), "out must not be null, its rows at least N apart");
    // of no numbers at all, the address is any
    GemmArguments args{M, N, K, operand_of(K ? a : out, a_type, a_strides), operand_of(K ? b : out, b_type, b_strides),
                       (float*)out, out_stride, (float)alpha, accumulate, parts};
    py::gil_scoped_release release;
    amx::gemm(args, M * N * K < (1 << 18) ? 1 : threads);
}
#endif

}  // namespace
}  // namespace copd

PYBIND11_MODULE(_C, m) {
    m.attr("has_cuda") = copd::HAS_CUDA;
    m.def("cuda_versions", [] { return copd::cuda_versions(); });  // of the runtime linked in, and of the driver
    m.def("isa", [] { return copd::cpu().first; });
    using namespace py::literals;
    m.def("kl", &copd::kl, "z"_a, "type"_a, "heads"_a, "R"_a, "V"_a, "student"_a, "teachers"_a, "divergence"_a, "beta"_a,
          "weight"_a, "cap"_a, "dlogits"_a, "dlogits_type"_a, "value"_a, "on_cuda"_a, "place"_a, "weight_stride"_a = 0,
          "value_stride"_a = 0, "stride"_a = 0, "dlogits_stride"_a = 0, "caps"_a = 0, "raw"_a = copd::RawTuple{});
    m.def("logprob", &copd::logprob, "z"_a, "type"_a, "R"_a, "V"_a, "side"_a, "top"_a, "tokens"_a, "upstream"_a, "cap"_a,
          "dlogits"_a, "dlogits_type"_a, "on_cuda"_a, "place"_a, "stride"_a = 0, "dlogits_stride"_a = 0, "caps"_a = 0,
          "raw"_a = copd::RawTuple{});
    m.def("agreement", &copd::agreement, "z"_a, "type"_a, "heads"_a, "R"_a, "V"_a, "student"_a, "teachers"_a, "k"_a,
          "overlap"_a, "forward"_a, "reverse"_a, "threads"_a, "stride"_a = 0,
          "raw"_a = copd::RawTuple{});
#ifdef COPD_AMX
    m.def("gemm", &copd::gemm, "M"_a, "N"_a, "K"_a, "a"_a, "a_type"_a, "a_strides"_a, "b"_a, "b_type"_a, "b_strides"_a,
          "out"_a, "out_stride"_a, "alpha"_a, "accumulate"_a, "parts"_a, "threads"_a);
#endif
    m.def("complete", &copd::complete, "z"_a, "type"_a, "R"_a, "V"_a, "on_cuda"_a, "place"_a, "stride"_a = 0,
          "raw"_a = copd::RawTuple{});
}

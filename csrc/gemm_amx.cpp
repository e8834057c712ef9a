// GEMMs of 16-bit operands with fp32 sums, on the matrix unit of a CPU (AMX), which multiplies bf16 numbers.
//
// Other numbers are sums of bf16 ones, each the rounded rest of those before: fp16 exactly of two, fp32 to 16 bits of two,
// to 8 of one. Products of all of them are added.
//
// Threads pack a block of each operand together, in the order in which the unit reads it, and then share out the 32 x 32
// pieces of the output that the two blocks make. A number is summed in one order, whatever the number of threads.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <new>

#include "table.h"

namespace copd::amx {
namespace {

// a tile register: 16 rows of 64 bytes. Of a they are 16 rows by 32 of K, of b 16 pairs along K by 16 columns
constexpr int64_t ROWS = 16, DEPTH = 32, TILE = ROWS * DEPTH;
// a piece of the output: 2 x 2 tiles
constexpr int64_t PIECE = 2 * ROWS;
// most of a block; of K so much that a piece's b stays in the first-level cache while a runs past it
constexpr int64_t BLOCK_M = 1024, BLOCK_N = 512, BLOCK_K = 512;
// rows or columns that a thread packs at a time: several lines of memory in a row
constexpr int64_t TASK = 128;

using Bf16 = uint16_t;

int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// --- packing --------------------------------------------------------------------------------------

// How many bf16 numbers one of these becomes.
int parts_of(Type type, int parts_of_float) {
    return type == Type::bfloat16 ? 1 : type == Type::float16 ? 2 : parts_of_float;
}

inline __m512 widened(__m256i bf16) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16); }

// 32 numbers, in two halves, as parts.
template <int PARTS> inline void split(__m512 low, __m512 high, __m512i* part) {
#pragma GCC unroll 2
    for (int p = 0; p < PARTS; ++p) {
        part[p] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        // nothing is left of an infinite number, where inf - inf were NaN; a NaN leaves NaN
        __m512 l = widened(_mm512_castsi512_si256(part[p])), h = widened(_mm512_extracti64x4_epi64(part[p], 1));
        constexpr int INFINITE = 0x18;
        low = _mm512_maskz_sub_ps((__mmask16)~_mm512_fpclass_ps_mask(l, INFINITE), low, l);
        high = _mm512_maskz_sub_ps((__mmask16)~_mm512_fpclass_ps_mask(h, INFINITE), high, h);
    }
}

// 16 numbers from `at` and 16 from `then`, where the masks say and else 0, as parts.
template <Type TYPE, int PARTS>
inline void load(const void* data, int64_t at, int64_t then, __mmask16 low, __mmask16 high, __m512i* part) {
    if constexpr (TYPE == Type::float32) {
        const float* from = (const float*)data;
        split<PARTS>(_mm512_maskz_loadu_ps(low, from + at), _mm512_maskz_loadu_ps(high, from + then), part);
    } else {
        const Bf16* from = (const Bf16*)data;
        __m256i a = _mm256_maskz_loadu_epi16(low, from + at), b = _mm256_maskz_loadu_epi16(high, from + then);
        if constexpr (TYPE == Type::bfloat16)
            part[0] = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        else
            split<PARTS>(_mm512_cvtph_ps(a), _mm512_cvtph_ps(b), part);
    }
}

// Sixteen rows of sixteen 32-bit numbers become columns.
inline void transpose(__m512i* row) {
    __m512i x[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(row[i], row[i + 1]), b = _mm512_unpackhi_epi32(row[i], row[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(row[i + 2], row[i + 3]), d = _mm512_unpackhi_epi32(row[i + 2], row[i + 3]);
        x[i] = _mm512_unpacklo_epi64(a, c), x[i + 1] = _mm512_unpackhi_epi64(a, c);
        x[i + 2] = _mm512_unpacklo_epi64(b, d), x[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88), d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
        row[i] = _mm512_shuffle_i32x4(a, c, 0x88), row[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        row[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd), row[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// What of an operand is packed: `outer` (rows of a, columns of b) and k, which end at the others.
struct Region {
    int64_t outer, outer_end, k, k_end;
};

inline __mmask16 mask_of(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

constexpr auto ZIP = [] {
    std::array<Bf16, 32> order{};
    for (int i = 0; i < 16; ++i) order[2 * i] = i, order[2 * i + 1] = 16 + i;
    return order;
}();

// One tile, its parts `apart` from one another; 0 outside of the region.
template <Type TYPE, int PARTS, bool ALONG_K, bool OF_B>
inline void pack_tile(const Operand& operand, const Region& from, Bf16* out, int64_t apart) {
    const __m512i zip = _mm512_loadu_si512(ZIP.data());
    __m512i rows[PARTS][16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
        __m512i part[PARTS];
        if constexpr (ALONG_K) {
            // 32 numbers of one row
            const int64_t at = (from.outer + r) * operand.stride + from.k;
            const int64_t count = from.outer + r < from.outer_end ? from.k_end - from.k : 0;
            load<TYPE, PARTS>(operand.data, at, at + 16, mask_of(count), mask_of(count - 16), part);
        } else {
            // two rows of 16 numbers, zipped to pairs along K
            const int64_t k = from.k + 2 * r, at = k * operand.k_stride + from.outer;
            const __mmask16 mask = mask_of(from.outer_end - from.outer);
            load<TYPE, PARTS>(operand.data, at, at + operand.k_stride, k < from.k_end ? mask : 0,
                              k + 1 < from.k_end ? mask : 0, part);
            for (int p = 0; p < PARTS; ++p) part[p] = _mm512_permutexvar_epi16(zip, part[p]);
        }
        for (int p = 0; p < PARTS; ++p) rows[p][r] = part[p];
    }
#pragma GCC unroll 2
    for (int p = 0; p < PARTS; ++p) {
        // a tile of b holds in its columns what one of a holds in its rows
        if constexpr (ALONG_K == OF_B) transpose(rows[p]);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) _mm512_store_si512(out + p * apart + r * DEPTH, rows[p][r]);
    }
}

// Tiles of 16 by `depth` tiles along K, one strip after another, read in the order of memory.
template <Type TYPE, int PARTS, bool ALONG_K, bool OF_B>
void pack_strips(const Operand& operand, const Region& region, Bf16* out, int64_t apart) {
    const int64_t depth = up(region.k_end - region.k, DEPTH) / DEPTH;
    const int64_t strips = up(region.outer_end - region.outer, PIECE) / ROWS;
    for (int64_t i = 0; i < strips * depth; ++i) {
        const int64_t strip = ALONG_K ? i / depth : i % strips, t = ALONG_K ? i % depth : i / strips;
        const Region tile{region.outer + strip * ROWS, region.outer_end, region.k + t * DEPTH, region.k_end};
        pack_tile<TYPE, PARTS, ALONG_K, OF_B>(operand, tile, out + (strip * depth + t) * TILE, apart);
    }
}

template <bool OF_B> void pack(const Operand& operand, int parts, const Region& region, Bf16* out, int64_t apart) {
    auto with = [&]<Type TYPE, int PARTS> {
        if (operand.k_stride == 1)
            pack_strips<TYPE, PARTS, true, OF_B>(operand, region, out, apart);
        else
            pack_strips<TYPE, PARTS, false, OF_B>(operand, region, out, apart);
    };
    if (operand.type == Type::bfloat16) return with.template operator()<Type::bfloat16, 1>();
    if (operand.type == Type::float16) return with.template operator()<Type::float16, 2>();
    if (parts == 1) return with.template operator()<Type::float32, 1>();
    with.template operator()<Type::float32, 2>();
}

// --- one piece of the output ----------------------------------------------------------------------

// Two strips, packed.
struct Strips {
    const Bf16* first;  // tiles along K
    int64_t next;       // to the second strip
    int64_t apart;      // to the next part of the numbers
    int parts;
};

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = ROWS;
    }
};

// Sums over `depth` tiles along K of the parts' products, the smallest first, in tiles 0 to 3. Meanwhile the processor
// fetches where they will go.
inline void multiply(const Strips& a, const Strips& b, int64_t depth, const float* out, int64_t stride) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    int64_t row = 0;
    for (int i = a.parts - 1; i >= 0; --i) {
        for (int j = b.parts - 1; j >= 0; --j) {
            const Bf16 *left = a.first + i * a.apart, *right = b.first + j * b.apart;
            for (int64_t k = 0; k < depth * TILE; k += TILE) {
                _tile_loadd(4, left + k, 64);
                _tile_loadd(6, right + k, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right + b.next + k, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, left + a.next + k, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
                for (int64_t end = std::min(row + 4, PIECE); row < end; ++row) {
                    __builtin_prefetch(out + row * stride, 1);
                    __builtin_prefetch(out + row * stride + ROWS, 1);
                }
            }
        }
    }
}

// The piece's sums times alpha to `out`, or onto it; `rows` and `columns` of it exist.
inline void finish(float* out, int64_t stride, int64_t rows, int64_t columns, float alpha, bool onto) {
    alignas(64) float piece[PIECE * PIECE];
    constexpr int64_t bytes = PIECE * sizeof(float);
    _tile_stored(0, piece, bytes);
    _tile_stored(1, piece + ROWS, bytes);
    _tile_stored(2, piece + ROWS * PIECE, bytes);
    _tile_stored(3, piece + ROWS * PIECE + ROWS, bytes);
    const __m512 factor = _mm512_set1_ps(alpha);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; c += 16) {
            const __mmask16 mask = columns - c >= 16 ? 0xffff : (1u << (columns - c)) - 1;
            float* to = out + r * stride + c;
            __m512 x = _mm512_mul_ps(factor, _mm512_load_ps(piece + r * PIECE + c));
            if (onto) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, to));
            _mm512_mask_storeu_ps(to, mask, x);
        }
    }
}

}  // namespace

// Whether the processor has the unit and the system lets this process use it.
bool available() {
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    const bool tiles = d >> 24 & 1, bf16_tiles = d >> 22 & 1;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
    const bool bf16_vectors = a >> 5 & 1;
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl's
    return tiles && bf16_tiles && bf16_vectors && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}

void gemm(const GemmArguments& args, int threads) {
    const int64_t M = args.M, N = args.N, K = args.K, stride = args.out_stride;
    const Operand a = args.a, b = args.b;
    const int a_parts = parts_of(a.type, args.parts), b_parts = parts_of(b.type, args.parts);
    const int64_t block_m = std::min(BLOCK_M, up(M, PIECE)), block_n = std::min(BLOCK_N, up(N, PIECE));
    const int64_t block_k = std::clamp<int64_t>(up(K, DEPTH), DEPTH, BLOCK_K);
    const int64_t a_apart = block_m * block_k, b_apart = block_n * block_k;
    struct Free {
        void operator()(Bf16* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    std::unique_ptr<Bf16, Free> packed(new (std::align_val_t(64)) Bf16[a_parts * a_apart + b_parts * b_apart]);
    Bf16 *packed_a = packed.get(), *packed_b = packed_a + a_parts * a_apart;
    const TileConfig config;
#pragma omp parallel num_threads(threads)
    {
        _tile_loadconfig(&config);
        for (int64_t n0 = 0; n0 < N; n0 += block_n)
            for (int64_t m0 = 0; m0 < M; m0 += block_m)
                for (int64_t k0 = 0; k0 < std::max<int64_t>(K, 1); k0 += block_k) {
                    const int64_t m1 = std::min(m0 + block_m, M), n1 = std::min(n0 + block_n, N);
                    const int64_t k1 = std::min(k0 + block_k, K), strip = up(k1 - k0, DEPTH) * ROWS;
                    const int64_t a_tasks = up(m1 - m0, TASK) / TASK;
                    // packed for the rows before
                    const bool have_b = m0 && K <= block_k;
                    const int64_t b_tasks = have_b ? 0 : up(n1 - n0, TASK) / TASK;
#pragma omp for schedule(static)
                    for (int64_t task = 0; task < a_tasks + b_tasks; ++task) {
                        if (const int64_t m = task * TASK; task < a_tasks) {
                            const Region region{m0 + m, std::min(m0 + m + TASK, m1), k0, k1};
                            pack<false>(a, a_parts, region, packed_a + m / ROWS * strip, a_apart);
                        } else {
                            const int64_t n = (task - a_tasks) * TASK;
                            const Region region{n0 + n, std::min(n0 + n + TASK, n1), k0, k1};
                            pack<true>(b, b_parts, region, packed_b + n / ROWS * strip, b_apart);
                        }
                    }
                    const int64_t down = up(m1 - m0, PIECE) / PIECE, across = up(n1 - n0, PIECE) / PIECE;
#pragma omp for schedule(static)
                    for (int64_t piece = 0; piece < down * across; ++piece) {
                        const int64_t m = piece / across * PIECE, n = piece % across * PIECE;
                        float* to = args.out + (m0 + m) * stride + n0 + n;
                        multiply({packed_a + m / ROWS * strip, strip, a_apart, a_parts},
                                 {packed_b + n / ROWS * strip, strip, b_apart, b_parts}, strip / TILE, to, stride);
                        const int64_t rows = std::min(PIECE, m1 - m0 - m), columns = std::min(PIECE, n1 - n0 - n);
                        finish(to, stride, rows, columns, args.alpha, args.accumulate || k0);
                    }
                }
        _tile_release();
    }
}

}  // namespace copd::amx

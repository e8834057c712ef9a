// What a GPU's threads do with rows. Two ways to read a row, one way to work on it:
//
//   FromMemory   a block a row, each sweep reads device memory again: any architecture, type, alignment and width
//   FromCluster  sm_90 and later: the blocks of a cluster hold a row of every head in their shared memory, so a logit is
//                read from device memory once. Bulk copies fill a ring of segments and complete on its mbarriers; a
//                segment is refilled for a later row as soon as the last sweep is through with it.
//
// A row's sums merge in a fixed order (threads, warps, blocks), and no result depends on timing.

#pragma once

#ifdef __CUDACC__
#include "hopper.cuh"
#endif
#include "rows.h"
#include "running.cuh"
#include "table.h"

namespace copd::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int MAX_TEACHERS = 16;

// What a kernel is told, by value.
template <class S, class Out> struct Work {
    S* z;  // (H, R, V)
    int64_t R, V, stride, out_stride;  // from row to row, of the logits and of dlogits
    int64_t weight_stride, value_stride;  // from teacher to teacher
    int student, T;
    int teachers[MAX_TEACHERS];
    Mixture<S> mixture;
    S cap;
    const S* caps;    // (R,), one a row; null where all are `cap`
    const S* weight;  // (T, R)
    S* value;         // (T, R)
    Out* dlogits;     // (R, V)
    bool aligned;     // rows start at multiples of 16 bytes, of dlogits too

    // of logprob, (R,) each
    S* side[3];  // max, tail, moment
    int64_t* top;
    const int64_t* tokens;
    const S* upstream[3];

    // of raw logits, as in csrc/table.h; a place is 0 of the student and 1 + j of teacher j
    uint32_t raw;  // a bit a place
    S raw_caps[1 + MAX_TEACHERS];
    const S *bias, *temperature;
    int64_t bias_stride;

    __device__ S cap_of(int64_t r) const { return caps ? caps[r] : cap; }
};

// Says which heads are raw, at the first place that each has.
template <class S, class Out> void set_raw(Work<S, Out>& work, const Raw& raw) {
    work.bias = (const S*)raw.bias, work.temperature = (const S*)raw.temperature, work.bias_stride = raw.bias_stride;
    for (int i = 0; i < raw.count; ++i) {
        int place = 0;
        while (place < work.T && (place ? work.teachers[place - 1] : work.student) != raw.heads[i]) ++place;
        work.raw |= 1u << place;
        work.raw_caps[place] = S(raw.caps[raw.heads[i]]);
    }
}

// Shared memory of a block beside the logits.
template <class S> struct Scratch {
    Sides<S> sides[WARPS];
    JsdSums<S> sums[WARPS];
    Sides<S> partial_sides[2][MAX_TEACHERS];
    JsdSums<S> partial_sums[2][MAX_TEACHERS];
    Pair<S> pairs[MAX_TEACHERS];
    RowGradient<S> gradient;
};

// --- reading a row --------------------------------------------------------------------------------

__device__ void narrow(float x, float& y) { y = x; }
__device__ void narrow(double x, double& y) { y = x; }
// beyond its range a number becomes infinite, never a wrong finite one
__device__ void narrow(float x, __half& y) { y = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

template <class S, class Out, int N>
__device__ void store(Out* to, const S (&x)[N], bool aligned, int64_t room) {
    constexpr int BYTES = N * sizeof(Out) < 16 ? N * sizeof(Out) : 16, STEP = BYTES / sizeof(Out);
    alignas(16) Out y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(x[i], y[i]);
    if (aligned && room >= N) {
#pragma unroll
        for (int i = 0; i < N; i += STEP) {
            if constexpr (BYTES == 16) *reinterpret_cast<int4*>(to + i) = *reinterpret_cast<const int4*>(y + i);
            else *reinterpret_cast<int2*>(to + i) = *reinterpret_cast<const int2*>(y + i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (i < room) to[i] = y[i];
    }
}

template <class S> struct FromMemory {
    static constexpr int N = sizeof(S) == 4 ? 8 : 2;  // columns a thread and tile
    S* base;
    int64_t R, V, stride;
    bool aligned;

    template <class Out> __device__ FromMemory(const Work<S, Out>& work)
        : base(work.z), R(work.R), V(work.V), stride(work.stride), aligned(work.aligned) {}

    __device__ int64_t first_row() const { return blockIdx.x; }
    __device__ int64_t row_step() const { return gridDim.x; }
    __device__ Index<S> begin() const { return 0; }
    __device__ Index<S> end() const { return V; }
    __device__ void wait(int) {}
    __device__ void release(int) {}
    __device__ void finish_row(bool) { __syncthreads(); }
    __device__ void finish() {}
    template <class X> __device__ X combined(const X (&partial)[2][MAX_TEACHERS], int turn, int count) {
        __syncthreads();
        return partial[turn][(int)threadIdx.x < count ? threadIdx.x : 0];
    }

    __device__ void load(int, int head, int64_t r, int64_t col, S (&x)[N]) const {
        const S* from = base + (head * R + r) * stride + col;
        if (aligned && col + N <= V) {
            constexpr int STEP = 16 / sizeof(S);
#pragma unroll
            for (int i = 0; i < N; i += STEP) {
                int4 bits = *reinterpret_cast<const int4*>(from + i);
                memcpy(&x[i], &bits, 16);
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] = col + i < V ? from[i] : LOWEST<S>;
        }
    }

    // What this thread has loaded, changed; it reads it so from now on, and so does whoever reads z later.
    __device__ void put(int, int head, int64_t r, int64_t col, const S (&x)[N]) const {
        store(base + (head * R + r) * stride + col, x, aligned, V - col);
    }
};

constexpr int SEGMENT = THREADS * 4;  // columns that a block's threads read at once

// The cut of a row for a cluster: `slice` columns a block, in segments; `slots` segments of all heads fit its memory.
struct Ring {
    int blocks, slice, segments, slots, heads;
    size_t bytes() const { return (size_t)slots * (heads * SEGMENT * sizeof(float) + sizeof(uint64_t)); }
};

// The smallest cluster whose blocks hold a row of all heads with a fifth to spare for the next row, else the smallest
// that holds it at all; no blocks if none does.
inline Ring cut(int64_t V, int heads, size_t shared_bytes, int segment = SEGMENT) {
    Ring best{0, 0, 0, 0, heads};
    size_t slot_bytes = heads * segment * sizeof(float) + sizeof(uint64_t);
    int slots = shared_bytes / slot_bytes;
    for (int blocks : {1, 2, 4, 8, 16}) {
        int64_t slice = (V + blocks - 1) / blocks;
        slice = (slice + 3) / 4 * 4;  // bulk copies take multiples of 16 bytes
        int64_t segments = (slice + segment - 1) / segment;
        if (segments > slots) continue;
        if (!best.blocks) best = {blocks, (int)slice, (int)segments, slots, heads};
        if (slots * 5 >= segments * 6) return {blocks, (int)slice, (int)segments, slots, heads};
    }
    return best;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
struct FromCluster {
    static constexpr int N = 4;
    float* z;
    int64_t R, V, stride;
    Ring ring;
    float* buffer;       // [slots][heads][SEGMENT]
    uint64_t* barriers;  // [slots]
    int64_t row, step;   // the cluster's current row and the way to its next
    int start, stop;     // columns of this block
    int slot = 0;        // of the row's first segment
    uint32_t parity = 0; // of that slot's barrier

    template <class Out> __device__ FromCluster(const Work<float, Out>& work, const Ring& ring, float* shared)
        : z(work.z), R(work.R), V(work.V), stride(work.stride), ring(ring), buffer(shared),
          barriers(reinterpret_cast<uint64_t*>(shared + ring.slots * ring.heads * SEGMENT)),
          row(blockIdx.x / ring.blocks), step(gridDim.x / ring.blocks) {
        start = min((int64_t)cg::this_cluster().block_rank() * ring.slice, V);
        stop = min((int64_t)start + ring.slice, V);
        if (threadIdx.x == 0) {
            for (int i = 0; i < ring.slots; ++i) hopper::init(barriers + i);
            hopper::publish();
            for (int i = 0; i < ring.slots; ++i) request(i);
        }
        __syncthreads();
    }

    __device__ int64_t first_row() const { return row; }
    __device__ int64_t row_step() const { return step; }
    __device__ int begin() const { return start; }
    __device__ int end() const { return stop; }

    // Thread 0 asks for the segment that comes `ahead` of this row's first one, if there is one.
    __device__ void request(int ahead) {
        int64_t from_row = row + ahead / ring.segments * step;
        if (from_row >= R) return;
        int place = (slot + ahead) % ring.slots, col = start + ahead % ring.segments * SEGMENT;
        // a row's last copy reads up to three numbers of the gap behind it
        int bytes = (max(0, min(SEGMENT, stop - col)) + 3) / 4 * 4 * (int)sizeof(float);
        hopper::expect(barriers + place, bytes * ring.heads);
        for (int head = 0; head < ring.heads && bytes; ++head)
            hopper::copy(buffer + (place * ring.heads + head) * SEGMENT, z + (head * R + from_row) * stride + col, bytes,
                         barriers + place);
    }

    // Waits for segment i of this row.
    __device__ void wait(int i) {
        int place = slot + i;
        bool wrapped = place >= ring.slots;
        hopper::wait(barriers + (wrapped ? place - ring.slots : place), parity ^ (uint32_t)wrapped);
    }

    __device__ void load(int i, int head, int64_t, int64_t col, float (&x)[N]) const {
        int place = slot + i;
        place = place >= ring.slots ? place - ring.slots : place;
        const float* from = buffer + (place * ring.heads + head) * SEGMENT + threadIdx.x * N;
        float4 four = *reinterpret_cast<const float4*>(from);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
        if (col + N > stop) {
#pragma unroll
            for (int n = 1; n < N; ++n)
                if (col + n >= stop) x[n] = LOWEST<float>;
        }
    }

    // As from memory; a later copy takes the place of what is written here.
    __device__ void put(int i, int head, int64_t r, int64_t col, const float (&x)[N]) const {
        int place = slot + i;
        place = place >= ring.slots ? place - ring.slots : place;
        store(buffer + (place * ring.heads + head) * SEGMENT + threadIdx.x * N, x, true, N);
        hopper::settle();
        store(z + (head * R + r) * stride + col, x, true, stop - col);
    }

    // Every thread is through with segment i: its slot takes a later one.
    __device__ void release(int i) {
        __syncthreads();
        if (threadIdx.x == 0) request(i + ring.slots);
    }

    // Refills what the sweeps have not released; a block whose slice is short passes over segments without columns.
    __device__ void finish_row(bool released) {
        __syncthreads();
        int swept = released ? (stop - start + SEGMENT - 1) / SEGMENT : 0;
        for (int i = swept; i < ring.segments && threadIdx.x == 0; ++i) request(i + ring.slots);
        row += step;
        slot += ring.segments;
        if (slot >= ring.slots) slot -= ring.slots, parity ^= 1;
    }

    // No block may leave while another reads its shared memory.
    __device__ void finish() { cg::this_cluster().sync(); }

    // Thread j < count gets partial[turn][j] of all blocks, merged in their order. Whoever writes this copy again has
    // passed the barrier of the other copy's turn, which every reader reached after reading.
    template <class X> __device__ X combined(const X (&partial)[2][MAX_TEACHERS], int turn, int count) {
        auto cluster = cg::this_cluster();
        cluster.sync();
        int j = (int)threadIdx.x < count ? threadIdx.x : 0;
        X all = partial[turn][j];
        if ((int)threadIdx.x < count) {
            all = *cluster.map_shared_rank(&partial[turn][j], 0);
            for (int rank = 1; rank < ring.blocks; ++rank)
                all = merge(all, *cluster.map_shared_rank(&partial[turn][j], rank));
        }
        return all;
    }
};
#endif

// --- working on a row -----------------------------------------------------------------------------

// Calls f(tile number, first column) for this thread's columns, tile by tile.
template <class Rows, class F> __device__ void sweep(Rows& rows, F f) {
    auto col = rows.begin() + (decltype(rows.begin()))threadIdx.x * Rows::N;
    int tiles = (rows.end() - rows.begin() + THREADS * Rows::N - 1) / (THREADS * Rows::N);
    for (int i = 0; i < tiles; ++i, col += THREADS * Rows::N) f(i, col);
}

// Completes a row's raw logits where they are, in a sweep of its own: a cluster has them at hand, and in the statistics'
// loop it would cost rows that lack nothing registers and branches.
template <class S, class Out, class Rows> __device__ void complete(Rows& rows, const Work<S, Out>& work, int64_t r) {
    const S temperature = work.temperature ? work.temperature[r] : S(0);
    for (int place = 0; place <= work.T; ++place) {
        if (!(work.raw >> place & 1)) continue;
        const int head = place ? work.teachers[place - 1] : work.student;
        const S* bias = work.bias ? work.bias + head * work.bias_stride : nullptr;
        const S cap = work.raw_caps[place];
        sweep(rows, [&](int i, Index<S> col) {
            rows.wait(i);
            if (col >= rows.end()) return;
            S x[Rows::N];
            rows.load(i, head, r, col, x);
#pragma unroll
            for (int n = 0; n < Rows::N; ++n)
                if (col + n < rows.end()) x[n] = completed(x[n], bias ? bias[col + n] : S(0), cap, temperature);
            rows.put(i, head, r, col, x);
        });
    }
}

// This thread's side of head `a` beside head `b`, from what it has run through.
template <Moment M, class S, int N, class Rows>
__device__ Side<S> side_of(Rows& rows, const Running<M, S, N>& running, int a, int b, int64_t r) {
    S z[N], other[N] = {};
    auto load = [&](int i, Index<S> col) {
        rows.load(i, a, r, col, z);
        if constexpr (M != Moment::of_logits) rows.load(i, b, r, col, other);
    };
    Side<S> side;
    if (running.first >= 0) load((running.first - rows.begin()) / (THREADS * N), running.first);
    if (running.settle(z, other, side)) return side;
    sweep(rows, [&](int i, Index<S> col) {
        if (col >= rows.end()) return;
        load(i, col);
        for (S& x : z) x = x == LOWEST<S> ? -INFINITE<S> : x;
        fold<M != Moment::none>(side, z, other, col, 1);
    });
    return side;
}

template <Divergence D, class S, class Out, class Rows>
__device__ void kl_rows(Rows& rows, const Work<S, Out>& work, Scratch<S>& shared) {
    constexpr int N = Rows::N;
    constexpr bool P = D == Divergence::reverse || D == Divergence::symmetric;
    constexpr bool Q = D == Divergence::forward || D == Divergence::symmetric;
    constexpr Moment OF_P = P ? Moment::of_difference : Moment::none;
    constexpr Moment OF_Q = Q ? Moment::of_difference : Moment::none;
    int turn = 0;
    for (int64_t r = rows.first_row(); r < work.R; r += rows.row_step(), turn ^= 1) {
        if (work.raw) complete(rows, work, r);
        for (int j = 0; j < work.T; ++j) {
            Running<OF_P, S, N> student;
            Running<OF_Q, S, N> teacher;
            sweep(rows, [&](int i, Index<S> col) {
                if (j == 0) rows.wait(i);
                if (col >= rows.end()) return;
                S s[N], t[N];
                rows.load(i, work.student, r, col, s);
                rows.load(i, work.teachers[j], r, col, t);
                student.add(s, t, col);
                teacher.add(t, s, col);
            });
            Sides<S> sides{side_of(rows, student, work.student, work.teachers[j], r),
                           side_of(rows, teacher, work.teachers[j], work.student, r)};
            sides = reduce(sides, shared.sides);
            if (threadIdx.x == 0) shared.partial_sides[turn][j] = sides;
        }
        Sides<S> sides = rows.combined(shared.partial_sides, turn, work.T);
        int own = threadIdx.x;
        if (own < work.T) {
            Pair<S> pair;
            pair.s = sides.s, pair.t = sides.t;
            prepare(D, work.mixture, pair);
            pair.weight = work.weight ? work.weight[own * work.weight_stride + r] : S(0);
            if (D != Divergence::jsd && rows.begin() == 0) work.value[own * work.value_stride + r] = value(D, pair);
            shared.pairs[own] = pair;
        }
        __syncthreads();
        if constexpr (D == Divergence::jsd) {
            for (int j = 0; j < work.T; ++j) {
                JsdSums<S> sums;
                const Pair<S> pair = shared.pairs[j];
                sweep(rows, [&](int i, Index<S> col) {
                    if (col >= rows.end()) return;
                    S s[N], t[N];
                    rows.load(i, work.student, r, col, s);
                    rows.load(i, work.teachers[j], r, col, t);
#pragma unroll
                    for (int n = 0; n < N; ++n)
                        jsd_term(sums, s[n], t[n], col + n, pair, work.mixture,
                                 [&](bool lower) { return exp_(lower ? t[n] - pair.t.max : s[n] - pair.s.max); });
                });
                sums = reduce(sums, shared.sums);
                if (threadIdx.x == 0) shared.partial_sums[turn][j] = sums;
            }
            JsdSums<S> sums = rows.combined(shared.partial_sums, turn, work.T);
            if (own < work.T) {
                S divergence = settle(sums, work.mixture, shared.pairs[own]);
                if (rows.begin() == 0) work.value[own * work.value_stride + r] = divergence;
            }
            __syncthreads();
        }
        if (work.dlogits) {
            if (threadIdx.x == 0) shared.gradient = RowGradient<S>(D, shared.pairs, work.T, work.cap_of(r));
            __syncthreads();
            const RowGradient<S> gradient = shared.gradient;
            Out* out = work.dlogits + r * work.out_stride;
            sweep(rows, [&](int i, Index<S> col) {
                if (col < rows.end()) {
                    S s[N], a[N] = {}, b[N] = {};
                    rows.load(i, work.student, r, col, s);
                    for (int j = 0; j < work.T; ++j) {
                        const Pair<S>& pair = shared.pairs[j];
                        if (pair.weight == 0) continue;
                        S t[N];
                        rows.load(i, work.teachers[j], r, col, t);
#pragma unroll
                        for (int n = 0; n < N; ++n) teach<D>(s[n], t[n], pair, work.mixture, a[n], b[n]);
                    }
#pragma unroll
                    for (int n = 0; n < N; ++n) a[n] = dlogit(s[n], a[n], b[n], gradient);
                    store(out + col, a, work.aligned, work.V - col);
                    if (gradient.top >= col && gradient.top < col + N) narrow(at_top(gradient), out[gradient.top]);
                }
                rows.release(i);
            });
        }
        rows.finish_row(work.dlogits != nullptr);
    }
    rows.finish();
}

template <class S, class Out, class Rows>
__device__ void logprob_rows(Rows& rows, const Work<S, Out>& work, Scratch<S>& shared) {
    constexpr int N = Rows::N;
    int turn = 0;
    for (int64_t r = rows.first_row(); r < work.R; r += rows.row_step(), turn ^= 1) {
        if (work.raw) complete(rows, work, r);
        if (!work.dlogits) {
            Running<Moment::of_logits, S, N> running;
            sweep(rows, [&](int i, Index<S> col) {
                rows.wait(i);
                if (col >= rows.end()) return;
                S x[N], nothing[N] = {};
                rows.load(i, 0, r, col, x);
                running.add(x, nothing, col);
            });
            Sides<S> sides{side_of(rows, running, 0, 0, r), {}};
            sides = reduce(sides, shared.sides);
            if (threadIdx.x == 0) shared.partial_sides[turn][0] = sides;
            const Side<S> side = rows.combined(shared.partial_sides, turn, 1).s.distribution();
            if (threadIdx.x == 0 && rows.begin() == 0) {
                work.side[0][r] = side.max, work.side[1][r] = side.tail, work.side[2][r] = side.moment;
                work.top[r] = side.top;
            }
        } else {
            const Side<S> side{work.side[0][r], (Index<S>)work.top[r], work.side[1][r], S(0), work.side[2][r]};
            const LogProbGradient<S> gradient(side, (Index<S>)work.tokens[r], work.upstream[0][r],
                                              work.upstream[1][r], work.upstream[2][r], work.cap_of(r));
            Out* out = work.dlogits + r * work.out_stride;
            sweep(rows, [&](int i, Index<S> col) {
                rows.wait(i);
                if (col < rows.end()) {
                    S x[N];
                    rows.load(i, 0, r, col, x);
#pragma unroll
                    for (int n = 0; n < N; ++n) x[n] = dlogit(x[n], col + n, gradient);
                    store(out + col, x, work.aligned, work.V - col);
                    if (gradient.top >= col && gradient.top < col + N) narrow(at_top(gradient), out[gradient.top]);
                }
                rows.release(i);
            });
        }
        rows.finish_row(work.dlogits != nullptr);
    }
    rows.finish();
}

// A block a row, in one pass; neighbouring threads take neighbouring logits, whatever the alignment.
template <class S, class Out> __device__ void complete_rows(const Work<S, Out>& work) {
    for (int64_t r = blockIdx.x; r < work.R; r += gridDim.x) {
        S* row = work.z + r * work.stride;
        const S cap = work.raw_caps[0], temperature = work.temperature ? work.temperature[r] : S(0);
#pragma unroll 4
        for (int64_t i = threadIdx.x; i < work.V; i += THREADS)
            row[i] = completed(row[i], work.bias ? work.bias[i] : S(0), cap, temperature);
    }
}

}  // namespace
}  // namespace copd::cuda

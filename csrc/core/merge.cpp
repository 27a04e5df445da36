// Attention over disjoint sets of keys, put together by the softmax states of the parts: with m the largest
// lse,
//
//   w_p = exp(lse_p - m)   out = sum_p w_p out_p / sum_p w_p   lse = m + log sum_p w_p
//
// (Milakov and Gimelshein 2018; FlashDecoding, Dao et al. 2023, merges the splits of a row so.)
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <fastattn/attention.h>

#include "core/problem_parts.h"
#include "core/scalar_access.h"
#include "threads/thread_pool.h"

namespace fastattn {
namespace {

using Index = std::int64_t;

constexpr Index kRowsPerItem = 64;
constexpr Index kElementsPerThread = 1 << 16;  // below it a thread costs more than it saves

struct State {
    Operand out;
    ScoreOperand lse;
};

struct Merge {
    Index batch = 1, rows = 0, heads = 1, dim = 0;
    DType dtype = DType::f32, out_dtype = DType::f32;
    std::vector<State> parts;
    State result;
};

// f(the element at an offset, as a number).
template <class F>
void with_elements(const Operand& x, DType dtype, Index at, F&& f) {
    switch (dtype) {
        case DType::f64: return f([p = static_cast<const double*>(x.data) + at](Index d) { return p[d]; });
        case DType::f32: return f([p = static_cast<const float*>(x.data) + at](Index d) { return p[d]; });
        case DType::f16:
            return f(
                [p = static_cast<const std::uint16_t*>(x.data) + at](Index d) { return f16_to_f32(p[d]); });
        default:
            return f(
                [p = static_cast<const std::uint16_t*>(x.data) + at](Index d) { return bf16_to_f32(p[d]); });
    }
}

Index row_start(const Operand& x, Index b, Index i, Index h) { return b * x.batch + i * x.seq + h * x.head; }
Index lse_place(const ScoreOperand& x, Index b, Index h, Index i) {
    return b * x.batch + h * x.head + i * x.query;
}

// Acc: double for float64, else float. sum holds `dim` of them, weights one for each part.
template <class Acc>
void merge_row(const Merge& m, Index b, Index h, Index i, Acc* sum, double* weights) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const auto count = m.parts.size();
    double top = -inf;
    bool is_nan = false;
    for (std::size_t p = 0; p < count; ++p) {
        const ScoreOperand& x = m.parts[p].lse;
        weights[p] = load_real(x.data, x.dtype, lse_place(x, b, h, i));
        is_nan = is_nan || weights[p] != weights[p];
        top = std::max(top, weights[p]);
    }
    // Shares first: a sum of shares of outs is no larger than they are.
    double total = 0.0;
    for (std::size_t p = 0; p < count; ++p) {
        const double lse = weights[p];
        weights[p] = is_nan        ? std::numeric_limits<double>::quiet_NaN()
                     : lse == -inf ? 0.0
                     : top == inf  ? (lse == inf ? 1.0 : 0.0)
                                   : std::exp(lse - top);
        total += weights[p];
    }
    std::fill(sum, sum + m.dim, Acc(0));
    for (std::size_t p = 0; p < count; ++p) {
        const ScoreOperand& lse = m.parts[p].lse;
        const double of_part = load_real(lse.data, lse.dtype, lse_place(lse, b, h, i));
        // Whatever their outs hold: parts without keys, and those beside an infinite sink.
        if (of_part == -inf || (weights[p] == 0.0 && top == inf)) continue;
        const Operand& x = m.parts[p].out;
        with_elements(x, m.dtype, row_start(x, b, i, h), [&](auto element) {
            const Acc share = static_cast<Acc>(weights[p] / total);
            for (Index d = 0; d < m.dim; ++d) sum[d] += share * static_cast<Acc>(element(d * x.dim));
        });
    }
    const Operand& out = m.result.out;
    const Index at = row_start(out, b, i, h);
    for (Index d = 0; d < m.dim; ++d)
        store_real(out.data, m.out_dtype, at + d * out.dim, static_cast<double>(sum[d]));
    const ScoreOperand& lse = m.result.lse;
    store_real(lse.data, lse.dtype, lse_place(lse, b, h, i), total == 0.0 ? -inf : top + std::log(total));
}

template <class Acc>
void merge_all(const Merge& m, Executor& executor) {
    const Index blocks = (m.rows + kRowsPerItem - 1) / kRowsPerItem;
    auto merge = [&](Index item, int) {
        std::vector<Acc> sum(static_cast<std::size_t>(m.dim));
        std::vector<double> weights(m.parts.size());
        const Index first = item % blocks * kRowsPerItem, h = item / blocks % m.heads,
                    b = item / blocks / m.heads;
        for (Index i = first; i < std::min(m.rows, first + kRowsPerItem) && !executor.stop_requested(); ++i)
            merge_row<Acc>(m, b, h, i, sum.data(), weights.data());
    };
    if (blocks * m.heads * m.batch > 0) executor.for_each(m.batch * m.heads * blocks, merge);
}

bool same_shape(const TensorView& a, const TensorView& b) {
    return a.rank == b.rank && std::equal(a.shape, a.shape + std::max(a.rank, 0), b.shape);
}

std::string name_of(const char* what, std::size_t part) {
    return std::string(what) + "[" + std::to_string(part) + "]";
}

void check_host(const char* name, const TensorView& view) {
    if (view.device.type != DeviceType::cpu)
        throw UnsupportedError(std::string(name) + ": expected an array of the CPU, got one on " +
                               device_string(view.device));
    const ViewCheck check = measure(view);
    if (check.fault != ViewFault::none) fail_view(name, view, check.fault);
}

void check_apart(const char* name, const TensorView& written, const char* other, const TensorView& view) {
    if (extents_meet(measure(written).extent, measure(view).extent) && may_share_memory(written, view))
        fail_overlap(name, other);
}

Merge make_merge(const MergeParams& a) {
    if (a.outs.empty()) fail_value("outs", "expected at least one part, got none");
    if (a.lses.size() != a.outs.size())
        fail_value("lses", "expected as many parts as outs, " + std::to_string(a.outs.size()) + ", got " +
                               std::to_string(a.lses.size()));
    const TensorView& like = a.outs[0];
    if (like.rank < 2 || like.rank > 4) fail_rank("outs[0]", "2, 3 or 4 axes", like);
    check_float("outs[0]", like);
    const Axes axes = axes_of(like.rank, a.layout);
    Merge m;
    m.batch = size_at(like, axes.batch);
    m.rows = size_at(like, axes.seq);
    m.heads = size_at(like, axes.head);
    m.dim = size_at(like, axes.dim);
    m.dtype = like.dtype;
    const DType lse_dtype = like.dtype == DType::f64 ? DType::f64 : DType::f32;
    const Index full[4] = {m.batch, m.heads, m.rows, 0};
    const auto to_lse = [&](const char* name, const TensorView& view) {
        check_host(name, view);
        if (view.dtype != lse_dtype) fail_dtype(name, dtype_name(lse_dtype), view.dtype);
        const int first = 4 - like.rank;
        bool fits = view.rank == 3 - first;
        for (int axis = first; fits && axis < 3; ++axis) fits = view.shape[axis - first] == full[axis];
        if (!fits) fail_score_output(name, full, first, 3, false, view);
        Index strides[3] = {0, 0, 0};
        for (int axis = first; axis < 3; ++axis) strides[axis] = stride_at(view, axis - first);
        return ScoreOperand{view.data, view.dtype, strides[0], strides[1], strides[2], 0, view.device.type};
    };
    for (std::size_t p = 0; p < a.outs.size(); ++p) {
        const std::string out = name_of("outs", p), lse = name_of("lses", p);
        const TensorView& view = a.outs[p];
        check_host(out.c_str(), view);
        if (view.dtype != m.dtype) fail_dtype(out.c_str(), dtype_name(m.dtype), view.dtype);
        if (!same_shape(view, like)) fail_shape(out.c_str(), shape_string(like) + " as outs[0]", view);
        m.parts.push_back({to_operand(view, axes), to_lse(lse.c_str(), a.lses[p])});
    }
    if (!a.out.given()) fail_value("out", "expected an array for the result, got none");
    check_host("out", a.out);
    check_float("out", a.out);
    if (a.out.dtype != m.dtype && (a.out.dtype == DType::f64) != (m.dtype == DType::f64))
        fail_dtype("out", "a dtype that accumulates as outs do", a.out.dtype);
    if (!same_shape(a.out, like)) fail_shape("out", shape_string(like) + " as outs[0]", a.out);
    if (a.out.readonly) fail_value("out", "expected a writable array, got a read-only one");
    if (overlaps_itself(a.out)) fail_self_overlap("out", a.out);
    for (std::size_t p = 0; p < a.outs.size(); ++p) {
        check_apart("out", a.out, name_of("outs", p).c_str(), a.outs[p]);
        check_apart("out", a.out, name_of("lses", p).c_str(), a.lses[p]);
    }
    m.out_dtype = a.out.dtype;
    m.result = {to_operand(a.out, axes), to_lse("lse", a.lse)};
    return m;
}

}  // namespace

void merge_states(const MergeParams& params, const RunOptions& options) {
    const Merge m = make_merge(params);
    int threads = options.num_threads > 0 ? options.num_threads : get_num_threads();
    if (options.max_threads > 0) threads = std::min(threads, options.max_threads);
    const double elements = static_cast<double>(m.batch) * static_cast<double>(m.rows) *
                            static_cast<double>(m.heads) * static_cast<double>(m.dim) *
                            static_cast<double>(m.parts.size());
    threads = static_cast<int>(
        std::clamp(elements / static_cast<double>(kElementsPerThread), 1.0, static_cast<double>(threads)));
    ThreadPoolExecutor executor(threads, options.poll, options.poll_context);
    if (m.dtype == DType::f64) return merge_all<double>(m, executor);
    merge_all<float>(m, executor);
}

}  // namespace fastattn

// AttentionParams -> AttentionProblem: the one place that checks ranks, shapes, dtypes, sizes, ranges
// and overlap. Kernels trust what leaves here. The good path does no heap or string work.
#include <fastattn/attention.h>

#include <algorithm>
#include <cmath>

#include "core/mask_lists.h"
#include "core/problem_errors.h"
#include "core/problem_parts.h"
#include "core/scalar_access.h"
#include "core/visible.h"

namespace fastattn {
namespace {

using Index = std::int64_t;

// ---- optional arrays ------------------------------------------------------------------------------
// One value per batch entry, integer.
HeadOperand to_batch_operand(const char* name, const TensorView& view, const AttentionProblem& p) {
    if (!is_integer(view.dtype)) fail_dtype(name, "an integer dtype", view.dtype);
    if (view.rank != 1 || view.shape[0] != p.batch)
        fail_shape(name, "(B,) = " + shape_string({p.batch}), view);
    return {view.data, view.dtype, stride_at(view, 0), 0, view.device.type};
}

// limit: (b) -> rows or keys that entry b has place for.
template <class Limit>
void check_lengths(const char* name, const HeadOperand& lens, Index batch, Limit limit) {
    for (Index b = 0; b < batch; ++b) {
        const Index length = load_integer(lens.data, lens.dtype, b * lens.batch), most = limit(b);
        if (length < 0 || length > most) fail_length(name, b, length, most);
    }
}

// Bounds of packed entries among `size` rows or keys.
HeadOperand to_bounds(const char* name, const TensorView& view, const AttentionProblem& p, const char* axis,
                      Index size) {
    if (!is_integer(view.dtype)) fail_dtype(name, "an integer dtype", view.dtype);
    if (view.rank != 1 || view.shape[0] != p.batch + 1)
        fail_shape(name, "(B + 1,) = " + shape_string({p.batch + 1}) + " as cu_q", view);
    const HeadOperand cu{view.data, view.dtype, stride_at(view, 0), 0, view.device.type};
    // Values on a CUDA device cannot be read here.
    if (cu.place != DeviceType::cpu) return cu;
    Index before = 0;
    for (Index b = 0; b <= p.batch; ++b) {
        const Index bound = load_integer(cu.data, cu.dtype, b * cu.batch);
        if (bound < before || bound > size) fail_bound(name, b, bound, before, axis, size);
        before = bound;
    }
    return cu;
}

void set_entries(const AttentionParams& a, AttentionProblem& p, Arrays& arrays) {
    if (!a.cu_q.given()) {
        if (a.cu_kv.given()) fail_value("cu_kv", "expected none without cu_q");
        return;
    }
    if (a.q.rank != 3)
        fail_rank("q",
                  a.layout == Layout::bshd ? "3 axes (Tq, Hq, D), as there is cu_q"
                                           : "3 axes (Hq, Tq, D), as there is cu_q",
                  a.q);
    if (a.cu_q.rank != 1 || a.cu_q.shape[0] < 1) fail_shape("cu_q", "(B + 1,), with B >= 0", a.cu_q);
    if (a.q_lens.given()) fail_value("q_lens", "expected none beside cu_q, which has the lengths");
    if (a.weights.given()) fail_value("weights", "expected none beside cu_q");
    p.batch = a.cu_q.shape[0] - 1;
    const TensorView& cu_kv = a.cu_kv.given() ? a.cu_kv : a.cu_q;
    p.cu_q = to_bounds("cu_q", a.cu_q, p, "Tq", p.q_size);
    if (a.block_table.given()) {
        if (a.cu_kv.given()) fail_value("cu_kv", "expected none beside pages");
        return arrays.side_input("cu_q", a.cu_q);
    }
    p.cu_kv = to_bounds(a.cu_kv.given() ? "cu_kv" : "cu_q", cu_kv, p, "Tk", p.kv_size);
    arrays.side_input("cu_q", a.cu_q);
    if (a.cu_kv.given()) arrays.side_input("cu_kv", a.cu_kv);
}

// Keys in pages: the table's numbers are looked at as far as the lengths reach, and trusted from then on.
void set_pages(const AttentionParams& a, AttentionProblem& p) {
    const TensorView& table = a.block_table;
    if (table.dtype != DType::i64 || table.device.type != DeviceType::cpu)
        fail_dtype("block_table", "int64 on the CPU", table.dtype);
    if (table.rank != 2 || table.shape[0] != p.batch)
        fail_shape("block_table", "(B, N) with B = " + std::to_string(p.batch), table);
    if (!a.kv_lens.given())
        fail_value("kv_lens", "expected the lengths of the entries beside pages, got none");
    const HeadOperand lens = to_batch_operand("kv_lens", a.kv_lens, p);
    const Index width = table.shape[1], page = p.kv_size, count = size_at(a.k, 0);
    if (width > 1 && table.strides[1] != 1 && p.batch > 0)
        fail_value("block_table", "expected rows in one piece, got strides");
    if (page == 0) fail_shape("k", "pages of at least one key", a.k);
    Index longest = 0;
    const auto* const pages = static_cast<const Index*>(table.data);
    for (Index b = 0; b < p.batch; ++b) {
        const Index length = load_integer(lens.data, lens.dtype, b * lens.batch);
        if (length < 0 || length > width * page) fail_length("kv_lens", b, length, width * page);
        for (Index n = 0; n * page < length; ++n) {
            const Index at = pages[b * stride_at(table, 0) + n];
            if (at < 0 || at >= count)
                fail_value("block_table", "expected pages below " + std::to_string(count) + ", got " +
                                              std::to_string(at) + " for page " + std::to_string(n) +
                                              " of entry " + std::to_string(b));
        }
        longest = std::max(longest, length);
    }
    static constexpr Index kNone = 0;
    for (Operand* x : {&p.k, &p.v}) {
        x->pages = pages == nullptr ? &kNone : pages;
        x->entry_pages = stride_at(table, 0);
        x->page = page;
        if (count <= 1) x->batch = 0;
    }
    p.kv_size = longest;
}

// Where a mask or bias with the axes (B, Sk) or (B, Sq, Sk) belongs; empty for others. As it is, it would
// broadcast over queries and heads, or not at all.
std::string axis_hint(const char* name, const TensorView& view, const AttentionProblem& p) {
    const bool by_entry = !p.packed() && (view.rank == 2 || view.rank == 3) && view.shape[0] == p.batch &&
                          p.batch > 1 && view.shape[view.rank - 1] == p.kv_size;
    if (!by_entry) return {};
    const auto passed_as = [&](const char* axes, const char* index) {
        return std::string("; if its axes are ") + axes + ", pass " + name + index;
    };
    if (view.rank == 2)
        return passed_as("(B, Sk), as those of padding", "[:, None, None, :], of shape (B, 1, 1, Sk)");
    if (view.shape[1] != 1 && view.shape[1] != p.q_size) return {};
    return passed_as("(B, Sq, Sk)", "[:, None]");
}

void set_optional_inputs(const AttentionParams& a, AttentionProblem& p, Arrays& arrays) {
    if (a.mask.given()) {
        if (a.mask.dtype != DType::boolean)
            fail_mask_dtype(a.mask_as_bool, a.mask, axis_hint("mask", a.mask, p));
        p.mask = to_score_operand("mask", a.mask, p);
        arrays.side_input("mask", a.mask);
    }
    if (a.bias.given()) {
        if (a.bias.dtype != p.dtype && a.bias.dtype != p.lse_dtype)
            fail_float_pair("bias", p.dtype, p.lse_dtype, a.bias.dtype);
        p.bias = to_score_operand("bias", a.bias, p);
        arrays.side_input("bias", a.bias);
    }
    if (a.alibi_slopes.given()) {
        const TensorView& s = a.alibi_slopes;
        check_float("alibi_slopes", s);
        const bool per_batch = s.rank == 2 && s.shape[0] == p.batch && s.shape[1] == p.q_heads;
        if (!per_batch && !(s.rank == 1 && s.shape[0] == p.q_heads))
            fail_shape("alibi_slopes",
                       "(Hq,) = " + shape_string({p.q_heads}) +
                           " or (B, Hq) = " + shape_string({p.batch, p.q_heads}),
                       s);
        p.alibi_slopes = {s.data, s.dtype, per_batch ? stride_at(s, 0) : 0, stride_at(s, s.rank - 1),
                          s.device.type};
        arrays.side_input("alibi_slopes", s);
    }
    if (a.sinks.given()) {
        check_float("sinks", a.sinks);
        if (a.sinks.rank != 1 || a.sinks.shape[0] != p.q_heads)
            fail_shape("sinks", "(Hq,) = " + shape_string({p.q_heads}), a.sinks);
        p.sinks = {a.sinks.data, a.sinks.dtype, 0, stride_at(a.sinks, 0), a.sinks.device.type};
        arrays.side_input("sinks", a.sinks);
    }
    // Values on a CUDA device cannot be read here; its kernels clamp them.
    const auto readable = [](const TensorView& view) { return view.device.type == DeviceType::cpu; };
    if (a.q_lens.given()) {
        p.q_lens = to_batch_operand("q_lens", a.q_lens, p);
        arrays.side_input("q_lens", a.q_lens);
        if (readable(a.q_lens)) check_lengths("q_lens", p.q_lens, p.batch, [&](Index) { return p.q_size; });
        p.has_q_lens = true;
    }
    if (a.kv_lens.given()) {
        p.kv_lens = to_batch_operand("kv_lens", a.kv_lens, p);
        arrays.side_input("kv_lens", a.kv_lens);
        if (readable(a.kv_lens)) {
            check_lengths("kv_lens", p.kv_lens, p.batch, [&](Index b) {
                const KeyRange keys = p.keys_of(b);
                return keys.end - keys.begin;
            });
        }
        p.has_kv_lens = true;
    }
    if (a.q_offsets.given()) {
        if (a.q_offset) fail_value("q_offset", "expected one value or one per batch entry, got both");
        p.q_offsets = to_batch_operand("q_offset", a.q_offsets, p);
        arrays.side_input("q_offset", a.q_offsets);
        p.has_q_offset = true;
    } else if (a.q_offset) {
        p.q_offset = *a.q_offset;
        p.has_q_offset = true;
    }
}

// ---- numbers --------------------------------------------------------------------------------------
void set_numbers(const AttentionParams& a, AttentionProblem& p) {
    p.scale = a.scale ? *a.scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
    if (!std::isfinite(p.scale)) fail_number("scale", "a finite number", p.scale);
    if (a.softcap) {
        p.softcap = *a.softcap;
        if (!(p.softcap > 0) || !std::isfinite(p.softcap))
            fail_number("softcap", "a finite number above 0", p.softcap);
    }
    p.dropout = a.dropout;
    if (!(p.dropout >= 0 && p.dropout < 1)) fail_number("dropout", "0 <= p < 1", p.dropout);
    p.seed = a.seed;
    p.causal = a.causal;
    if (a.window_left) {
        if (*a.window_left < 0) fail_integer("window", "a left size >= 0 or None", *a.window_left);
        p.window_left = *a.window_left;
    }
    if (a.window_right) {
        if (*a.window_right < 0) fail_integer("window", "a right size >= 0 or None", *a.window_right);
        p.window_right = *a.window_right;
    }
}

// ---- q, k, v ----------------------------------------------------------------------------------------
void set_operands(const AttentionParams& a, AttentionProblem& p, const Axes& axes, Arrays& arrays) {
    const TensorView &q = a.q, &k = a.k, &v = a.v;
    arrays.input("q", q);
    arrays.input("k", k);
    arrays.input("v", v);
    p.batch = size_at(q, axes.batch);
    p.q_size = size_at(q, axes.seq);
    p.q_heads = size_at(q, axes.head);
    p.head_dim = size_at(q, axes.dim);
    // Of pages: (P, page), whatever the axes of q are.
    const Axes key_axes = axes_of(k.rank, a.layout);
    const std::int64_t batch = a.block_table.given() ? size_at(k, key_axes.batch) : p.batch;
    p.kv_size = size_at(k, key_axes.seq);
    p.kv_heads = size_at(k, key_axes.head);
    p.value_dim = size_at(v, key_axes.dim);
    if (p.head_dim == 0) fail_empty_dim("q", q);
    if (size_at(k, key_axes.batch) != batch || size_at(k, key_axes.dim) != p.head_dim)
        fail_operand("k", a.layout, {batch, kAnySize, kKvHeads, p.head_dim}, "q", q, k);
    if (size_at(v, key_axes.batch) != batch || size_at(v, key_axes.seq) != p.kv_size ||
        size_at(v, key_axes.head) != p.kv_heads)
        fail_operand("v", a.layout, {batch, p.kv_size, p.kv_heads, kAnySize}, "k", k, v);
    if (p.value_dim == 0) fail_empty_dim("v", v);
    // No query heads are a multiple of any number of heads; then the group has none.
    if (p.kv_heads == 0 ? p.q_heads != 0 : p.q_heads % p.kv_heads != 0)
        fail_heads(q, k, p.q_heads, p.kv_heads);
    p.group = p.kv_heads == 0 ? 1 : p.q_heads / p.kv_heads;
    p.q = to_operand(q, axes);
    p.k = to_operand(k, key_axes);
    p.v = to_operand(v, key_axes);
}

// ---- outputs ----------------------------------------------------------------------------------------
alignas(64) unsigned char not_yet_made[64];

void set_outputs(const AttentionParams& a, AttentionProblem& p, Arrays& arrays, bool for_execution) {
    if (a.out.given()) {
        if (a.out_dtype && a.out.dtype != p.out_dtype)
            fail_dtype("out", (std::string(dtype_name(p.out_dtype)) + " as out_dtype says").c_str(),
                       a.out.dtype);
        p.out = to_matching_operand("out", a.out, a, {p.array_batch(), p.q_size, p.q_heads, p.value_dim},
                                    p.out_dtype, "q", a.q);
        p.out.data = add_output("out", a.out, arrays, for_execution);
    } else if (for_execution) {
        fail_value("out", "expected an array for the result, got none");
    } else {
        check_byte_count("out", {p.array_batch(), p.q_size, p.q_heads, p.value_dim}, p.out_dtype);
    }
    if (a.lse.given()) {
        p.lse = to_score_rows("lse", a.lse, p, a.q.rank, false);
        p.lse.data = add_output("lse", a.lse, arrays, for_execution);
    }
    if (a.weights.given()) {
        p.weights = to_score_rows("weights", a.weights, p, a.q.rank, true);
        p.weights.data = add_output("weights", a.weights, arrays, for_execution);
    }
}

}  // namespace

// ---- shared with the backward pass --------------------------------------------------------------------
void* add_output(const char* name, const TensorView& view, Arrays& arrays, bool for_execution) {
    if (!for_execution && view.data == nullptr) return not_yet_made;
    arrays.output(name, view);
    return view.data;
}

ScoreOperand to_score_operand(const char* name, const TensorView& view, const AttentionProblem& p) {
    const int most = p.packed() ? 3 : 4;
    if (view.rank > most) fail_rank(name, p.packed() ? "at most 3 axes" : "at most 4 axes", view);
    const Index target[4] = {p.array_batch(), p.q_heads, p.q_size, p.kv_size};
    Index strides[4] = {0, 0, 0, 0};
    for (int axis = 0; axis < view.rank; ++axis) {
        const int to = 4 - view.rank + axis;  // right-aligned, as NumPy broadcasts
        if (view.shape[axis] == 1) continue;
        if (view.shape[axis] != target[to])
            fail_value(name, std::string("expected a shape that broadcasts to ") +
                                 (p.packed() ? "(Hq, Tq, Tk) = " : "(B, Hq, Sq, Sk) = ") +
                                 shape_string(target + 4 - most, most) + ", got " + shape_string(view) +
                                 axis_hint(name, view, p));
        strides[to] = view.strides[axis];
    }
    if (is_empty(view)) return {view.data, view.dtype, 0, 0, 0, 0, view.device.type};
    return {view.data, view.dtype, strides[0], strides[1], strides[2], strides[3], view.device.type};
}

Operand to_matching_operand(const char* name, const TensorView& view, const AttentionParams& params,
                            const SizePattern& sizes, DType dtype, const char* like_name,
                            const TensorView& like) {
    check_same_dtype(name, view, dtype);
    const Axes axes = axes_of(params.q.rank, params.layout);
    if (view.rank != params.q.rank || size_at(view, axes.batch) != sizes.batch ||
        size_at(view, axes.seq) != sizes.seq || size_at(view, axes.head) != sizes.head ||
        size_at(view, axes.dim) != sizes.dim)
        fail_operand(name, params.layout, sizes, like_name, like, view);
    return to_operand(view, axes);
}

ScoreOperand to_score_rows(const char* name, const TensorView& view, const AttentionProblem& p, int q_rank,
                           bool with_keys) {
    check_same_dtype(name, view, p.lse_dtype);
    const Index full[4] = {p.array_batch(), p.q_heads, p.q_size, p.kv_size};
    const int first = 4 - q_rank, last = with_keys ? 4 : 3;
    bool fits = view.rank == last - first;
    for (int axis = first; fits && axis < last; ++axis) fits = view.shape[axis - first] == full[axis];
    if (!fits) fail_score_output(name, full, first, last, p.packed(), view);
    Index strides[4] = {0, 0, 0, 0};
    if (!is_empty(view))
        for (int axis = first; axis < last; ++axis) strides[axis] = stride_at(view, axis - first);
    return {view.data, view.dtype, strides[0], strides[1], strides[2], strides[3], view.device.type};
}

AttentionProblem read_inputs(const AttentionParams& a, Arrays& arrays) {
    if (!a.q.given()) fail_value("q", "expected an array, got none");
    if (!a.k.given()) fail_value("k", "expected an array, got none");
    if (!a.v.given()) fail_value("v", "expected an array, got none");
    if (a.q.rank < 2 || a.q.rank > 4) fail_rank("q", "2, 3 or 4 axes", a.q);
    if (a.block_table.given()) {
        if (a.k.rank != 4) fail_rank("k", "pages with 4 axes", a.k);
        if (a.v.rank != 4) fail_rank("v", "pages with 4 axes", a.v);
    } else {
        if (a.k.rank != a.q.rank) fail_rank_match("k", a.q, a.k);
        if (a.v.rank != a.q.rank) fail_rank_match("v", a.q, a.v);
    }
    check_float("q", a.q);
    check_same_dtype("k", a.k, a.q.dtype);
    check_same_dtype("v", a.v, a.q.dtype);

    AttentionProblem p;
    p.dtype = a.q.dtype;
    p.k_dtype = a.k.dtype;
    p.v_dtype = a.v.dtype;
    p.lse_dtype = p.dtype == DType::f64 ? DType::f64 : DType::f32;
    p.out_dtype = a.out_dtype.value_or(p.dtype);
    if (p.out_dtype != p.dtype && p.out_dtype != p.lse_dtype)
        fail_float_pair("out_dtype", p.dtype, p.lse_dtype, p.out_dtype);
    p.device = a.q.device;
    set_operands(a, p, axes_of(a.q.rank, a.layout), arrays);
    set_entries(a, p, arrays);
    if (a.block_table.given()) set_pages(a, p);
    set_numbers(a, p);
    set_optional_inputs(a, p, arrays);
    p.conditions = a.conditions.data();
    p.condition_count = static_cast<Index>(a.conditions.size());
    check_conditions(p);
    return p;
}

// ---- the problem ------------------------------------------------------------------------------------
// The lengths are clamped although make_problem checked them: another thread may write to the array
// meanwhile, and that must not become an access out of bounds.
namespace {

Index length_among(bool given, const HeadOperand& lens, Index b, Index size) noexcept {
    if (!given || lens.place != DeviceType::cpu) return size;
    return std::clamp<Index>(load_integer(lens.data, lens.dtype, b * lens.batch), 0, size);
}

// [cu[b], cu[b + 1]) of `size` rows or keys.
KeyRange bounds_of(const HeadOperand& cu, Index b, Index size) noexcept {
    if (cu.data == nullptr || cu.place != DeviceType::cpu) return {0, size};
    const auto at = [&](Index n) { return load_integer(cu.data, cu.dtype, n * cu.batch); };
    const Index begin = std::clamp<Index>(at(b), 0, size);
    return {begin, std::clamp<Index>(at(b + 1), begin, size)};
}

Index size_of(const KeyRange& range) noexcept { return range.end - range.begin; }

}  // namespace

KeyRange AttentionProblem::rows_of(Index b) const noexcept { return bounds_of(cu_q, b, q_size); }
KeyRange AttentionProblem::keys_of(Index b) const noexcept { return bounds_of(cu_kv, b, kv_size); }

Index AttentionProblem::q_len_among(Index b, Index size) const noexcept {
    return length_among(has_q_lens, q_lens, b, size);
}
Index AttentionProblem::kv_len_among(Index b, Index size) const noexcept {
    return length_among(has_kv_lens, kv_lens, b, size);
}
Index AttentionProblem::q_len(Index b) const noexcept { return q_len_among(b, size_of(rows_of(b))); }
Index AttentionProblem::kv_len(Index b) const noexcept { return kv_len_among(b, size_of(keys_of(b))); }

Index AttentionProblem::offset(Index b) const noexcept {
    if (!has_q_offset) return kv_len(b) - q_len(b);
    if (q_offsets.data == nullptr || q_offsets.place != DeviceType::cpu) return q_offset;
    return load_integer(q_offsets.data, q_offsets.dtype, b * q_offsets.batch);
}

KeyRange AttentionProblem::key_range(Index b, Index i) const noexcept {
    return attended_range(*this, kv_len(b), offset(b), i);
}

bool AttentionProblem::ranges_known() const noexcept {
    const auto readable = [](const HeadOperand& x) {
        return x.data == nullptr || x.place == DeviceType::cpu;
    };
    return readable(q_lens) && readable(kv_lens) && readable(q_offsets) && readable(cu_q) && readable(cu_kv);
}

AttentionProblem make_problem(const AttentionParams& a, bool for_execution) {
    Arrays arrays(a.q.device);
    AttentionProblem p = read_inputs(a, arrays);
    set_outputs(a, p, arrays, for_execution);
    arrays.check_overlaps();
    return p;
}

}  // namespace fastattn

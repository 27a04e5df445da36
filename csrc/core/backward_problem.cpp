// BackwardParams -> BackwardProblem: the checks of make_problem, and the gradients against what they belong
// to.
#include <fastattn/attention.h>

#include <algorithm>

#include "core/problem_errors.h"
#include "core/problem_parts.h"

namespace fastattn {
namespace {

void check_given(const char* name, const TensorView& view) {
    if (!view.given()) fail_value(name, "expected an array, got none");
}

// A result in the shape and dtype of the argument that it is the gradient of.
class Results {
public:
    Results(const BackwardParams& params, Arrays& arrays, bool for_execution)
        : params_(params), arrays_(arrays), for_execution_(for_execution) {}

    Operand operand(const char* name, const TensorView& view, const SizePattern& sizes, const char* like_name,
                    const TensorView& like) {
        if (!view.given() && !for_execution_) return {};
        check_given(name, view);
        Operand result = to_matching_operand(name, view, params_.forward, sizes, like.dtype, like_name, like);
        result.data = add_output(name, view, arrays_, for_execution_);
        return result;
    }

    // False: not asked for, or without elements.
    bool side(const char* name, const TensorView& view, const char* like_name, const TensorView& like) {
        if (!view.given()) return false;
        if (!like.given()) fail_value(name, std::string("expected none without ") + like_name);
        if (view.dtype != like.dtype) fail_dtype(name, dtype_name(like.dtype), view.dtype);
        if (view.rank != like.rank || !std::equal(view.shape, view.shape + view.rank, like.shape))
            fail_shape(name, shape_string(like) + std::string(" as ") + like_name, view);
        return !is_empty(view);
    }
    void* place(const char* name, const TensorView& view) {
        return add_output(name, view, arrays_, for_execution_);
    }

private:
    const BackwardParams& params_;
    Arrays& arrays_;
    bool for_execution_;
};

// Strides over (batch, head) of alibi_slopes or sinks.
ScoreOperand per_head(const TensorView& view) {
    return {
        nullptr, view.dtype,      view.rank == 2 ? stride_at(view, 0) : 0, stride_at(view, view.rank - 1), 0,
        0,       view.device.type};
}

}  // namespace

BackwardProblem make_backward_problem(const BackwardParams& a, bool for_execution) {
    const AttentionParams& f = a.forward;
    if (f.weights.given()) fail_value("weights", "expected none, the backward pass does not take them");
    BackwardProblem b;
    Arrays arrays(f.q.device);
    if (f.block_table.given()) fail_value("k", "expected an array: there are no gradients of keys in pages");
    if (f.out_dtype) fail_value("out_dtype", "expected none, the backward pass takes out in q's dtype");
    AttentionProblem& p = b.forward = read_inputs(f, arrays);

    const SizePattern q_sizes{p.array_batch(), p.q_size, p.q_heads, p.head_dim};
    const SizePattern out_sizes{p.array_batch(), p.q_size, p.q_heads, p.value_dim};
    check_given("dout", a.dout);
    b.dout = to_matching_operand("dout", a.dout, f, out_sizes, p.dtype, "q", f.q);
    arrays.input("dout", a.dout);
    check_given("out", f.out);
    p.out = to_matching_operand("out", f.out, f, out_sizes, p.dtype, "q", f.q);
    arrays.input("out", f.out);
    check_given("lse", f.lse);
    p.lse = to_score_rows("lse", f.lse, p, f.q.rank, false);
    arrays.input("lse", f.lse);
    if (a.dlse.given()) {
        b.dlse = to_score_rows("dlse", a.dlse, p, f.q.rank, false);
        arrays.input("dlse", a.dlse);
    }

    Results results(a, arrays, for_execution);
    b.dq = results.operand("dq", a.dq, q_sizes, "q", f.q);
    b.dk = results.operand("dk", a.dk, {p.array_batch(), p.kv_size, p.kv_heads, p.head_dim}, "k", f.k);
    b.dv = results.operand("dv", a.dv, {p.array_batch(), p.kv_size, p.kv_heads, p.value_dim}, "v", f.v);
    if (results.side("dbias", a.dbias, "bias", f.bias)) {
        b.dbias = to_score_operand("dbias", a.dbias, p);
        b.dbias.data = results.place("dbias", a.dbias);
    }
    if (results.side("dalibi_slopes", a.dalibi_slopes, "alibi_slopes", f.alibi_slopes)) {
        b.dalibi = per_head(a.dalibi_slopes);
        b.dalibi.data = results.place("dalibi_slopes", a.dalibi_slopes);
    }
    if (results.side("dsinks", a.dsinks, "sinks", f.sinks)) {
        b.dsinks = per_head(a.dsinks);
        b.dsinks.data = results.place("dsinks", a.dsinks);
    }
    arrays.check_overlaps();
    return b;
}

}  // namespace fastattn

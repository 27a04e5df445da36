// What make_problem and make_backward_problem share: axes, single arrays and their overlaps.
#pragma once

#include <fastattn/attention.h>

#include "core/memory_overlap.h"
#include "core/problem_errors.h"

namespace fastattn {

// ---- axes -------------------------------------------------------------------------------------
// Where (batch, seq, head, dim) lie in the caller's array; -1: the axis is absent and has size 1.
struct Axes {
    int batch, seq, head, dim;
};

constexpr Axes axes_of(int rank, Layout layout) noexcept {
    if (rank == 2) return {-1, 0, -1, 1};
    const bool bshd = layout == Layout::bshd;
    if (rank == 3) return bshd ? Axes{-1, 0, 1, 2} : Axes{-1, 1, 0, 2};
    return bshd ? Axes{0, 1, 2, 3} : Axes{0, 2, 1, 3};
}

inline std::int64_t size_at(const TensorView& view, int axis) noexcept {
    return axis < 0 ? 1 : view.shape[axis];
}
// Sizes 0 and 1 and arrays without elements may come with any stride; kernels get a harmless one.
inline bool is_empty(const TensorView& view) noexcept {
    bool empty = false;
    for (int axis = 0; axis < view.rank; ++axis) empty |= view.shape[axis] == 0;
    return empty;
}
inline std::int64_t stride_at(const TensorView& view, int axis) noexcept {
    return axis < 0 || view.shape[axis] <= 1 ? 0 : view.strides[axis];
}

inline Operand to_operand(const TensorView& view, const Axes& axes) noexcept {
    if (is_empty(view)) return {view.data, 0, 0, 0, 1};
    return {view.data, stride_at(view, axes.batch), stride_at(view, axes.seq), stride_at(view, axes.head),
            view.shape[axes.dim] == 1 ? 1 : view.strides[axes.dim]};
}

// ---- single arrays ------------------------------------------------------------------------------
// Collects every array of the call, to check the outputs against all of them at the end.
class Arrays {
public:
    explicit Arrays(Device device) noexcept : device_(device) {}

    void input(const char* name, const TensorView& view) { add(name, view, false); }

    // May also be on the host when q is on a device.
    void side_input(const char* name, const TensorView& view) {
        if (view.device.type == DeviceType::cpu)
            check_and_store(name, view, false);
        else
            add(name, view, false);
    }

    // Outputs must be writable and no two of their elements may share memory.
    void output(const char* name, const TensorView& view) {
        if (view.readonly) fail_value(name, "expected a writable array, got a read-only one");
        add(name, view, true);
    }

    void check_overlaps() const {
        for (int i = 0; i < count_; ++i) {
            if (!entries_[i].written) continue;
            for (int j = 0; j < count_; ++j) {
                if (j == i || (entries_[j].written && j < i)) continue;
                if (!extents_meet(entries_[i].extent, entries_[j].extent)) continue;
                if (may_share_memory(*entries_[i].view, *entries_[j].view))
                    fail_overlap(entries_[i].name, entries_[j].name);
            }
        }
    }

private:
    struct Entry {
        const char* name;
        const TensorView* view;
        ByteExtent extent;
        bool written;
    };

    void add(const char* name, const TensorView& view, bool written) {
        if (!(view.device == device_)) fail_device(name, view.device, device_);
        check_and_store(name, view, written);
    }

    void check_and_store(const char* name, const TensorView& view, bool written) {
        const ViewCheck check = measure(view);
        if (check.fault != ViewFault::none) fail_view(name, view, check.fault);
        if (written && overlaps_itself(view)) fail_self_overlap(name, view);
        entries_[count_++] = {name, &view, check.extent, written};
    }

    static constexpr int kMaxArrays = 24;
    Device device_;
    int count_ = 0;
    Entry entries_[kMaxArrays];
};

inline void check_float(const char* name, const TensorView& view) {
    if (!is_float(view.dtype)) fail_dtype(name, "a float dtype", view.dtype);
}

inline void check_same_dtype(const char* name, const TensorView& view, DType expected) {
    if (view.dtype != expected) fail_dtype_match(name, expected, view.dtype);
}

// Bytes of an array that the caller has not made yet.
inline void check_byte_count(const char* name, std::initializer_list<std::int64_t> shape, DType dtype) {
    auto bytes = static_cast<std::int64_t>(item_size(dtype));
    for (const std::int64_t n : shape)
        if (n != 0 && multiply_overflows(bytes, n, &bytes))
            fail_value(name, "the number of bytes of " + shape_string(shape) + " overflows 64 bits");
}

// ---- what a problem is made of ------------------------------------------------------------------
// Everything of a problem but its outputs; `arrays` collects what it read.
AttentionProblem read_inputs(const AttentionParams& params, Arrays& arrays);

// An array with the axes of q, k or v: checked against the sizes that it must have, because of the array
// `like`.
Operand to_matching_operand(const char* name, const TensorView& view, const AttentionParams& params,
                            const SizePattern& sizes, DType dtype, const char* like_name,
                            const TensorView& like);

// An array broadcast over (B, Hq, Sq, Sk).
ScoreOperand to_score_operand(const char* name, const TensorView& view, const AttentionProblem& p);

// lse, its gradient, weights: axes (B, Hq, Sq[, Sk]) less those that q lacks, in lse's dtype.
ScoreOperand to_score_rows(const char* name, const TensorView& view, const AttentionProblem& p, int q_rank,
                           bool with_keys);

// An output; while it need not exist yet (explain) a place that is never read or written, only not null.
void* add_output(const char* name, const TensorView& view, Arrays& arrays, bool for_execution);

}  // namespace fastattn

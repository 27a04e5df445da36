#include "core/problem_errors.h"

#include <cstdio>

namespace fastattn {
namespace {

std::string number_string(double x) {
    char text[32];
    std::snprintf(text, sizeof text, "%.10g", x);
    return text;
}

std::string labelled(const char* name, const TensorView& view) {
    return std::string(name) + " " + shape_string(view);
}

std::string size_string(std::int64_t size) {
    if (size == kAnySize) return "*";
    if (size == kKvHeads) return "Hkv";
    return std::to_string(size);
}

}  // namespace

OutOfMemory::OutOfMemory(const char* what_for, std::size_t size)
    : Error("fastattn: no memory for " + std::string(what_for) + ": " + std::to_string(size) +
            " bytes asked for"),
      bytes(size) {}

std::string shape_string(const std::int64_t* shape, int rank) {
    std::string text = "(";
    for (int axis = 0; axis < rank; ++axis) text += (axis ? ", " : "") + std::to_string(shape[axis]);
    return text + (rank == 1 ? ",)" : ")");
}

std::string shape_string(std::initializer_list<std::int64_t> shape) {
    return shape_string(shape.begin(), static_cast<int>(shape.size()));
}

std::string shape_string(const TensorView& view) {
    if (view.rank <= kMaxRank) return shape_string(view.shape, view.rank);
    if (view.full_shape != nullptr) return shape_string(view.full_shape, view.rank);
    std::string text = shape_string(view.shape, kMaxRank);
    text.back() = ',';
    return text + " ...)";
}

std::string device_string(Device device) {
    return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

void fail_value(const char* name, const std::string& what) {
    throw ValueError(std::string(name) + ": " + what);
}

void fail_number(const char* name, const char* expected, double got) {
    fail_value(name, std::string("expected ") + expected + ", got " + number_string(got));
}

void fail_integer(const char* name, const char* expected, std::int64_t got) {
    fail_value(name, std::string("expected ") + expected + ", got " + std::to_string(got));
}

void fail_rank(const char* name, const char* expected, const TensorView& got) {
    fail_value(name, std::string("expected ") + expected + ", got " + std::to_string(got.rank) +
                         " with shape " + shape_string(got));
}

void fail_rank_match(const char* name, const TensorView& q, const TensorView& got) {
    fail_value(name, "expected " + std::to_string(q.rank) + " axes to match " + labelled("q", q) + ", got " +
                         std::to_string(got.rank) + " with shape " + shape_string(got));
}

void fail_dtype(const char* name, const char* expected, DType got) {
    throw TypeError(std::string(name) + ": expected " + expected + ", got " + dtype_name(got));
}

void fail_mask_dtype(const char* as_bool, const TensorView& got, const std::string& hint) {
    throw TypeError(std::string("mask: expected bool, got ") + dtype_name(got.dtype) + " of shape " +
                    shape_string(got) + "; use " + as_bool + hint);
}

void fail_dtype_match(const char* name, DType expected, DType got) {
    throw TypeError(std::string(name) + ": expected " + dtype_name(expected) + " to match q, got " +
                    dtype_name(got));
}

void fail_float_pair(const char* name, DType dtype, DType lse_dtype, DType got) {
    std::string expected = dtype_name(dtype);
    if (lse_dtype != dtype) expected += std::string(" or ") + dtype_name(lse_dtype);
    fail_dtype(name, expected.c_str(), got);
}

void fail_device(const char* name, Device got, Device expected) {
    fail_value(name, "expected an array on " + device_string(expected) + " as q is, got one on " +
                         device_string(got));
}

void fail_view(const char* name, const TensorView& view, ViewFault fault) {
    const std::string shape = shape_string(view);
    switch (fault) {
        case ViewFault::negative_size: fail_value(name, "expected sizes >= 0, got shape " + shape);
        case ViewFault::too_many_bytes:
            fail_value(name, "expected a byte count within 64 bits, got shape " + shape + " of " +
                                 dtype_name(view.dtype));
        case ViewFault::reaches_too_far:
            fail_value(name, "expected strides within the address space, got strides " +
                                 shape_string(view.strides, view.rank) + " for shape " + shape);
        case ViewFault::null_data: fail_value(name, "expected data, got a null pointer for shape " + shape);
        case ViewFault::misaligned:
            fail_value(name, std::string("expected data aligned to ") + dtype_name(view.dtype) +
                                 ", got a misaligned pointer for shape " + shape);
        case ViewFault::none: break;
    }
    fail_value(name, "invalid array of shape " + shape);
}

void fail_shape(const char* name, const std::string& expected, const TensorView& got) {
    fail_value(name, "expected shape " + expected + ", got " + shape_string(got));
}

void fail_operand(const char* name, Layout layout, const SizePattern& expected, const char* like_name,
                  const TensorView& like, const TensorView& got) {
    const std::string batch = like.rank == 4 ? size_string(expected.batch) + ", " : "";
    const std::string head = like.rank >= 3 ? size_string(expected.head) + ", " : "";
    const std::string seq = size_string(expected.seq) + ", ";
    const std::string shape =
        "(" + batch + (layout == Layout::bshd ? seq + head : head + seq) + size_string(expected.dim) + ")";
    fail_value(name, "expected shape " + shape + " to match " + labelled(like_name, like) + ", got " +
                         shape_string(got));
}

void fail_empty_dim(const char* name, const TensorView& got) {
    fail_value(name, "expected a head dimension >= 1, got shape " + shape_string(got));
}

void fail_heads(const TensorView& q, const TensorView& k, std::int64_t q_heads, std::int64_t kv_heads) {
    fail_value("k", "expected a number of heads that divides the " + std::to_string(q_heads) + " of " +
                        labelled("q", q) + ", got " + std::to_string(kv_heads) + " in " + shape_string(k));
}

void fail_score_output(const char* name, const std::int64_t full[4], int first, int last, bool packed,
                       const TensorView& got) {
    static constexpr const char* kPadded[4] = {"B", "Hq", "Sq", "Sk"};
    static constexpr const char* kPacked[4] = {"", "Hq", "Tq", "Tk"};
    const char* const* names = packed ? kPacked : kPadded;
    std::string axes = "(";
    for (int axis = first; axis < last; ++axis) axes += (axis > first ? ", " : "") + std::string(names[axis]);
    axes += last - first == 1 ? ",) = " : ") = ";
    fail_shape(name, axes + shape_string(full + first, last - first), got);
}

void fail_length(const char* name, std::int64_t entry, std::int64_t got, std::int64_t limit) {
    fail_value(name, "expected lengths from 0 to " + std::to_string(limit) + ", got " + std::to_string(got) +
                         " at index " + std::to_string(entry));
}

void fail_bound(const char* name, std::int64_t index, std::int64_t got, std::int64_t before, const char* axis,
                std::int64_t size) {
    const std::string at = std::to_string(got) + " at index " + std::to_string(index);
    if (got > size)
        fail_value(name, std::string("expected bounds of at most ") + axis + " = " + std::to_string(size) +
                             ", got " + at);
    if (got < 0) fail_value(name, "expected bounds of at least 0, got " + at);
    fail_value(name, "expected bounds that do not decrease, got " + at + " after " + std::to_string(before) +
                         " (entry " + std::to_string(index - 1) + ")");
}

void fail_self_overlap(const char* name, const TensorView& view) {
    fail_value(name, "expected elements that do not overlap in memory, got strides " +
                         shape_string(view.strides, view.rank) + " for shape " + shape_string(view));
}

void fail_overlap(const char* name, const char* other) {
    fail_value(name, std::string("expected memory of its own, but it overlaps ") + other);
}

}  // namespace fastattn

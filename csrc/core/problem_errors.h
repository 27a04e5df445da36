// The messages of make_problem: each names the argument, what was expected and what came. All cold.
#pragma once

#include <initializer_list>
#include <string>

#include <fastattn/attention.h>

#include "core/memory_overlap.h"

namespace fastattn {

// Sizes of (batch, seq, head, dim) for a message; the special values stand for free sizes.
inline constexpr std::int64_t kAnySize = -1;
inline constexpr std::int64_t kKvHeads = -2;
struct SizePattern {
    std::int64_t batch, seq, head, dim;
};

std::string shape_string(const std::int64_t* shape, int rank);  // "(2, 3)", "(2,)", "()"
std::string shape_string(std::initializer_list<std::int64_t> shape);
std::string shape_string(const TensorView& view);

[[noreturn]] void fail_value(const char* name, const std::string& what);
[[noreturn]] void fail_number(const char* name, const char* expected, double got);
[[noreturn]] void fail_integer(const char* name, const char* expected, std::int64_t got);
[[noreturn]] void fail_rank(const char* name, const char* expected, const TensorView& got);
[[noreturn]] void fail_rank_match(const char* name, const TensorView& q, const TensorView& got);
[[noreturn]] void fail_dtype(const char* name, const char* expected, DType got);
// as_bool: how the caller makes a bool array of it; hint: more to say, or empty.
[[noreturn]] void fail_mask_dtype(const char* as_bool, const TensorView& got, const std::string& hint);
[[noreturn]] void fail_dtype_match(const char* name, DType expected, DType got);
// A dtype that is neither q's nor lse's.
[[noreturn]] void fail_float_pair(const char* name, DType dtype, DType lse_dtype, DType got);
[[noreturn]] void fail_device(const char* name, Device got, Device expected);
[[noreturn]] void fail_view(const char* name, const TensorView& view, ViewFault fault);
[[noreturn]] void fail_shape(const char* name, const std::string& expected, const TensorView& got);
// A q-like array: the expected sizes in the caller's layout, because of an array `like`.
[[noreturn]] void fail_operand(const char* name, Layout layout, const SizePattern& expected,
                               const char* like_name, const TensorView& like, const TensorView& got);
[[noreturn]] void fail_empty_dim(const char* name, const TensorView& got);
[[noreturn]] void fail_heads(const TensorView& q, const TensorView& k, std::int64_t q_heads,
                             std::int64_t kv_heads);
[[noreturn]] void fail_score_output(const char* name, const std::int64_t full[4], int first, int last,
                                    bool packed, const TensorView& got);
[[noreturn]] void fail_length(const char* name, std::int64_t entry, std::int64_t got, std::int64_t limit);
// Of bounds of packed entries: the one before, and the axis with its size.
[[noreturn]] void fail_bound(const char* name, std::int64_t index, std::int64_t got, std::int64_t before,
                             const char* axis, std::int64_t size);
[[noreturn]] void fail_self_overlap(const char* name, const TensorView& view);
[[noreturn]] void fail_overlap(const char* name, const char* other);

std::string device_string(Device device);  // "cpu", "cuda:0"

}  // namespace fastattn

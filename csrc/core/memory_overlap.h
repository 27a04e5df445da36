// Which bytes does a strided view touch, and do two views touch a common one?
#pragma once

#include <cstdint>

#include <fastattn/tensor_view.h>

namespace fastattn {

// a * b of non-negative numbers into *product; true when it does not fit.
inline bool multiply_overflows(std::int64_t a, std::int64_t b, std::int64_t* product) noexcept {
#if defined(__GNUC__)
    return __builtin_mul_overflow(a, b, product);
#else
    if (a != 0 && b > INT64_MAX / a) return true;
    *product = a * b;
    return false;
#endif
}

// Addresses [begin, end) between the first and the last byte; empty for a view without elements.
struct ByteExtent {
    std::uintptr_t begin = 0, end = 0;
};

enum class ViewFault : std::uint8_t {
    none,
    negative_size,
    too_many_bytes,
    reaches_too_far,
    null_data,
    misaligned
};

struct ViewCheck {
    ByteExtent extent;
    ViewFault fault = ViewFault::none;
};

// The extent of a view of rank <= kMaxRank, or why it cannot be one. The byte count is that of the
// shape with zeros left out, so that no product of some of the sizes can overflow later.
ViewCheck measure(const TensorView& view) noexcept;

inline bool extents_meet(const ByteExtent& a, const ByteExtent& b) noexcept {
    return a.begin < b.end && b.begin < a.end;
}

// Whether some byte belongs to an element of both. Exact for slices and transposes of one buffer
// (interleaved ones too); for strides too irregular to decide quickly it says true. Both views must
// have passed measure() and have elements.
bool may_share_memory(const TensorView& a, const TensorView& b) noexcept;

// Whether two elements of one view may share a byte: false only if each stride steps over everything
// that the smaller strides span.
bool overlaps_itself(const TensorView& view) noexcept;

}  // namespace fastattn

// One element of an array whose dtype is known at run time only (lengths, slopes, masks, biases).
// Internal linkage throughout, so that ISA objects may include it.
#pragma once

#include <cstdint>
#include <cstring>

#include <fastattn/tensor_view.h>

#include "core/half.h"
#include "core/host_device.h"

namespace fastattn {
namespace {

template <class T>
FASTATTN_HOST_DEVICE static inline T load_as(const void* data, std::int64_t index) noexcept {
    return static_cast<const T*>(data)[index];
}

// Any integer dtype; uint64 values past the int64 range saturate.
[[maybe_unused]] FASTATTN_HOST_DEVICE static inline std::int64_t load_integer(const void* data, DType dtype,
                                                                              std::int64_t index) noexcept {
    switch (dtype) {
        case DType::i64: return load_as<std::int64_t>(data, index);
        case DType::i32: return load_as<std::int32_t>(data, index);
        case DType::i16: return load_as<std::int16_t>(data, index);
        case DType::i8: return load_as<std::int8_t>(data, index);
        case DType::u64: {
            const auto value = load_as<std::uint64_t>(data, index);
            return value > INT64_MAX ? INT64_MAX : static_cast<std::int64_t>(value);
        }
        case DType::u32: return load_as<std::uint32_t>(data, index);
        case DType::u16: return load_as<std::uint16_t>(data, index);
        case DType::u8: return load_as<std::uint8_t>(data, index);
        default: return 0;
    }
}

// Any float dtype.
[[maybe_unused]] FASTATTN_HOST_DEVICE static inline double load_real(const void* data, DType dtype,
                                                                     std::int64_t index) noexcept {
    switch (dtype) {
        case DType::f64: return load_as<double>(data, index);
        case DType::f32: return static_cast<double>(load_as<float>(data, index));
        case DType::f16: return static_cast<double>(f16_to_f32(load_as<std::uint16_t>(data, index)));
        case DType::bf16: return static_cast<double>(bf16_to_f32(load_as<std::uint16_t>(data, index)));
        default: return 0.0;
    }
}

// Rounds once, to nearest even.
[[maybe_unused]] FASTATTN_HOST_DEVICE static inline void store_real(void* data, DType dtype,
                                                                    std::int64_t index,
                                                                    double value) noexcept {
    switch (dtype) {
        case DType::f64: static_cast<double*>(data)[index] = value; break;
        case DType::f32: static_cast<float*>(data)[index] = static_cast<float>(value); break;
        case DType::f16: static_cast<std::uint16_t*>(data)[index] = f64_to_f16(value); break;
        case DType::bf16: static_cast<std::uint16_t*>(data)[index] = f64_to_bf16(value); break;
        default: break;
    }
}

}  // namespace
}  // namespace fastattn

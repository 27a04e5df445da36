// TensorView: how every array enters and leaves the core. A view owns nothing; the caller keeps the
// memory alive. Strides count elements, not bytes, and may be zero or negative.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn {

enum class DType : std::uint8_t { f64, f32, f16, bf16, boolean, i8, i16, i32, i64, u8, u16, u32, u64 };

constexpr std::size_t item_size(DType dtype) noexcept {
    switch (dtype) {
        case DType::f64:
        case DType::i64:
        case DType::u64: return 8;
        case DType::f32:
        case DType::i32:
        case DType::u32: return 4;
        case DType::f16:
        case DType::bf16:
        case DType::i16:
        case DType::u16: return 2;
        case DType::boolean:
        case DType::i8:
        case DType::u8: return 1;
    }
    return 0;
}

// The names that users see: NumPy's ("float32"), and "bfloat16".
constexpr const char* dtype_name(DType dtype) noexcept {
    switch (dtype) {
        case DType::f64: return "float64";
        case DType::f32: return "float32";
        case DType::f16: return "float16";
        case DType::bf16: return "bfloat16";
        case DType::boolean: return "bool";
        case DType::i8: return "int8";
        case DType::i16: return "int16";
        case DType::i32: return "int32";
        case DType::i64: return "int64";
        case DType::u8: return "uint8";
        case DType::u16: return "uint16";
        case DType::u32: return "uint32";
        case DType::u64: return "uint64";
    }
    return "?";
}

constexpr bool is_float(DType dtype) noexcept { return dtype <= DType::bf16; }
constexpr bool is_integer(DType dtype) noexcept { return dtype >= DType::i8; }

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
    DeviceType type = DeviceType::cpu;
    int index = 0;
    friend constexpr bool operator==(const Device&, const Device&) = default;
};

inline constexpr int kMaxRank = 4;

// A strided array. rank == -1 means "not given". A rank above kMaxRank is representable so that
// validation can name it; shape and strides then hold the first kMaxRank axes only, and full_shape, which the
// caller keeps alive, may have all of them for the message.
struct TensorView {
    void* data = nullptr;
    DType dtype = DType::f32;
    Device device{};
    bool readonly = false;
    int rank = -1;
    std::int64_t shape[kMaxRank] = {0, 0, 0, 0};
    std::int64_t strides[kMaxRank] = {0, 0, 0, 0};
    const std::int64_t* full_shape = nullptr;  // with a rank above kMaxRank, or null

    constexpr bool given() const noexcept { return rank >= 0; }
};

}  // namespace fastattn

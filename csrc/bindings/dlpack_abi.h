// The binary interface of DLPack, https://dmlc.github.io/dlpack/latest/c_api.html, as of version 1.1:
// declared here so that no foreign header is needed. The layout of these structs is frozen by the
// standard (major version 1); names follow ours.
#pragma once

#include <cstdint>

namespace fastattn::dlpack {

inline constexpr std::uint32_t kMajorVersion = 1;
inline constexpr std::uint32_t kMinorVersion = 1;

// DLDeviceType
enum : std::int32_t {
    kCpu = 1,
    kCuda = 2,
    kCudaHost = 3,   // page-locked host memory
    kRocm = 10,
    kRocmHost = 11,  // page-locked host memory
    kCudaManaged = 13,
};

// DLDataTypeCode
enum : std::uint8_t {
    kInt = 0,
    kUInt = 1,
    kFloat = 2,
    kOpaqueHandle = 3,
    kBfloat = 4,
    kComplex = 5,
    kBool = 6,
};

// Bits of DLManagedTensorVersioned::flags
inline constexpr std::uint64_t kReadOnly = std::uint64_t{1} << 0;
inline constexpr std::uint64_t kIsCopied = std::uint64_t{1} << 1;

struct DLDevice {
    std::int32_t device_type;
    std::int32_t device_id;
};

struct DLDataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct DLTensor {
    void* data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null: compact, row-major
    std::uint64_t byte_offset;
};

// Capsule "dltensor", once consumed "used_dltensor".
struct DLManagedTensor {
    DLTensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(DLManagedTensor* self);
};

struct DLPackVersion {
    std::uint32_t major;
    std::uint32_t minor;
};

// Capsule "dltensor_versioned", once consumed "used_dltensor_versioned".
struct DLManagedTensorVersioned {
    DLPackVersion version;
    void* manager_ctx;
    void (*deleter)(DLManagedTensorVersioned* self);
    std::uint64_t flags;
    DLTensor dl_tensor;
};

static_assert(sizeof(void*) != 8 || (sizeof(DLTensor) == 48 && sizeof(DLManagedTensor) == 64 &&
                                     sizeof(DLManagedTensorVersioned) == 80),
              "DLPack structs have the layout of the standard");

inline constexpr const char* kLegacyName = "dltensor";
inline constexpr const char* kLegacyUsedName = "used_dltensor";
inline constexpr const char* kVersionedName = "dltensor_versioned";
inline constexpr const char* kVersionedUsedName = "used_dltensor_versioned";

}  // namespace fastattn::dlpack

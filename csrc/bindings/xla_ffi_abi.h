// The part of XLA's foreign function interface that our handlers meet, in names of our own, so that no header
// of JAX is needed to build, and one build serves every jaxlib that speaks it: what stands here is the same
// in versions 0.1 (jaxlib 0.5) to 0.3 (jaxlib 0.10). tests/cpp/check_xla_ffi_abi.cpp compares it with the
// header in jaxlib.
//
// A structure begins with its size in bytes, as the runtime knows it: fields past that size do not exist.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn::xla_ffi {

inline constexpr int kMajor = 0;
inline constexpr int kOldestMinor = 1, kNewestMinor = 3;

// XLA_FFI_Extension_Type
enum ExtensionKind : int { kMetadataExtension = 1 };
// XLA_FFI_ArgType, XLA_FFI_RetType
enum OperandKind : int { kBuffer = 1 };
// XLA_FFI_AttrType
enum AttributeKind : int { kScalar = 3, kString = 4 };
// XLA_FFI_ExecutionStage
enum Stage : int { kExecute = 3 };
// XLA_FFI_DataType
enum DataType : int {
    kPred = 1,
    kS8 = 2,
    kS16 = 3,
    kS32 = 4,
    kS64 = 5,
    kU8 = 6,
    kU16 = 7,
    kU32 = 8,
    kU64 = 9,
    kF16 = 10,
    kF32 = 11,
    kF64 = 12,
    kBf16 = 16,
};
// XLA_FFI_Error_Code; shown to the user as its name in capitals
enum ErrorCode : int {
    kCancelled = 1,
    kInvalidArgument = 3,
    kResourceExhausted = 8,
    kUnimplemented = 12,
    kInternal = 13,
};

struct Extension {  // XLA_FFI_Extension_Base
    std::size_t bytes;
    ExtensionKind kind;
    Extension* next;
};
struct Version {  // XLA_FFI_Api_Version
    std::size_t bytes;
    Extension* extensions;
    int major, minor;
};

struct Text {  // XLA_FFI_ByteSpan; not terminated
    const char* data;
    std::size_t size;
};
struct Scalar {  // XLA_FFI_Scalar
    DataType dtype;
    void* value;
};
struct Buffer {  // XLA_FFI_Buffer: a dense array, here in row-major order, JAX's default
    std::size_t bytes;
    Extension* extensions;
    DataType dtype;
    void* data;
    std::int64_t rank;
    std::int64_t* dims;
};

struct Operands {  // XLA_FFI_Args, XLA_FFI_Rets
    std::size_t bytes;
    Extension* extensions;
    std::int64_t size;
    OperandKind* kinds;
    void** values;  // Buffer*
};
struct Attributes {  // XLA_FFI_Attrs
    std::size_t bytes;
    Extension* extensions;
    std::int64_t size;
    AttributeKind* kinds;
    Text** names;
    void** values;  // Scalar*, Text*
};

struct Error;  // XLA_FFI_Error, the runtime's own; null: success
struct ErrorArguments {  // XLA_FFI_Error_Create_Args
    std::size_t bytes;
    Extension* extensions;
    const char* message;
    ErrorCode code;
};
struct Api {  // XLA_FFI_Api, as far as it is used
    std::size_t bytes;
    Extension* extensions;
    Version version;
    const void* internal;
    Error* (*create_error)(ErrorArguments*);
};

struct CallFrame {  // XLA_FFI_CallFrame, but for its last field, which only asynchronous handlers set
    std::size_t bytes;
    Extension* extensions;
    const Api* api;
    void* context;
    Stage stage;
    Operands arguments, results;
    Attributes attributes;
};
using Handler = Error*(CallFrame*);  // XLA_FFI_Handler

// A call frame with this extension asks what the handler is; nothing is to be computed then.
struct Metadata {  // XLA_FFI_Metadata
    std::size_t bytes;
    Version version;
    std::uint32_t traits;
    std::int64_t state_type;  // not in early 0.1; 0: the handler has no state
};
struct MetadataExtension {  // XLA_FFI_Metadata_Extension
    Extension base;
    Metadata* metadata;
};

}  // namespace fastattn::xla_ffi

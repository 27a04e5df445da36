// Compiled where jaxlib's headers are, run never: csrc/bindings/xla_ffi_abi.h says the same as
// xla/ffi/api/c_api.h.
#include <xla/ffi/api/c_api.h>

#include <cstddef>
#include <type_traits>

#include "bindings/xla_ffi_abi.h"

namespace fastattn::xla_ffi {
namespace {

static_assert(XLA_FFI_API_MAJOR == kMajor);
static_assert(XLA_FFI_API_MINOR >= kOldestMinor);

// ---- values ---------------------------------------------------------------------------------------
// Enumerations of two headers: compared as what they are passed as.
template <class Ours, class Theirs>
constexpr bool same(Ours ours, Theirs theirs) {
    return sizeof(ours) == sizeof(theirs) && static_cast<long long>(ours) == static_cast<long long>(theirs);
}

static_assert(same(kMetadataExtension, XLA_FFI_Extension_Metadata));
static_assert(same(kBuffer, XLA_FFI_ArgType_BUFFER));
static_assert(same(kBuffer, XLA_FFI_RetType_BUFFER));
static_assert(same(kScalar, XLA_FFI_AttrType_SCALAR));
static_assert(same(kString, XLA_FFI_AttrType_STRING));
static_assert(same(kExecute, XLA_FFI_ExecutionStage_EXECUTE));

static_assert(same(kPred, XLA_FFI_DataType_PRED));
static_assert(same(kS8, XLA_FFI_DataType_S8));
static_assert(same(kS16, XLA_FFI_DataType_S16));
static_assert(same(kS32, XLA_FFI_DataType_S32));
static_assert(same(kS64, XLA_FFI_DataType_S64));
static_assert(same(kU8, XLA_FFI_DataType_U8));
static_assert(same(kU16, XLA_FFI_DataType_U16));
static_assert(same(kU32, XLA_FFI_DataType_U32));
static_assert(same(kU64, XLA_FFI_DataType_U64));
static_assert(same(kF16, XLA_FFI_DataType_F16));
static_assert(same(kF32, XLA_FFI_DataType_F32));
static_assert(same(kF64, XLA_FFI_DataType_F64));
static_assert(same(kBf16, XLA_FFI_DataType_BF16));

static_assert(same(kCancelled, XLA_FFI_Error_Code_CANCELLED));
static_assert(same(kInvalidArgument, XLA_FFI_Error_Code_INVALID_ARGUMENT));
static_assert(same(kResourceExhausted, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED));
static_assert(same(kUnimplemented, XLA_FFI_Error_Code_UNIMPLEMENTED));
static_assert(same(kInternal, XLA_FFI_Error_Code_INTERNAL));

// ---- sizes and places -----------------------------------------------------------------------------
// Same place, size and kind (pointer or not) of a field of both.
#define FASTATTN_SAME_FIELD(Ours, ours, Theirs, theirs)               \
    static_assert(offsetof(Ours, ours) == offsetof(Theirs, theirs) && \
                  sizeof(Ours::ours) == sizeof(Theirs::theirs) &&     \
                  std::is_pointer_v<decltype(Ours::ours)> == std::is_pointer_v<decltype(Theirs::theirs)>)
// A structure that is passed whole, or that we make.
#define FASTATTN_SAME_SIZE(Ours, Theirs) \
    static_assert(sizeof(Ours) == sizeof(Theirs) && alignof(Ours) == alignof(Theirs))

FASTATTN_SAME_SIZE(Extension, XLA_FFI_Extension_Base);
FASTATTN_SAME_FIELD(Extension, bytes, XLA_FFI_Extension_Base, struct_size);
FASTATTN_SAME_FIELD(Extension, kind, XLA_FFI_Extension_Base, type);
FASTATTN_SAME_FIELD(Extension, next, XLA_FFI_Extension_Base, next);

FASTATTN_SAME_SIZE(Version, XLA_FFI_Api_Version);
FASTATTN_SAME_FIELD(Version, bytes, XLA_FFI_Api_Version, struct_size);
FASTATTN_SAME_FIELD(Version, extensions, XLA_FFI_Api_Version, extension_start);
FASTATTN_SAME_FIELD(Version, major, XLA_FFI_Api_Version, major_version);
FASTATTN_SAME_FIELD(Version, minor, XLA_FFI_Api_Version, minor_version);

FASTATTN_SAME_SIZE(Text, XLA_FFI_ByteSpan);
FASTATTN_SAME_FIELD(Text, data, XLA_FFI_ByteSpan, ptr);
FASTATTN_SAME_FIELD(Text, size, XLA_FFI_ByteSpan, len);

FASTATTN_SAME_SIZE(Scalar, XLA_FFI_Scalar);
FASTATTN_SAME_FIELD(Scalar, dtype, XLA_FFI_Scalar, dtype);
FASTATTN_SAME_FIELD(Scalar, value, XLA_FFI_Scalar, value);

FASTATTN_SAME_FIELD(Buffer, bytes, XLA_FFI_Buffer, struct_size);
FASTATTN_SAME_FIELD(Buffer, extensions, XLA_FFI_Buffer, extension_start);
FASTATTN_SAME_FIELD(Buffer, dtype, XLA_FFI_Buffer, dtype);
FASTATTN_SAME_FIELD(Buffer, data, XLA_FFI_Buffer, data);
FASTATTN_SAME_FIELD(Buffer, rank, XLA_FFI_Buffer, rank);
FASTATTN_SAME_FIELD(Buffer, dims, XLA_FFI_Buffer, dims);

FASTATTN_SAME_SIZE(Operands, XLA_FFI_Args);
FASTATTN_SAME_FIELD(Operands, bytes, XLA_FFI_Args, struct_size);
FASTATTN_SAME_FIELD(Operands, extensions, XLA_FFI_Args, extension_start);
FASTATTN_SAME_FIELD(Operands, size, XLA_FFI_Args, size);
FASTATTN_SAME_FIELD(Operands, kinds, XLA_FFI_Args, types);
FASTATTN_SAME_FIELD(Operands, values, XLA_FFI_Args, args);
FASTATTN_SAME_SIZE(Operands, XLA_FFI_Rets);
FASTATTN_SAME_FIELD(Operands, bytes, XLA_FFI_Rets, struct_size);
FASTATTN_SAME_FIELD(Operands, extensions, XLA_FFI_Rets, extension_start);
FASTATTN_SAME_FIELD(Operands, size, XLA_FFI_Rets, size);
FASTATTN_SAME_FIELD(Operands, kinds, XLA_FFI_Rets, types);
FASTATTN_SAME_FIELD(Operands, values, XLA_FFI_Rets, rets);

FASTATTN_SAME_SIZE(Attributes, XLA_FFI_Attrs);
FASTATTN_SAME_FIELD(Attributes, bytes, XLA_FFI_Attrs, struct_size);
FASTATTN_SAME_FIELD(Attributes, extensions, XLA_FFI_Attrs, extension_start);
FASTATTN_SAME_FIELD(Attributes, size, XLA_FFI_Attrs, size);
FASTATTN_SAME_FIELD(Attributes, kinds, XLA_FFI_Attrs, types);
FASTATTN_SAME_FIELD(Attributes, names, XLA_FFI_Attrs, names);
FASTATTN_SAME_FIELD(Attributes, values, XLA_FFI_Attrs, attrs);

FASTATTN_SAME_SIZE(ErrorArguments, XLA_FFI_Error_Create_Args);
FASTATTN_SAME_FIELD(ErrorArguments, bytes, XLA_FFI_Error_Create_Args, struct_size);
FASTATTN_SAME_FIELD(ErrorArguments, extensions, XLA_FFI_Error_Create_Args, extension_start);
FASTATTN_SAME_FIELD(ErrorArguments, message, XLA_FFI_Error_Create_Args, message);
FASTATTN_SAME_FIELD(ErrorArguments, code, XLA_FFI_Error_Create_Args, errc);

FASTATTN_SAME_FIELD(Api, bytes, XLA_FFI_Api, struct_size);
FASTATTN_SAME_FIELD(Api, extensions, XLA_FFI_Api, extension_start);
FASTATTN_SAME_FIELD(Api, version, XLA_FFI_Api, api_version);
FASTATTN_SAME_FIELD(Api, internal, XLA_FFI_Api, internal_api);
FASTATTN_SAME_FIELD(Api, create_error, XLA_FFI_Api, XLA_FFI_Error_Create);

FASTATTN_SAME_FIELD(CallFrame, bytes, XLA_FFI_CallFrame, struct_size);
FASTATTN_SAME_FIELD(CallFrame, extensions, XLA_FFI_CallFrame, extension_start);
FASTATTN_SAME_FIELD(CallFrame, api, XLA_FFI_CallFrame, api);
FASTATTN_SAME_FIELD(CallFrame, context, XLA_FFI_CallFrame, ctx);
FASTATTN_SAME_FIELD(CallFrame, stage, XLA_FFI_CallFrame, stage);
FASTATTN_SAME_FIELD(CallFrame, arguments, XLA_FFI_CallFrame, args);
FASTATTN_SAME_FIELD(CallFrame, results, XLA_FFI_CallFrame, rets);
FASTATTN_SAME_FIELD(CallFrame, attributes, XLA_FFI_CallFrame, attrs);
static_assert(sizeof(CallFrame) == static_cast<std::size_t>(XLA_FFI_CallFrame_STRUCT_SIZE));

FASTATTN_SAME_FIELD(Metadata, bytes, XLA_FFI_Metadata, struct_size);
FASTATTN_SAME_FIELD(Metadata, version, XLA_FFI_Metadata, api_version);
FASTATTN_SAME_FIELD(Metadata, traits, XLA_FFI_Metadata, traits);
// A late field: jaxlib 0.6 does not have it yet.
template <class Theirs>
constexpr bool same_state_type() {
    if constexpr (requires(Theirs theirs) { theirs.state_type_id; })
        return offsetof(Metadata, state_type) == offsetof(Theirs, state_type_id) &&
               sizeof(Metadata) == sizeof(Theirs);
    else
        return sizeof(Theirs) == offsetof(Metadata, state_type);
}
static_assert(same_state_type<XLA_FFI_Metadata>());
FASTATTN_SAME_FIELD(MetadataExtension, base, XLA_FFI_Metadata_Extension, extension_base);
FASTATTN_SAME_FIELD(MetadataExtension, metadata, XLA_FFI_Metadata_Extension, metadata);

// ---- functions ------------------------------------------------------------------------------------
// One pointer in, one pointer out.
template <class Function>
constexpr bool takes_and_returns_a_pointer = false;
template <class Result, class Argument>
constexpr bool takes_and_returns_a_pointer<Result*(Argument*)> = true;

static_assert(takes_and_returns_a_pointer<Handler> && takes_and_returns_a_pointer<XLA_FFI_Handler>);
static_assert(takes_and_returns_a_pointer<std::remove_pointer_t<decltype(Api::create_error)>> &&
              takes_and_returns_a_pointer<XLA_FFI_Error_Create>);

}  // namespace
}  // namespace fastattn::xla_ffi

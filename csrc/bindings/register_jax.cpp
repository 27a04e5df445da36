// Handlers that XLA calls for fastattn.jax: buffers and attributes in, BackwardParams or AttentionParams,
// core.
//
// They run on threads of XLA without the GIL, so nothing of Python may be touched in them. An operand or a
// result is found by its name: the attributes "operands" and "results" list the names in the order of the
// buffers.
#include <algorithm>
#include <cfenv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>

#include <fastattn/attention.h>

#include "bindings/buffer.h"
#include "bindings/mask_words.h"
#include "bindings/places.h"
#include "bindings/register.h"
#include "bindings/xla_ffi_abi.h"
#include "core/scalar_access.h"

namespace fastattn::bindings {
namespace {

using namespace xla_ffi;

// A call that fastattn.jax does not make: another version of it, or of XLA.
struct ProtocolError : std::runtime_error {
    explicit ProtocolError(const std::string& what)
        : std::runtime_error("fastattn: " + what + "; fastattn.jax and fastattn._core do not fit together") {}
};

std::string quoted(std::string_view text) { return "\"" + std::string(text) + "\""; }

// ---- buffers ----------------------------------------------------------------------------------------
// Of an array without elements; null would mean "not given".
alignas(64) unsigned char no_elements[64];

DType to_dtype(DataType dtype, std::string_view name) {
    switch (dtype) {
        case kPred: return DType::boolean;
        case kS8: return DType::i8;
        case kS16: return DType::i16;
        case kS32: return DType::i32;
        case kS64: return DType::i64;
        case kU8: return DType::u8;
        case kU16: return DType::u16;
        case kU32: return DType::u32;
        case kU64: return DType::u64;
        case kF16: return DType::f16;
        case kF32: return DType::f32;
        case kF64: return DType::f64;
        case kBf16: return DType::bf16;
    }
    throw TypeError(std::string(name) + ": XLA's element type " + std::to_string(dtype) +
                    " is not supported");
}

TensorView to_view(const xla_ffi::Buffer& buffer, std::string_view name) {
    TensorView view;
    view.dtype = to_dtype(buffer.dtype, name);
    view.rank = static_cast<int>(buffer.rank);
    if (view.rank > kMaxRank) view.full_shape = buffer.dims;
    std::copy_n(buffer.dims, std::min(view.rank, kMaxRank), view.shape);
    if (view.rank <= kMaxRank) set_compact_strides(view);
    view.data = buffer.data == nullptr ? no_elements : buffer.data;
    return view;
}

// One value for all batch entries, as an array of rank 0.
std::int64_t to_integer(const TensorView& view, const char* name) {
    if (!is_integer(view.dtype))
        throw TypeError(std::string(name) + ": expected an integer dtype, got " + dtype_name(view.dtype));
    return load_integer(view.data, view.dtype, 0);
}

// An integer, or 64 bits as two uint32, the high ones first: the data of a key of jax.random.
std::uint64_t to_seed(const TensorView& view) {
    if (view.rank == 1 && view.shape[0] == 2 && view.dtype == DType::u32) {
        const auto* words = static_cast<const std::uint32_t*>(view.data);
        return std::uint64_t{words[0]} << 32 | words[1];
    }
    if (view.rank != 0) throw ValueError("seed: expected an integer or uint32 of shape (2,)");
    if (view.dtype == DType::u64) return *static_cast<const std::uint64_t*>(view.data);
    const std::int64_t value = to_integer(view, "seed");
    if (value < 0) throw ValueError("seed: expected 0 <= seed < 2**64, got " + std::to_string(value));
    return static_cast<std::uint64_t>(value);
}

TensorView* find_array(BackwardParams& params, std::string_view name) {
    AttentionParams& f = params.forward;
    for (const auto& [slot, member] : kArrays)
        if (kArguments[slot].name == name) return &(f.*member);
    const struct {
        std::string_view name;
        TensorView& view;
    } rows[] = {
        {"out", f.out},
        {"lse", f.lse},
        {"weights", f.weights},
        {"dout", params.dout},
        {"dlse", params.dlse},
        {"dq", params.dq},
        {"dk", params.dk},
        {"dv", params.dv},
        {"dbias", params.dbias},
        {"dalibi_slopes", params.dalibi_slopes},
        {"dsinks", params.dsinks},
    };
    for (const auto& row : rows)
        if (row.name == name) return &row.view;
    return nullptr;
}

void set_array(BackwardParams& params, std::string_view name, const TensorView& view) {
    AttentionParams& f = params.forward;
    if (name == "seed") {
        f.seed = to_seed(view);
    } else if (name == "q_offset" && view.rank == 0) {
        f.q_offset = to_integer(view, "q_offset");
    } else if (name == "mask_lists") {
        read_mask_words(view, f);
    } else if (TensorView* place = find_array(params, name)) {
        *place = view;
    } else {
        throw ProtocolError("no array is called " + quoted(name));
    }
}

// `names`: separated by spaces.
void set_arrays(BackwardParams& params, std::string_view names, const Operands& buffers) {
    std::int64_t next = 0;
    while (!names.empty()) {
        const std::size_t end = std::min(names.find(' '), names.size());
        const std::string_view name = names.substr(0, end);
        names.remove_prefix(std::min(end + 1, names.size()));
        if (next == buffers.size || buffers.kinds[next] != kBuffer)
            throw ProtocolError("no buffer for " + quoted(name));
        set_array(params, name, to_view(*static_cast<const xla_ffi::Buffer*>(buffers.values[next]), name));
        ++next;
    }
    if (next != buffers.size) throw ProtocolError("more buffers than names");
}

// ---- attributes -------------------------------------------------------------------------------------
class AttributeReader {
public:
    explicit AttributeReader(const Attributes& attributes) : attributes_(attributes) {}

    // Empty when absent.
    std::string_view text(std::string_view name) {
        const auto* text = static_cast<const Text*>(find(name, kString));
        return text == nullptr ? std::string_view() : std::string_view(text->data, text->size);
    }
    // Leaves `value` alone when absent.
    template <class T, class Target>
    void scalar(std::string_view name, DataType dtype, Target& value) {
        const auto* scalar = static_cast<const Scalar*>(find(name, kScalar));
        if (scalar == nullptr) return;
        if (scalar->dtype != dtype)
            throw ProtocolError("the attribute " + quoted(name) + " has another element type");
        T read;
        std::memcpy(&read, scalar->value, sizeof(read));
        value = read;
    }
    void check_all_read() const {
        if (read_ != attributes_.size) throw ProtocolError("there are attributes of unknown names");
    }

private:
    const void* find(std::string_view name, AttributeKind kind) {
        for (std::int64_t i = 0; i < attributes_.size; ++i) {
            const Text& candidate = *attributes_.names[i];
            if (std::string_view(candidate.data, candidate.size) != name) continue;
            if (attributes_.kinds[i] != kind)
                throw ProtocolError("the attribute " + quoted(name) + " is of another kind");
            ++read_;
            return attributes_.values[i];
        }
        return nullptr;
    }

    const Attributes& attributes_;
    std::int64_t read_ = 0;
};

// `kernel` of the options points into the frame.
void read_call(const CallFrame& frame, BackwardParams& params, RunOptions& options) {
    AttributeReader attributes(frame.attributes);
    AttentionParams& f = params.forward;
    const std::string_view layout = attributes.text("layout");
    if (layout != "bshd" && layout != "bhsd") throw ProtocolError("layout is " + quoted(layout));
    f.layout = layout == "bshd" ? Layout::bshd : Layout::bhsd;
    for (const auto& [slot, member] : kOptionalNumbers)
        attributes.scalar<double>(slot_name(slot), kF64, f.*member);
    for (const auto& [slot, member] : kNumbers) attributes.scalar<double>(slot_name(slot), kF64, f.*member);
    for (const auto& [slot, member] : kFlags) attributes.scalar<bool>(slot_name(slot), kPred, f.*member);
    attributes.scalar<std::int64_t>("window_left", kS64, f.window_left);
    attributes.scalar<std::int64_t>("window_right", kS64, f.window_right);
    options.kernel = attributes.text("kernel");
    const std::string_view out_dtype = attributes.text("out_dtype");
    for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16})
        if (out_dtype == dtype_name(dtype)) f.out_dtype = dtype;
    options.device = "cpu";  // where XLA's buffers are; the program was compiled for it
    set_arrays(params, attributes.text("operands"), frame.arguments);
    set_arrays(params, attributes.text("results"), frame.results);
    attributes.check_all_read();
}

// ---- handlers ---------------------------------------------------------------------------------------
// XLA flushes denormals on the threads that call us. Our own threads do not, and the result must not depend
// on who computes which item.
class DefaultFloatEnvironment {
public:
    DefaultFloatEnvironment() noexcept {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
    DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
    DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

private:
    std::fenv_t saved_;
};

void handle_forward(const CallFrame& frame) {
    BackwardParams params;
    RunOptions options;
    read_call(frame, params, options);
    attention_forward(make_problem(params.forward), options);
}

void handle_backward(const CallFrame& frame) {
    BackwardParams params;
    RunOptions options;
    read_call(frame, params, options);
    attention_backward(make_backward_problem(params), options);
}

void handle_not_here(const CallFrame&) {
    throw UnsupportedError(
        "fastattn.jax computes on the CPU only, and this program was compiled for another platform. Put the "
        "arrays on the CPU (jax.device_put(x, jax.devices(\"cpu\")[0])), or run in "
        "jax.default_device(jax.devices(\"cpu\")[0]) with uncommitted arrays");
}

xla_ffi::Error* make_error(const Api& api, ErrorCode code, const char* message) noexcept {
    ErrorArguments arguments{sizeof(ErrorArguments), nullptr, message, code};
    return api.create_error(&arguments);
}

// Inside a catch block.
xla_ffi::Error* current_error(const Api& api) noexcept {
    try {
        throw;
    } catch (const UnsupportedError& error) {
        return make_error(api, kUnimplemented, error.what());
    } catch (const ValueError& error) {
        return make_error(api, kInvalidArgument, error.what());
    } catch (const TypeError& error) {
        return make_error(api, kInvalidArgument, error.what());
    } catch (const OutOfMemory& error) {
        return make_error(api, kResourceExhausted, error.what());
    } catch (const Cancelled& error) {
        return make_error(api, kCancelled, error.what());
    } catch (const std::bad_alloc&) {
        return make_error(api, kResourceExhausted, "fastattn: no memory for the bookkeeping of this call");
    } catch (const std::exception& error) {
        return make_error(api, kInternal, error.what());
    } catch (...) {
        return make_error(api, kInternal, "fastattn: an unknown C++ exception");
    }
}

// Answers "what are you?". Older runtimes take version 0.1 only and do not say theirs; newer ones take a
// range that ends with their own.
void describe(const CallFrame& frame, Metadata& metadata) noexcept {
    int minor = kOldestMinor;
    if (frame.api != nullptr && frame.api->version.major == kMajor)
        minor = std::clamp(frame.api->version.minor, kOldestMinor, kNewestMinor);
    metadata.version.major = kMajor;
    metadata.version.minor = minor;
    metadata.traits = 0;
    if (metadata.bytes >= sizeof(Metadata)) metadata.state_type = 0;
}

using Handle = void(const CallFrame&);

template <Handle run>
xla_ffi::Error* handle(CallFrame* frame) noexcept {
    if (frame->bytes < sizeof(CallFrame)) {
        // Not even the place of the function that makes errors is known.
        std::fputs("fastattn: this XLA calls its handlers in an unknown way\n", stderr);
        std::abort();
    }
    for (Extension* extension = frame->extensions; extension != nullptr; extension = extension->next) {
        if (extension->kind == kMetadataExtension) {
            describe(*frame, *reinterpret_cast<MetadataExtension*>(extension)->metadata);
            return nullptr;
        }
    }
    const Api& api = *frame->api;
    try {
        if (api.version.major != kMajor)
            throw ProtocolError("XLA's FFI has version " + std::to_string(api.version.major) + "." +
                                std::to_string(api.version.minor));
        // Their places depend on each other's sizes.
        if (frame->arguments.bytes != sizeof(Operands) || frame->results.bytes != sizeof(Operands) ||
            frame->attributes.bytes != sizeof(Attributes))
            throw ProtocolError("XLA's call frame has another layout");
        if (frame->stage != kExecute) throw ProtocolError("XLA asks for a stage that there is not");
        const DefaultFloatEnvironment environment;
        run(*frame);
        return nullptr;
    } catch (...) {
        return current_error(api);
    }
}

template <Handle run>
py::capsule target() {
    return py::capsule(reinterpret_cast<const void*>(static_cast<Handler*>(&handle<run>)));
}

py::dict xla_ffi_targets() {
    py::dict targets;
    targets["mha"] = target<handle_forward>();
    targets["mha_backward"] = target<handle_backward>();
    targets["not_here"] = target<handle_not_here>();
    return targets;
}

}  // namespace

void register_jax(py::module_& m) {
    m.def("xla_ffi_targets", &xla_ffi_targets,
          "The handlers that fastattn.jax registers with XLA, by name; PyCapsules of XLA_FFI_Handler.");
}

}  // namespace fastattn::bindings

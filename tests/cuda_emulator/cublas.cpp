// A cuBLASLt of the emulated GPU behind csrc/cuda/blas/abi.h. It checks what the library checks, rather more
// strictly, and multiplies when the stream gets there. Products are summed in the compute type, one after
// another.
#include <algorithm>
#include <cstring>
#include <set>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/half.h"
#include "cuda/blas/abi.h"
#include "emulator.h"
#include "state.h"

namespace fastattn::emulator {
namespace {

using namespace cuda::cublas;

struct Settings {
    bool available = true, pointer_arrays = true;
    std::size_t version = 130002;
};
Settings g_settings;
std::vector<MatmulRecord> g_records;

// Live objects by kind: a handle of the wrong kind or one that was destroyed is an error, not a crash.
template <class T>
std::set<void*>& live() {
    static auto* const the = new std::set<void*>;
    return *the;
}

template <class T>
T* find(void* handle) {
    return live<T>().contains(handle) ? static_cast<T*>(handle) : nullptr;
}

template <class T>
Status create(void** handle, const T& value) {
    if (handle == nullptr) return kInvalidValue;
    auto* const made = new T(value);
    live<T>().insert(made);
    *handle = made;
    return kSuccess;
}

template <class T>
Status destroy(void* handle) {
    T* const object = find<T>(handle);
    if (object == nullptr) return kInvalidValue;
    live<T>().erase(object);
    delete object;
    return kSuccess;
}

struct Library {
    int device;
};

struct Product {
    ComputeType compute;
    DataType scale;
    bool transpose_a = false, transpose_b = false;
};

struct Matrix {  // column-major
    DataType type;
    std::int64_t rows, cols, ld;
    std::int32_t batches = 1;
    std::int64_t stride = 0;
    bool pointer_array = false;
};

struct Wish {
    std::uint64_t max_workspace = 0;
    std::uint32_t reduction_schemes = 0xFFFFFFFFu;
    std::uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C, D
};

// Algorithm.data: what a heuristic promised.
struct Promise {
    std::uint64_t magic, workspace_bytes, kind;
    std::uint32_t alignment[4];
    std::uint64_t unused[3];
};
static_assert(sizeof(Promise) == sizeof(Algorithm));
constexpr std::uint64_t kMagic = 0x6661737461747465u;

std::size_t size_of(DataType type) { return type == kF64 ? 8 : type == kF32 ? 4 : 2; }

bool is_type(DataType type) { return type == kF32 || type == kF64 || type == kF16 || type == kBf16; }

template <class T>
Status take(const void* value, std::size_t bytes, T* target) {
    if (value == nullptr || bytes != sizeof(T)) return kInvalidValue;
    std::memcpy(target, value, sizeof(T));
    return kSuccess;
}

// ---- what fits together -----------------------------------------------------------------------------------

struct Operands {
    Product product;
    Matrix a, b, c, d;
    std::int64_t m, n, k;
};

Status check(Operands& o) {
    o.m = o.product.transpose_a ? o.a.cols : o.a.rows;
    o.k = o.product.transpose_a ? o.a.rows : o.a.cols;
    o.n = o.product.transpose_b ? o.b.rows : o.b.cols;
    const std::int64_t k_of_b = o.product.transpose_b ? o.b.cols : o.b.rows;
    for (const Matrix* matrix : {&o.a, &o.b, &o.c, &o.d}) {
        if (matrix->rows < 1 || matrix->cols < 1 || matrix->ld < matrix->rows || matrix->batches < 1 ||
            matrix->batches != o.d.batches || matrix->pointer_array != o.d.pointer_array) {
            return kInvalidValue;
        }
    }
    if (k_of_b != o.k || o.c.rows != o.m || o.c.cols != o.n || o.d.rows != o.m || o.d.cols != o.n) {
        return kInvalidValue;
    }
    if (o.d.batches > 1 && !o.d.pointer_array && o.d.stride == 0)
        return kInvalidValue;  // all write one matrix
    if (o.d.pointer_array && !g_settings.pointer_arrays) return kNotSupported;

    const DataType type = o.a.type, out = o.d.type;
    if (o.b.type != type || o.c.type != out) return kNotSupported;
    const ComputeType compute = o.product.compute;
    if (type == kF64) {
        return out == kF64 && compute == kCompute64F && o.product.scale == kF64 ? kSuccess : kNotSupported;
    }
    if (o.product.scale != kF32) return kNotSupported;
    if (type == kF32) {
        return out == kF32 && (compute == kCompute32F || compute == kCompute32FFastTf32) ? kSuccess
                                                                                         : kNotSupported;
    }
    return (out == type || out == kF32) && compute == kCompute32F ? kSuccess : kNotSupported;
}

// The promise of an algorithm holds for products of one kind, whatever their sizes.
std::uint64_t kind_of(const Operands& o) {
    return static_cast<std::uint64_t>(o.product.compute) | static_cast<std::uint64_t>(o.a.type) << 8 |
           static_cast<std::uint64_t>(o.d.type) << 16 | std::uint64_t{o.product.transpose_a} << 24 |
           std::uint64_t{o.product.transpose_b} << 25 | std::uint64_t{o.d.pointer_array} << 26;
}

Status gather(void* product, void* a, void* b, void* c, void* d, Operands* operands) {
    const Product* const p = find<Product>(product);
    const Matrix* const matrices[] = {find<Matrix>(a), find<Matrix>(b), find<Matrix>(c), find<Matrix>(d)};
    if (p == nullptr) return kInvalidValue;
    for (const Matrix* matrix : matrices) {
        if (matrix == nullptr) return kInvalidValue;
    }
    *operands = {*p, *matrices[0], *matrices[1], *matrices[2], *matrices[3], 0, 0, 0};
    return check(*operands);
}

// ---- the arithmetic ---------------------------------------------------------------------------------------

// TF32 keeps 10 bits of the fraction; tensor cores are fed the nearest.
float to_tf32(float x) {
    const std::uint32_t bits = f32_bits(x);
    if ((bits & 0x7F800000u) == 0x7F800000u) return x;
    return f32_from_bits((bits + 0x1000u) & ~0x1FFFu);
}

template <class T>
T load(const char* data, std::int64_t index, DataType type) {
    const char* const at = data + index * static_cast<std::int64_t>(size_of(type));
    if (type == kF64) {
        double x;
        std::memcpy(&x, at, sizeof x);
        return static_cast<T>(x);
    }
    if (type == kF32) {
        float x;
        std::memcpy(&x, at, sizeof x);
        return static_cast<T>(x);
    }
    std::uint16_t x;
    std::memcpy(&x, at, sizeof x);
    return static_cast<T>(type == kF16 ? f16_to_f32(x) : bf16_to_f32(x));
}

template <class T>
void store(char* data, std::int64_t index, DataType type, T value) {
    char* const at = data + index * static_cast<std::int64_t>(size_of(type));
    if (type == kF64) {
        const auto x = static_cast<double>(value);
        std::memcpy(at, &x, sizeof x);
    } else if (type == kF32) {
        const auto x = static_cast<float>(value);
        std::memcpy(at, &x, sizeof x);
    } else {
        const auto x = static_cast<float>(value);
        const std::uint16_t bits = type == kF16 ? f32_to_f16(x) : f32_to_bf16(x);
        std::memcpy(at, &bits, sizeof bits);
    }
}

// packed[col * pitch + row] of the matrix as it lies or of its transpose; what pads the columns is zero.
template <class T>
void pack(const char* data, const Matrix& matrix, bool transpose, bool tf32, std::int64_t pitch,
          std::vector<T>& packed) {
    const std::int64_t packed_cols = transpose ? matrix.rows : matrix.cols;
    packed.assign(static_cast<std::size_t>(pitch * packed_cols), T{0});
    for (std::int64_t col = 0; col < matrix.cols; ++col) {
        for (std::int64_t row = 0; row < matrix.rows; ++row) {
            T x = load<T>(data, col * matrix.ld + row, matrix.type);
            if (tf32) x = static_cast<T>(to_tf32(static_cast<float>(x)));
            packed[static_cast<std::size_t>(transpose ? row * pitch + col : col * pitch + row)] = x;
        }
    }
}

// Elements that the inner loop of multiply() takes at once.
template <class T>
constexpr std::int64_t kWide = 32 / static_cast<std::int64_t>(sizeof(T));

// sums[o * inner + i] = sum over t of u[t * inner + i] * v[o * depth + t], in the order of t; `inner` a
// multiple of kWide. Vectors by hand, as -O2 makes none of loops like these.
template <class T>
void multiply(const T* u, const T* v, T* sums, std::int64_t inner, std::int64_t outer, std::int64_t depth) {
    typedef T V __attribute__((vector_size(16)));
    constexpr std::int64_t kLanes = kWide<T> / 2;
    const auto block = [&]<int rows>(std::integral_constant<int, rows>, std::int64_t i, std::int64_t o) {
        V low[rows] = {}, high[rows] = {};
        for (std::int64_t t = 0; t < depth; ++t) {
            V x, y;
            std::memcpy(&x, u + t * inner + i, sizeof x);
            std::memcpy(&y, u + t * inner + i + kLanes, sizeof y);
            for (int r = 0; r < rows; ++r) {
                const T w = v[(o + r) * depth + t];
                low[r] += x * w;
                high[r] += y * w;
            }
        }
        for (int r = 0; r < rows; ++r) {
            std::memcpy(sums + (o + r) * inner + i, &low[r], sizeof(V));
            std::memcpy(sums + (o + r) * inner + i + kLanes, &high[r], sizeof(V));
        }
    };
    for (std::int64_t i = 0; i < inner; i += kWide<T>) {
        std::int64_t o = 0;
        for (; o + 4 <= outer; o += 4) block(std::integral_constant<int, 4>{}, i, o);
        for (; o < outer; ++o) block(std::integral_constant<int, 1>{}, i, o);
    }
}

struct Call {
    Operands operands;
    const void* a = nullptr;
    const void* b = nullptr;
    const void* c = nullptr;
    void* d = nullptr;
    double alpha = 0, beta = 0;
    std::uint32_t alignment[4] = {};
    void* workspace = nullptr;
    std::size_t workspace_bytes = 0;
};

bool is_aligned(const void* data, std::uint32_t alignment) {
    return reinterpret_cast<std::uintptr_t>(data) % alignment == 0;
}

// The address of batch entry e; pointer arrays are read now, as on the device.
char* entry_of(const void* data, const Matrix& matrix, std::int32_t e, std::uint32_t alignment) {
    if (!matrix.pointer_array) {
        const std::int64_t bytes = e * matrix.stride * static_cast<std::int64_t>(size_of(matrix.type));
        return static_cast<char*>(const_cast<void*>(data)) + bytes;
    }
    char* const entry = static_cast<char* const*>(data)[e];
    // The call that promised the alignment has returned long ago: on a GPU this is a fault or wrong numbers.
    if (entry == nullptr || !is_aligned(entry, alignment)) {
        die("entry %d of a pointer array is %p, promised was an alignment of %u", e,
            static_cast<void*>(entry), alignment);
    }
    return entry;
}

template <class T>
void run(const Call& call) {
    const auto& [product, a, b, c, d, m, n, k] = call.operands;
    const bool tf32 = product.compute == kCompute32FFastTf32;
    const bool by_rows = n > m;  // the longer side is the inner loop
    const std::int64_t inner = ((by_rows ? n : m) + kWide<T> - 1) / kWide<T> * kWide<T>;
    std::vector<T> packed_a, packed_b, sums(static_cast<std::size_t>(inner * (by_rows ? m : n)));
    const char *last_a = nullptr, *last_b = nullptr;
    const T alpha = static_cast<T>(call.alpha), beta = static_cast<T>(call.beta);
    for (std::int32_t e = 0; e < d.batches; ++e) {
        const char* const pa = entry_of(call.a, a, e, call.alignment[0]);
        const char* const pb = entry_of(call.b, b, e, call.alignment[1]);
        if (pa != last_a) pack(pa, a, product.transpose_a != by_rows, tf32, by_rows ? k : inner, packed_a);
        if (pb != last_b) pack(pb, b, product.transpose_b != by_rows, tf32, by_rows ? inner : k, packed_b);
        last_a = pa;
        last_b = pb;
        const T* const wide = by_rows ? packed_b.data() : packed_a.data();
        const T* const narrow = by_rows ? packed_a.data() : packed_b.data();
        multiply(wide, narrow, sums.data(), inner, by_rows ? m : n, k);
        char* const pd = entry_of(call.d, d, e, call.alignment[3]);
        const char* const pc = beta != 0 ? entry_of(call.c, c, e, call.alignment[2]) : nullptr;
        for (std::int64_t col = 0; col < n; ++col) {
            for (std::int64_t row = 0; row < m; ++row) {
                T x = alpha * sums[static_cast<std::size_t>(by_rows ? row * inner + col : col * inner + row)];
                if (pc != nullptr) x += beta * load<T>(pc, col * c.ld + row, c.type);
                store<T>(pd, col * d.ld + row, d.type, x);
            }
        }
    }
    // A workspace that something else uses shows.
    if (call.workspace_bytes > 0) std::memset(call.workspace, 0xFF, call.workspace_bytes);
}

// ---- the table --------------------------------------------------------------------------------------------

#define FASTATTN_ENTER(name)         \
    const Lock lock_of_gpu(mutex()); \
    if (const int code_asked_for = injected(name)) return code_asked_for

std::size_t get_version() {
    const Lock lock(mutex());
    return g_settings.version;
}

const char* get_status_name(Status status) {
    switch (status) {
        case kSuccess: return "CUBLAS_STATUS_SUCCESS";
        case 1: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case kAllocFailed: return "CUBLAS_STATUS_ALLOC_FAILED";
        case kInvalidValue: return "CUBLAS_STATUS_INVALID_VALUE";
        case 13: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case 14: return "CUBLAS_STATUS_INTERNAL_ERROR";
        case kNotSupported: return "CUBLAS_STATUS_NOT_SUPPORTED";
        default: return "CUBLAS_STATUS_UNKNOWN";
    }
}

Status create_library(Handle* handle) {
    FASTATTN_ENTER("Create");
    return create(handle, Library{device_of_thread()});
}

Status create_product(Descriptor* descriptor, ComputeType compute, DataType scale) {
    FASTATTN_ENTER("MatmulDescCreate");
    if (!is_type(scale)) return kInvalidValue;
    return create(descriptor, Product{compute, scale});
}

Status destroy_product(Descriptor descriptor) {
    FASTATTN_ENTER("MatmulDescDestroy");
    return destroy<Product>(descriptor);
}

Status set_product(Descriptor descriptor, DescriptorAttribute attribute, const void* value,
                   std::size_t bytes) {
    FASTATTN_ENTER("MatmulDescSetAttribute");
    Product* const product = find<Product>(descriptor);
    std::int32_t operation = 0;
    if (product == nullptr || take(value, bytes, &operation) != kSuccess) return kInvalidValue;
    if (operation != kNone && operation != kTranspose) return kInvalidValue;
    switch (attribute) {
        case kTransposeA: product->transpose_a = operation == kTranspose; return kSuccess;
        case kTransposeB: product->transpose_b = operation == kTranspose; return kSuccess;
    }
    return kInvalidValue;
}

Status create_layout(Layout* layout, DataType type, std::uint64_t rows, std::uint64_t cols, std::int64_t ld) {
    FASTATTN_ENTER("MatrixLayoutCreate");
    if (!is_type(type)) return kInvalidValue;
    return create(layout, Matrix{type, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(cols), ld});
}

Status destroy_layout(Layout layout) {
    FASTATTN_ENTER("MatrixLayoutDestroy");
    return destroy<Matrix>(layout);
}

Status set_layout(Layout layout, LayoutAttribute attribute, const void* value, std::size_t bytes) {
    FASTATTN_ENTER("MatrixLayoutSetAttribute");
    Matrix* const matrix = find<Matrix>(layout);
    if (matrix == nullptr) return kInvalidValue;
    switch (attribute) {
        case kBatchCount: return take(value, bytes, &matrix->batches);
        case kBatchStride: return take(value, bytes, &matrix->stride);
        case kBatchMode: {
            std::uint32_t mode = 0;
            if (take(value, bytes, &mode) != kSuccess || mode > kPointerArray) return kInvalidValue;
            matrix->pointer_array = mode == kPointerArray;
            return kSuccess;
        }
    }
    return kInvalidValue;
}

Status create_preference(Preference* preference) {
    FASTATTN_ENTER("MatmulPreferenceCreate");
    return create(preference, Wish{});
}

Status destroy_preference(Preference preference) {
    FASTATTN_ENTER("MatmulPreferenceDestroy");
    return destroy<Wish>(preference);
}

Status set_preference(Preference preference, PreferenceAttribute attribute, const void* value,
                      std::size_t bytes) {
    FASTATTN_ENTER("MatmulPreferenceSetAttribute");
    Wish* const wish = find<Wish>(preference);
    if (wish == nullptr) return kInvalidValue;
    switch (attribute) {
        case kMaxWorkspaceBytes: return take(value, bytes, &wish->max_workspace);
        case kReductionSchemeMask: return take(value, bytes, &wish->reduction_schemes);
        case kMinAlignmentA:
        case kMinAlignmentB:
        case kMinAlignmentC:
        case kMinAlignmentD: {
            std::uint32_t alignment = 0;
            if (take(value, bytes, &alignment) != kSuccess) return kInvalidValue;
            if (alignment == 0 || (alignment & (alignment - 1)) != 0) return kInvalidValue;
            wish->alignment[attribute - kMinAlignmentA] = alignment;
            return kSuccess;
        }
    }
    return kInvalidValue;
}

Status get_heuristic(Handle handle, Descriptor descriptor, Layout a, Layout b, Layout c, Layout d,
                     Preference preference, int requested, HeuristicResult results[], int* found) {
    FASTATTN_ENTER("MatmulAlgoGetHeuristic");
    const Wish* const wish = find<Wish>(preference);
    if (find<Library>(handle) == nullptr || wish == nullptr || requested < 1 || results == nullptr ||
        found == nullptr) {
        return kInvalidValue;
    }
    *found = 0;
    Operands operands;
    if (const Status status = gather(descriptor, a, b, c, d, &operands)) return status;
    Promise promise = {};
    promise.magic = kMagic;
    // Odd on purpose: neither all that was offered nor a round number.
    promise.workspace_bytes = std::min<std::uint64_t>(wish->max_workspace, 1000);
    promise.kind = kind_of(operands);
    std::copy_n(wish->alignment, 4, promise.alignment);
    HeuristicResult& result = results[0];
    result = {};
    std::memcpy(&result.algorithm, &promise, sizeof promise);
    result.workspace_bytes = static_cast<std::size_t>(promise.workspace_bytes);
    result.state = kSuccess;
    result.waves = 1;
    *found = 1;
    return kSuccess;
}

Status matmul(Handle handle, Descriptor descriptor, const void* alpha, const void* a, Layout layout_a,
              const void* b, Layout layout_b, const void* beta, const void* c, Layout layout_c, void* d,
              Layout layout_d, const Algorithm* algorithm, void* workspace, std::size_t workspace_bytes,
              void* stream) {
    FASTATTN_ENTER("Matmul");
    const Library* const library = find<Library>(handle);
    Call call;
    if (library == nullptr || alpha == nullptr || beta == nullptr || algorithm == nullptr)
        return kInvalidValue;
    if (const Status status = gather(descriptor, layout_a, layout_b, layout_c, layout_d, &call.operands)) {
        return status;
    }
    const Operands& o = call.operands;
    Promise promise;
    std::memcpy(&promise, algorithm, sizeof promise);
    if (promise.magic != kMagic || promise.kind != kind_of(o)) return kInvalidValue;
    if (promise.workspace_bytes > workspace_bytes) return kInvalidValue;
    if (promise.workspace_bytes > 0 && (workspace == nullptr || !is_aligned(workspace, 16)))
        return kInvalidValue;

    // A handle belongs to the device it was made for.
    if (device_of_thread() != library->device || !on_current_device(stream)) return kInvalidValue;

    call.alpha = load<double>(static_cast<const char*>(alpha), 0, o.product.scale);
    call.beta = load<double>(static_cast<const char*>(beta), 0, o.product.scale);
    const void* const data[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) {
        if (i == 2 && call.beta == 0) continue;  // C is not read
        // Arrays of pointers are checked, but for their own alignment, when they are read.
        const std::uint32_t alignment = o.d.pointer_array ? 8 : promise.alignment[i];
        if (data[i] == nullptr || !is_aligned(data[i], alignment)) return kInvalidValue;
    }
    call.a = a;
    call.b = b;
    call.c = c;
    call.d = d;
    std::copy_n(promise.alignment, 4, call.alignment);
    call.workspace = workspace;
    call.workspace_bytes = static_cast<std::size_t>(promise.workspace_bytes);
    g_records.push_back({o.product.compute,
                         o.product.transpose_a,
                         o.product.transpose_b,
                         o.a.type,
                         o.b.type,
                         o.d.type,
                         o.m,
                         o.n,
                         o.k,
                         o.a.ld,
                         o.b.ld,
                         o.d.ld,
                         o.d.batches,
                         o.a.stride,
                         o.b.stride,
                         o.d.stride,
                         o.d.pointer_array,
                         static_cast<float>(call.alpha),
                         static_cast<float>(call.beta),
                         workspace_bytes,
                         stream});
    enqueue(stream, [call] {
        if (call.operands.a.type == kF64) {
            run<double>(call);
        } else {
            run<float>(call);
        }
    });
    return kSuccess;
}

#undef FASTATTN_ENTER

constexpr Table kTable = {
    get_version,        get_status_name, create_library, create_product, destroy_product,
    set_product,        create_layout,   destroy_layout, set_layout,     create_preference,
    destroy_preference, set_preference,  get_heuristic,  matmul,
};

}  // namespace

void set_cublas_available(bool available) {
    const Lock lock(mutex());
    g_settings.available = available;
}

void set_cublas_version(std::size_t version) {
    const Lock lock(mutex());
    g_settings.version = version;
}

void set_pointer_arrays_supported(bool supported) {
    const Lock lock(mutex());
    g_settings.pointer_arrays = supported;
}

std::size_t live_descriptors() {
    const Lock lock(mutex());
    return live<Product>().size() + live<Matrix>().size() + live<Wish>().size();
}

std::vector<MatmulRecord> take_matmuls() {
    const Lock lock(mutex());
    return std::exchange(g_records, {});
}

void reset_cublas() {
    g_settings = {};
    g_records.clear();
}

}  // namespace fastattn::emulator

namespace fastattn::cuda::cublas {

const Table* open(const char** why) noexcept {
    const emulator::Lock lock(emulator::mutex());
    if (emulator::injected("open") == 0 && emulator::g_settings.available) return &emulator::kTable;
    if (why != nullptr) *why = "the emulated GPU was told to have no cuBLASLt";
    return nullptr;
}

void offer(const char*) {}

}  // namespace fastattn::cuda::cublas

// Compiled where cuBLAS 13's headers are, run never: csrc/cuda/blas/abi.h says the same as cublasLt.h.
#include <cublasLt.h>

#include <array>
#include <cstddef>
#include <type_traits>

#include "cuda/blas/abi.h"

namespace fastattn::cuda::cublas {
namespace {

// ---- values ---------------------------------------------------------------------------------------
static_assert(CUBLAS_VER_MAJOR == 13);

static_assert(kSuccess == CUBLAS_STATUS_SUCCESS);
static_assert(kAllocFailed == CUBLAS_STATUS_ALLOC_FAILED);
static_assert(kInvalidValue == CUBLAS_STATUS_INVALID_VALUE);
static_assert(kNotSupported == CUBLAS_STATUS_NOT_SUPPORTED);

// Enumerations of two headers: compared as what they are passed as.
template <class Ours, class Theirs>
constexpr bool same(Ours ours, Theirs theirs) {
    return static_cast<long long>(ours) == static_cast<long long>(theirs);
}

static_assert(same(kF32, CUDA_R_32F));
static_assert(same(kF64, CUDA_R_64F));
static_assert(same(kF16, CUDA_R_16F));
static_assert(same(kBf16, CUDA_R_16BF));

static_assert(same(kCompute32F, CUBLAS_COMPUTE_32F));
static_assert(same(kCompute64F, CUBLAS_COMPUTE_64F));
static_assert(same(kCompute32FFastTf32, CUBLAS_COMPUTE_32F_FAST_TF32));

static_assert(same(kNone, CUBLAS_OP_N));
static_assert(same(kTranspose, CUBLAS_OP_T));

static_assert(same(kTransposeA, CUBLASLT_MATMUL_DESC_TRANSA));
static_assert(same(kTransposeB, CUBLASLT_MATMUL_DESC_TRANSB));

static_assert(same(kBatchCount, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT));
static_assert(same(kBatchStride, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET));
static_assert(same(kBatchMode, CUBLASLT_MATRIX_LAYOUT_BATCH_MODE));
static_assert(same(kStrided, CUBLASLT_BATCH_MODE_STRIDED));
static_assert(same(kPointerArray, CUBLASLT_BATCH_MODE_POINTER_ARRAY));

static_assert(same(kMaxWorkspaceBytes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES));
static_assert(same(kReductionSchemeMask, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK));
static_assert(same(kMinAlignmentA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES));
static_assert(same(kMinAlignmentB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES));
static_assert(same(kMinAlignmentC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES));
static_assert(same(kMinAlignmentD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES));
static_assert(same(kReductionComputeType, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));

// ---- sizes and places -----------------------------------------------------------------------------
// What is written through a const void* has the size of the attribute.
static_assert(sizeof(Operation) == sizeof(cublasOperation_t));
static_assert(sizeof(DataType) == sizeof(cudaDataType_t));
static_assert(sizeof(ComputeType) == sizeof(cublasComputeType_t));
static_assert(sizeof(BatchMode) == sizeof(std::uint32_t));

static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(alignof(Algorithm) == alignof(cublasLtMatmulAlgo_t));
static_assert(sizeof(HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(alignof(HeuristicResult) == alignof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(HeuristicResult, algorithm) == offsetof(cublasLtMatmulHeuristicResult_t, algo));
static_assert(offsetof(HeuristicResult, workspace_bytes) ==
              offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(HeuristicResult, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(offsetof(HeuristicResult, waves) == offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));
static_assert(offsetof(HeuristicResult, reserved) == offsetof(cublasLtMatmulHeuristicResult_t, reserved));

// ---- functions ------------------------------------------------------------------------------------
// How the calling convention sees a type: opaque structures and enumerations of the two headers are other
// types, but an integer is passed as an integer of its size and a pointer as a pointer.
struct Passed {
    char kind;
    std::size_t bytes;
    constexpr bool operator==(const Passed&) const = default;
};

template <class T>
constexpr Passed passed() {
    if (std::is_pointer_v<T>) return {'p', sizeof(T)};
    if (std::is_floating_point_v<T>) return {'f', sizeof(T)};
    static_assert(std::is_pointer_v<T> || std::is_floating_point_v<T> || std::is_integral_v<T> ||
                  std::is_enum_v<T>);
    return {'i', sizeof(T)};
}

template <class Function>
struct Signature;

template <class Result, class... Arguments>
struct Signature<Result (*)(Arguments...)> {
    static constexpr std::array<Passed, 1 + sizeof...(Arguments)> value = {passed<Result>(),
                                                                           passed<Arguments>()...};
};

template <class Ours, class Theirs>
constexpr bool compatible() {
    constexpr auto& ours = Signature<Ours>::value;
    constexpr auto& theirs = Signature<Theirs>::value;
    if constexpr (ours.size() != theirs.size())
        return false;
    else
        return ours == theirs;
}

#define FASTATTN_SAME_CALL(name) static_assert(compatible<decltype(Table::name), decltype(&cublasLt##name)>())

FASTATTN_SAME_CALL(GetVersion);
FASTATTN_SAME_CALL(GetStatusName);
FASTATTN_SAME_CALL(Create);
FASTATTN_SAME_CALL(MatmulDescCreate);
FASTATTN_SAME_CALL(MatmulDescDestroy);
FASTATTN_SAME_CALL(MatmulDescSetAttribute);
FASTATTN_SAME_CALL(MatrixLayoutCreate);
FASTATTN_SAME_CALL(MatrixLayoutDestroy);
FASTATTN_SAME_CALL(MatrixLayoutSetAttribute);
FASTATTN_SAME_CALL(MatmulPreferenceCreate);
FASTATTN_SAME_CALL(MatmulPreferenceDestroy);
FASTATTN_SAME_CALL(MatmulPreferenceSetAttribute);
FASTATTN_SAME_CALL(MatmulAlgoGetHeuristic);
FASTATTN_SAME_CALL(Matmul);

// A function added to Table without a line above would go unchecked.
static_assert(sizeof(Table) == 14 * sizeof(void*));

}  // namespace
}  // namespace fastattn::cuda::cublas

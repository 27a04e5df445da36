// The part of cuBLASLt's binary interface that we call, in names of our own, so that no foreign header is
// needed to build and no library to link: loader.cpp opens the library when it is first used.
// tests/cpp/check_cublas_abi.cpp compares all of this with NVIDIA's header where that is installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastattn::cuda::cublas {

using Handle = void*;  // cublasLtHandle_t
using Descriptor = void*;  // cublasLtMatmulDesc_t
using Layout = void*;  // cublasLtMatrixLayout_t
using Preference = void*;  // cublasLtMatmulPreference_t
using Status = int;  // cublasStatus_t; 0 is success

inline constexpr Status kSuccess = 0;
inline constexpr Status kAllocFailed = 3;
inline constexpr Status kInvalidValue = 7;
inline constexpr Status kNotSupported = 15;

// cudaDataType_t
enum DataType : int { kF32 = 0, kF64 = 1, kF16 = 2, kBf16 = 14 };
// cublasComputeType_t
enum ComputeType : int { kCompute32F = 68, kCompute64F = 70, kCompute32FFastTf32 = 77 };
// cublasOperation_t
enum Operation : std::int32_t { kNone = 0, kTranspose = 1 };
// cublasLtMatmulDescAttributes_t
enum DescriptorAttribute : int { kTransposeA = 3, kTransposeB = 4 };
// cublasLtMatrixLayoutAttribute_t
enum LayoutAttribute : int { kBatchCount = 5, kBatchStride = 6, kBatchMode = 8 };
// cublasLtBatchMode_t, as uint32_t
enum BatchMode : std::uint32_t { kStrided = 0, kPointerArray = 1 };
// cublasLtMatmulPreferenceAttributes_t
enum PreferenceAttribute : int {
    kMaxWorkspaceBytes = 1,
    kReductionSchemeMask = 3,
    kMinAlignmentA = 5,
    kMinAlignmentB = 6,
    kMinAlignmentC = 7,
    kMinAlignmentD = 8,
};
// cublasLtReductionScheme_t
inline constexpr std::uint32_t kReductionComputeType = 2;

struct Algorithm {  // cublasLtMatmulAlgo_t
    std::uint64_t data[8];
};
struct HeuristicResult {  // cublasLtMatmulHeuristicResult_t
    Algorithm algorithm;
    std::size_t workspace_bytes;
    Status state;
    float waves;
    int reserved[4];
};

// The functions, named as in cublasLt.h without "cublasLt".
struct Table {
    std::size_t (*GetVersion)();  // 130002 for 13.0.2
    const char* (*GetStatusName)(Status);
    Status (*Create)(Handle*);
    Status (*MatmulDescCreate)(Descriptor*, ComputeType, DataType scale_type);
    Status (*MatmulDescDestroy)(Descriptor);
    Status (*MatmulDescSetAttribute)(Descriptor, DescriptorAttribute, const void*, std::size_t);
    Status (*MatrixLayoutCreate)(Layout*, DataType, std::uint64_t rows, std::uint64_t cols, std::int64_t ld);
    Status (*MatrixLayoutDestroy)(Layout);
    Status (*MatrixLayoutSetAttribute)(Layout, LayoutAttribute, const void*, std::size_t);
    Status (*MatmulPreferenceCreate)(Preference*);
    Status (*MatmulPreferenceDestroy)(Preference);
    Status (*MatmulPreferenceSetAttribute)(Preference, PreferenceAttribute, const void*, std::size_t);
    Status (*MatmulAlgoGetHeuristic)(Handle, Descriptor, Layout a, Layout b, Layout c, Layout d, Preference,
                                     int requested, HeuristicResult results[], int* found);
    Status (*Matmul)(Handle, Descriptor, const void* alpha, const void* a, Layout, const void* b, Layout,
                     const void* beta, const void* c, Layout, void* d, Layout, const Algorithm*,
                     void* workspace, std::size_t workspace_bytes, void* stream);
};

// The library, opened at the first call; nullptr when there is none, and *why says what is missing.
// Thread-safe; the answer does not change but from "none" to a library after offer().
const Table* open(const char** why) noexcept;
// Where a libcublasLt may be, found by someone who knows the machine better (Python's packages). Call before
// open().
void offer(const char* path);

}  // namespace fastattn::cuda::cublas

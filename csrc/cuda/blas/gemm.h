// Products of batches of matrices by cuBLASLt. What to call is decided by pure functions; GemmPlans asks the
// library for an algorithm once for each kind of product.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "cuda/blas/abi.h"
#include "cuda/simt/runtime.h"

namespace fastattn::cuda {

// Scratch for cuBLAS: what its documentation asks for on Hopper, and enough elsewhere.
inline constexpr std::size_t kGemmWorkspaceBytes = std::size_t{32} << 20;

// Throws CudaError unless all is well.
void throw_on_status(const cublas::Table& table, cublas::Status status, const char* attempted);

// A batch of column-major matrices: axes of the batch with strides in elements.
inline constexpr int kBatchAxes = 3;
struct GemmOperand {
    void* data = nullptr;
    cublas::DataType type = cublas::kF32;
    std::int64_t ld = 0;
    std::array<std::int64_t, kBatchAxes> stride{};
};

// c (m, n) = factor * op(a) op(b), or c += that, for every index of the batch axes; op(a) is (m, k), op(b) is
// (k, n).
struct Gemm {
    bool transpose_a = false, transpose_b = false, accumulate = false;
    cublas::ComputeType compute = cublas::kCompute32F;
    double factor = 1.0;
    std::int64_t m = 0, n = 0, k = 0;
    std::array<std::int64_t, kBatchAxes> count{1, 1, 1};
    GemmOperand a, b, c;

    std::int64_t entries() const noexcept { return count[0] * count[1] * count[2]; }
};

// The same products with fewer axes: neighbours whose strides continue each other in all three operands
// become one; the axis with the most entries comes last.
Gemm merge_axes(const Gemm& gemm) noexcept;

// More calls than this and one call with arrays of pointers is faster.
inline constexpr std::int64_t kStridedCallsAtMost = 4;
// Entries of the batch of one call: the library's kernels count them on an axis of their grid.
inline constexpr std::int64_t kBatchAtMost = 32768;
// Calls with a strided batch over the last axis: the product of the other counts.
std::int64_t strided_calls(const Gemm& merged) noexcept;
// What an algorithm is chosen by.
struct GemmKey {
    bool transpose_a = false, transpose_b = false, pointer_arrays = false;
    cublas::ComputeType compute = cublas::kCompute32F;
    std::array<cublas::DataType, 3> type{};
    std::array<std::uint32_t, 3> alignment{};  // bytes, of every matrix
    std::array<std::int64_t, 3> size{};  // m, n, k
    std::array<std::int64_t, 3> ld{}, stride{};
    std::int64_t batch = 1;

    friend bool operator==(const GemmKey&, const GemmKey&) = default;
};
GemmKey key_of(const Gemm& merged, bool pointer_arrays) noexcept;

// An algorithm with its descriptors, which any thread may use.
class GemmPlan;

// The plans of one device. Thread-safe.
class GemmPlans {
public:
    GemmPlans(const cublas::Table& table, cublas::Handle handle, std::size_t workspace_bytes);
    ~GemmPlans();

    // Where products run.
    struct Place {
        Stream stream = nullptr;
        void* workspace = nullptr;  // as many bytes as the plans were made for
        void** pointers = nullptr;  // on the device, 3 for each entry; null: not to be used
    };
    // Queues the products; throws CudaError.
    void run(const Gemm& gemm, const Place& place);

private:
    struct Hash {
        std::size_t operator()(const GemmKey& key) const noexcept;
    };
    std::shared_ptr<const GemmPlan> find(const GemmKey& key);
    bool run_by_pointers(const Gemm& merged, const Place& place);  // false: not supported
    cublas::Status call(const GemmPlan& plan, const Place& place, const Gemm& gemm, const void* a,
                        const void* b, void* c) const;

    const cublas::Table& table_;
    const cublas::Handle handle_;
    const std::size_t workspace_bytes_;
    std::mutex mutex_;
    std::unordered_map<GemmKey, std::shared_ptr<const GemmPlan>, Hash> plans_;
};

}  // namespace fastattn::cuda

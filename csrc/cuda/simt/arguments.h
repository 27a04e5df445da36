// What the SIMT kernels are handed, by value. Every pointer is one of the device.
#pragma once

#include <cstdint>

#include <fastattn/attention.h>

#include "core/host_device.h"
#include "cuda/chunk.h"

namespace fastattn::cuda {

// 16-bit weights of long rows are small numbers, which float16 has few bits for: they are stored times this, and the product with v
// takes it back, together with 1 - dropout.
FASTATTN_HOST_DEVICE constexpr double weight_scale(DType dtype) noexcept {
    return dtype == DType::f16 ? 32768.0 : 1.0;
}
FASTATTN_HOST_DEVICE constexpr double weight_unit(DType dtype, double dropout) noexcept {
    return 1.0 / (weight_scale(dtype) * (1.0 - dropout));
}

// Scores of one chunk: row r of the matrix belongs to pair r / (G * rows) of (batch entry, kv head), the batch
// entry outside; within a pair r = g * rows + i, or i * G + g with group_inner.
struct SoftmaxArgs {
    AttentionProblem problem;
    Chunk chunk;
    bool group_inner = false;
    // in:  raw products q.k, (row, key - chunk.key), in f64 for f64, else f32
    // out: weights in the problem's dtype, in the same memory: row r still starts at r * ld * sizeof(score)
    void* scores = nullptr;
    std::int64_t ld = 0;  // elements of a row of scores, a multiple of 8
};

// target[b,s,h,d] = source[b,s,h,d]; with lengths, rows s >= lengths[b] - first_row become 0 without being read.
struct CopyArgs {
    Operand source, target;
    int item_size = 0;  // bytes: 2, 4 or 8
    std::int64_t batches = 0, rows = 0, heads = 0, dims = 0;
    bool has_lengths = false;
    HeadOperand lengths;  // batch stride counts from entry 0 of the copy
    std::int64_t first_row = 0;
};

// Addresses for products in pointer-array mode: pointers[x * n + e] = base[x] + the strides of entry e, where
// e counts through count[0] x count[1] x count[2], the last fastest, n of them.
struct PointerArgs {
    void** pointers = nullptr;
    char* base[3] = {};
    std::int64_t stride[3][3] = {};  // [x][axis], bytes
    std::int64_t count[3] = {1, 1, 1};
};

}  // namespace fastattn::cuda

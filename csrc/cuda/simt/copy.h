// Copies between strided arrays, and addresses for products in pointer-array mode.
#pragma once

#include "cuda/simt/row.h"

namespace fastattn::cuda {
namespace {

inline constexpr int kCopyBlock = 256;  // threads, a warp for each (b, s, h)

template <class T>
__global__ void __launch_bounds__(kCopyBlock) copy_rows(const __grid_constant__ CopyArgs a) {
    const Index r = Index{blockIdx.x} * (kCopyBlock / 32) + threadIdx.x / 32;
    if (r >= a.batches * a.rows * a.heads) return;
    const Index bs = quotient(r, a.heads), b = quotient(bs, a.rows);
    const Index h = r - bs * a.heads, s = bs - b * a.rows;
    const bool valid = a.first_row + s < length_of(a.lengths, a.has_lengths, b, a.first_row + a.rows);
    const T* source =
        static_cast<const T*>(a.source.data) + b * a.source.batch + s * a.source.seq + h * a.source.head;
    T* target = static_cast<T*>(a.target.data) + b * a.target.batch + s * a.target.seq + h * a.target.head;
    for (Index d = threadIdx.x % 32; d < a.dims; d += 32)
        target[d * a.target.dim] = valid ? source[d * a.source.dim] : T(0);
}

inline constexpr int kPointerBlock = 256;

__global__ void __launch_bounds__(kPointerBlock) fill_pointers(const __grid_constant__ PointerArgs a) {
    const Index n = a.count[0] * a.count[1] * a.count[2];
    const Index e = Index{blockIdx.x} * kPointerBlock + threadIdx.x;
    if (e >= n) return;
    const Index at[3] = {e / a.count[2] / a.count[1], e / a.count[2] % a.count[1], e % a.count[2]};
    for (int x = 0; x < 3; ++x)
        a.pointers[x * n + e] =
            a.base[x] + at[0] * a.stride[x][0] + at[1] * a.stride[x][1] + at[2] * a.stride[x][2];
}

}  // namespace
}  // namespace fastattn::cuda

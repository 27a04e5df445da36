// Rows of the output that hold NaN or Inf, once more: a product P.V reads every value of the chunk, and
// 0 * NaN is NaN, so a masked value leaks into the rows that may not attend it. Here they are summed key by
// key over the keys that the row may attend. Rows are found by their result, so the common case reads the
// output and stops.
#pragma once

#include "core/keys.h"
#include "cuda/simt/row.h"

namespace fastattn::cuda {
namespace {

inline constexpr int kRestoreBlock = 256;  // threads, a warp for each row

template <class T, class Acc>
__global__ void __launch_bounds__(kRestoreBlock) restore_rows(const __grid_constant__ SoftmaxArgs a) {
    const AttentionProblem& p = a.problem;
    const Index rows = a.chunk.batches * a.chunk.kv_heads * p.group * a.chunk.rows;
    const Index r = Index{blockIdx.x} * (kRestoreBlock / 32) + threadIdx.x / 32;
    if (r >= rows) return;
    const RowPlace at = place_of_row(a, r);
    T* out = static_cast<T*>(p.out.data) + at.b * p.out.batch + at.i * p.out.seq + at.h * p.out.head;
    const int lane = static_cast<int>(threadIdx.x % 32);
    bool odd = a.chunk.keys == 0;  // then nobody has written the row
    for (Index d = lane; d < p.value_dim; d += 32) {
        const Acc x = widen(out[d * p.out.dim]);
        odd |= !(x - x == Acc(0));
    }
    if (!__any_sync(0xFFFFFFFFu, odd)) return;

    const Row row(p, at);
    const T* weights = reinterpret_cast<const T*>(static_cast<const Acc*>(a.scores) + r * a.ld);
    const KeyRows<T> v(p.v, at.b, at.h / p.group);
    for (Index d = lane; d < p.value_dim; d += 32) {
        Acc sum = 0;
        for (Index n = 0; n < a.chunk.keys; ++n) {
            const Index j = a.chunk.key + n;
            if (row.attends(p, j)) sum += widen(weights[n]) * widen(v[j][d * v.number_stride()]);
        }
        narrow(sum * static_cast<Acc>(weight_unit(p.dtype, p.dropout)), out[d * p.out.dim]);
    }
}

}  // namespace
}  // namespace fastattn::cuda

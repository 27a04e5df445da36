// Instances of the SIMT kernels of the backward pass, and their launches. The tests compile it as C++ for the
// emulated GPU.
#include "cuda/simt/launch_backward.h"

#include "cuda/simt/backward.h"
#include "cuda/simt/launch_macro.h"

namespace fastattn::cuda {
namespace {

Index blocks_for_warps(Index warps) { return (warps + kBackwardWarps - 1) / kBackwardWarps; }
Index blocks_for_threads(Index threads) { return (threads + kBackwardBlock - 1) / kBackwardBlock; }

Index rows_of(const BackwardArgs& a, const Chunk& c) {
    return c.batches * c.kv_heads * a.problem.forward.group * c.rows;
}
Index keys_of(const Chunk& c) { return c.batches * c.kv_heads * c.keys; }

template <class T, class Acc, int threads>
void gradients_of(const BackwardArgs& a, Stream stream) {
    const Index rows_per_block = kBackwardBlock / threads;
    const Index blocks = (rows_of(a, a.chunk) + rows_per_block - 1) / rows_per_block;
    if (is_plain(a.problem.forward)) {
        FASTATTN_LAUNCH((score_gradients<T, Acc, threads, true>), blocks, kBackwardBlock, stream, a);
    } else {
        FASTATTN_LAUNCH((score_gradients<T, Acc, threads, false>), blocks, kBackwardBlock, stream, a);
    }
}

}  // namespace

void launch_row_states(const BackwardArgs& a, Stream stream) {
    const Index blocks = blocks_for_warps(rows_of(a, a.region));
    if (blocks == 0) return;
    with_types(a.problem.forward.dtype, [&]<class T, class Acc>(T*, Acc*) {
        FASTATTN_LAUNCH((row_states<T, Acc>), blocks, kBackwardBlock, stream, a);
    });
}

void launch_score_gradients(const BackwardArgs& a, Stream stream) {
    if (rows_of(a, a.chunk) == 0) return;
    with_types(a.problem.forward.dtype, [&]<class T, class Acc>(T*, Acc*) {
        if (a.chunk.keys <= kWarpKeys) {
            gradients_of<T, Acc, 32>(a, stream);
        } else {
            gradients_of<T, Acc, kBackwardBlock>(a, stream);
        }
    });
}

void launch_row_units(const BackwardArgs& a, Stream stream) {
    const Index blocks = a.chunk.batches * a.chunk.kv_heads;
    if (blocks > 0) FASTATTN_LAUNCH(row_units, blocks, kBackwardBlock, stream, a);
}

void launch_scale_rows(const BackwardArgs& a, Stream stream) {
    const Index rows = rows_of(a, a.chunk);
    if (rows == 0 || a.chunk.keys == 0) return;
    if (a.chunk.keys <= kWarpKeys) {
        FASTATTN_LAUNCH((scale_rows<32>), blocks_for_warps(rows), kBackwardBlock, stream, a);
    } else {
        FASTATTN_LAUNCH((scale_rows<kBackwardBlock>), rows, kBackwardBlock, stream, a);
    }
}

void launch_add_keys(const BackwardArgs& a, Stream stream) {
    const Index blocks = blocks_for_warps(keys_of(a.chunk));
    if (blocks > 0) FASTATTN_LAUNCH(add_keys, blocks, kBackwardBlock, stream, a);
}

void launch_repair(const BackwardArgs& a, Stream stream) {
    const Index blocks = blocks_for_warps(rows_of(a, a.chunk) + keys_of(a.chunk));
    if (blocks == 0) return;
    with_types(a.problem.forward.dtype, [&]<class T, class Acc>(T*, Acc*) {
        FASTATTN_LAUNCH((repair<T, Acc>), blocks, kBackwardBlock, stream, a);
    });
}

void launch_bias_sums(const BackwardArgs& a, Stream stream) {
    const ScoreOperand& to = a.bias_sums;
    const Chunk& c = a.chunk;
    const Index batches = to.batch == 0 ? 1 : c.batches,
                heads = to.head == 0 ? 1 : c.kv_heads * a.problem.forward.group,
                rows = to.query == 0 ? 1 : c.rows, tiles = to.key == 0 ? 1 : (c.keys + 31) / 32;
    const Index blocks = batches * heads * rows * tiles;
    if (blocks == 0 || rows_of(a, c) == 0 || c.keys == 0) return;
    with_types(a.problem.forward.dtype, [&]<class T, class Acc>(T*, Acc*) {
        FASTATTN_LAUNCH((bias_sums<Acc>), blocks, kBackwardBlock, stream, a);
    });
}

void launch_head_sums(const BackwardArgs& a, Stream stream) {
    const Index blocks = a.region.kv_heads * a.problem.forward.group;
    if (blocks == 0 || rows_of(a, a.region) == 0) return;
    with_types(a.problem.forward.dtype, [&]<class T, class Acc>(T*, Acc*) {
        FASTATTN_LAUNCH((head_sums<Acc>), blocks, kBackwardBlock, stream, a);
    });
}

void launch_clean(const CleanArgs& a, Stream stream) {
    const Index blocks = blocks_for_warps(a.copy.batches * a.copy.heads * a.copy.rows);
    if (blocks == 0) return;
    with_types(a.dtype, [&]<class T, class Acc>(T*, Acc*) {
        FASTATTN_LAUNCH((clean_rows<T>), blocks, kBackwardBlock, stream, a);
    });
}

void launch_any_bad(const AnyArgs& a, Stream stream) {
    if (a.count > 0) FASTATTN_LAUNCH(any_bad, a.count, kBackwardBlock, stream, a);
}

void launch_store(const StoreArgs& a, Stream stream) {
    const Index blocks = blocks_for_warps(a.batches * a.heads * a.rows);
    if (blocks == 0) return;
    with_types(a.dtype, [&]<class T, class Acc>(T*, Acc*) {
        FASTATTN_LAUNCH((store_rows<T, Acc>), blocks, kBackwardBlock, stream, a);
    });
}

void launch_store_bias(const StoreBiasArgs& a, Stream stream) {
    const Index blocks = blocks_for_threads(a.size[0] * a.size[1] * a.size[2] * a.size[3]);
    if (blocks > 0) FASTATTN_LAUNCH(store_bias, blocks, kBackwardBlock, stream, a);
}

void launch_store_heads(const StoreHeadsArgs& a, Stream stream) {
    const Index items = (a.batches > 1 ? a.batches : 1) * a.heads;
    if (items > 0) FASTATTN_LAUNCH(store_heads, blocks_for_threads(items), kBackwardBlock, stream, a);
}

void launch_zero(const ZeroArgs& a, Stream stream) {
    const Index blocks = blocks_for_threads((a.bytes + 15) / 16);
    if (blocks > 0) FASTATTN_LAUNCH(zero, blocks, kBackwardBlock, stream, a);
}

}  // namespace fastattn::cuda

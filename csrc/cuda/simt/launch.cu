// Instances of the forward's SIMT kernels and of those that all share, and their launches. The tests compile
// it as C++ for the emulated GPU.
#include "cuda/simt/launch.h"

#include "cuda/simt/copy.h"
#include "cuda/simt/launch_macro.h"
#include "cuda/simt/restore.h"
#include "cuda/simt/softmax.h"

namespace fastattn::cuda {
namespace {

Index blocks_for(Index items, Index per_block) { return (items + per_block - 1) / per_block; }

Index rows_of(const SoftmaxArgs& a) {
    return a.chunk.batches * a.chunk.kv_heads * a.problem.group * a.chunk.rows;
}

template <class T, class Acc, int threads>
void softmax_of(const SoftmaxArgs& a, Stream stream) {
    const Index blocks = blocks_for(rows_of(a), kSoftmaxBlock / threads);
    if (is_plain(a.problem)) {
        FASTATTN_LAUNCH((softmax_rows<T, Acc, threads, true>), blocks, kSoftmaxBlock, stream, a);
    } else {
        FASTATTN_LAUNCH((softmax_rows<T, Acc, threads, false>), blocks, kSoftmaxBlock, stream, a);
    }
}

}  // namespace

void launch_softmax(const SoftmaxArgs& a, Stream stream) {
    with_types(a.problem.dtype, [&]<class T, class Acc>(T*, Acc*) {
        if (a.chunk.keys <= kWarpKeys) {
            softmax_of<T, Acc, 32>(a, stream);
        } else {
            softmax_of<T, Acc, kSoftmaxBlock>(a, stream);
        }
    });
}

void launch_restore(const SoftmaxArgs& a, Stream stream) {
    with_types(a.problem.dtype, [&]<class T, class Acc>(T*, Acc*) {
        FASTATTN_LAUNCH((restore_rows<T, Acc>), blocks_for(rows_of(a), kRestoreBlock / 32), kRestoreBlock,
                        stream, a);
    });
}

void launch_copy(const CopyArgs& a, Stream stream) {
    const Index blocks = blocks_for(a.batches * a.rows * a.heads, kCopyBlock / 32);
    switch (a.item_size) {
        case 2: FASTATTN_LAUNCH((copy_rows<std::uint16_t>), blocks, kCopyBlock, stream, a); break;
        case 4: FASTATTN_LAUNCH((copy_rows<std::uint32_t>), blocks, kCopyBlock, stream, a); break;
        default: FASTATTN_LAUNCH((copy_rows<std::uint64_t>), blocks, kCopyBlock, stream, a); break;
    }
}

void launch_pointers(const PointerArgs& a, Stream stream) {
    const Index n = a.count[0] * a.count[1] * a.count[2];
    FASTATTN_LAUNCH(fill_pointers, blocks_for(n, kPointerBlock), kPointerBlock, stream, a);
}

}  // namespace fastattn::cuda

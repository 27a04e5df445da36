#include "cuda/cublas/forward.h"

#include <algorithm>

#include "cuda/cublas/products.h"
#include "cuda/host/errors.h"
#include "cuda/host/operands.h"
#include "cuda/host/staging.h"
#include "cuda/simt/launch.h"

namespace fastattn::cuda {
namespace {

// Scratch of a region, within one block of the device.
struct Scratch {
    std::byte *scores = nullptr, *gemm = nullptr, *pointers = nullptr;
};

// A chunk's scores stay within the limit, or are those of one row of one kv head, or of all there is.
Scratch take_scratch(const AttentionProblem& p, const Chunk& region, std::size_t limit,
                     Carver& carver) noexcept {
    Chunk row = region;
    row.batches = row.kv_heads = row.rows = 1;
    Scratch scratch;
    scratch.scores = carver.take(std::min(score_bytes(p, region), std::max(limit, score_bytes(p, row))));
    scratch.gemm = carver.take(kGemmWorkspaceBytes);
    scratch.pointers =
        carver.take(3 * sizeof(void*) * static_cast<std::size_t>(region.batches * region.kv_heads * p.group));
    return scratch;
}

}  // namespace

std::size_t CublasAttention::workspace_bytes(const AttentionProblem& host, const AttentionProblem& device,
                                             const Chunk& region) const {
    Carver carver(nullptr);
    take_scratch(host, region, limit(), carver);
    const RegionOperands operands(host, device, region, carver);
    return carver.used();
}

void CublasAttention::queue(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
                            const KernelMemory& memory, Stream stream) const {
    Carver carver(memory.workspace);
    const Scratch scratch = take_scratch(host, region, limit(), carver);
    const RegionOperands operands(host, device, region, carver);
    const AttentionProblem& p = operands.problem();
    operands.queue_copies_in(stream);
    const GemmPlans::Place place{stream, scratch.gemm, reinterpret_cast<void**>(scratch.pointers)};
    Chunks walk(host, region, limit());
    for (Chunk chunk; walk.next(chunk);) {
        const Fold fold = fold_of(p, p.q, p.out, chunk);
        SoftmaxArgs args;
        args.problem = p;
        args.chunk = chunk;
        args.group_inner = fold == Fold::inner;
        args.scores = scratch.scores;
        args.ld = score_stride(chunk.keys);
        if (chunk.keys > 0) gemm_.run(scores_product(p, chunk, fold, scratch.scores, args.ld, tf32_), place);
        launch_softmax(args, stream);
        throw_on_error(runtime::last_error(), "launching softmax_rows");
        if (chunk.keys > 0) gemm_.run(values_product(p, chunk, fold, scratch.scores, args.ld, tf32_), place);
        if (chunk.keys == 0 || is_restricted(p)) {
            launch_restore(args, stream);
            throw_on_error(runtime::last_error(), "launching restore_rows");
        }
    }
    operands.queue_copies_out(stream);
}

std::string CublasAttention::describe(const AttentionProblem& p, bool staged) const {
    Index chunks = 0;
    Chunk first;
    const auto walk = [&](const Chunk& region) {
        Chunks all(p, region, limit());
        for (Chunk chunk; all.next(chunk); ++chunks)
            if (chunks == 0) first = chunk;
    };
    Units units(p);
    bool same_keys = false;
    if (!staged) walk(whole(p));
    for (Chunk unit; staged && units.next(unit, same_keys);) walk(unit);
    std::string text = "cuBLAS, scores in " + std::to_string(chunks) + " chunk" + (chunks == 1 ? "" : "s") +
                       ", the first of " + std::to_string(first.rows) + " rows x " +
                       std::to_string(first.batches * first.kv_heads * p.group) + " heads";
    if (tf32_ && p.dtype == DType::f32) text += ", TF32";
    return text;
}

}  // namespace fastattn::cuda

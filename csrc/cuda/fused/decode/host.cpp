#include "cuda/fused/decode/host.h"

#include <algorithm>

#include "cuda/fused/decode/launch.h"
#include "cuda/host/errors.h"

namespace fastattn::cuda {
namespace {

// A row of tiles.inc; of width 0: none.
struct TileSizes {
    int width = 0, mt = 0;
};

// The narrowest that holds both head dimensions, and of these the first that holds all rows of a kv head, or
// the last.
TileSizes tile_for(const AttentionProblem& p) noexcept {
    const Index dims = std::max(p.head_dim, p.value_dim), rows = p.q_size * p.group;
    TileSizes found;
#define FASTATTN_DECODE_TILE(tile_width, tile_mt, slots)                                                     \
    if (dims <= (tile_width) && (found.width == 0 || (found.width == (tile_width) && rows > 16 * found.mt))) \
        found = {tile_width, tile_mt};
#include "cuda/fused/decode/tiles.inc"
#undef FASTATTN_DECODE_TILE
    return found;
}

// The sums of the pieces, for each row of the region.
DecodeArgs take_sums(const FlashArgs& flash, const Pieces& pieces, Carver& carver) noexcept {
    DecodeArgs args{flash, pieces};
    if (pieces.count == 1) return args;
    const AttentionProblem& p = flash.problem;
    const Chunk& region = flash.region;
    const Index parts = region.batches * region.kv_heads * p.group * region.rows * pieces.count;
    const auto take = [&](Index n) {
        return reinterpret_cast<float*>(carver.take(static_cast<std::size_t>(n) * sizeof(float)));
    };
    args.m = take(parts);
    args.l = take(parts);
    args.o = take(parts * p.value_dim);
    return args;
}

}  // namespace

const char* FlashDecode::refuses(const AttentionProblem& p) {
    if (const char* why = FusedKernel::refuses(p)) return why;
    return p.q_size > kDecodeRows ? "takes up to 16 query rows" : nullptr;
}

std::size_t FlashDecode::scratch_bytes(const AttentionProblem& host, const Chunk& region) const {
    Carver carver(nullptr);
    take_sums({host, region}, pieces_of(host, region), carver);
    return carver.used();
}

void FlashDecode::launch(const FlashArgs& flash, std::byte* scratch, Stream stream) const {
    Carver carver(scratch);
    const DecodeArgs args = take_sums(flash, pieces_of(flash.problem, flash.region), carver);
    const TileSizes tile = tile_for(flash.problem);
    throw_on_error(launch_decode(args, tile.width, tile.mt, stream), "asking for shared memory");
    throw_on_error(runtime::last_error(), "launching decode_forward");
    if (args.pieces.count == 1) return;
    launch_merge_splits(args, stream);
    throw_on_error(runtime::last_error(), "launching merge_splits");
}

std::string FlashDecode::describe(const AttentionProblem& p, bool) const {
    const TileSizes tile = tile_for(p);
    const Pieces pieces = pieces_of(p, whole(p));
    std::string text = "fused, " + std::to_string(16 * tile.mt) + " rows a block, head dimensions up to " +
                       std::to_string(tile.width);
    if (pieces.count > 1)
        text += ", keys in " + std::to_string(pieces.count) + " pieces of " + std::to_string(pieces.size);
    return text;
}

}  // namespace fastattn::cuda

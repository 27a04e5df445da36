// What the kernel for few query rows is handed, and how the keys of a head are cut into pieces for it: pure
// functions, tested without a GPU.
#pragma once

#include <algorithm>

#include "cuda/fused/arguments.h"
#include "cuda/host/chunking.h"

namespace fastattn::cuda {

inline constexpr Index kDecodeRows = 16;  // query rows of a head at most
// Keys that the warps of a block take at once; pieces begin at multiples of it.
inline constexpr Index kDecodeStep = 64;

// Keys of a piece, by the problem of one kv head alone: `rows` = Sq * G, `keys` = Sk. Whatever else is in the
// batch and whatever GPU it is, a row is summed in the same order. What it weighs up, with an H200 (132 SMs,
// 2 to 4 blocks on each) in mind:
//   - One batch entry with 8 kv heads should reach all SMs: 16 pieces (128 blocks) from 1k keys on, 64 (512
//     blocks) from 32k on.
//   - A piece costs writing and reading its sums: 8 bytes for each row and feature, where a key costs 4 for
//     each feature. Eight keys for each row bound that by a quarter of the traffic, and it mostly stays in
//     the second-level cache; with 8 rows, pieces of 256 keys (32 entries of 4k keys) make it 6 %, 512 keys 3
//     %. Beyond that only the number of pieces to merge still counts.
constexpr Index piece_keys(Index rows, Index keys) noexcept {
    const Index spread = std::clamp<Index>((keys + 15) / 16, kDecodeStep, 512);
    const Index merged = (keys + 63) / 64;
    return round_up(std::max({spread, merged, 8 * rows}), kDecodeStep);
}

// Pieces `first` .. `first + count - 1` of a head have all the keys of a region; piece n the keys from n *
// size on.
struct Pieces {
    Index size = 0, first = 0, count = 1;
};

constexpr Pieces pieces_of(const AttentionProblem& p, const Chunk& region) noexcept {
    Pieces pieces;
    pieces.size = piece_keys(p.q_size * p.group, p.kv_size);
    pieces.first = region.key / pieces.size;
    // One where there are no keys at all: it writes the rows' zeros.
    pieces.count =
        std::max<Index>(1, (region.key + region.keys + pieces.size - 1) / pieces.size - pieces.first);
    return pieces;
}

struct DecodeArgs {
    FlashArgs flash;
    Pieces pieces;
    // With several pieces, for each row of the region ([batch][kv head][query][head of the group]) and piece,
    // the state of its softmax over the keys of the piece: m = max x, l = sum 2^(x - m), o = sum 2^(x - m) v.
    // Where l is 0, o is not written.
    float *m = nullptr, *l = nullptr, *o = nullptr;
};

}  // namespace fastattn::cuda

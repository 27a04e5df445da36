// The arrays of a call whose caller has them on the host: when each of them travels, which axes it has, where
// it lies in a block of memory, and how it is copied there.
#pragma once

#include <array>
#include <cstddef>
#include <initializer_list>
#include <type_traits>

#include "cuda/host/chunking.h"
#include "threads/executor.h"

namespace fastattn::cuda {

// Bytes of a unit's arrays that are aimed at; two units are on their way at a time.
inline constexpr std::size_t kUnitBytes = std::size_t{32} << 20;

// ---- the table --------------------------------------------------------------------------------------------
// When an array travels; those of one way share a block of memory.
enum class Travel {
    keys,  // to the device, unless the unit before has the same
    in,  // to the device with each unit
    out,  // from the device with each unit
    side,  // to the device once, whole
    summed,  // from the device once, whole: every unit adds to it
    never,  // absent, or on the device
};
inline constexpr std::size_t kBlocks = 5;

// Which axes an array has beside the batch. Of keys, results have all, and what travels to the device those
// of the region.
enum class Axes {
    queries,  // query heads, rows, features; rows begin at multiples of 16 bytes
    keys,  // kv heads, keys, features; the same
    scores,  // query heads, rows, keys: those that it does not broadcast
    weights,  // query heads, rows, keys, whatever its strides say
    rows,  // query heads, rows, whatever its strides say
};

struct StagedArray {
    StagedArray(Operand& x, DType type, Index features, Axes has, Travel how) noexcept;
    StagedArray(ScoreOperand& x, Axes has, Travel how) noexcept;
    explicit StagedArray(HeadOperand& x) noexcept;

    // Of the problem that the table was made of.
    void** data;
    std::array<Index*, 4>
        strides;  // batch, head, row (or key), key (or feature); null: an axis that it never has
    DeviceType* place = nullptr;

    DType dtype;
    Axes axes;
    Travel travel;
    Index features = 0;
};

std::array<StagedArray, 13> arrays_of(AttentionProblem& p) noexcept;
std::array<StagedArray, 20> arrays_of(BackwardProblem& b) noexcept;

template <class Problem>
auto& forward_of(Problem& problem) noexcept {
    if constexpr (std::is_same_v<std::remove_const_t<Problem>, BackwardProblem>) {
        return problem.forward;
    } else {
        return problem;
    }
}

// The same for every head and entry, and not too large to be on the device whole: uploaded once for all
// units.
bool is_shared(const AttentionProblem& p, const ScoreOperand& x) noexcept;
// Whether every element of dbias is one dS, so that it is written and not summed.
bool has_all_axes(const ScoreOperand& dbias, const AttentionProblem& p) noexcept;

// ---- arrays of a region in blocks; problems are by value, as a table has addresses ------------------------
// Where the arrays of a region lie, compact, each in the block of its way.
struct BlockLayout {
    std::array<std::size_t, 20> offset{};  // by the table's rows
    std::array<std::size_t, kBlocks> used{};
    std::size_t bytes(Travel travel) const noexcept { return used[static_cast<std::size_t>(travel)]; }
};
template <class Problem>
BlockLayout lay_out(Problem p, const Chunk& region) noexcept;

struct Block {
    Travel travel;
    std::byte* data;  // null: only strides and alignment count
};
// `to` with the arrays of these blocks in place, addressed by the indices of the whole problem. What travels
// how is p's.
template <class Problem>
Problem placed(Problem p, Problem to, const Chunk& region, const BlockLayout& layout,
               std::initializer_list<Block> blocks, DeviceType place) noexcept;
// Copies the arrays of one way between p and `there`, from p if they go to the device, else to p.
template <class Problem>
void copy_arrays(Problem p, Problem there, const Chunk& region, Travel travel, Executor& executor);

}  // namespace fastattn::cuda

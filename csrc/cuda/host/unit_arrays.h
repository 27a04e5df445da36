// The arrays of a unit of a staged call: what of them travels, where it lies in a block, and how it is copied there.
#pragma once

#include <array>
#include <cstddef>

#include "cuda/host/chunking.h"
#include "threads/executor.h"

namespace fastattn::cuda {

// Bytes of a unit's arrays that are aimed at; two units are on their way at a time.
inline constexpr std::size_t kUnitBytes = std::size_t{32} << 20;

// ---- arrays over (batch, head, query, key) ----------------------------------------------------------------------
// The same for every head and entry, and not too large to be on the device whole: uploaded once for all units.
bool is_shared(const AttentionProblem& p, const ScoreOperand& x) noexcept;
// The same unit with the first `keys` keys: all, or one where an array has no key axis.
Chunk with_keys(const Chunk& unit, Index keys) noexcept;
// An output over (batch, head, query[, key]) has all its axes, whatever its strides say.
ScoreOperand full(const ScoreOperand& x, Index keys) noexcept;
// Sizes of what is stored for the keys of the unit: broadcast axes once.
std::array<Index, 4> stored_size(const AttentionProblem& p, const ScoreOperand& x,
                                 const Chunk& unit) noexcept;
std::size_t stored_bytes(const AttentionProblem& p, const ScoreOperand& x, const Chunk& unit) noexcept;
// The array, compact at `data`, in the whole problem's indices.
ScoreOperand placed(const AttentionProblem& p, const ScoreOperand& x, const Chunk& unit, void* data) noexcept;

// ---- copies on the host; both arrays are in the whole problem's indices ---------------------------------------------
void copy_queries(const AttentionProblem& p, const Chunk& unit, const Operand& from, const Operand& to,
                  Index dims, Executor& executor);
void copy_keys(const AttentionProblem& p, const Chunk& unit, const Operand& from, const Operand& to,
               Index dims, Executor& executor);
void copy_scores(const AttentionProblem& p, const Chunk& unit, const ScoreOperand& from,
                 const ScoreOperand& to, const std::array<Index, 4>& size, Executor& executor);

}  // namespace fastattn::cuda

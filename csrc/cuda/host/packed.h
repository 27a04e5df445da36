// Packed entries on a device: a call for each, with its arrays begun at its own rows and keys.
#pragma once

#include <vector>

#include <fastattn/attention.h>

namespace fastattn::cuda {

// Why packed entries cannot be computed so, or nullptr; of other problems always nullptr.
const char* refuses_packed(const AttentionProblem& p) noexcept;
const char* refuses_packed(const BackwardProblem& b) noexcept;

// A problem for each entry, as a batch of one, and for what lies outside of all entries: rows without keys,
// keys without rows. Bounds that the host reads must not change meanwhile.
std::vector<AttentionProblem> entry_problems(const AttentionProblem& packed);
std::vector<BackwardProblem> entry_problems(const BackwardProblem& packed);

}  // namespace fastattn::cuda

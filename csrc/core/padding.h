// What stands beyond the entries' rows and keys: zeros, and an lse of -inf.
#pragma once

#include <cstdint>
#include <functional>

#include <fastattn/attention.h>

#include "core/entry.h"
#include "threads/executor.h"

namespace fastattn {

// Entry b of a call, as plan() has read it.
using EntryAt = std::function<const Entry&(std::int64_t b)>;

void clear_padding(const AttentionProblem& p, const EntryAt& entry_at, Executor& executor);
void clear_padding(const BackwardProblem& p, const EntryAt& entry_at, Executor& executor);
// dbias of packed entries: zeros before their items, and after them the sums of a bias with one number for
// each head.
void clear_bias_gradient(const BackwardProblem& p, Executor& executor);
// sums: (entry, head)
void store_bias_sums(const BackwardProblem& p, const double* sums, const EntryAt& entry_at);

}  // namespace fastattn

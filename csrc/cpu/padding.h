// What stands beyond an entry's rows and keys, in arrays that are longer than it: zeros, and an lse of -inf.
#pragma once

#include "cpu/backward/schedule.h"
#include "cpu/flash/schedule.h"
#include "threads/executor.h"

namespace fastattn::cpu {

void clear_padding(const AttentionProblem& p, const EntryTable<FlashEntry>& entries, Executor& executor);
void clear_padding(const BackwardProblem& p, const EntryTable<BackwardEntry>& entries, Executor& executor);

}  // namespace fastattn::cpu

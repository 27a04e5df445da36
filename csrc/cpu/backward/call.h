// One backward call, as its work items see it.
#pragma once

#include <cstddef>

#include <fastattn/attention.h>

#include "cpu/backward/schedule.h"
#include "threads/executor.h"

namespace fastattn::cpu {

struct BackwardCall {
    const BackwardProblem& problem;
    const BackwardSchedule& schedule;
    std::byte* shared;
    Executor& executor;
};

// One after the other; what each needs of the earlier ones is complete.
enum class BackwardPhase { prepare, gradients, merge, heads, bias };

// Where an entry's items of a phase are numbered; nullptr: an item of the phase goes through all entries.
// dbias has blocks that entries share, unless they are packed.
inline Phase BackwardEntry::* phase_of(const BackwardProblem& problem, BackwardPhase phase) noexcept {
    switch (phase) {
        case BackwardPhase::prepare: return &BackwardEntry::prepares;
        case BackwardPhase::gradients: return &BackwardEntry::items;
        case BackwardPhase::merge: return &BackwardEntry::merges;
        case BackwardPhase::bias: return problem.forward.packed() ? &BackwardEntry::biases : nullptr;
        default: return nullptr;
    }
}

}  // namespace fastattn::cpu

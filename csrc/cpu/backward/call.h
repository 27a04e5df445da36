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

}  // namespace fastattn::cpu

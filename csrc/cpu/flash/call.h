// One forward call, as its work items see it.
#pragma once

#include <cstddef>

#include <fastattn/attention.h>

#include "cpu/flash/schedule.h"
#include "threads/executor.h"

namespace fastattn::cpu {

struct FlashCall {
    const AttentionProblem& problem;
    const FlashSchedule& schedule;
    std::byte* shared;
    Executor& executor;
};

}  // namespace fastattn::cpu

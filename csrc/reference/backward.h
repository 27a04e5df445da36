// The backward pass of cpu-reference.
#pragma once

#include "core/kernel.h"

namespace fastattn {

KernelPlan plan_reference_backward(const BackwardProblem& problem, Device device, int threads, bool describe);
void run_reference_backward(const BackwardProblem& problem, const Target& target, const Workspace& workspace,
                            Executor& executor);

}  // namespace fastattn

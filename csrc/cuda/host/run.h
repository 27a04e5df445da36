// A call of a device's kernel: arrays on the device are used where they lie, in the caller's stream and
// without waiting; host arrays are staged.
#pragma once

#include "core/kernel.h"
#include "cuda/host/context.h"
#include "cuda/host/device_kernel.h"

namespace fastattn::cuda {

template <class Problem>
KernelPlan plan_call(const DeviceKernel<Problem>& kernel, const Problem& asked, int threads, bool describe);
template <class Problem>
void run_call(const DeviceKernel<Problem>& kernel, const DeviceContext& device, const Problem& asked,
              Stream stream, Executor& executor);

}  // namespace fastattn::cuda

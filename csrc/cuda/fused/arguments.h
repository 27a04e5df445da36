// What the fused kernels are handed, by value. Every pointer is one of the device.
#pragma once

#include <fastattn/attention.h>

#include "cuda/simt/chunk.h"

namespace fastattn::cuda {

struct FlashArgs {
    AttentionProblem problem;
    Chunk region;  // rows and heads to compute; keys are found on the device
};

}  // namespace fastattn::cuda

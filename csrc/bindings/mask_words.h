// A Mask of fastattn.masks as it comes from Python, PyTorch's operators and XLA's programs: one array of
// int64.
#pragma once

#include <fastattn/attention.h>

namespace fastattn::bindings {

// The number of conditions; of each its kind, the sizes of its arrays (index 3, starts, spans, rank and size
// of lengths), its numbers in the order of MaskCondition, and the arrays. `words`: int64, or uint32 twice as
// many, as JAX may have no int64; in one piece. The conditions point into it.
void read_mask_words(const TensorView& words, AttentionParams& params);

}  // namespace fastattn::bindings

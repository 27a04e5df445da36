// How much work and traffic a call is, for explain() and for choosing a device.
#pragma once

#include <fastattn/attention.h>

namespace fastattn {

// 2 * (D + Dv) for each (head, row, key) within causal, window, lengths and lists of keys. Without lists in
// closed form per batch entry.
double count_flops(const AttentionProblem& problem);

// The same without causal, window and lengths, in a few operations; one key more than there is, as the
// rows of a call without keys are written all the same.
double flops_at_most(const AttentionProblem& problem) noexcept;

// Every element of the inputs and outputs once; what a zero stride repeats is counted once.
double count_bytes(const AttentionProblem& problem) noexcept;

// Of these, the outputs: out, lse and weights where asked for.
double count_result_bytes(const AttentionProblem& problem) noexcept;

}  // namespace fastattn

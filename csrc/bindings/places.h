// Where arguments lie in AttentionParams, and so of what kind they are: read by mha, by the handlers of
// fastattn.jax and, as the kinds of core/arguments.inc, by fastattn._arguments.
#pragma once

#include <optional>

#include <fastattn/attention.h>

#include "bindings/arguments.h"

namespace fastattn::bindings {

template <class T>
struct Place {
    Slot slot;
    T AttentionParams::* member;
};

inline constexpr Place<std::optional<double>> kOptionalNumbers[] = {
    {kScale, &AttentionParams::scale},
    {kSoftcap, &AttentionParams::softcap},
};
inline constexpr Place<double> kNumbers[] = {{kDropout, &AttentionParams::dropout}};
inline constexpr Place<bool> kFlags[] = {{kCausal, &AttentionParams::causal}};
// The inputs; a q_offset that is one number for all entries lies elsewhere.
inline constexpr Place<TensorView> kArrays[] = {
    {kQ, &AttentionParams::q},
    {kK, &AttentionParams::k},
    {kV, &AttentionParams::v},
    {kMask, &AttentionParams::mask},
    {kBias, &AttentionParams::bias},
    {kAlibiSlopes, &AttentionParams::alibi_slopes},
    {kSinks, &AttentionParams::sinks},
    {kQLens, &AttentionParams::q_lens},
    {kKvLens, &AttentionParams::kv_lens},
    {kQOffset, &AttentionParams::q_offsets},
    {kCuQ, &AttentionParams::cu_q},
    {kCuKv, &AttentionParams::cu_kv},
};

template <class Places>
constexpr bool holds(const Places& places, int slot) noexcept {
    for (const auto& place : places) {
        if (place.slot == slot) {
            return true;
        }
    }
    return false;
}

// nullptr: it is missing above, or among the ones that are read in a way of their own.
constexpr const char* kind_of(int slot) noexcept {
    switch (slot) {
        case kLayout:
        case kOutDtype:
        case kDevice:
        case kKernel: return "text";
        case kWindow: return "window";
        case kQOffset:
        case kSeed: return "integer";  // or an array of integers
        case kNeedDbias:
        case kReturnLse:
        case kReturnWeights: return "flag";
        case kDout:
        case kOut:
        case kLse:
        case kDlse: return "array";
        default: break;
    }
    if (holds(kArrays, slot)) {
        return "array";
    }
    if (holds(kOptionalNumbers, slot) || holds(kNumbers, slot)) {
        return "number";
    }
    return holds(kFlags, slot) ? "flag" : nullptr;
}

constexpr bool every_kind_is_known() noexcept {
    for (int slot = 0; slot < kSlots; ++slot) {
        if (kind_of(slot) == nullptr) {
            return false;
        }
    }
    return true;
}
static_assert(every_kind_is_known(), "an argument of core/arguments.inc has no place in bindings/places.h");

}  // namespace fastattn::bindings

// The entries of a call of cpu-reference, read once by plan().
#pragma once

#include <cstdint>

#include "core/entry_list.h"
#include "core/kernel.h"

namespace fastattn {

class ReferenceSchedule final : public Schedule {
public:
    explicit ReferenceSchedule(const AttentionProblem& p) : entries_(p) {
        for_each_entry(p, [&](std::int64_t, const Entry& entry) { entries_.add() = entry; });
    }
    const Entry& operator[](std::int64_t b) const { return entry_at(entries_.table(), b); }

    static const ReferenceSchedule& of(const Workspace& workspace) {
        return *static_cast<const ReferenceSchedule*>(workspace.schedule);
    }

private:
    EntryList<Entry> entries_;
};

}  // namespace fastattn

// The entries of a call of cpu-reference, read once by plan().
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/entry_list.h"
#include "core/kernel.h"

namespace fastattn {

class ReferenceSchedule final : public Schedule {
public:
    explicit ReferenceSchedule(const AttentionProblem& p) : entries_(p) {
        entries_.for_each(p, [&](std::int64_t, const Entry& entry) {
            entries_.add() = entry;
            most_rows_ = std::max(most_rows_, entry.q_size);
            most_keys_ = std::max(most_keys_, entry.kv_size);
        });
    }
    const Entry& operator[](std::int64_t b) const { return entry_at(entries_.table(), b); }

    // Of an entry, with padding.
    std::int64_t most_rows() const { return most_rows_; }
    std::int64_t most_keys() const { return most_keys_; }

    static const ReferenceSchedule& of(const Workspace& workspace) {
        return *static_cast<const ReferenceSchedule*>(workspace.schedule);
    }

private:
    EntryList<Entry> entries_;
    std::int64_t most_rows_ = 0, most_keys_ = 0;
};

}  // namespace fastattn

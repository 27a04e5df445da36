// The rows of an EntryTable, and the memory that they have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/entries.h"
#include "core/entry_table.h"

namespace fastattn {

template <class Planned>
class EntryList {
public:
    explicit EntryList(const AttentionProblem& p) : alike_(entries_alike(p)), batch_(p.batch) {
        if (!alike_) more_.reserve(static_cast<std::size_t>(batch_));
    }
    EntryList(const EntryList&) = delete;
    EntryList& operator=(const EntryList&) = delete;

    // f(b, entry) for each entry; see for_each_entry.
    template <class F>
    void for_each(const AttentionProblem& p, F&& f) {
        for_each_entry(p, lists_, f);
    }

    Planned& add() { return alike_ ? first_ : more_.emplace_back(); }
    std::span<Planned> rows() { return alike_ ? std::span(&first_, 1) : std::span(more_); }
    EntryTable<Planned> table() const {
        return {alike_ ? &first_ : more_.data(), alike_ ? 1 : batch_, alike_};
    }
    // Entries that a row stands for.
    std::int64_t times() const { return alike_ ? batch_ : 1; }

private:
    const bool alike_;
    const std::int64_t batch_;
    MaskLists lists_;
    Planned first_{};  // no second allocation where the entries are alike
    std::vector<Planned> more_;
};

}  // namespace fastattn

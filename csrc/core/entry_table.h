// What is planned for each entry of a call, and the way from an item of work to its entry. Plain structs: ISA
// files hold no containers.
#pragma once

#include <cstdint>

namespace fastattn {

// Items of a phase are numbered through all entries, in their order.
struct Phase {
    std::int64_t first = 0, count = 0;  // of an entry
};

// Where an item belongs.
template <class Planned>
struct Place {
    const Planned* entry;
    std::int64_t batch, item;  // item: of the entry
    std::int64_t shared;  // where the part of the entry begins
};

// Planned has phases, and `shared` and `shared_size`: where the entry's part of the shared workspace begins,
// and its bytes. Alike entries have one row, whose phases and shared part are those of the first of them.
template <class Planned>
struct EntryTable {
    const Planned* rows = nullptr;
    std::int64_t count = 0;  // rows
    bool alike = true;
};

namespace {

template <class Planned>
const Planned& entry_at(const EntryTable<Planned>& table, std::int64_t b) {
    return table.rows[table.alike ? 0 : b];
}

template <class Planned>
Place<Planned> place_of(const EntryTable<Planned>& table, Phase Planned::* phase, std::int64_t item) {
    const Planned* row = table.rows;
    if (table.alike) {
        const std::int64_t count = (row->*phase).count, b = item / count;
        return {row, b, item % count, row->shared + b * row->shared_size};
    }
    // The last entry that begins at the item or before it is the one that has items there.
    std::int64_t low = 0, high = table.count;
    while (high - low > 1) {
        const std::int64_t middle = low + (high - low) / 2;
        ((row[middle].*phase).first <= item ? low : high) = middle;
    }
    row += low;
    return {row, low, item - (row->*phase).first, row->shared};
}

}  // namespace

}  // namespace fastattn

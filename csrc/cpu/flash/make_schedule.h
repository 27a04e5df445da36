// The schedule of a forward call, with the memory of its rows.
#pragma once

#include <memory>
#include <string>

#include "core/entry_list.h"
#include "core/kernel.h"
#include "cpu/flash/schedule.h"

namespace fastattn::cpu {

class ForwardSchedule final : public Schedule {
public:
    ForwardSchedule(const AttentionProblem& problem, const TileShape& tile, int threads);
    const FlashSchedule& flash() const { return flash_; }
    // What explain() says of it.
    std::string describe(const AttentionProblem& problem, const TileShape& tile) const;

private:
    EntryList<FlashEntry> entries_;
    FlashSchedule flash_;
};

}  // namespace fastattn::cpu

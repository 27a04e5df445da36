// The schedule of a backward call, with the memory of its rows.
#pragma once

#include <string>

#include "core/entry_list.h"
#include "core/kernel.h"
#include "cpu/backward/schedule.h"

namespace fastattn::cpu {

class GradientSchedule final : public Schedule {
public:
    GradientSchedule(const BackwardProblem& problem, const TileShape& tile, int threads);
    const BackwardSchedule& backward() const { return backward_; }
    std::string describe(const TileShape& tile) const;

private:
    EntryList<BackwardEntry> entries_;
    BackwardSchedule backward_;
};

}  // namespace fastattn::cpu

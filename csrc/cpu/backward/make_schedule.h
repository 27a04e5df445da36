// The schedule of a backward call, with the memory of its rows.
#pragma once

#include <string>
#include <vector>

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
    void find_hulls(const AttentionProblem& p, const Entry& entry, BackwardPlan& plan);

    EntryList<BackwardEntry> entries_;
    std::vector<std::vector<KeyRange>> hulls_;
    BackwardSchedule backward_;
};

}  // namespace fastattn::cpu

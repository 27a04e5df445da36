// Masks by lists of keys: the conditions of a call (MaskCondition), checked, and what they make of an entry.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/entry.h"

namespace fastattn {

// Throws TypeError or ValueError; the values of lists and lengths are checked, too.
void check_conditions(const AttentionProblem& p);

// Whether all entries have the same conditions.
bool conditions_alike(const AttentionProblem& p) noexcept;

// The lists of the entries of a call. One condition of lists is used where it lies; else each row's list is
// found once, and rows that have the same share it.
class MaskLists {
public:
    // Of entry b, whose lengths are known. ValueError: a key that an exact condition selects is not there.
    RowLists of(const AttentionProblem& p, std::int64_t b, const Entry& entry) {
        return p.condition_count == 0 ? RowLists{} : find(p, b, entry);
    }

private:
    struct Made {
        std::vector<std::int64_t> index, starts;
        std::vector<Span> spans;
    };
    RowLists find(const AttentionProblem& p, std::int64_t b, const Entry& entry);
    RowLists make(const AttentionProblem& p, std::int64_t b, const Entry& entry);

    std::vector<std::unique_ptr<Made>> made_;
};

// Whether rows have few keys, far apart, and the heads of a group the same ones; as far as some rows tell.
struct Selected {
    bool sparse = false;
    std::int64_t most = 0;  // keys of a row, or more
};
Selected selected_keys(const AttentionProblem& p, const Entry& entry);

// Pairs of row and key that lengths, causal, window and lists leave, of all query heads.
double count_listed_pairs(const AttentionProblem& p);

}  // namespace fastattn

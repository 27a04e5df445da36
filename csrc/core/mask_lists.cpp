#include "core/mask_lists.h"

#include <algorithm>
#include <string>

#include "core/entries.h"
#include "core/problem_errors.h"
#include "core/problem_parts.h"

namespace fastattn {
namespace {

using Index = std::int64_t;
using Kind = MaskCondition::Kind;

constexpr Index kMostConditions = 8;

const Index* numbers(const TensorView& view) { return static_cast<const Index*>(view.data); }

Index ceil_div(Index a, Index b) { return a / b + (a % b != 0 ? 1 : 0); }

[[noreturn]] void fail(const std::string& what) { fail_value("mask", what); }

void check_numbers(const char* what, const TensorView& view, int rank) {
    if (view.dtype != DType::i64 || view.device.type != DeviceType::cpu)
        throw TypeError(std::string("mask: expected ") + what + " of int64 on the CPU, got " +
                        dtype_name(view.dtype) + " on " + device_string(view.device));
    if (view.rank != rank)
        fail(std::string("expected ") + what + " with " + std::to_string(rank) + " axes, got shape " +
             shape_string(view));
    const ViewCheck check = measure(view);
    if (check.fault != ViewFault::none) fail_view("mask", view, check.fault);
    Index stride = 1;
    for (int axis = rank - 1; axis >= 0 && rank < 3; --axis) {
        if (view.shape[axis] > 1 && view.strides[axis] != stride && !is_empty(view))
            fail(std::string("expected ") + what + " in one piece, got strides");
        stride *= view.shape[axis];
    }
}

// Entries, heads and rows that a list is for.
void check_index(const AttentionProblem& p, const MaskCondition& c) {
    check_numbers("the index of lists", c.index, 3);
    if (c.row_block < 1) fail_integer("mask", "row_block >= 1", c.row_block);
    const Index heads = c.kv_heads ? p.kv_heads : p.q_heads, rows = ceil_div(p.q_size, c.row_block);
    const Index wanted[] = {p.array_batch(), heads, rows};
    for (int axis = 0; axis < 3; ++axis) {
        if (c.index.shape[axis] == wanted[axis] || c.index.shape[axis] == 1) continue;
        const std::string of_rows = std::to_string(p.q_size) + " rows" +
                                    (c.row_block == 1 ? ""
                                                      : " (" + std::to_string(rows) + " blocks of " +
                                                            std::to_string(c.row_block) + ")");
        fail("expected a Mask for " + std::to_string(p.array_batch()) + " entries, " + std::to_string(heads) +
             (c.kv_heads ? " heads of k" : " heads") + " and " + of_rows +
             ", or 1 in place of any, got one for " + shape_string(c.index));
    }
    if (!p.packed() && (p.kv_size < c.least_keys || p.kv_size > c.most_keys))
        fail("expected Sk = " +
             (c.least_keys == c.most_keys
                  ? std::to_string(c.most_keys)
                  : std::to_string(c.least_keys) + " to " + std::to_string(c.most_keys)) +
             " as the Mask has, got " + std::to_string(p.kv_size));
}

void check_lists(const AttentionProblem& p, const MaskCondition& c) {
    check_index(p, c);
    check_numbers("the starts of lists", c.starts, 1);
    check_numbers("the intervals of lists", c.spans, 2);
    if (c.spans.shape[1] != 2) fail("expected intervals (n, 2), got shape " + shape_string(c.spans));
    const Index lists = c.starts.shape[0] - 1, spans = c.spans.shape[0];
    const Index* const starts = numbers(c.starts);
    const auto* const span = static_cast<const Span*>(c.spans.data);
    if (lists < 0 || starts[0] < 0) fail("expected starts (lists + 1,) from 0 on");
    for (Index n = 0; n < lists; ++n) {
        if (starts[n + 1] < starts[n] || starts[n + 1] > spans)
            fail("expected starts that do not decrease, up to " + std::to_string(spans) + ", got " +
                 std::to_string(starts[n + 1]) + " after list " + std::to_string(n));
        for (Index s = starts[n]; s < starts[n + 1]; ++s)
            if (span[s].begin >= span[s].end || (s > starts[n] && span[s].begin < span[s - 1].end))
                fail("expected ascending, disjoint intervals, got another order in list " +
                     std::to_string(n));
    }
    for (Index b = 0; b < c.index.shape[0]; ++b)
        for (Index h = 0; h < c.index.shape[1]; ++h)
            for (Index i = 0; i < c.index.shape[2]; ++i) {
                const Index n = numbers(
                    c.index)[b * c.index.strides[0] + h * c.index.strides[1] + i * c.index.strides[2]];
                if (n < 0 || n >= lists)
                    fail("expected a list below " + std::to_string(lists) + ", got " + std::to_string(n) +
                         " for row " + std::to_string(i));
            }
}

void check_condition(const AttentionProblem& p, const MaskCondition& c) {
    switch (c.kind) {
        case Kind::lists: return check_lists(p, c);
        case Kind::prefix:
            check_numbers("lengths of prefixes", c.lengths, c.lengths.rank == 0 ? 0 : 1);
            if (c.lengths.rank == 1 && c.lengths.shape[0] != 1 && c.lengths.shape[0] != p.batch)
                fail("expected lengths of prefixes for " + std::to_string(p.batch) + " entries, got " +
                     std::to_string(c.lengths.shape[0]));
            return;
        case Kind::chunks:
            if (c.size < 1) fail_integer("mask", "chunks of at least 1 position", c.size);
            return;
        case Kind::sinks_window:
            if (c.keep < 0 || c.left < 0) fail("expected keep and left >= 0");
            return;
    }
    fail("an unknown kind of condition");
}

RowLists lists_of(const AttentionProblem& p, const MaskCondition& c, Index b, const Entry& entry) {
    const auto stride = [&](int axis) { return c.index.shape[axis] == 1 ? 0 : c.index.strides[axis]; };
    RowLists lists;
    lists.index = numbers(c.index) + (p.packed() ? 0 : b * stride(0));
    lists.head = stride(1);
    lists.row = stride(2);
    lists.heads = c.kv_heads ? std::max<Index>(p.group, 1) : 1;
    lists.rows = c.row_block;
    lists.first_row = entry.first_row;
    lists.starts = numbers(c.starts);
    lists.spans = static_cast<const Span*>(c.spans.data);
    lists.shift = c.from_end ? entry.kv_len : 0;
    if (p.packed() && entry.kv_size > c.most_keys)
        fail("expected entries of at most " + std::to_string(c.most_keys) + " keys as the Mask has, got " +
             std::to_string(entry.kv_size) + " for entry " + std::to_string(b));
    if (!c.exact) return lists;
    const Index heads = lists.head == 0 ? std::min<Index>(p.q_heads, 1) : p.q_heads;
    for (Index h = 0; h < heads; h += lists.heads)
        for (Index i = 0; i < entry.q_size; ++i) {
            const RowSpans list = list_of(lists, h, i);
            if (list.count == 0) continue;
            const Index last = list.first[list.count - 1].end - c.size;
            if (last >= entry.kv_size)
                fail("row " + std::to_string(i) + " of entry " + std::to_string(b) + " selects key " +
                     std::to_string(last) + ", which has " + std::to_string(entry.kv_size) + " keys");
        }
    return lists;
}

// f(interval) for what a condition on positions leaves a row, in order.
template <class F>
void for_spans_at(const MaskCondition& c, Index b, Index p, F f) {
    const Index past = saturating_add(p, 1);
    switch (c.kind) {
        case Kind::prefix: {
            const Index length = c.lengths.rank == 0 || c.lengths.shape[0] == 1
                                     ? *numbers(c.lengths)
                                     : numbers(c.lengths)[b * c.lengths.strides[0]];
            return f(Span{0, std::max(length, past)});
        }
        case Kind::chunks: {
            const Index rest = p % c.size, begin = saturating_add(p, -(rest < 0 ? rest + c.size : rest));
            return f(Span{begin, saturating_add(begin, c.size)});
        }
        case Kind::sinks_window: {
            const Index begin = std::max<Index>(saturating_add(p, -c.left), 0);
            if (past <= begin) return f(Span{0, c.keep});
            if (begin <= c.keep) return f(Span{0, std::max(c.keep, past)});
            f(Span{0, c.keep});
            return f(Span{begin, past});
        }
        default: return;
    }
}

// Adds what two intervals share; to the last one where they touch.
void add_common(std::vector<Span>& to, const Span& a, const Span& b) {
    const Span both{std::max(a.begin, b.begin), std::min(a.end, b.end)};
    if (both.begin >= both.end) return;
    if (!to.empty() && to.back().end == both.begin) {
        to.back().end = both.end;
    } else {
        to.push_back(both);
    }
}

}  // namespace

void check_conditions(const AttentionProblem& p) {
    if (p.condition_count > kMostConditions) fail_integer("mask", "at most 8 conditions", p.condition_count);
    for (Index n = 0; n < p.condition_count; ++n) check_condition(p, p.conditions[n]);
}

bool conditions_alike(const AttentionProblem& p) noexcept {
    for (Index n = 0; n < p.condition_count; ++n) {
        const MaskCondition& c = p.conditions[n];
        if (c.kind == Kind::lists && c.index.shape[0] > 1) return false;
        if (c.kind == Kind::prefix && c.lengths.rank == 1 && c.lengths.shape[0] > 1) return false;
    }
    return true;
}

RowLists MaskLists::find(const AttentionProblem& p, Index b, const Entry& entry) {
    if (p.condition_count == 1 && p.conditions->kind == Kind::lists)
        return lists_of(p, *p.conditions, b, entry);
    return make(p, b, entry);
}

RowLists MaskLists::make(const AttentionProblem& p, Index b, const Entry& entry) {
    const MaskCondition* const begin = p.conditions;
    const MaskCondition* const end = begin + p.condition_count;
    std::vector<RowLists> given;
    Index heads = 1;
    for (const MaskCondition* c = begin; c < end; ++c) {
        given.push_back(c->kind == Kind::lists ? lists_of(p, *c, b, entry) : RowLists{});
        if (given.back().head != 0) heads = p.q_heads;
    }
    made_.push_back(std::make_unique<Made>());
    Made& made = *made_.back();
    made.starts.push_back(0);
    made.index.reserve(static_cast<std::size_t>(heads * entry.q_len));
    std::vector<Span> row, next;
    for (Index h = 0; h < heads; ++h) {
        for (Index i = 0; i < entry.q_len; ++i) {
            row.assign(1, Span{0, entry.kv_len});
            for (const MaskCondition* c = begin; c < end; ++c) {
                next.clear();
                if (c->kind == Kind::lists) {
                    const RowSpans list = list_of(given[static_cast<std::size_t>(c - begin)], h, i);
                    for (const Span& mine : row) {
                        for (Index n = span_after(list, mine.begin); n < list.count; ++n) {
                            const Span other{saturating_add(list.first[n].begin, list.shift),
                                             saturating_add(list.first[n].end, list.shift)};
                            if (other.begin >= mine.end) break;
                            add_common(next, mine, other);
                        }
                    }
                } else {
                    // At most two intervals: each of the row's with both.
                    for (const Span& mine : row)
                        for_spans_at(*c, b, saturating_add(entry.offset, i),
                                     [&](const Span& other) { add_common(next, mine, other); });
                }
                row.swap(next);
            }
            const auto last =
                static_cast<std::size_t>(made.starts.size() >= 2 ? *(made.starts.end() - 2) : 0);
            const bool same =
                made.starts.size() >= 2 && made.spans.size() - last == row.size() &&
                std::equal(row.begin(), row.end(), made.spans.begin() + static_cast<Index>(last),
                           [](const Span& x, const Span& y) { return x.begin == y.begin && x.end == y.end; });
            if (!same) {
                made.spans.insert(made.spans.end(), row.begin(), row.end());
                made.starts.push_back(static_cast<Index>(made.spans.size()));
            }
            made.index.push_back(static_cast<Index>(made.starts.size()) - 2);
        }
    }
    RowLists lists;
    lists.index = made.index.data();
    lists.head = heads == 1 ? 0 : entry.q_len;
    lists.row = 1;
    lists.starts = made.starts.data();
    lists.spans = made.spans.data();
    static constexpr Index kNothing = 0;
    if (lists.index == nullptr) lists.index = &kNothing;  // of no rows
    return lists;
}

namespace {

// Keys of a row within its range.
Index count_keys(const KeyRange& range, const RowSpans& list) {
    if (list.first == nullptr) return range.end - range.begin;
    Index keys = 0;
    for (Index n = 0; n < list.count; ++n)
        keys += std::min(list.first[n].end + list.shift, range.end) -
                std::max(list.first[n].begin + list.shift, range.begin);
    return keys;
}

}  // namespace

Selected selected_keys(const AttentionProblem& p, const Entry& entry) {
    // Below so many keys in a row on average gathering is worth it, where it leaves out as many of all.
    constexpr Index kRun = 24, kShare = 4;
    constexpr Index kSample = 32, kExact = 256;
    Selected found;
    const RowLists& lists = entry.lists;
    const bool by_group = lists.head == 0 || lists.heads == p.group;
    const Index rows = p.kv_heads * entry.q_len;
    if (lists.index == nullptr || !by_group || rows == 0) return found;
    const Index step = rows <= kExact ? 1 : rows / kSample;
    double keys = 0, runs = 0, all = 0;
    for (Index n = 0; n < rows; n += step) {
        RowSpans list;
        const KeyRange range = row_keys(p, entry, n / entry.q_len * p.group, n % entry.q_len, list);
        const Index own = count_keys(range, list);
        found.most = std::max(found.most, own);
        keys += static_cast<double>(own);
        runs += static_cast<double>(list.first == nullptr ? 1 : list.count);
        all += static_cast<double>(range.end - range.begin);
    }
    found.sparse = keys < kRun * runs && keys * kShare < all;
    if (step != 1) found.most = entry.kv_len;
    return found;
}

double count_listed_pairs(const AttentionProblem& p) {
    MaskLists lists;
    double pairs = 0.0;
    const double times = p.batch > 1 && entries_alike(p) ? static_cast<double>(p.batch) : 1.0;
    if (p.batch == 0) return 0.0;
    for_each_entry(p, lists, [&](Index, const Entry& entry) {
        const Index heads = entry.lists.head == 0 ? std::min<Index>(p.q_heads, 1) : p.q_heads;
        const double each =
            times * static_cast<double>(p.q_heads) / static_cast<double>(std::max<Index>(heads, 1));
        for (Index h = 0; h < heads; ++h)
            for (Index i = 0; i < entry.q_len; ++i) {
                RowSpans list;
                const KeyRange range = row_keys(p, entry, h, i, list);
                pairs += each * static_cast<double>(count_keys(range, list));
            }
    });
    return pairs;
}

}  // namespace fastattn

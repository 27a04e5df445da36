#include "cpu/flash/schedule.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "core/mask_lists.h"
#include "cpu/flash/make_schedule.h"
#include "cpu/flash/workspace.h"

namespace fastattn::cpu {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Bytes of packed q and accumulators that one item may hold. They are read once per block of keys, a few KB
// for each tile, so they need no place in L2; k and v of a block, read for every tile, do.
constexpr std::int64_t kItemBytes = 1280 * 1024, kLeastItemBytes = 320 * 1024;
// ... and of all threads together: a workspace that is not too large is kept for the next call.
constexpr std::int64_t kAllItemBytes = std::int64_t{40} << 20;
// An item packs its own k and v; below so many rows that would cost more than a few percent.
constexpr std::int64_t kMinRows = 96;
// Packed k and v of kKeyBlock keys; above it blocks are half as long.
constexpr std::int64_t kBlockBytes = 256 * 1024;

// Few rows and many keys: split the keys, so that the work is parallel and k and v are packed for all rows at
// once.
std::int64_t split_length(const AttentionProblem& p, std::int64_t keys, const FlashPlan& plan) {
    // More rows, fewer splits: what partial results take stays the same.
    const std::int64_t most_splits =
        std::max<std::int64_t>(kMostSplits * 16 / std::max<std::int64_t>(plan.rows, 16), 1);
    std::int64_t length = plan.decode ? kDecodeSplitKeys : kSplitKeys;
    length = std::max(length, round_up(ceil_div(keys, most_splits), kKeyBlock));
    const bool pays = p.weights.data == nullptr && plan.rows <= kSplitRows && keys > length;
    return pays ? length : keys;
}

// Packed k and v of a block stay in L2, beside the q and O that stream through it.
std::int64_t prefill_key_block(const AttentionProblem& p, const TileShape& tile) {
    const std::int64_t key_bytes = (p.head_dim + p.value_dim) * tile.unit_bytes / tile.scalars;
    return kKeyBlock * key_bytes > kBlockBytes ? kKeyBlock / 2 : kKeyBlock;
}

// Rows (Sq * G) that go to decode at most. Beyond 8 it pays where k and v come from memory: in caches packing
// them for prefill's larger tiles is as good from 16 rows on.
std::int64_t most_decode_rows(const AttentionProblem& p, std::int64_t keys) {
    constexpr std::int64_t kFewKeys = 512, kLargeHead = std::int64_t{12} << 20;
    const auto size = [](DType dtype) { return static_cast<std::int64_t>(item_size(dtype)); };
    const std::int64_t key_bytes = p.head_dim * size(p.k_dtype) + p.value_dim * size(p.v_dtype);
    if (keys >= ceil_div(kLargeHead, std::max<std::int64_t>(key_bytes, 1))) return 32;
    return keys >= kFewKeys ? 16 : 8;
}

// Where the heads of a key lie side by side, one item reads all of them: memory is fast only when it is
// read in the order of the addresses. Fewer where there would be too few items.
std::int64_t decode_heads(const AttentionProblem& p, const FlashPlan& plan, int threads) {
    if (!heads_side_by_side(p.k) || !heads_side_by_side(p.v)) return 1;
    const std::int64_t most =
        std::max<std::int64_t>(kDecodeItemRows / std::max<std::int64_t>(plan.rows, 1), 1);
    const std::int64_t all = std::max<std::int64_t>(p.kv_heads, 1);
    std::int64_t heads = ceil_div(all, ceil_div(all, most));
    while (heads > 1 && p.batch * ceil_div(p.kv_heads, heads) * plan.key_splits < std::int64_t{4} * threads) {
        heads = ceil_div(heads, 2);
    }
    return heads;
}

}  // namespace

FlashPlan plan_flash(const AttentionProblem& p, const Entry& entry, const TileShape& tile, int threads) {
    FlashPlan plan;
    const bool may_select = entry.lists.index != nullptr && p.weights.data == nullptr && p.dropout == 0 &&
                            p.alibi_slopes.data == nullptr && p.bias.data == nullptr &&
                            p.mask.data == nullptr;
    const Selected selected = may_select ? selected_keys(p, entry) : Selected{};
    plan.selects = selected.sparse;
    const std::int64_t keys = plan.selects ? selected.most : entry.kv_len;
    plan.rows = entry.q_len * p.group;
    plan.decode = plan.selects || (plan.rows <= most_decode_rows(p, keys) && p.weights.data == nullptr);
    plan.gathers = plan.decode && (plan.selects || p.k.dim != 1 || p.v.dim != 1 || !decodes_in_pages(p.k) ||
                                   !decodes_in_pages(p.v));
    plan.q_stride = round_up(ceil_div(p.head_dim, tile.scalars), tile.width);
    plan.o_stride = round_up(p.value_dim, tile.width);
    plan.partial_stride = plan.o_stride + kPartialHeader;
    plan.key_block = plan.decode ? kDecodeBlock
                                 : std::min(prefill_key_block(p, tile),
                                            round_up(std::max<std::int64_t>(keys, 1), tile.nr));

    const std::int64_t heads = p.batch * p.kv_heads;
    plan.split_keys = split_length(p, keys, plan);
    plan.key_splits = plan.split_keys > 0 ? ceil_div(keys, plan.split_keys) : 1;
    const std::int64_t section = plan.decode ? kDecodeSectionKeys : kSectionKeys;
    if (tile.unit_bytes == 4 && plan.split_keys > section) plan.section_keys = section;
    if (plan.selects) {
        plan.rows_per_item = std::max<std::int64_t>(p.group, 1);
        plan.row_items = entry.q_len;
    } else if (plan.decode) {
        plan.heads_per_item = decode_heads(p, plan, threads);
        plan.rows_per_item = std::max<std::int64_t>(plan.rows, 1);
        plan.row_items = plan.rows > 0 ? 1 : 0;
    } else {
        const std::int64_t bytes = std::clamp(kAllItemBytes / threads, kLeastItemBytes, kItemBytes);
        const std::int64_t row_bytes = (plan.q_stride + plan.o_stride) * tile.unit_bytes;
        const std::int64_t most = std::max<std::int64_t>(bytes / row_bytes, tile.mr);
        std::int64_t blocks = ceil_div(plan.rows, most);
        const std::int64_t wanted =
            ceil_div(std::int64_t{8} * threads, std::max<std::int64_t>(heads * plan.key_splits, 1));
        blocks = std::max(blocks, std::min(wanted, plan.rows / kMinRows));
        blocks = std::max<std::int64_t>(blocks, 1);
        plan.rows_per_item = std::max<std::int64_t>(round_up(ceil_div(plan.rows, blocks), tile.mr), tile.mr);
        plan.row_items = ceil_div(plan.rows, plan.rows_per_item);
    }
    plan.head_items = ceil_div(p.kv_heads, plan.heads_per_item);
    plan.items = plan.head_items * plan.row_items * plan.key_splits;
    if (plan.key_splits > 1) {
        plan.merge_items = p.kv_heads * plan.rows;
        plan.shared_bytes =
            static_cast<std::size_t>(plan.merge_items * plan.key_splits * plan.partial_stride) *
            static_cast<std::size_t>(tile.unit_bytes);
    }
    plan.per_thread_bytes = workspace_bytes(p, plan, tile);
    return plan;
}

ForwardSchedule::ForwardSchedule(const AttentionProblem& p, const TileShape& tile, int threads)
    : entries_(p) {
    const std::int64_t times = entries_.times();
    FlashSchedule& all = flash_;
    std::int64_t groups = 0;
    entries_.for_each(p, [&](std::int64_t, const Entry& lengths) {
        FlashEntry& entry = entries_.add();
        entry.lengths = lengths;
        const FlashPlan& plan = entry.plan = plan_flash(p, lengths, tile, threads);
        entry.items = {all.items, plan.items};
        entry.merges = {all.merge_items, plan.merge_items};
        entry.shared = static_cast<std::int64_t>(all.shared_bytes);
        entry.shared_size = static_cast<std::int64_t>((plan.shared_bytes + 63) / 64 * 64);
        all.items += times * plan.items;
        all.merge_items += times * plan.merge_items;
        all.shared_bytes += static_cast<std::size_t>(times * entry.shared_size);
        all.per_thread_bytes = std::max(all.per_thread_bytes, plan.per_thread_bytes);
        groups += plan.decode ? 0 : times * plan.head_items;
    });
    all.entries = entries_.table();
    all.groups = std::max<std::int64_t>(groups, 1);
}

namespace {

std::string describe_plan(const AttentionProblem& p, const FlashPlan& plan, const TileShape& tile) {
    std::string text = plan.decode ? "decode" : "prefill";
    text += ", tile " + std::to_string(tile.mr) + "x" + std::to_string(tile.nr);
    text += ", key block " + std::to_string(plan.key_block);
    text += ", rows per item " + std::to_string(plan.rows_per_item);
    if (plan.selects) text += ", keys gathered by lists";
    if (plan.key_splits > 1) text += ", key splits " + std::to_string(plan.key_splits);
    if (p.weights.data != nullptr) text += ", second pass for the weights";
    return text;
}

}  // namespace

std::string ForwardSchedule::describe(const AttentionProblem& p, const TileShape& tile) const {
    constexpr std::size_t kMostKinds = 8;
    std::vector<std::pair<std::string, std::int64_t>> kinds;
    std::int64_t others = 0;
    for (std::int64_t row = 0; row < flash_.entries.count; ++row) {
        std::string text = describe_plan(p, flash_.entries.rows[row].plan, tile);
        const auto same = [&](const auto& kind) { return kind.first == text; };
        const auto found = std::find_if(kinds.begin(), kinds.end(), same);
        if (found == kinds.end() && kinds.size() == kMostKinds) {
            ++others;
        } else if (found == kinds.end()) {
            kinds.emplace_back(std::move(text), 1);
        } else {
            ++found->second;
        }
    }
    if (kinds.size() == 1 && others == 0) return kinds[0].first;
    std::string all;
    for (const auto& [text, entries] : kinds)
        all += (all.empty() ? "" : "; ") + std::to_string(entries) +
               (entries == 1 ? " entry: " : " entries: ") + text;
    if (others > 0) all += "; " + std::to_string(others) + " others";
    return all;
}

}  // namespace fastattn::cpu

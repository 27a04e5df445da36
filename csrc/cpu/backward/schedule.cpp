#include "cpu/backward/schedule.h"

#include <algorithm>
#include <numeric>

#include "core/broadcast.h"
#include "cpu/backward/make_schedule.h"
#include "cpu/flash/workspace.h"

namespace fastattn::cpu {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Rows of weights are broadcast column by column: a stride that is no power of two spreads them over the
// cache.
constexpr std::int64_t kPadding = 16;
// Partial sums of dq that may lie side by side; beyond it a head is one item, however many threads there are.
constexpr std::int64_t kMostPartialBytes = std::int64_t{512} << 20;

}  // namespace

BackwardPlan plan_backward(const BackwardProblem& problem, const Entry& entry, const TileShape& tile,
                           int threads, double heads) {
    const AttentionProblem& p = problem.forward;
    BackwardPlan plan;
    const std::int64_t key_unit = std::lcm(tile.mr, tile.nr), row_unit = std::lcm(tile.mr, tile.scalars);
    // Blocks of about the same size: they are what threads share.
    const std::int64_t keys = std::max<std::int64_t>(entry.kv_len, 1);
    plan.key_block = round_up(ceil_div(keys, ceil_div(keys, round_up(kBackwardKeys, key_unit))), key_unit);
    plan.row_block = std::min(round_up(kBackwardRows, row_unit),
                              round_up(std::max<std::int64_t>(entry.q_len, 1), row_unit));
    plan.key_blocks = ceil_div(entry.kv_len, plan.key_block);
    plan.row_blocks = ceil_div(entry.q_len, plan.row_block);
    plan.sections = tile.unit_bytes == 4 && p.group * plan.row_blocks > kSectionBlocks;
    plan.chunk_blocks = std::max<std::int64_t>(1, ceil_div(plan.key_blocks, kMostChunks));
    plan.chunks = std::max<std::int64_t>(1, ceil_div(plan.key_blocks, plan.chunk_blocks));
    plan.dq_sections = tile.unit_bytes == 4 && plan.chunk_blocks > kSectionBlocks;
    plan.q_units = round_up(ceil_div(p.head_dim, tile.scalars), tile.width);
    plan.v_units = round_up(ceil_div(p.value_dim, tile.scalars), tile.width);
    plan.d_stride = round_up(p.head_dim, tile.width);
    plan.v_stride = round_up(p.value_dim, tile.width);
    plan.dq_size = p.group * entry.q_len * plan.d_stride;
    plan.weight_stride = plan.key_block + kPadding;
    plan.ds_stride = plan.key_block / tile.scalars + kPadding;

    const std::int64_t partial_bytes = p.kv_heads * plan.chunks * plan.dq_size * tile.unit_bytes;
    plan.split = plan.chunks > 1 && heads < 4.0 * threads && p.batch * partial_bytes <= kMostPartialBytes;
    plan.items = plan.split ? p.kv_heads * plan.chunks : p.kv_heads;
    plan.merge_items = plan.split ? p.q_heads * plan.row_blocks : 0;
    plan.partial_bytes = plan.split ? partial_bytes : 0;
    return plan;
}

GradientSchedule::GradientSchedule(const BackwardProblem& problem, const TileShape& tile, int threads)
    : entries_(problem.forward) {
    const AttentionProblem& p = problem.forward;
    BackwardSchedule& all = backward_;
    all.head_items = problem.dalibi.data != nullptr || problem.dsinks.data != nullptr ? p.q_heads : 0;
    entries_.for_each(p, [&](std::int64_t, const Entry& lengths) { entries_.add().lengths = lengths; });
    const std::int64_t times = entries_.times();
    const auto work_of = [](const Entry& entry) {
        return static_cast<double>(std::max<std::int64_t>(entry.q_len, 1)) *
               static_cast<double>(std::max<std::int64_t>(entry.kv_len, 1));
    };
    double work = 0;
    for (const BackwardEntry& entry : entries_.rows())
        work += static_cast<double>(times) * work_of(entry.lengths);
    const auto plan_of = [&](const Entry& entry, double of_work) {
        // So many heads of this size are as much work as all there is.
        return plan_backward(problem, entry, tile, threads, work / of_work * static_cast<double>(p.kv_heads));
    };
    // Packed entries have no blocks together.
    const Entry arrays = p.packed() ? Entry{} : Entry{p.q_size, p.kv_size, 0};
    BackwardPlan& whole = all.whole = plan_of(arrays, work);
    const ScoreOperand& dbias = problem.dbias;
    const AxisSizes bias = own_sizes(dbias, p);
    // Blocks of dbias, those of dS in each; both of one entry where entries are packed.
    const auto bias_items = [&](std::int64_t row_blocks, std::int64_t key_blocks) {
        return bias.batch * bias.head * (dbias.query == 0 ? 1 : row_blocks) *
               (dbias.key == 0 ? 1 : key_blocks);
    };
    const auto plan_bias = [&](BackwardPlan& plan) {
        const std::int64_t items = bias_items(plan.row_blocks, plan.key_blocks);
        // No axis is empty where there is an item.
        const std::int64_t blocks = p.array_batch() * p.q_heads * plan.row_blocks * plan.key_blocks;
        plan.bias_sections = tile.unit_bytes == 4 && items > 0 && blocks / items > kBiasSectionBlocks;
        return plan.row_blocks * plan.key_blocks == 0 && p.packed() ? 0 : items;
    };
    all.bias_items = plan_bias(whole);

    const auto rows = static_cast<std::size_t>(p.array_batch() * p.q_heads * p.q_size);
    auto take = [&](std::size_t bytes) {
        const std::size_t start = all.shared_bytes;
        all.shared_bytes += (bytes + 63) / 64 * 64;
        return start;
    };
    // A shorter entry may have more chunks than the whole.
    all.most_chunks = p.has_kv_lens || p.packed() ? kMostChunks : whole.chunks;
    all.states = take(rows * 3 * static_cast<std::size_t>(tile.unit_bytes));
    all.slopes = take(problem.dalibi.data == nullptr
                          ? 0
                          : rows * static_cast<std::size_t>(all.most_chunks) * sizeof(double));
    all.bias_sums =
        take(p.packed() ? static_cast<std::size_t>(p.batch * bias.head) * sizeof(double) : std::size_t{0});
    all.per_thread_bytes = backward_offsets(problem, whole, tile).total;

    bool split = false;
    for (BackwardEntry& entry : entries_.rows()) {
        const Entry& lengths = entry.lengths;
        entry.plan = plan_of(lengths, work_of(lengths));
        find_hulls(p, lengths, entry.plan);
        const BackwardPlan& plan = entry.plan;
        entry.prepares = {all.prepare_items, ceil_div(p.q_heads * lengths.q_size, kRowsPerPreparation)};
        entry.items = {all.items, plan.items};
        entry.merges = {all.merge_items, plan.merge_items};
        entry.shared_size = (plan.partial_bytes + 63) / 64 * 64;
        entry.shared = static_cast<std::int64_t>(take(static_cast<std::size_t>(times * entry.shared_size)));
        all.prepare_items += times * entry.prepares.count;
        if (p.packed() && dbias.data != nullptr) {
            // As of the arrays of the entry alone.
            entry.bias_plan = plan_of({lengths.q_size, lengths.kv_size, 0}, work);
            entry.biases = {all.bias_items, plan_bias(entry.bias_plan)};
            all.bias_items += times * entry.biases.count;
            all.per_thread_bytes =
                std::max(all.per_thread_bytes, backward_offsets(problem, entry.bias_plan, tile).total);
        }
        all.items += times * plan.items;
        all.merge_items += times * plan.merge_items;
        all.per_thread_bytes = std::max(all.per_thread_bytes, backward_offsets(problem, plan, tile).total);
        split = split || plan.split;
    }
    all.entries = entries_.table();
    all.packed = p.packed();
    all.groups = split ? 1 : std::max<std::int64_t>(all.items, 1);
}

void GradientSchedule::find_hulls(const AttentionProblem& p, const Entry& entry, BackwardPlan& plan) {
    if (entry.lists.index == nullptr || plan.row_blocks == 0) return;
    const std::int64_t heads = entry.lists.head == 0 ? 1 : p.q_heads;
    std::vector<KeyRange>& hulls = hulls_.emplace_back(static_cast<std::size_t>(heads * plan.row_blocks));
    for (std::int64_t h = 0; h < heads; ++h) {
        for (std::int64_t i = 0; i < entry.q_len; ++i) {
            RowSpans list;
            const KeyRange keys = row_keys(p, entry, h, i, list);
            KeyRange& hull = hulls[static_cast<std::size_t>(h * plan.row_blocks + i / plan.row_block)];
            if (keys.begin >= keys.end) continue;
            if (hull.begin >= hull.end) {
                hull = keys;
            } else {
                hull.begin = std::min(hull.begin, keys.begin);
                hull.end = std::max(hull.end, keys.end);
            }
        }
    }
    plan.hulls = hulls.data();
    plan.hull_head = heads == 1 ? 0 : plan.row_blocks;
}

std::string GradientSchedule::describe(const TileShape& tile) const {
    const EntryTable<BackwardEntry>& entries = backward_.entries;
    const bool packed = backward_.packed && entries.count > 0;
    const BackwardPlan& plan = packed ? entries.rows[0].plan : backward_.whole;
    std::string text = "backward, tile " + std::to_string(tile.mr) + "x" + std::to_string(tile.nr) +
                       ", block " + std::to_string(plan.row_block) + "x" + std::to_string(plan.key_block);
    if (plan.split) text += ", key chunks " + std::to_string(plan.chunks);
    return text;
}

BackwardOffsets backward_offsets(const BackwardProblem& problem, const BackwardPlan& plan,
                                 const TileShape& t) {
    const AttentionProblem& p = problem.forward;
    std::size_t at = 0;
    auto take = [&](std::int64_t bytes) {
        const std::size_t start = at;
        at += (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
        return start;
    };
    const std::int64_t u = t.unit_bytes;
    const std::int64_t d_panels = ceil_div(p.head_dim, t.nr) * t.nr,
                       v_panels = ceil_div(p.value_dim, t.nr) * t.nr;
    const std::int64_t keys = plan.key_block, rows = plan.row_block;
    BackwardOffsets f{};
    f.k_panels = take(keys * ceil_div(p.head_dim, t.scalars) * u);
    f.v_panels = take(keys * ceil_div(p.value_dim, t.scalars) * u);
    f.k_rows = take(d_panels * (keys / t.scalars) * u);
    f.q_rows = take(rows * plan.q_units * u);
    f.dout_rows = take(rows * plan.v_units * u);
    f.q_panels = take(d_panels * (rows / t.scalars) * u);
    f.dout_panels = take(v_panels * (rows / t.scalars) * u);
    f.weights = take(rows / t.scalars * plan.weight_stride * u);
    f.ds = take(rows / t.scalars * plan.weight_stride * u);
    f.ds_rows = t.scalars == 1 ? f.ds : take(rows * plan.ds_stride * u);
    const std::int64_t tile = t.mr * t.nr * u;
    f.x = take(tile);
    f.p = take(tile);
    f.kept = take(tile);
    f.dp = take(tile);
    f.cap = take(tile);
    f.dk = take(keys * plan.d_stride * u);
    f.dv = take(keys * plan.v_stride * u);
    constexpr auto total = static_cast<std::int64_t>(sizeof(double));
    if (plan.sections) f.totals = take(keys * (plan.d_stride + plan.v_stride) * total);
    if (plan.dq_sections) f.dq_total = take(plan.dq_size * total);
    if (plan.bias_sections) f.dbias_total = take(rows * keys * total);
    const std::int64_t dq = plan.split ? 0 : plan.dq_size * u;
    f.dq = take(dq);
    f.dq_chunk = take(plan.chunks > 1 ? dq : 0);
    f.dbias = take(problem.dbias.data == nullptr ? 0 : rows * keys * u);
    f.states = take(3 * rows * u);
    f.info = take(rows * static_cast<std::int64_t>(sizeof(RowInfo)));
    f.tiles = take(rows / t.mr * static_cast<std::int64_t>(2 * sizeof(std::int64_t)));
    f.bad_k = take(keys);
    f.bad_q = take(rows);
    f.bad_dout = take(rows);
    f.total = at;
    return f;
}

}  // namespace fastattn::cpu

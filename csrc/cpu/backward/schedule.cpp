#include "cpu/backward/schedule.h"

#include <algorithm>
#include <numeric>

#include "core/broadcast.h"
#include "cpu/flash/workspace.h"

namespace fastattn::cpu {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Rows of weights are broadcast column by column: a stride that is no power of two spreads them over the cache.
constexpr std::int64_t kPadding = 16;
// Partial sums of dq that may lie side by side; beyond it a head is one item, however many threads there are.
constexpr std::int64_t kMostPartialBytes = std::int64_t{512} << 20;

}  // namespace

BackwardPlan plan_backward(const BackwardProblem& problem, const TileShape& tile, int threads) {
    const AttentionProblem& p = problem.forward;
    BackwardPlan plan;
    const std::int64_t key_unit = std::lcm(tile.mr, tile.nr), row_unit = std::lcm(tile.mr, tile.scalars);
    // Blocks of about the same size: they are what threads share.
    const std::int64_t keys = std::max<std::int64_t>(p.kv_size, 1);
    plan.key_block = round_up(ceil_div(keys, ceil_div(keys, round_up(kBackwardKeys, key_unit))), key_unit);
    plan.row_block =
        std::min(round_up(kBackwardRows, row_unit), round_up(std::max<std::int64_t>(p.q_size, 1), row_unit));
    plan.key_blocks = ceil_div(p.kv_size, plan.key_block);
    plan.row_blocks = ceil_div(p.q_size, plan.row_block);
    plan.sections = tile.unit_bytes == 4 && p.group * plan.row_blocks > kSectionBlocks;
    plan.chunk_blocks = std::max<std::int64_t>(1, ceil_div(plan.key_blocks, kMostChunks));
    plan.chunks = std::max<std::int64_t>(1, ceil_div(plan.key_blocks, plan.chunk_blocks));
    plan.dq_sections = tile.unit_bytes == 4 && plan.chunk_blocks > kSectionBlocks;
    plan.q_units = round_up(ceil_div(p.head_dim, tile.scalars), tile.width);
    plan.v_units = round_up(ceil_div(p.value_dim, tile.scalars), tile.width);
    plan.d_stride = round_up(p.head_dim, tile.width);
    plan.v_stride = round_up(p.value_dim, tile.width);
    plan.weight_stride = plan.key_block + kPadding;
    plan.ds_stride = plan.key_block / tile.scalars + kPadding;

    const std::int64_t heads = p.batch * p.kv_heads, head_rows = p.group * p.q_size;
    const std::int64_t partial_bytes = heads * plan.chunks * head_rows * plan.d_stride * tile.unit_bytes;
    plan.split = plan.chunks > 1 && heads < std::int64_t{4} * threads && partial_bytes <= kMostPartialBytes;
    plan.items = plan.split ? heads * plan.chunks : heads;
    plan.merge_items = plan.split ? p.batch * p.q_heads * plan.row_blocks : 0;
    plan.prepare_items = p.batch * ceil_div(p.q_heads * p.q_size, kRowsPerPreparation);
    plan.head_items = problem.dalibi.data != nullptr || problem.dsinks.data != nullptr ? p.q_heads : 0;
    const AxisSizes bias = own_sizes(problem.dbias, p);
    plan.bias_items = bias.batch * bias.head * (problem.dbias.query == 0 ? 1 : plan.row_blocks) *
                      (problem.dbias.key == 0 ? 1 : plan.key_blocks);
    // No axis is empty where there is an item.
    const std::int64_t blocks = p.batch * p.q_heads * plan.row_blocks * plan.key_blocks;
    plan.bias_sections =
        tile.unit_bytes == 4 && plan.bias_items > 0 && blocks / plan.bias_items > kBiasSectionBlocks;

    const auto rows = static_cast<std::size_t>(p.batch * p.q_heads * p.q_size);
    const auto unit = static_cast<std::size_t>(tile.unit_bytes);
    std::size_t at = 0;
    auto take = [&](std::size_t bytes) {
        const std::size_t start = at;
        at += (bytes + 63) / 64 * 64;
        return start;
    };
    plan.states = take(rows * 3 * unit);
    plan.slopes = take(
        problem.dalibi.data == nullptr ? 0 : rows * static_cast<std::size_t>(plan.chunks) * sizeof(double));
    plan.partials = take(plan.split ? static_cast<std::size_t>(partial_bytes) : 0);
    plan.shared_bytes = at;
    plan.per_thread_bytes = backward_offsets(problem, plan, tile).total;
    return plan;
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
    const std::int64_t dq_size = p.group * p.q_size * plan.d_stride;
    if (plan.sections) f.totals = take(keys * (plan.d_stride + plan.v_stride) * total);
    if (plan.dq_sections) f.dq_total = take(dq_size * total);
    if (plan.bias_sections) f.dbias_total = take(rows * keys * total);
    const std::int64_t dq = plan.split ? 0 : dq_size * u;
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

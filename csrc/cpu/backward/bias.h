// dbias: a pass of its own, whose items are blocks of the bias. Axes that the bias broadcasts are summed
// inside of an item.
#pragma once

#include "core/broadcast.h"
#include "cpu/backward/pack.h"
#include "cpu/backward/panel.h"

namespace fastattn::cpu {
namespace {

// Blocks that have n rows or keys of an entry.
inline std::int64_t blocks_of(std::int64_t n, std::int64_t block) { return (n + block - 1) / block; }

// The sums of the block, over rows or keys that the bias does not tell apart. Packed entries add up only
// later where it tells neither apart.
template <class E>
void store_bias(const BackwardBlock<E>& block, std::int64_t b, std::int64_t h, std::int64_t i,
                std::int64_t j) {
    const AttentionProblem& p = block.forward;
    const BackwardPlan& plan = block.plan;
    const ScoreOperand& out = block.problem.dbias;
    const auto within = [](std::int64_t left, std::int64_t most) { return left < most ? left : most; };
    const std::int64_t rows = within(out.query == 0 ? p.q_size : p.q_size - i, plan.row_block);
    const std::int64_t keys = within(out.key == 0 ? p.kv_size : p.kv_size - j, plan.key_block);
    for (std::int64_t r = 0; r < (out.query == 0 ? 1 : rows); ++r) {
        for (std::int64_t c = 0; c < (out.key == 0 ? 1 : keys); ++c) {
            double sum = 0;
            for (std::int64_t rr = r; rr < (out.query == 0 ? rows : r + 1); ++rr) {
                for (std::int64_t cc = c; cc < (out.key == 0 ? keys : c + 1); ++cc) {
                    const std::int64_t at = rr * plan.key_block + cc;
                    sum += double(block.at.dbias[at]);
                    if (plan.bias_sections) sum += block.at.dbias_total[at];
                }
            }
            if (p.packed() && out.query == 0 && out.key == 0) {
                block.bias_sums[block.x.batch * own_sizes(out, p).head + h] = sum;
            } else {
                store_real(out.data, out.dtype, score_offset(out, b, h, i + r, j + c), sum);
            }
        }
    }
}

// One block of dbias: dS anew for all heads, rows and keys that the bias of the block served. Rows and keys
// that the bias does not tell apart are first summed at their places in their blocks.
template <class E, class S, class K, class W>
void find_bias_gradient(BackwardBlock<E>& block, std::int64_t item) {
    const AttentionProblem& p = block.forward;
    const BackwardPlan& plan = block.plan;
    const ScoreOperand& out = block.problem.dbias;
    const AxisSizes own = own_sizes(out, p);
    // Of packed entries an item is a block of one of them.
    const std::int64_t all_rows = blocks_of(p.q_size, plan.row_block),
                       all_keys = blocks_of(p.kv_size, plan.key_block);
    const std::int64_t key_blocks = out.key == 0 ? 1 : all_keys;
    const std::int64_t row_blocks = out.query == 0 ? 1 : all_rows;
    const std::int64_t kb = item % key_blocks, rb = item / key_blocks % row_blocks;
    const std::int64_t h = item / key_blocks / row_blocks % own.head,
                       b = p.packed() ? block.x.batch : item / key_blocks / row_blocks / own.head;
    const std::int64_t size = plan.row_block * plan.key_block;
    clear_vectors<typename E::V>(block.at.dbias, size);
    for (std::int64_t c = 0; plan.bias_sections && c < size; ++c) block.at.dbias_total[c] = 0;
    std::int64_t blocks = 0;
    block.into_bias = true;
    for (std::int64_t bb = b; bb < (out.batch == 0 && !p.packed() ? p.batch : b + 1); ++bb) {
        block.go_to_entry(bb);
        for (std::int64_t hh = h; hh < (out.head == 0 ? p.q_heads : h + 1); ++hh) {
            for (std::int64_t j = kb; j < (out.key == 0 ? all_keys : kb + 1); ++j) {
                start_keys(block, hh / p.group, j * plan.key_block, p.kv_size);
                for (std::int64_t i = rb; i < (out.query == 0 ? all_rows : rb + 1); ++i) {
                    if (block.executor.stop_requested()) return;
                    if (plan.bias_sections && blocks++ == kBiasSectionBlocks) {
                        end_section(block.at.dbias, block.at.dbias_total, size);
                        blocks = 1;
                    }
                    if (start_rows<E, S, K, W>(block, hh, i * plan.row_block) && !find_ds(block)) return;
                }
            }
        }
    }
    store_bias(block, b, h, rb * plan.row_block, kb * plan.key_block);
}

}  // namespace
}  // namespace fastattn::cpu

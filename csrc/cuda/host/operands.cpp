#include "cuda/host/operands.h"

#include "cuda/host/errors.h"
#include "cuda/simt/launch.h"

namespace fastattn::cuda {

void* element(const Operand& x, DType dtype, Index b, Index s, Index h) noexcept {
    const Index at = b * x.batch + s * x.seq + h * x.head;
    return static_cast<char*>(x.data) + at * static_cast<Index>(item_size(dtype));
}

Operand take_queries(const AttentionProblem& p, const Chunk& region, DType dtype, Index dims,
                     Carver& carver) noexcept {
    const Index heads = region.kv_heads * p.group;
    std::byte* data = carver.take(compact_bytes(dtype, region.batches, heads, region.rows, dims));
    return compact_operand(data, dtype, region, region.kv_head * p.group, heads, region.row, region.rows,
                           dims);
}

Operand take_keys(const AttentionProblem&, const Chunk& region, DType dtype, Index dims,
                  Carver& carver) noexcept {
    std::byte* data = carver.take(compact_bytes(dtype, region.batches, region.kv_heads, region.keys, dims));
    return compact_operand(data, dtype, region, region.kv_head, region.kv_heads, region.key, region.keys,
                           dims);
}

CopyArgs copy_of_queries(const AttentionProblem& p, const Chunk& region, const Operand& source,
                         const Operand& target, Index dims) noexcept {
    const Index head = region.kv_head * p.group;
    CopyArgs args;
    args.source = source;
    args.target = target;
    args.source.data = element(source, p.dtype, region.batch, region.row, head);
    args.target.data = element(target, p.dtype, region.batch, region.row, head);
    args.item_size = static_cast<int>(item_size(p.dtype));
    args.batches = region.batches;
    args.rows = region.rows;
    args.heads = region.kv_heads * p.group;
    args.dims = dims;
    return args;
}

CopyArgs copy_of_keys(const AttentionProblem& p, const Chunk& region, const Operand& source,
                      const Operand& target, Index dims) noexcept {
    CopyArgs args;
    args.source = source;
    args.target = target;
    args.source.data = element(source, p.dtype, region.batch, region.key, region.kv_head);
    args.target.data = element(target, p.dtype, region.batch, region.key, region.kv_head);
    args.item_size = static_cast<int>(item_size(p.dtype));
    args.batches = region.batches;
    args.rows = region.keys;
    args.heads = region.kv_heads;
    args.dims = dims;
    return args;
}

void queue_copy(const CopyArgs& args, Stream stream) {
    if (args.batches * args.rows * args.heads == 0) return;
    launch_copy(args, stream);
    throw_on_error(runtime::last_error(), "launching copy_rows");
}

RegionOperands::RegionOperands(const AttentionProblem& host, const AttentionProblem& device,
                               const Chunk& region, Carver& carver) noexcept
    : device_(device), prepared_(device), region_(region) {
    const AttentionProblem& p = device;
    // Values of keys beyond a length that only the device knows may be anything; copied, they are zero.
    const bool hidden_keys = host.has_kv_lens && host.kv_lens.place != DeviceType::cpu;
    q_ = !is_gemm_operand(p.q, p.dtype, region.rows, p.head_dim);
    k_ = !is_gemm_operand(p.k, p.dtype, region.keys, p.head_dim);
    v_ = hidden_keys || !is_gemm_operand(p.v, p.dtype, region.keys, p.value_dim);
    out_ = !is_gemm_operand(p.out, p.dtype, region.rows, p.value_dim);
    if (q_) prepared_.q = take_queries(p, region, p.dtype, p.head_dim, carver);
    if (k_) prepared_.k = take_keys(p, region, p.dtype, p.head_dim, carver);
    if (v_) prepared_.v = take_keys(p, region, p.dtype, p.value_dim, carver);
    if (out_) prepared_.out = take_queries(p, region, p.dtype, p.value_dim, carver);
}

void RegionOperands::queue_copies_in(Stream stream) const {
    const AttentionProblem& p = device_;
    if (k_) queue_copy(copy_of_keys(p, region_, p.k, prepared_.k, p.head_dim), stream);
    if (v_) {
        CopyArgs args = copy_of_keys(p, region_, p.v, prepared_.v, p.value_dim);
        if (p.has_kv_lens) {
            args.has_lengths = true;
            args.first_row = region_.key;
            args.lengths = p.kv_lens;
            args.lengths.data =
                static_cast<const char*>(p.kv_lens.data) +
                region_.batch * p.kv_lens.batch * static_cast<Index>(item_size(p.kv_lens.dtype));
        }
        queue_copy(args, stream);
    }
    if (q_) queue_copy(copy_of_queries(p, region_, p.q, prepared_.q, p.head_dim), stream);
}

void RegionOperands::queue_copies_out(Stream stream) const {
    if (out_)
        queue_copy(copy_of_queries(device_, region_, prepared_.out, device_.out, device_.value_dim), stream);
}

}  // namespace fastattn::cuda

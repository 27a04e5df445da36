#include "cuda/operands.h"

#include "cuda/errors.h"
#include "cuda/launch.h"

namespace fastattn::cuda {

void* element(const Operand& x, DType dtype, Index b, Index s, Index h) noexcept {
    const Index at = b * x.batch + s * x.seq + h * x.head;
    return static_cast<char*>(x.data) + at * static_cast<Index>(item_size(dtype));
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
    const Index q_heads = region.kv_heads * p.group;
    const auto queries = [&](Index dims) {
        std::byte* data = carver.take(compact_bytes(p.dtype, region.batches, q_heads, region.rows, dims));
        return compact_operand(data, p.dtype, region, region.kv_head * p.group, q_heads, region.row,
                               region.rows, dims);
    };
    const auto keys = [&](Index dims) {
        std::byte* data =
            carver.take(compact_bytes(p.dtype, region.batches, region.kv_heads, region.keys, dims));
        return compact_operand(data, p.dtype, region, region.kv_head, region.kv_heads, region.key,
                               region.keys, dims);
    };
    if (q_) prepared_.q = queries(p.head_dim);
    if (k_) prepared_.k = keys(p.head_dim);
    if (v_) prepared_.v = keys(p.value_dim);
    if (out_) prepared_.out = queries(p.value_dim);
}

void RegionOperands::queue_copies_in(Stream stream) const {
    if (region_.keys > 0) {
        if (k_) copy_keys(device_.k, prepared_.k, device_.head_dim, false, stream);
        if (v_) copy_keys(device_.v, prepared_.v, device_.value_dim, device_.has_kv_lens, stream);
    }
    if (q_) copy_queries(device_.q, prepared_.q, device_.head_dim, stream);
}

void RegionOperands::queue_copies_out(Stream stream) const {
    if (out_) copy_queries(prepared_.out, device_.out, device_.value_dim, stream);
}

void RegionOperands::copy_queries(const Operand& source, const Operand& target, Index dims,
                                  Stream stream) const {
    const DType dtype = device_.dtype;
    const Index head = region_.kv_head * device_.group;
    CopyArgs args;
    args.source = source;
    args.target = target;
    args.source.data = element(source, dtype, region_.batch, region_.row, head);
    args.target.data = element(target, dtype, region_.batch, region_.row, head);
    args.item_size = static_cast<int>(item_size(dtype));
    args.batches = region_.batches;
    args.rows = region_.rows;
    args.heads = region_.kv_heads * device_.group;
    args.dims = dims;
    launch_copy(args, stream);
    throw_on_error(runtime::last_error(), "launching copy_rows");
}

void RegionOperands::copy_keys(const Operand& source, const Operand& target, Index dims, bool only_valid,
                               Stream stream) const {
    const DType dtype = device_.dtype;
    CopyArgs args;
    args.source = source;
    args.target = target;
    args.source.data = element(source, dtype, region_.batch, region_.key, region_.kv_head);
    args.target.data = element(target, dtype, region_.batch, region_.key, region_.kv_head);
    args.item_size = static_cast<int>(item_size(dtype));
    args.batches = region_.batches;
    args.rows = region_.keys;
    args.heads = region_.kv_heads;
    args.dims = dims;
    if (only_valid) {
        args.has_lengths = true;
        args.first_row = region_.key;
        args.lengths = device_.kv_lens;
        args.lengths.data =
            static_cast<const char*>(device_.kv_lens.data) +
            region_.batch * device_.kv_lens.batch * static_cast<Index>(item_size(device_.kv_lens.dtype));
    }
    launch_copy(args, stream);
    throw_on_error(runtime::last_error(), "launching copy_rows");
}

}  // namespace fastattn::cuda

// torch.ops.moe.fused_moe.cutlass_sm90: the whole layer in one call.
//   sort_slots -> permute (+ quantise) -> both GEMMs with the activation (+ requantise) in between -> finalize
// or, where the two GEMMs cannot be one launch (no gate, interleaved w13), GEMM1 -> act_mul -> GEMM2.
// Every intermediate is a tensor of torch's allocator, of the sizes that meta_kernels/_sizes.py states.
#include <torch/csrc/stable/library.h>

#include "act_mul/act_mul.h"
#include "common/arguments.h"
#include "common/stream.h"
#include "finalize/finalize.h"
#include "fused_moe/sort_permute.h"
#include "grouped_gemm/sm90_config.h"
#include "grouped_gemm/tensor_args.h"
#include "permute/permute.h"
#include "sort_slots/sort_slots.h"

#ifdef TORCH_MOE_SM90

namespace moe {
namespace {

constexpr const char* kOp = "fused_moe";

// What the stages share: sizes, the format, and the maps of sort_slots.
struct Layer {
  int64_t num_tokens = 0, top_k = 0, num_rows = 0, hidden_size = 0, intermediate_size = 0;
  Format format = Format::bf16;
  ActivationParams activation;
  GateUpLayout layout = GateUpLayout::gate_up;
  const int32_t* expert_offsets = nullptr;
  const int32_t* slot_to_row = nullptr;
  int32_t* counters = nullptr;  // 0 at the start: what the GEMMs draw tiles from
  cudaStream_t stream = nullptr;
};

void check_gemm(const char* argument, const char* reason) {
  if (reason != nullptr) refuse(kOp, argument, "a shape that this backend runs", reason);
}

// torch's allocator reuses memory in stream order: these may go as soon as the last launch that reads them is in the stream.
struct Permuted {
  Tensor expert_offsets, slot_to_row, counters;
  QuantizedTensors rows;
};

// sort_slots and permute; one launch for few slots, else two.
Permuted run_permute(Layer& layer, const Tensor& hidden_states, const Tensor& topk_ids, const std::optional<Tensor>& expert_map,
                     int32_t num_experts, int64_t num_counters, const float* topk_weights) {
  // The scales of a row are written together (K-major): MN-major they would be single floats all over memory.
  const int64_t columns = scale_columns(layer.format, layer.hidden_size);
  Permuted out{empty({num_experts + 1}, ScalarType::Int, topk_ids), empty({layer.num_tokens, layer.top_k}, ScalarType::Int, topk_ids),
               empty({num_counters}, ScalarType::Int, topk_ids),
               {empty({layer.num_rows, layer.hidden_size}, value_dtype(layer.format), hidden_states),
                empty({layer.num_rows, columns}, ScalarType::Float, hidden_states), {}}};
  out.rows.view = {out.rows.values.data_ptr(), out.rows.scale.data_ptr(), layer.hidden_size, columns, 1};
  SortSlotsArgs sort;
  sort.topk_ids = pointer<const int32_t>(topk_ids);
  sort.expert_map = pointer<const int32_t>(expert_map);
  sort.num_slots = topk_ids.numel();
  sort.num_global_experts = expert_map ? static_cast<int32_t>(expert_map->size(0)) : 0;
  sort.num_experts = num_experts;
  sort.num_rows = layer.num_rows;
  sort.expert_offsets = pointer<int32_t>(out.expert_offsets);
  sort.slot_to_row = pointer<int32_t>(out.slot_to_row);
  sort.cleared = pointer<int32_t>(out.counters);
  sort.num_cleared = num_counters;
  PermuteArgs args;
  args.hidden_states = hidden_states.data_ptr();
  args.dtype = float_dtype(hidden_states);
  args.slot_to_row = sort.slot_to_row;
  args.topk_weights = topk_weights;
  args.num_tokens = layer.num_tokens;
  args.top_k = static_cast<int32_t>(layer.top_k);
  args.num_rows = layer.num_rows;
  args.format = layer.format;
  args.out = out.rows.view;
  if (sort.num_slots > 0 && sort.num_slots <= kSortPermuteMaxSlots) {
    check_cuda(kOp, sort_permute(sort, args, layer.stream));
  } else {
    const Tensor workspace = empty({static_cast<int64_t>(sort_slots_workspace_bytes(sort.num_slots, num_experts))}, ScalarType::Byte, topk_ids);
    check_cuda(kOp, sort_slots(sort, workspace.data_ptr(), layer.stream));
    check_cuda(kOp, permute(args, layer.stream));
  }
  layer.expert_offsets = sort.expert_offsets;
  layer.slot_to_row = sort.slot_to_row;
  layer.counters = sort.cleared;
  return out;
}

void set_input(GroupedGemmArgs& args, const Layer& layer, const QuantizedTensors& a) {
  args.a = a.values.data_ptr();
  args.num_rows = layer.num_rows;
  args.expert_offsets = layer.expert_offsets;
  if (has_scale(layer.format))
    args.a_scale = {static_cast<const float*>(a.view.scale), 0, a.view.scale_stride_row, a.view.scale_stride_k};
}

// expert_out [num_rows, H] = act @ w2, act = quantize(activation(permuted @ w13)).
Tensor run_gemms(const Layer& layer, GroupedGemmArgs gemm1, GroupedGemmArgs gemm2, const QuantizedTensors& permuted, const Tensor& like) {
  const Tensor gate_up = empty({layer.num_rows, gemm1.n}, ScalarType::Float, like);
  set_input(gemm1, layer, permuted);
  gemm1.out = gate_up.data_ptr();
  gemm1.out_dtype = DType::float32;
  check_cuda(kOp, grouped_gemm_sm90_counted(gemm1, layer.counters, layer.stream));
  const QuantizedTensors act = empty_quantized(layer.format, layer.num_rows, layer.intermediate_size, like);
  ActMulArgs args;
  args.gate_up = gate_up.data_ptr();
  args.dtype = DType::float32;
  args.expert_offsets = layer.expert_offsets;
  args.num_experts = gemm1.num_experts;
  args.num_rows = layer.num_rows;
  args.activation = layer.activation;
  args.layout = layer.layout;
  args.format = layer.format;
  args.out = act.view;
  check_cuda(kOp, act_mul(args, layer.stream));
  set_input(gemm2, layer, act);
  Tensor expert_out = empty({layer.num_rows, layer.hidden_size}, like.scalar_type(), like);
  gemm2.out = expert_out.data_ptr();
  gemm2.out_dtype = float_dtype(like);
  check_cuda(kOp, grouped_gemm_sm90_counted(gemm2, layer.counters + 1, layer.stream));
  return expert_out;
}

// The same in one launch.
Tensor run_fused_gemms(const Layer& layer, FusedGemms fused, const FusedGemmsSizes& sizes, const QuantizedTensors& permuted, const Tensor& like) {
  const QuantizedTensors act = empty_quantized(layer.format, layer.num_rows, layer.intermediate_size, like);
  const Tensor gate_up = empty({sizes.gate_up}, ScalarType::Float, like);
  Tensor expert_out = empty({layer.num_rows, layer.hidden_size}, like.scalar_type(), like);
  set_input(fused.gemm1, layer, permuted);
  set_input(fused.gemm2, layer, act);
  fused.gemm1.out = act.values.data_ptr();
  fused.gemm1.out_dtype = fused.gemm1.ab_dtype;
  fused.gemm2.out = expert_out.data_ptr();
  fused.gemm2.out_dtype = float_dtype(like);
  fused.gate_up = pointer<float>(gate_up);
  fused.sync = layer.counters;
  check_cuda(kOp, fused_gemms_sm90(fused, layer.stream));
  return expert_out;
}

Tensor run_finalize(const Layer& layer, const Tensor& expert_out, const float* topk_weights, double routed_scaling_factor) {
  Tensor output = empty({layer.num_tokens, layer.hidden_size}, expert_out.scalar_type(), expert_out);
  FinalizeArgs args;
  args.expert_out = expert_out.data_ptr();
  args.dtype = float_dtype(expert_out);
  args.slot_to_row = layer.slot_to_row;
  args.topk_weights = topk_weights;
  args.num_tokens = layer.num_tokens;
  args.num_rows = layer.num_rows;
  args.hidden_size = layer.hidden_size;
  args.top_k = static_cast<int32_t>(layer.top_k);
  args.routed_scaling_factor = static_cast<float>(routed_scaling_factor);
  args.out = output.data_ptr();
  check_cuda(kOp, finalize(args, layer.stream));
  return output;
}

Tensor fused_moe_sm90(const Tensor& hidden_states, const Tensor& w13, const Tensor& w2, const Tensor& topk_weights, const Tensor& topk_ids,
                      const std::optional<Tensor>& w13_scale, const std::optional<Tensor>& w2_scale,
                      const std::optional<Tensor>& w13_global_scale, const std::optional<Tensor>& w2_global_scale,
                      const std::optional<Tensor>& a13_global_scale, const std::optional<Tensor>& a2_global_scale,
                      const std::optional<Tensor>& w13_bias, const std::optional<Tensor>& w2_bias, const std::optional<Tensor>& expert_map,
                      const std::string& format, const std::string& act_format, const std::string& activation, double alpha, double beta,
                      const std::optional<double>& limit, double routed_scaling_factor, bool apply_router_weight_on_input,
                      const std::string& w13_layout) {
  Layer layer;
  layer.format = parse_format(kOp, format);
  MOE_EXPECT(layer.format == Format::bf16 || layer.format == Format::fp16 || layer.format == Format::fp8_block, kOp, "format",
             "bf16, fp16 or fp8_block for this backend", format);
  MOE_EXPECT(act_format.empty() || act_format == format, kOp, "act_format", format << " for this backend", act_format);
  const std::pair<const char*, const std::optional<Tensor>&> global_scales[] = {{"w13_global_scale", w13_global_scale},
                                                                                {"w2_global_scale", w2_global_scale},
                                                                                {"a13_global_scale", a13_global_scale},
                                                                                {"a2_global_scale", a2_global_scale}};
  for (const auto& [name, scale] : global_scales) MOE_EXPECT(!scale, kOp, name, "none for " << format, describe(*scale));
  layer.activation = parse_activation(kOp, activation, alpha, beta, limit);
  layer.layout = parse_layout(kOp, "w13_layout", w13_layout);
  expect_tensor(kOp, "hidden_states", hidden_states, {ScalarType::BFloat16, ScalarType::Half}, {"T", "H"}, hidden_states);
  MOE_EXPECT(has_scale(layer.format) || value_dtype(layer.format) == hidden_states.scalar_type(), kOp, "format",
             "the format of hidden_states or a quantised one", format);
  layer.num_tokens = hidden_states.size(0);
  layer.hidden_size = hidden_states.size(1);
  expect_tensor(kOp, "topk_ids", topk_ids, {ScalarType::Int}, {layer.num_tokens, "K"}, hidden_states);
  layer.top_k = topk_ids.size(1);
  expect_tensor(kOp, "topk_weights", topk_weights, {ScalarType::Float}, {layer.num_tokens, layer.top_k}, hidden_states);
  if (expert_map) expect_tensor(kOp, "expert_map", *expert_map, {ScalarType::Int}, {"Eg"}, hidden_states);
  MOE_EXPECT(!apply_router_weight_on_input || layer.top_k == 1, kOp, "apply_router_weight_on_input", "top_k 1",
             "top_k " + std::to_string(layer.top_k));
  const int64_t parts = is_gated(layer.activation.kind) ? 2 : 1;
  const GroupedGemmArgs gemm1 = weight_args(kOp, "w13", w13, w13_scale, w13_bias, layer.format, parts, hidden_states);
  const GroupedGemmArgs gemm2 = weight_args(kOp, "w2", w2, w2_scale, w2_bias, layer.format, 1, hidden_states);
  layer.intermediate_size = gemm2.k;
  expect_tensor(kOp, "w13", w13, {w13.scalar_type()}, {w2.size(0), parts * gemm2.k, layer.hidden_size}, hidden_states);
  expect_tensor(kOp, "w2", w2, {w2.scalar_type()}, {"E", layer.hidden_size, "I"}, hidden_states);
  check_gemm("w13", grouped_gemm_sm90_why_not(gemm1));
  check_gemm("w2", grouped_gemm_sm90_why_not(gemm2));
  layer.num_rows = layer.num_tokens * layer.top_k;

  FusedGemms fused{gemm1, gemm2};
  fused.gemm1.num_rows = fused.gemm2.num_rows = layer.num_rows;
  fused.activation = layer.activation;
  fused.gate_part = layer.layout == GateUpLayout::up_gate ? 1 : 0;
  if (layer.num_rows <= kSortPermuteMaxSlots) fused.topk_ids = pointer<const int32_t>(topk_ids);
  fused.expert_map = pointer<const int32_t>(expert_map);
  fused.num_slots = layer.num_rows;
  fused.num_global_experts = expert_map ? static_cast<int32_t>(expert_map->size(0)) : 0;
  const bool can_fuse = layer.layout != GateUpLayout::interleaved && fused_gemms_sm90_why_not(gemm1, gemm2) == nullptr;

  const CudaScope scope(hidden_states);
  layer.stream = scope.stream;
  const FusedGemmsSizes sizes = can_fuse ? fused_gemms_sm90_sizes(fused) : FusedGemmsSizes{2, 0};
  const float* weights = pointer<const float>(topk_weights);
  const Permuted permuted =
      run_permute(layer, hidden_states, topk_ids, expert_map, gemm1.num_experts, sizes.sync, apply_router_weight_on_input ? weights : nullptr);
  const Tensor expert_out = can_fuse ? run_fused_gemms(layer, fused, sizes, permuted.rows, hidden_states)
                                     : run_gemms(layer, gemm1, gemm2, permuted.rows, hidden_states);
  return run_finalize(layer, expert_out, apply_router_weight_on_input ? nullptr : weights, routed_scaling_factor);
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("fused_moe.cutlass_sm90", TORCH_BOX(&moe::fused_moe_sm90)); }

#endif  // TORCH_MOE_SM90

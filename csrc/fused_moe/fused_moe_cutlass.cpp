// torch.ops.moe.fused_moe.cutlass_sm90: the whole layer in one call and five launches (six where GEMM1 is not fused):
//   sort_slots -> permute (+ quantise) -> GEMM1 with activation (+ requantise) -> GEMM2 -> finalize
// Every intermediate is a tensor of torch's allocator, of the sizes that meta_kernels/_sizes.py states.
#include <torch/csrc/stable/library.h>

#include "act_mul/act_mul.h"
#include "common/arguments.h"
#include "common/stream.h"
#include "finalize/finalize.h"
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
  int32_t* tile_counters = nullptr;  // [2], one for each GEMM
  cudaStream_t stream = nullptr;
};

void check_gemm(const char* argument, const char* reason) {
  if (reason != nullptr) refuse(kOp, argument, "a shape that this backend runs", reason);
}

// torch's allocator reuses memory in stream order: these may go as soon as the last launch that reads them is in the stream.
struct Maps {
  Tensor expert_offsets, slot_to_row, tile_counters;
};

Maps run_sort_slots(const Tensor& topk_ids, const std::optional<Tensor>& expert_map, int32_t num_experts, int64_t num_rows,
                    cudaStream_t stream) {
  Maps maps{empty({num_experts + 1}, ScalarType::Int, topk_ids), empty({topk_ids.size(0), topk_ids.size(1)}, ScalarType::Int, topk_ids),
            empty({2}, ScalarType::Int, topk_ids)};
  SortSlotsArgs args;
  args.topk_ids = pointer<const int32_t>(topk_ids);
  args.expert_map = pointer<const int32_t>(expert_map);
  args.num_slots = topk_ids.numel();
  args.num_global_experts = expert_map ? static_cast<int32_t>(expert_map->size(0)) : 0;
  args.num_experts = num_experts;
  args.num_rows = num_rows;
  args.expert_offsets = pointer<int32_t>(maps.expert_offsets);
  args.slot_to_row = pointer<int32_t>(maps.slot_to_row);
  args.cleared = pointer<int32_t>(maps.tile_counters);
  args.num_cleared = 2;
  const int64_t bytes = static_cast<int64_t>(sort_slots_workspace_bytes(args.num_slots, num_experts));
  const Tensor workspace = empty({bytes}, ScalarType::Byte, topk_ids);
  check_cuda(kOp, sort_slots(args, workspace.data_ptr(), stream));
  return maps;
}

// The scales of a row are written together (K-major): MN-major they would be single floats all over memory.
QuantizedTensors run_permute(const Layer& layer, const Tensor& hidden_states, const float* topk_weights) {
  const int64_t columns = scale_columns(layer.format, layer.hidden_size);
  QuantizedTensors out{empty({layer.num_rows, layer.hidden_size}, value_dtype(layer.format), hidden_states),
                       empty({layer.num_rows, columns}, ScalarType::Float, hidden_states), {}};
  out.view = {out.values.data_ptr(), out.scale.data_ptr(), layer.hidden_size, columns, 1};
  PermuteArgs args;
  args.hidden_states = hidden_states.data_ptr();
  args.dtype = float_dtype(hidden_states);
  args.slot_to_row = layer.slot_to_row;
  args.topk_weights = topk_weights;
  args.num_tokens = layer.num_tokens;
  args.top_k = static_cast<int32_t>(layer.top_k);
  args.num_rows = layer.num_rows;
  args.format = layer.format;
  args.out = out.view;
  check_cuda(kOp, permute(args, layer.stream));
  return out;
}

void set_input(GroupedGemmArgs& args, const Layer& layer, const QuantizedTensors& a) {
  args.a = a.values.data_ptr();
  args.num_rows = layer.num_rows;
  args.expert_offsets = layer.expert_offsets;
  if (has_scale(layer.format))
    args.a_scale = {static_cast<const float*>(a.view.scale), 0, a.view.scale_stride_row, a.view.scale_stride_k};
}

// act = quantize(activation(permuted @ w13)). Fused into the GEMM's epilogue, or two launches around a float32 gate_up
// (the same bits) where the epilogue cannot (no gate, interleaved w13) or where its 256-row tiles are too few to keep the
// memory busy: on an H200, DeepSeek-V3 TP8 at one token takes 25.7 us fused, 15.6 + 2 us in two launches.
QuantizedTensors run_gemm1(const Layer& layer, GroupedGemmArgs gemm, const QuantizedTensors& permuted) {
  set_input(gemm, layer, permuted);
  QuantizedTensors act = empty_quantized(layer.format, layer.num_rows, layer.intermediate_size, permuted.values);
  const bool can_fuse = layer.layout != GateUpLayout::interleaved && grouped_gemm_gated_sm90_why_not(gemm) == nullptr;
  if (can_fuse && grouped_gemm_gated_sm90_pays(gemm)) {
    GatedEpilogue epilogue;
    epilogue.activation = layer.activation;
    epilogue.gate_part = layer.layout == GateUpLayout::up_gate ? 1 : 0;
    epilogue.act_scale = static_cast<float*>(act.view.scale);
    epilogue.scale_stride_row = act.view.scale_stride_row;
    epilogue.scale_stride_k = act.view.scale_stride_k;
    gemm.out = act.values.data_ptr();
    gemm.out_dtype = gemm.ab_dtype;
    check_cuda(kOp, grouped_gemm_gated_sm90(gemm, epilogue, layer.tile_counters, layer.stream));
    return act;
  }
  const Tensor gate_up = empty({layer.num_rows, gemm.n}, ScalarType::Float, permuted.values);
  gemm.out = gate_up.data_ptr();
  gemm.out_dtype = DType::float32;
  check_cuda(kOp, grouped_gemm_sm90_counted(gemm, layer.tile_counters, layer.stream));
  ActMulArgs args;
  args.gate_up = gate_up.data_ptr();
  args.dtype = DType::float32;
  args.expert_offsets = layer.expert_offsets;
  args.num_experts = gemm.num_experts;
  args.num_rows = layer.num_rows;
  args.activation = layer.activation;
  args.layout = layer.layout;
  args.format = layer.format;
  args.out = act.view;
  check_cuda(kOp, act_mul(args, layer.stream));
  return act;
}

Tensor run_gemm2(const Layer& layer, GroupedGemmArgs gemm, const QuantizedTensors& act, const Tensor& like) {
  set_input(gemm, layer, act);
  Tensor expert_out = empty({layer.num_rows, layer.hidden_size}, like.scalar_type(), like);
  gemm.out = expert_out.data_ptr();
  gemm.out_dtype = float_dtype(like);
  check_cuda(kOp, grouped_gemm_sm90_counted(gemm, layer.tile_counters + 1, layer.stream));
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

  const CudaScope scope(hidden_states);
  layer.stream = scope.stream;
  const Maps maps = run_sort_slots(topk_ids, expert_map, gemm1.num_experts, layer.num_rows, layer.stream);
  layer.expert_offsets = pointer<const int32_t>(maps.expert_offsets);
  layer.slot_to_row = pointer<const int32_t>(maps.slot_to_row);
  layer.tile_counters = pointer<int32_t>(maps.tile_counters);
  const float* weights = pointer<const float>(topk_weights);
  QuantizedTensors act;
  {
    const QuantizedTensors permuted = run_permute(layer, hidden_states, apply_router_weight_on_input ? weights : nullptr);
    act = run_gemm1(layer, gemm1, permuted);
  }  // permuted's memory may hold expert_out
  const Tensor expert_out = run_gemm2(layer, gemm2, act, hidden_states);
  return run_finalize(layer, expert_out, apply_router_weight_on_input ? nullptr : weights, routed_scaling_factor);
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("fused_moe.cutlass_sm90", TORCH_BOX(&moe::fused_moe_sm90)); }

#endif  // TORCH_MOE_SM90

// torch.ops.moe.fused_moe.cutlass_sm90: the whole layer in one call; and fused_moe.default, which is the same wherever that is possible; and
// the same with a tactic by name, for benchmarks/tune.py.
//   sort_slots -> permute (+ quantise) -> both GEMMs with the activation (+ requantise) in between -> finalize
// or, where GEMM1 gathers its tokens: sort_slots -> quantize, not for 16 bits -> both GEMMs -> finalize;
// or, with few slots: sort_slots -> both GEMMs, which quantise by themselves -> finalize;
// or, where the two GEMMs cannot be one launch (no gate, interleaved w13), GEMM1 -> act_mul -> GEMM2.
// All intermediates lie in one tensor of torch's allocator, which takes no more than meta_kernels/_sizes.py states: an allocation costs the
// host more than a launch.
#include <torch/csrc/stable/library.h>

#include <array>
#include <csignal>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "act_mul/act_mul.h"
#include "common/arguments.h"
#include "common/stream.h"
#include "finalize/finalize.h"
#include "fused_moe/sort_permute.h"
#include "grouped_gemm/sm90_config.h"
#include "grouped_gemm/tensor_args.h"
#include "permute/permute.h"
#include "quantize/quantize.h"
#include "sort_slots/sort_slots.h"

#ifdef TORCH_MOE_SM90

namespace moe {
namespace {

constexpr const char* kOp = "fused_moe";

// What the stages share: sizes and the format.
struct Layer {
  int64_t num_tokens = 0, top_k = 0, num_rows = 0, num_experts = 0, hidden_size = 0, intermediate_size = 0;
  Format format = Format::bf16;   // of activations, as they are multiplied
  ScaleView a13_global_scale, a2_global_scale;
  DType dtype = DType::bfloat16;  // of hidden_states and the output
  ActivationParams activation;
  GateUpLayout layout = GateUpLayout::gate_up;
  bool fused = false;             // both GEMMs in one launch
  FusedGemmsSizes sizes;
  bool gather = false;            // GEMM1 reads tokens through row_to_slot: nothing is permuted
  bool split = false;             // GEMM1 finds and quantises its tokens by itself, GEMM2 reads gate_up: nor is anything permuted
  cudaStream_t stream = nullptr;
};

// Device memory of a call, one piece after another from `base`.
struct Intermediates {
  int32_t *expert_offsets, *slot_to_row;
  int32_t* row_to_slot;             // gather
  int32_t* counters;                // 0 at the start: what the GEMMs draw tiles from
  float* gate_up;                   // split: right behind them, and 0 at the start as well
  int64_t cleared;                  // int32s from `counters` on
  uint8_t* sort_workspace;
  QuantizedMatrix permuted, act;    // gather: the quantised tokens
  void* expert_out;
  int64_t bytes = 0;

  Intermediates(const Layer& layer, uint8_t* base) {
    const auto place = [&](auto*& piece, int64_t size) {
      piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(base + bytes);
      bytes += round_up(size, 256);
    };
    const int64_t rows = layer.num_rows, element = has_scale(layer.format) ? 1 : 2;
    const auto place_matrix = [&](QuantizedMatrix& matrix, int64_t rows, int64_t k, bool mn_major) {
      const int64_t columns = scale_columns(layer.format, k), padded = mn_major ? round_up(rows, 4) : rows;
      uint8_t *values, *scale;
      place(values, rows * k * element);
      place(scale, padded * columns * 4);
      matrix = {values, scale, k, mn_major ? 1 : columns, mn_major ? padded : 1};
    };
    place(expert_offsets, 4 * (layer.num_experts + 1));
    place(slot_to_row, 4 * rows);
    place(row_to_slot, layer.gather ? 4 * rows : 0);
    place(counters, 4 * layer.sizes.sync);
    const int64_t parts = is_gated(layer.activation.kind) ? 2 : 1, first_cleared = bytes - round_up(4 * layer.sizes.sync, 256);
    place(gate_up, 4 * (layer.fused ? layer.sizes.gate_up : rows * parts * layer.intermediate_size));
    cleared = layer.split ? (bytes - first_cleared) / 4 : layer.sizes.sync;
    place(sort_workspace, static_cast<int64_t>(sort_slots_workspace_bytes(rows, static_cast<int32_t>(layer.num_experts))));
    const int64_t tokens = layer.split ? 0 : !layer.gather ? rows : has_scale(layer.format) ? layer.num_tokens : 0;
    place_matrix(permuted, tokens, layer.hidden_size, false);  // K-major: the scales of a row are written together
    place_matrix(act, layer.split ? 0 : rows, layer.intermediate_size, true);  // MN-major: those of a tile's rows are
    uint8_t* out;
    place(out, rows * layer.hidden_size * 2);
    expert_out = out;
  }
};

// The format that activations are multiplied in.
Format parse_act_format(const Tensor& w13, Format weights, const std::string& format, const std::string& act_format) {
  const Packing packing = packing_of(w13, weights);
  const std::string& name = act_format.empty() ? format : act_format;
  std::string names = packing == Packing::none ? format : packing == Packing::mxfp4_e4m3 ? "fp8_block" : "bf16";
  if (name == names) return act_format_of(w13, weights);
  for (const std::string& other : rounded_act_formats(packing)) {
    if (name == other) return rounded(parse_format(kOp, name, "act_format"));
    names += " or " + other;
  }
  refuse(kOp, "act_format", names + " for this backend", act_format);
}

// One element or [E].
ScaleView parse_act_global_scale(const char* argument, const std::optional<Tensor>& scale, const Layer& layer, const Tensor& like) {
  if (!scale) return {};
  MOE_EXPECT(layer.format == Format::as_nvfp4, kOp, argument, "none for these activations", describe(*scale));
  const bool one = scale->numel() == 1 && scale->dim() <= 1;
  const bool good = has_dtype(*scale, ScalarType::Float) && scale->is_cuda() && scale->get_device_index() == like.get_device_index();
  MOE_EXPECT(good && (one || (scale->dim() == 1 && scale->size(0) == layer.num_experts && scale->stride(0) == 1)), kOp, argument,
             "float32 on " << device_name(like) << ", one element or [" << layer.num_experts << "]", describe(*scale));
  return {pointer<const float>(*scale), one ? 0 : 1, 0, 0};
}

// The same for the stages before and after, which find the expert of a row in expert_offsets.
GlobalScale of_rows(const ScaleView& scale, const Layer& layer, const Intermediates& m) {
  return {scale.data, scale.data == nullptr ? 0 : scale.stride_group == 0 ? 1 : static_cast<int32_t>(layer.num_experts), m.expert_offsets};
}

bool takes_acts(Format format) { return format == Format::bf16 || format == Format::fp16 || format == Format::fp8_block; }

void check_gemm(const char* argument, const char* reason) {
  if (reason != nullptr) refuse(kOp, argument, "a shape that this backend runs", reason);
}

// sort_slots and permute; one launch for few slots, else two or three. Gather: sort_slots and quantize. Split: sort_slots alone. Returns what is
// complete before the last of these launches starts.
sm90::Known run_permute(const Layer& layer, const Intermediates& m, const Tensor& hidden_states, const Tensor& topk_ids,
                        const std::optional<Tensor>& expert_map, const float* topk_weights) {
  SortSlotsArgs sort;
  sort.topk_ids = pointer<const int32_t>(topk_ids);
  sort.expert_map = pointer<const int32_t>(expert_map);
  sort.num_slots = layer.num_rows;
  sort.num_global_experts = expert_map ? static_cast<int32_t>(expert_map->size(0)) : 0;
  sort.num_experts = static_cast<int32_t>(layer.num_experts);
  sort.num_rows = layer.num_rows;
  sort.expert_offsets = m.expert_offsets;
  sort.slot_to_row = m.slot_to_row;
  sort.row_to_slot = layer.gather ? m.row_to_slot : nullptr;
  sort.cleared = m.counters;
  sort.num_cleared = m.cleared;
  if (layer.split) {
    check_cuda(kOp, sort_clear(sort, layer.stream));
    return sm90::Known::inputs;
  }
  if (layer.gather) {
    check_cuda(kOp, sort_slots(sort, m.sort_workspace, layer.stream));
    if (!has_scale(layer.format)) return sm90::Known::inputs;
    QuantizeArgs args;
    args.input = hidden_states.data_ptr();
    args.dtype = layer.dtype;
    args.rows = layer.num_tokens;
    args.format = layer.format;
    args.out = m.permuted;
    check_cuda(kOp, quantize(args, layer.stream));
    return sm90::Known::offsets;
  }
  PermuteArgs args;
  args.hidden_states = hidden_states.data_ptr();
  args.dtype = layer.dtype;
  args.slot_to_row = m.slot_to_row;
  args.topk_weights = topk_weights;
  args.num_tokens = layer.num_tokens;
  args.top_k = static_cast<int32_t>(layer.top_k);
  args.num_rows = layer.num_rows;
  args.format = layer.format;
  args.out = m.permuted;
  args.global_scale = of_rows(layer.a13_global_scale, layer, m);
  if (sort_permute_pays(layer.num_tokens, layer.num_rows) && !args.global_scale.per_expert()) {
    check_cuda(kOp, sort_permute(sort, args, layer.stream));
    return sm90::Known::counters;
  }
  check_cuda(kOp, sort_slots(sort, m.sort_workspace, layer.stream));
  check_cuda(kOp, permute(args, layer.stream));
  return sm90::Known::offsets;
}

void set_rows(GroupedGemmArgs& args, const Layer& layer, const Intermediates& m, const QuantizedMatrix& a) {
  args.a = a.values;
  args.num_rows = layer.num_rows;
  args.expert_offsets = m.expert_offsets;
  if (has_scale(layer.format)) args.a_scale = {static_cast<const float*>(a.scale), 0, a.scale_stride_row, a.scale_stride_k};
}

// expert_out [num_rows, H] = act @ w2, act = quantize(activation(permuted @ w13)).
void run_gemms(const Layer& layer, const Intermediates& m, GroupedGemmArgs gemm1, GroupedGemmArgs gemm2) {
  set_rows(gemm1, layer, m, m.permuted);
  gemm1.out = m.gate_up;
  gemm1.out_dtype = DType::float32;
  check_cuda(kOp, grouped_gemm_sm90_counted(gemm1, m.counters, layer.stream));
  ActMulArgs args;
  args.gate_up = m.gate_up;
  args.dtype = DType::float32;
  args.expert_offsets = m.expert_offsets;
  args.num_experts = static_cast<int32_t>(layer.num_experts);
  args.num_rows = layer.num_rows;
  args.activation = layer.activation;
  args.layout = layer.layout;
  args.format = layer.format;
  args.out = m.act;
  args.global_scale = of_rows(layer.a2_global_scale, layer, m);
  check_cuda(kOp, act_mul(args, layer.stream));
  set_rows(gemm2, layer, m, m.act);
  gemm2.out = m.expert_out;
  gemm2.out_dtype = layer.dtype;
  check_cuda(kOp, grouped_gemm_sm90_counted(gemm2, m.counters + 1, layer.stream));
}

// The same in one launch.
void run_fused_gemms(const Layer& layer, const Intermediates& m, const Tensor& hidden_states, FusedGemms fused) {
  set_rows(fused.gemm1, layer, m, m.permuted);
  if (layer.gather) {
    if (!has_scale(layer.format)) fused.gemm1.a = hidden_states.data_ptr();
    fused.row_to_slot = m.row_to_slot;
  }
  set_rows(fused.gemm2, layer, m, m.act);
  fused.gemm1.out = m.act.values;
  fused.gemm1.out_dtype = fused.gemm1.ab_dtype;
  fused.gemm2.out = m.expert_out;
  fused.gemm2.out_dtype = layer.dtype;
  fused.hidden_states = hidden_states.data_ptr();
  fused.gate_up = m.gate_up;
  fused.sync = m.counters;
  check_cuda(kOp, fused_gemms_sm90(fused, layer.stream));
}

Tensor run_finalize(const Layer& layer, const Intermediates& m, const Tensor& like, const float* topk_weights, double routed_scaling_factor) {
  Tensor output = empty({layer.num_tokens, layer.hidden_size}, like.scalar_type(), like);
  FinalizeArgs args;
  args.expert_out = m.expert_out;
  args.dtype = layer.dtype;
  args.slot_to_row = m.slot_to_row;
  args.topk_weights = topk_weights;
  args.num_tokens = layer.num_tokens;
  args.num_rows = layer.num_rows;
  args.hidden_size = layer.hidden_size;
  args.top_k = static_cast<int32_t>(layer.top_k);
  args.routed_scaling_factor = static_cast<float>(routed_scaling_factor);
  args.slots_complete = layer.num_experts > 0;  // else no kernel runs between sort_slots and finalize
  args.out = output.data_ptr();
  check_cuda(kOp, finalize(args, layer.stream));
  return output;
}

// Chosen, or the one of this name.
sm90::Tactic tactic_of(const sm90::LayerFacts& facts, const std::string& name) {
  if (name.empty()) return sm90::choose_tactic(facts);
  std::string names;
  for (const sm90::Tactic& tactic : sm90::possible_tactics(facts)) {
    if (name == sm90::tactic_name(tactic)) return tactic;
    names += (names.empty() ? "" : ", ") + sm90::tactic_name(tactic);
  }
  refuse(kOp, "tactic", "one of " + names, name);
}

// tactic: empty, or the name of one for the two fused GEMMs.
Tensor run_layer(const Text& tactic, const Tensor& hidden_states, const Tensor& w13, const Tensor& w2, const Tensor& topk_weights,
                 const Tensor& topk_ids, const std::optional<Tensor>& w13_scale, const std::optional<Tensor>& w2_scale,
                 const std::optional<Tensor>& w13_global_scale, const std::optional<Tensor>& w2_global_scale,
                 const std::optional<Tensor>& a13_global_scale, const std::optional<Tensor>& a2_global_scale,
                 const std::optional<Tensor>& w13_bias, const std::optional<Tensor>& w2_bias, const std::optional<Tensor>& expert_map,
                 const Text& format, const Text& act_format, const Text& activation, double alpha, double beta,
                 const std::optional<double>& limit, double routed_scaling_factor, bool apply_router_weight_on_input,
                 const Text& w13_layout) {
  Layer layer;
  const Format weight_format = parse_format(kOp, format);
  MOE_EXPECT(takes_acts(act_format_of(w13, weight_format)), kOp, "format",
             "bf16, fp16, fp8_block or packed nvfp4, mxfp4 or mxfp8 for this backend", format);
  layer.format = parse_act_format(w13, weight_format, format, act_format);
  MOE_EXPECT(packing_of(w2, weight_format) == packing_of(w13, weight_format), kOp, "w2", "packed like w13", describe(w2));
  layer.activation = parse_activation(kOp, activation, alpha, beta, limit);
  layer.layout = parse_layout(kOp, "w13_layout", w13_layout, layer.activation, activation);
  expect_tensor(kOp, "hidden_states", hidden_states, {ScalarType::BFloat16, ScalarType::Half}, {"T", "H"}, hidden_states);
  MOE_EXPECT(has_scale(layer.format) || is_rounded(layer.format) || value_dtype(layer.format) == hidden_states.scalar_type(), kOp, "format",
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
  GroupedGemmArgs gemm1 = weight_args(kOp, "w13", w13, w13_scale, w13_global_scale, w13_bias, weight_format, parts, hidden_states);
  GroupedGemmArgs gemm2 = weight_args(kOp, "w2", w2, w2_scale, w2_global_scale, w2_bias, weight_format, 1, hidden_states);
  MOE_EXPECT(gemm2.num_experts >= 1, kOp, "w2", "at least one expert", describe(w2));
  layer.intermediate_size = gemm2.k;
  MOE_EXPECT(gemm1.num_experts == gemm2.num_experts && gemm1.n == parts * gemm2.k && gemm1.k == layer.hidden_size, kOp, "w13",
             "sizes that fit hidden_states and w2", describe(w13));
  MOE_EXPECT(gemm2.n == layer.hidden_size, kOp, "w2", "as many rows as hidden_states has columns", describe(w2));
  check_gemm("w13", grouped_gemm_sm90_why_not(gemm1));
  check_gemm("w2", grouped_gemm_sm90_why_not(gemm2));
  layer.num_rows = layer.num_tokens * layer.top_k;
  MOE_EXPECT(layer.num_rows <= INT32_MAX, kOp, "topk_ids", "at most " << INT32_MAX << " rows", layer.num_rows);
  layer.num_experts = gemm1.num_experts;
  gemm1.a_global_scale = layer.a13_global_scale = parse_act_global_scale("a13_global_scale", a13_global_scale, layer, hidden_states);
  gemm2.a_global_scale = layer.a2_global_scale = parse_act_global_scale("a2_global_scale", a2_global_scale, layer, hidden_states);
  layer.dtype = float_dtype(hidden_states);

  FusedGemms fused{gemm1, gemm2};
  fused.gemm1.num_rows = fused.gemm2.num_rows = layer.num_rows;
  fused.activation = layer.activation;
  fused.gate_part = layer.layout == GateUpLayout::up_gate ? 1 : 0;
  fused.top_k = static_cast<int32_t>(layer.top_k);
  fused.act_format = layer.format;
  fused.hidden_dtype = layer.dtype;
  fused.topk_ids = pointer<const int32_t>(topk_ids);
  if (apply_router_weight_on_input) fused.topk_weights = pointer<const float>(topk_weights);
  fused.expert_map = pointer<const int32_t>(expert_map);
  fused.num_global_experts = expert_map ? static_cast<int32_t>(expert_map->size(0)) : 0;
  layer.fused = layer.layout != GateUpLayout::interleaved && fused_gemms_sm90_why_not(gemm1, gemm2) == nullptr;

  const CudaScope scope(hidden_states);
  layer.stream = scope.stream;
  if (layer.fused) {
    const bool aligned = reinterpret_cast<uintptr_t>(hidden_states.data_ptr()) % 16 == 0;
    fused.tactic = tactic_of(fused_gemms_sm90_facts(fused, aligned && !apply_router_weight_on_input, aligned), tactic);
    layer.sizes = fused_gemms_sm90_sizes(fused);
    layer.gather = fused.tactic.tiles == sm90::Tiles::gathered128;
    layer.split = !sm90::gated(fused.tactic.tiles);
  } else {
    MOE_EXPECT(tactic.empty(), kOp, "tactic", "none where the two GEMMs cannot be one launch", tactic);
    layer.sizes = {2, 0};
  }
  // torch's allocator reuses memory in stream order: it may go as soon as the last launch that reads it is in the stream.
  const Tensor memory = empty({Intermediates(layer, nullptr).bytes}, ScalarType::Byte, hidden_states);
  const Intermediates m(layer, static_cast<uint8_t*>(memory.data_ptr()));
  const float* weights = pointer<const float>(topk_weights);
  fused.known = run_permute(layer, m, hidden_states, topk_ids, expert_map, apply_router_weight_on_input ? weights : nullptr);
  if (layer.fused) run_fused_gemms(layer, m, hidden_states, fused);
  else run_gemms(layer, m, gemm1, gemm2);
  return run_finalize(layer, m, hidden_states, apply_router_weight_on_input ? nullptr : weights, routed_scaling_factor);
}

// The one thing that an op registered by Python returns. No exception comes through: what it has to say, it returns.
template <typename Output, size_t kArgs>
Output call_python(const char* op, std::array<StableIValue, kArgs> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Output>(stack[0]);
}

// The stable ABI does not tell. Asked only where gradients are recorded.
template <typename... Args>
bool any_requires_grad(const Args&... args) {
  std::vector<Tensor> tensors;
  const auto collect = [&]<typename Arg>(const Arg& arg) {
    if constexpr (std::is_same_v<Arg, Tensor>) tensors.push_back(arg);
    if constexpr (std::is_same_v<Arg, std::optional<Tensor>>)
      if (arg) tensors.push_back(*arg);
  };
  (collect(args), ...);
  return call_python<bool>("moe::any_requires_grad", std::array{torch::stable::detail::from(tensors)});
}

// The dispatcher lets None pass for a tensor, but for the first one.
template <typename Arg>
bool is_given(const Arg& arg) {
  if constexpr (std::is_same_v<Arg, Tensor>) return arg.defined();
  return true;
}

// A string becomes a tensor of its bytes on the CPU, because a call through the dispatcher leaks strings.
template <typename Arg>
StableIValue for_python(const Arg& arg) {
  if constexpr (std::is_same_v<Arg, Text>) {
    const auto size = static_cast<int64_t>(arg.size());
    const int64_t stride = 1;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &handle));
    const Tensor bytes(handle);
    std::memcpy(bytes.data_ptr(), arg.data(), arg.size());
    return torch::stable::detail::from(bytes);
  } else {
    return torch::stable::detail::from(arg);
  }
}

bool is_sm90(const Tensor& tensor) {
  const int device = tensor.is_cuda() ? tensor.get_device_index() : -1;
  int major = 0, minor = 0;
  return device >= 0 && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 && minor == 0;
}

// The ops that take a layer's arguments alone; the tactic is chosen.
template <auto kFunction>
struct Chosen;
template <typename... Args, Tensor (*kFunction)(const Text&, Args...)>
struct Chosen<kFunction> {
  static Tensor run(Args... args) { return kFunction({}, args...); }

  // None where another backend has to run this, or somebody has to say what is wrong with it.
  static std::optional<Tensor> try_run(Args... args) try {
    if (!(is_given(args) && ...)) return std::nullopt;
    const auto all = std::forward_as_tuple(args...);
    const Tensor &hidden_states = std::get<0>(all), &w13 = std::get<1>(all);
    const std::string& format = std::get<14>(all);
    if (!is_sm90(hidden_states) || !takes_acts(act_format_of(w13, parse_format(kOp, format)))) return std::nullopt;  // sooner than by an exception
    if (aoti_torch_grad_mode_is_enabled() && any_requires_grad(args...)) return std::nullopt;
    return run(args...);
  } catch (const Refusal&) {
    return std::nullopt;
  }

  // fused_moe itself. Checks and choice in Python cost the host more than this whole function, so it is asked only if needed.
  static Tensor run_default(Args... args) {
    if (std::optional<Tensor> output = try_run(args...)) return *output;
    if (const auto output = call_python<std::optional<Tensor>>("moe::choose_fused_moe", std::array{for_python(args)...}))
      return *output;
    const auto why_not = call_python<Text>("moe::why_not", std::array<StableIValue, 1>{});
    if (why_not == "interrupted") std::raise(SIGINT);  // once more, for Python as soon as it goes on
    throw std::runtime_error(why_not);
  }
};

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) {
  m.impl("fused_moe", TORCH_BOX(&moe::Chosen<&moe::run_layer>::run_default));
  m.impl("fused_moe.cutlass_sm90", TORCH_BOX(&moe::Chosen<&moe::run_layer>::run));
  m.impl("fused_moe_with_tactic", TORCH_BOX(&moe::run_layer));
}

#endif  // TORCH_MOE_SM90

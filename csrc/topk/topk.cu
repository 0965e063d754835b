// s = softmax or sigmoid(router_logits[t]) over Eg experts; choice = s + correction_bias; the topk_groups groups with
// the largest sum of their two largest choices stay; topk_ids[t] = the top_k largest choices, topk_weights[t] = s[ids]
// scaled.
//
// One warp a token, all in registers: lane l holds the kPerLane consecutive experts from l * kPerLane on, so that a
// lower lane, then a lower register, is a lower expert id, and ties need no comparison of ids. Choices are kept as
// unsigned keys of the same order; key 0 is below every number and marks what cannot be chosen.
#include <torch/csrc/stable/library.h>

#include "common/dtypes.h"
#include "common/launch.h"
#include "common/stream.h"
#include "common/tensor.h"
#include "topk/topk.h"

namespace moe {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float negative_infinity() { return __uint_as_float(0xff800000u); }

// Unsigned keys in the order of floats; 0 for no number.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x = __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// x = row[first, first + kPerLane) as float32, NaN past the last expert.
template <typename T, int kPerLane>
__device__ __forceinline__ void load(const T* row, int first, int num_experts, bool vectorized, float (&x)[kPerLane]) {
  struct alignas(std::min<size_t>(16, kPerLane * sizeof(T))) Vector {
    T x[kPerLane];
  };
  if (vectorized && first + kPerLane <= num_experts) {
    const Vector vector = *reinterpret_cast<const Vector*>(row + first);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = to_float(vector.x[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = first + i < num_experts ? to_float(row[first + i]) : __int_as_float(0x7fffffff);
  }
}

// score(logit) of one token. A NaN logit counts for nothing in the softmax of the others, and a score that is not a
// number (of a NaN, or in the softmax of infinities) is 0.
struct Scoring {
  bool sigmoid;
  float max = 0.f, sum = 0.f;

  template <int kPerLane>
  __device__ __forceinline__ Scoring(bool sigmoid, const float (&logits)[kPerLane]) : sigmoid(sigmoid) {
    if (sigmoid) return;
    max = negative_infinity();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) max = fmaxf(max, logits[i]);
    max = warp_max(max);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum += isnan(logits[i]) ? 0.f : expf(__fsub_rn(logits[i], max));
    sum = warp_sum(sum);
  }

  __device__ __forceinline__ float operator()(float logit) const {
    const float score =
        sigmoid ? __fdiv_rn(1.f, __fadd_rn(1.f, expf(-logit))) : __fdiv_rn(expf(__fsub_rn(logit, max)), sum);
    return isnan(score) ? 0.f : score;
  }
};

// Groups of consecutive experts: which of them stay, as bits. `shared` is this warp's memory.
//
// Lanes that share a group find its two largest members, then they merge by shuffles. If a group is the experts of 1, 2, 4, .. lanes, as
// DeepSeek's 8 groups of 32 are, those are the members a lane looks at. Else 32 / bit_ceil(num_groups) lanes take them from shared memory, whose
// padding (4 words after every 32) keeps groups of 32 in different banks.
__device__ __forceinline__ int padded(int expert) { return expert + expert / 32 * 4; }

template <int kPerLane>
__device__ __forceinline__ unsigned groups_that_stay(const TopkArgs& args, const float (&choices)[kPerLane], float* shared, int lane) {
  const int group_size = args.num_experts / args.num_groups;
  float first = negative_infinity(), second = negative_infinity();
  const auto add = [&](float choice) {
    second = fmaxf(second, fminf(first, choice));
    first = fmaxf(first, choice);
  };
  int lanes_per_group = group_size / kPerLane;
  if (group_size % kPerLane == 0 && kLanes % lanes_per_group == 0) {
#pragma unroll
    for (float choice : choices) add(choice);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) shared[padded(lane * kPerLane + i)] = choices[i];
    __syncwarp();  // choices of all lanes are in shared memory
    lanes_per_group = kLanes;
    while (lanes_per_group * args.num_groups > kLanes) lanes_per_group /= 2;
    const int group = lane / lanes_per_group;
    for (int member = lane % lanes_per_group; group < args.num_groups && member < group_size; member += lanes_per_group)
      add(shared[padded(group * group_size + member)]);
  }
  for (int lanes = lanes_per_group / 2; lanes > 0; lanes /= 2) {
    const float other_first = __shfl_xor_sync(kAllLanes, first, lanes);
    const float other_second = __shfl_xor_sync(kAllLanes, second, lanes);
    second = fmaxf(fmaxf(second, other_second), fminf(first, other_first));
    first = fmaxf(first, other_first);
  }
  const float score = group_size == 1 ? first : __fadd_rn(first, second);
  const float my_score = __shfl_sync(kAllLanes, score, lane * lanes_per_group % kLanes);
  const uint32_t key = lane < args.num_groups ? order_key(my_score) : 0;  // lane g: group g
  int rank = 0;
  for (int other = 0; other < args.num_groups; ++other) {
    const uint32_t other_key = __shfl_sync(kAllLanes, key, other);
    rank += other_key > key || (other_key == key && other < lane);
  }
  return __ballot_sync(kAllLanes, lane < args.num_groups && rank < args.topk_groups);
}

// The largest key of a lane and its register, the first one among equals.
struct Best {
  uint32_t key = 0;
  int index = 0;

  template <int kPerLane>
  __device__ __forceinline__ void find(const uint32_t (&keys)[kPerLane]) {
    key = keys[0];
    index = 0;
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
      if (keys[i] > key) {
        key = keys[i];
        index = i;
      }
    }
  }
};

// Lane k gets the expert with the k-th largest key.
template <int kPerLane>
__device__ __forceinline__ int select(uint32_t (&keys)[kPerLane], int top_k, int lane) {
  int id = 0;
  Best best;
  best.find(keys);
  for (int k = 0; k < top_k; ++k) {
    const uint32_t largest = __reduce_max_sync(kAllLanes, best.key);
    const int owner = __ffs(__ballot_sync(kAllLanes, best.key == largest)) - 1;
    const int winner = __shfl_sync(kAllLanes, lane * kPerLane + best.index, owner);
    if (lane == k) id = winner;
    if (lane == owner) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) keys[i] = i == best.index ? 0 : keys[i];
      best.find(keys);
    }
  }
  return id;
}

template <typename T, int kPerLane>
__global__ void __launch_bounds__(kWarps* kLanes) topk_kernel(TopkArgs args, bool vectorized) {
  __shared__ __align__(16) float shared_choices[kWarps][kPerLane * 36];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, first = lane * kPerLane;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  pdl_wait();
  pdl_launch_next();
  if (token >= args.num_tokens) return;
  const T* row = static_cast<const T*>(args.router_logits) + token * args.num_experts;
  float choices[kPerLane];
  load<T, kPerLane>(row, first, args.num_experts, vectorized, choices);
  float bias[kPerLane] = {};
  if (args.correction_bias) load<float, kPerLane>(args.correction_bias, first, args.num_experts, vectorized, bias);
  const Scoring score(args.sigmoid, choices);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float choice = __fadd_rn(score(choices[i]), bias[i]);
    choices[i] = isnan(choices[i]) || isnan(choice) ? negative_infinity() : choice;
  }
  unsigned stay = kAllLanes;
  if (args.num_groups > 1) stay = groups_that_stay(args, choices, shared_choices[warp], lane);
  uint32_t keys[kPerLane];
  const int group_size = args.num_experts / args.num_groups;
  int group = first / group_size, member = first % group_size;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool candidate = first + i < args.num_experts && (stay >> (args.num_groups > 1 ? group : 0) & 1);
    keys[i] = candidate ? order_key(choices[i]) : 0;
    if (++member == group_size) {
      member = 0;
      ++group;
    }
  }
  const int id = select(keys, args.top_k, lane);
  if (lane < args.top_k) args.topk_ids[token * args.top_k + lane] = id;
  float weight = lane < args.top_k ? score(to_float(row[id])) : 0.f;
  if (args.renormalize) weight = __fdiv_rn(weight, __fadd_rn(warp_sum(weight), 1e-20f));
  if (lane < args.top_k) args.topk_weights[token * args.top_k + lane] = __fmul_rn(weight, args.routed_scaling_factor);
}

// dispatch_per_lane(n, [&]<int kPerLane>() { ... }): the smallest power of two whose 32 lanes hold n experts.
template <typename Function>
cudaError_t dispatch_per_lane(int num_experts, Function&& function) {
  if (num_experts <= 1 * kLanes) return function.template operator()<1>();
  if (num_experts <= 2 * kLanes) return function.template operator()<2>();
  if (num_experts <= 4 * kLanes) return function.template operator()<4>();
  if (num_experts <= 8 * kLanes) return function.template operator()<8>();
  if (num_experts <= 16 * kLanes) return function.template operator()<16>();
  if (num_experts <= kTopkMaxExperts) return function.template operator()<32>();
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t topk(const TopkArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.num_tokens, kWarps)));
  return dispatch_dtype(args.dtype, [&]<typename T>() {
    return dispatch_per_lane(args.num_experts, [&]<int kPerLane>() {
      const bool vectorized =
          args.num_experts % kPerLane == 0 && aligned_16(args.router_logits) && aligned_16(args.correction_bias);
      return launch(topk_kernel<T, kPerLane>, grid, dim3(kWarps * kLanes), 0, stream, args, vectorized);
    });
  });
}

namespace {

constexpr const char* kOp = "topk";

void check_sizes(int64_t experts, int64_t top_k, int64_t groups, int64_t topk_groups) {
  MOE_EXPECT(experts >= 1 && experts <= kTopkMaxExperts, kOp, "router_logits", "1 to " << kTopkMaxExperts << " experts",
             experts);
  MOE_EXPECT(groups >= 1 && groups <= kTopkMaxGroups && experts % groups == 0, kOp, "num_groups",
             "a divisor of " << experts << ", at most " << kTopkMaxGroups, groups);
  MOE_EXPECT(topk_groups >= 1 && topk_groups <= groups, kOp, "topk_groups", "1 to " << groups, topk_groups);
  const int64_t candidates = std::min<int64_t>(kTopkMaxTopk, experts / groups * topk_groups);
  MOE_EXPECT(top_k >= 1 && top_k <= candidates, kOp, "top_k", "1 to " << candidates, top_k);
}

std::tuple<Tensor, Tensor> topk_cuda(const Tensor& router_logits, int64_t top_k, const Text& scoring,
                                     const std::optional<Tensor>& correction_bias, int64_t num_groups,
                                     int64_t topk_groups, bool renormalize, double routed_scaling_factor) {
  expect_tensor(kOp, "router_logits", router_logits, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float},
                {"T", "Eg"}, router_logits);
  expect_tensor(kOp, "correction_bias", correction_bias, {ScalarType::Float}, {router_logits.size(1)}, router_logits);
  MOE_EXPECT(scoring == "softmax" || scoring == "sigmoid", kOp, "scoring", "one of softmax, sigmoid", scoring);
  check_sizes(router_logits.size(1), top_k, num_groups, topk_groups);
  TopkArgs args;
  args.router_logits = router_logits.data_ptr();
  args.dtype = float_dtype(router_logits);
  args.correction_bias = pointer<const float>(correction_bias);
  args.num_tokens = router_logits.size(0);
  args.num_experts = static_cast<int32_t>(router_logits.size(1));
  args.top_k = static_cast<int32_t>(top_k);
  args.sigmoid = scoring == "sigmoid";
  args.num_groups = static_cast<int32_t>(num_groups);
  args.topk_groups = static_cast<int32_t>(topk_groups);
  args.renormalize = renormalize;
  args.routed_scaling_factor = static_cast<float>(routed_scaling_factor);
  Tensor weights = empty({args.num_tokens, top_k}, ScalarType::Float, router_logits);
  Tensor ids = empty({args.num_tokens, top_k}, ScalarType::Int, router_logits);
  args.topk_weights = pointer<float>(weights);
  args.topk_ids = pointer<int32_t>(ids);
  const CudaScope scope(router_logits);
  check_cuda(kOp, topk(args, scope.stream));
  return {weights, ids};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { m.impl("topk.cuda", TORCH_BOX(&moe::topk_cuda)); }

// From the string and number arguments of schemas to the plain structs of launchers, with the errors of docs/ops.md.
#pragma once
#include <optional>
#include <string>

#include "act_mul/act_mul.h"
#include "common/check.h"

namespace moe {

inline ActivationParams parse_activation(const char* op, const std::string& name, double alpha, double beta,
                                         const std::optional<double>& limit) {
  static constexpr const char* kNames[] = {"silu", "gelu", "gelu_tanh", "relu", "swiglustep", "relu2_no_mul", "gelu_no_mul", "silu_no_mul"};
  int kind = 0;
  while (kind < 8 && name != kNames[kind]) ++kind;
  MOE_EXPECT(kind < 8, op, "activation", "one of silu, gelu, gelu_tanh, relu, swiglustep, relu2_no_mul, gelu_no_mul, silu_no_mul", name);
  ActivationParams params;
  params.kind = static_cast<Activation>(kind);
  const bool is_silu = params.kind == Activation::silu, is_step = params.kind == Activation::swiglustep;
  MOE_EXPECT(is_silu || alpha == 1.0, op, "alpha", "1.0 for " << name, alpha);
  MOE_EXPECT(is_silu || beta == 0.0, op, "beta", "0.0 for " << name, beta);
  MOE_EXPECT(is_silu || is_step || !limit, op, "limit", "none for " << name, *limit);
  MOE_EXPECT(!is_step || limit, op, "limit", "a number for " << name, "None");
  MOE_EXPECT(!limit || *limit >= 0, op, "limit", "a number >= 0", *limit);
  params.alpha = static_cast<float>(alpha);
  params.beta = static_cast<float>(beta);
  params.has_limit = limit.has_value();
  params.limit = static_cast<float>(limit.value_or(0.0));
  return params;
}

// `activation`: its name; what is not gated has no layout but the default.
inline GateUpLayout parse_layout(const char* op, const char* argument, const std::string& name, const ActivationParams& params,
                                 const std::string& activation) {
  static constexpr const char* kNames[] = {"gate_up", "up_gate", "interleaved"};  // in the order of GateUpLayout
  int layout = 0;
  while (layout < 3 && name != kNames[layout]) ++layout;
  MOE_EXPECT(layout < 3, op, argument, "one of gate_up, up_gate, interleaved", name);
  MOE_EXPECT(layout == 0 || is_gated(params.kind), op, argument, "gate_up for " << activation << ", which is not gated", name);
  return static_cast<GateUpLayout>(layout);
}

}  // namespace moe

// Strings that come and go through the stable ABI: torch's own conversion to std::string leaks a copy of each.
#pragma once
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace moe {

struct Text : std::string {
  using std::string::string;
};

}  // namespace moe

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<moe::Text> {
  static moe::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    moe::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)

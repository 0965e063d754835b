// SM90 grouped GEMM: what it can run, which tile configuration it takes, and the entry points.
#include <algorithm>

#include "grouped_gemm/launch_sm90.cuh"

namespace moe {
namespace sm90 {

EncodeTensorMap encode_tensor_map() {
  static const EncodeTensorMap function = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTensorMap>(symbol) : nullptr;
  }();
  return function;
}

int32_t choose_tile_rows(int64_t num_rows, int32_t num_experts, int32_t part_rows, int32_t parts, int32_t num_sms) {
  const int64_t token_tiles = max_token_tiles(num_rows, num_experts);
  const int64_t tiles256 = token_tiles * parts * ((part_rows + 255) / 256), tiles128 = token_tiles * parts * ((part_rows + 127) / 128);
  if (tiles256 >= 8 * num_sms) return 256;   // enough of them: the last round is a small part of all
  return tiles128 >= num_sms ? 128 : 64;     // decode: more thread blocks pull more bytes
}

}  // namespace sm90

const char* grouped_gemm_sm90_why_not(const GroupedGemmArgs& args) {
  const int element = args.ab_dtype == DType::float8_e4m3 ? 1 : 2;
  if (args.ab_dtype != DType::bfloat16 && args.ab_dtype != DType::float16 && args.ab_dtype != DType::float8_e4m3)
    return "a and b must be bfloat16, float16 or float8_e4m3fn";
  if (args.k * element % 16 != 0) return "rows of a and b must be a multiple of 16 bytes long (TMA)";
  if (reinterpret_cast<uintptr_t>(args.a) % 16 != 0 || reinterpret_cast<uintptr_t>(args.b) % 16 != 0)
    return "a and b must start at multiples of 16 bytes (TMA)";
  if (args.n % args.b_parts != 0 || args.n / args.b_parts % 8 != 0) return "each part of b must have a multiple of 8 rows (16-byte stores)";
  if (args.num_experts > sm90::kMaxExperts) return "at most 1024 experts";
  return nullptr;
}

size_t grouped_gemm_sm90_workspace_bytes(const GroupedGemmArgs&) { return sizeof(int32_t); }  // the tile counter

namespace {

cudaError_t count_sms(int* num_sms) {
  int device = 0;
  if (auto e = cudaGetDevice(&device)) return e;
  return cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace

cudaError_t grouped_gemm_sm90_counted(const GroupedGemmArgs& args, int32_t* tile_counter, cudaStream_t stream) {
  if (args.num_rows == 0 || args.num_experts == 0 || args.n == 0) return cudaSuccess;
  if (grouped_gemm_sm90_why_not(args) != nullptr) return cudaErrorInvalidValue;
  int num_sms = 0;
  if (auto e = count_sms(&num_sms)) return e;
  const int32_t rows = sm90::choose_tile_rows(args.num_rows, args.num_experts, args.n / args.b_parts, args.b_parts, num_sms);
  switch (args.ab_dtype) {
    case DType::float8_e4m3: return sm90::launch_element<__nv_fp8_e4m3>(rows, args, tile_counter, num_sms, stream);
    case DType::bfloat16: return sm90::launch_element<__nv_bfloat16>(rows, args, tile_counter, num_sms, stream);
    default: return sm90::launch_element<__half>(rows, args, tile_counter, num_sms, stream);
  }
}

cudaError_t grouped_gemm_sm90(const GroupedGemmArgs& args, void* workspace, cudaStream_t stream) {
  if (auto e = cudaMemsetAsync(workspace, 0, sizeof(int32_t), stream)) return e;
  return grouped_gemm_sm90_counted(args, static_cast<int32_t*>(workspace), stream);
}

const char* fused_gemms_sm90_why_not(const GroupedGemmArgs& gemm1, const GroupedGemmArgs& gemm2) {
  if (const char* reason = grouped_gemm_sm90_why_not(gemm1)) return reason;
  if (const char* reason = grouped_gemm_sm90_why_not(gemm2)) return reason;
  if (gemm1.b_parts != 2) return "w13 must hold gate and up, one above the other";
  return nullptr;
}

FusedGemmsSizes fused_gemms_sm90_sizes(const FusedGemms& f) {
  int num_sms = 0;
  if (count_sms(&num_sms) != cudaSuccess) return {};
  auto sizes = [&]<class C>() { return sm90::fused_sizes<C>(f); };
  return f.gemm1.ab_dtype == DType::float8_e4m3 ? sm90::with_fused_config<__nv_fp8_e4m3>(f, num_sms, sizes)
                                                : sm90::with_fused_config<__nv_bfloat16>(f, num_sms, sizes);
}

cudaError_t fused_gemms_sm90(const FusedGemms& f, cudaStream_t stream) {
  if (f.gemm1.num_rows == 0 || f.gemm1.num_experts == 0) return cudaSuccess;
  if (fused_gemms_sm90_why_not(f.gemm1, f.gemm2) != nullptr) return cudaErrorInvalidValue;
  int num_sms = 0;
  if (auto e = count_sms(&num_sms)) return e;
  switch (f.gemm1.ab_dtype) {
    case DType::float8_e4m3: return sm90::launch_fused_element<__nv_fp8_e4m3>(f, num_sms, stream);
    case DType::bfloat16: return sm90::launch_fused_element<__nv_bfloat16>(f, num_sms, stream);
    default: return sm90::launch_fused_element<__half>(f, num_sms, stream);
  }
}

}  // namespace moe

// SM90 grouped GEMM: what it can run, and the entry points.
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

}  // namespace sm90

const char* grouped_gemm_sm90_why_not(const GroupedGemmArgs& args) {
  const int element = args.ab_dtype == DType::float8_e4m3 ? 1 : 2;
  if (args.ab_dtype != DType::bfloat16 && args.ab_dtype != DType::float16 && args.ab_dtype != DType::float8_e4m3)
    return "a and b must be bfloat16, float16 or float8_e4m3fn";
  if (args.packing != Packing::none) {
    if (args.ab_dtype != (args.packing == Packing::mxfp4_e4m3 ? DType::float8_e4m3 : DType::bfloat16))
      return "packed weights are multiplied by activations of the kind they are packed for";
    if (args.n / args.b_parts % kPackedBlock != 0 || args.k % kPackedBlock != 0) return "packed weights come in blocks of 64 x 64";
  }
  if (args.k == 0) return "K must be at least 1";
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

sm90::GemmFacts facts_of(const GroupedGemmArgs& args, int num_sms) {
  const int64_t bytes = args.packing != Packing::none ? 0 : args.k * (args.ab_dtype == DType::float8_e4m3 ? 1 : 2);
  return {args.num_rows, args.num_experts, args.n / args.b_parts, args.b_parts, bytes, num_sms};
}

// Calls f.operator()<Element, Packing>() for what the arguments hold.
template <class F>
auto with_element(const GroupedGemmArgs& args, F&& f) {
  if (args.packing == Packing::nvfp4) return f.template operator()<__nv_bfloat16, Packing::nvfp4>();
  if (args.packing == Packing::mxfp4) return f.template operator()<__nv_bfloat16, Packing::mxfp4>();
  if (args.packing == Packing::mxfp8) return f.template operator()<__nv_bfloat16, Packing::mxfp8>();
  if (args.packing == Packing::mxfp4_e4m3) return f.template operator()<__nv_fp8_e4m3, Packing::mxfp4_e4m3>();
  if (args.ab_dtype == DType::float8_e4m3) return f.template operator()<__nv_fp8_e4m3, Packing::none>();
  if (args.ab_dtype == DType::float16) return f.template operator()<__half, Packing::none>();
  return f.template operator()<__nv_bfloat16, Packing::none>();
}

}  // namespace

cudaError_t grouped_gemm_sm90_counted(const GroupedGemmArgs& args, int32_t* tile_counter, cudaStream_t stream) {
  if (args.num_rows == 0 || args.num_experts == 0 || args.n == 0) return cudaSuccess;
  if (grouped_gemm_sm90_why_not(args) != nullptr) return cudaErrorInvalidValue;
  int num_sms = 0;
  if (auto e = count_sms(&num_sms)) return e;
  const int32_t rows = sm90::choose_tile_rows(facts_of(args, num_sms));
  return with_element(args, [&]<class Element, Packing kPacking>() { return sm90::launch_element<Element, kPacking>(rows, args, tile_counter, num_sms, stream); });
}

cudaError_t grouped_gemm_sm90(const GroupedGemmArgs& args, void* workspace, cudaStream_t stream) {
  int num_sms = 0;
  if (auto e = count_sms(&num_sms)) return e;
  if (sm90::tiles_are_dealt(facts_of(args, num_sms)))
    return grouped_gemm_sm90_counted(args, nullptr, stream);
  if (auto e = cudaMemsetAsync(workspace, 0, sizeof(int32_t), stream)) return e;
  return grouped_gemm_sm90_counted(args, static_cast<int32_t*>(workspace), stream);
}

const char* fused_gemms_sm90_why_not(const GroupedGemmArgs& gemm1, const GroupedGemmArgs& gemm2) {
  if (const char* reason = grouped_gemm_sm90_why_not(gemm1)) return reason;
  if (const char* reason = grouped_gemm_sm90_why_not(gemm2)) return reason;
  if (gemm1.b_parts != 2) return "w13 must hold gate and up, one above the other";
  return nullptr;
}

sm90::LayerFacts fused_gemms_sm90_facts(const FusedGemms& f, bool can_gather, bool can_split) {
  using sm90::Elements;
  int num_sms = 0;
  if (count_sms(&num_sms) != cudaSuccess) num_sms = 0;  // the launch will say so
  const bool packed = f.gemm1.packing != Packing::none, float8 = f.gemm1.ab_dtype == DType::float8_e4m3;
  const Elements elements = packed ? (float8 ? Elements::packed_float8 : Elements::packed) : float8 ? Elements::float8 : Elements::bits16;
  return {elements, f.gemm1.num_rows, f.gemm1.num_experts, f.gemm2.n, f.gemm2.k, num_sms, can_gather, can_split, f.local_share(), is_rounded(f.act_format)};
}

FusedGemmsSizes fused_gemms_sm90_sizes(const FusedGemms& f) {
  return with_element(f.gemm1, [&]<class Element, Packing kPacking>() {
    return sm90::with_fused_config<Element, kPacking>(f.tactic.tiles, [&]<class C>() { return sm90::fused_sizes<C>(f); });
  });
}

cudaError_t fused_gemms_sm90(const FusedGemms& f, cudaStream_t stream) {
  if (f.gemm1.num_rows == 0 || f.gemm1.num_experts == 0) return cudaSuccess;
  if (fused_gemms_sm90_why_not(f.gemm1, f.gemm2) != nullptr) return cudaErrorInvalidValue;
  int num_sms = 0;
  if (auto e = count_sms(&num_sms)) return e;
  return with_element(f.gemm1, [&]<class Element, Packing kPacking>() { return sm90::launch_fused_element<Element, kPacking>(f, num_sms, stream); });
}

}  // namespace moe

// The tile configurations of the SM90 grouped GEMM for packed mxfp8 weights, bf16 tokens.
#include "grouped_gemm/launch_sm90.cuh"

MOE_SM90_LAUNCHERS(__nv_bfloat16, Packing::mxfp8)

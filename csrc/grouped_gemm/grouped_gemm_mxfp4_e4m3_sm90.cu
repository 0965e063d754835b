// The tile configurations of the SM90 grouped GEMM for packed mxfp4 weights, float8 tokens.
#include "grouped_gemm/launch_sm90.cuh"

MOE_SM90_LAUNCHERS(__nv_fp8_e4m3, Packing::mxfp4_e4m3)

// The fp8_block tile configurations of the SM90 grouped GEMM.
#include "grouped_gemm/launch_sm90.cuh"

MOE_SM90_LAUNCHERS(__nv_fp8_e4m3, Packing::none)

// The fp16 tile configurations of the SM90 grouped GEMM.
#include "grouped_gemm/launch_sm90.cuh"

MOE_SM90_LAUNCHERS(__half, Packing::none)

# fastkd._cuda, if nvcc is there. FASTKD_CUDA (environment): auto, 0 or 1.
set(FASTKD_CUDA "$ENV{FASTKD_CUDA}")
build_info(cuda built false)
summary("CUDA kernels: not built")

// The cp.async primitives are in cudacpu.h; this file stands in for NVIDIA's, which needs nvcc.

// What the two generations of the projection kernels share: element types, the activation, the C interface's errors.
#pragma once

#include "cutlass/cutlass.h"
#include "cutlass/array.h"
#include "cutlass/bfloat16.h"
#include "cutlass/fast_math.h"
#include "cutlass/functional.h"
#include "cutlass/half.h"

#ifndef ELEMENT
#error "-DELEMENT=cutlass::bfloat16_t or cutlass::half_t"
#endif
#ifndef RESIDUAL
#error "-DRESIDUAL=0 (SiLU) or 1 (residual sum)"
#endif

// SiLU(x) = x/2 * (1 + tanh(x/2)): one special-function operation, where an exponential and a division cost two.
template <class T>
struct SiluByTanh {
  CUTLASS_HOST_DEVICE T operator()(T const& x) const {
    T half = T(0.5f) * x;
    return half * cutlass::fast_tanh(half) + half;
  }
};

template <class T, int N>
struct SiluByTanh<cutlass::Array<T, N>> {
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(cutlass::Array<T, N> const& x) const {
    cutlass::Array<T, N> out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) out[i] = SiluByTanh<T>{}(x[i]);
    return out;
  }
};

struct LinearArguments {
  void const* x;         // (rows, depth), rows x_row elements apart
  void const* weight;    // (columns, depth), dense
  void const* bias;      // (columns,)
  void const* residual;  // (rows, columns), rows residual_row elements apart; only where RESIDUAL
  void* out;             // (rows, columns), dense
  long long x_row, residual_row;
  int rows, columns, depth;
  int processors, raster, swizzle;  // raster: 0 heuristic, 1 along rows, 2 along columns
};

// Codes above 1000 are a cutlass::Status, others a cudaError_t.
inline int answer(cutlass::Status status) {
  if (status == cutlass::Status::kSuccess) return int(cudaPeekAtLastError());
  return 1000 + int(status);
}

extern "C" char const* hstu_error(int code) {
  return code > 1000 ? cutlassGetStatusString(cutlass::Status(code - 1000)) : cudaGetErrorString(cudaError_t(code));
}

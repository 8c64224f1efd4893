// SiLU(X W^T + b), or residual + X W^T + b, for Ampere: cp.async in several stages, mma.sync, the epilogue as a visitor tree.
#include "linear.h"

#include "cutlass/gemm/device/gemm_universal.h"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"

namespace visitor = cutlass::epilogue::threadblock;
using cute::_0, cute::_1, cute::Stride;

using Element = ELEMENT;
using BlockShape = cutlass::gemm::GemmShape<TILE_M, TILE_N, TILE_K>;
using Warp = cutlass::gemm::GemmShape<WARP_M, WARP_N, TILE_K>;
using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
constexpr auto Round = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int Aligned = 16 / sizeof(Element);

using Map = visitor::OutputTileThreadLayout<BlockShape, Warp, Element, Aligned, 1>;
using Matrix = Stride<int64_t, _1, int64_t>;
using Biased = visitor::Sm80EVT<visitor::VisitorCompute<cutlass::plus, float, float, Round>, visitor::VisitorAccFetch,
                                visitor::VisitorRowBroadcast<Map, Element, Stride<_0, _1, int32_t>>>;
using Silu = visitor::Sm80EVT<visitor::VisitorCompute<SiluByTanh, Element, float, Round>, Biased>;
using Sum = visitor::Sm80EVT<visitor::VisitorCompute<cutlass::plus, Element, float, Round>, Biased,
                             visitor::VisitorAuxLoad<Map, Element, Matrix>>;
using Store = visitor::Sm80EVT<visitor::VisitorAuxStore<Map, Element, Round, Matrix>, cute::conditional_t<RESIDUAL, Sum, Silu>>;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;

using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
    Element, Row, cutlass::ComplexTransform::kNone, Aligned, Element, Column, cutlass::ComplexTransform::kNone, Aligned, Element,
    Row, Aligned, float, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, BlockShape, Warp, Instruction, Store,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, STAGES, cutlass::arch::OpMultiplyAdd, 1>::GemmKernel;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

extern "C" int hstu_linear(LinearArguments const* a, void* stream) {
  auto input = [](void const* pointer) { return const_cast<Element*>(static_cast<Element const*>(pointer)); };
  typename Biased::Arguments biased{{}, {input(a->bias), Element(0), {_0{}, _1{}, 0}}, {}};
  typename visitor::VisitorAuxStore<Map, Element, Round, Matrix>::Arguments store{static_cast<Element*>(a->out),
                                                                                  {int64_t(a->columns), _1{}, int64_t(0)}};
#if RESIDUAL
  typename Store::Arguments tree{
      {biased, {input(a->residual), Element(0), {int64_t(a->residual_row), _1{}, int64_t(0)}}, {}}, store};
#else
  typename Store::Arguments tree{{biased, {}}, store};
#endif
  typename Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {a->rows, a->columns, a->depth}, 1, tree, a->x,
                                     a->weight, nullptr, nullptr, 0, 0, 0, 0, a->x_row, a->depth, 0, 0);
  Gemm gemm;
  if (auto status = gemm.can_implement(arguments); status != cutlass::Status::kSuccess) return answer(status);
  if (auto status = gemm.initialize(arguments); status != cutlass::Status::kSuccess) return answer(status);
  return answer(gemm.run(static_cast<cudaStream_t>(stream)));
}

extern "C" int hstu_shared_bytes() { return int(sizeof(typename Kernel::SharedStorage)); }

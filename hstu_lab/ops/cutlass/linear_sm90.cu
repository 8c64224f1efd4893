// SiLU(X W^T + b), or residual + X W^T + b, for Hopper: TMA loads, warp-specialised wgmma, the epilogue as a visitor tree.
#include "linear.h"

#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

using Element = ELEMENT;
using BlockShape = Shape<Int<TILE_M>, Int<TILE_N>, Int<TILE_K>>;
using Cluster = Shape<Int<CLUSTER_M>, Int<CLUSTER_N>, _1>;
using MainloopSchedule = conditional_t<PINGPONG, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                       cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
using EpilogueSchedule = conditional_t<PINGPONG, cutlass::epilogue::TmaWarpSpecialized,
                                       cutlass::epilogue::TmaWarpSpecializedCooperative>;
constexpr auto Round = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int Aligned = 16 / sizeof(Element);

using Biased = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, float, float, Round>,
                               fusion::Sm90RowBroadcast<0, BlockShape, Element, float>, fusion::Sm90AccFetch>;
using Silu = fusion::Sm90EVT<fusion::Sm90Compute<SiluByTanh, Element, float, Round>, Biased>;
using Sum = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, Element, float, Round>, fusion::Sm90SrcFetch<Element>, Biased>;
using Source = conditional_t<RESIDUAL, Element, void>;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BlockShape, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
    float, Source, Row, Aligned, Element, Row, Aligned, EpilogueSchedule, conditional_t<RESIDUAL, Sum, Silu>>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, Aligned, Element, Column, Aligned, float, BlockShape, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
    MainloopSchedule>::CollectiveOp;
using Kernel =
    cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, cutlass::gemm::PersistentScheduler>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

extern "C" int hstu_linear(LinearArguments const* a, void* stream) {
  auto input = [](void const* pointer) { return static_cast<Element const*>(pointer); };
  typename Biased::Arguments biased{{input(a->bias), Element(0), {}}, {}, {}};
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {a->rows, a->columns, a->depth, 1},
      {input(a->x), make_stride(int64_t(a->x_row), _1{}, int64_t(0)), input(a->weight),
       make_stride(int64_t(a->depth), _1{}, int64_t(0))},
      {{},
       static_cast<typename Epilogue::ElementC const*>(a->residual),
       make_stride(int64_t(a->residual_row), _1{}, int64_t(0)),
       static_cast<Element*>(a->out),
       make_stride(int64_t(a->columns), _1{}, int64_t(0))}};
#if RESIDUAL
  arguments.epilogue.thread = {{}, biased, {}};
#else
  arguments.epilogue.thread = {biased, {}};
#endif
  arguments.hw_info.sm_count = a->processors;
  using Raster = typename cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90Params::RasterOrderOptions;
  arguments.scheduler.raster_order = a->raster == 1   ? Raster::AlongM
                                     : a->raster == 2 ? Raster::AlongN
                                                      : Raster::Heuristic;
  arguments.scheduler.max_swizzle_size = a->swizzle;
  Gemm gemm;
  if (auto status = gemm.can_implement(arguments); status != cutlass::Status::kSuccess) return answer(status);
  if (Gemm::get_workspace_size(arguments) != 0) return answer(cutlass::Status::kErrorWorkspaceNull);
  if (auto status = gemm.initialize(arguments); status != cutlass::Status::kSuccess) return answer(status);
  return answer(gemm.run(static_cast<cudaStream_t>(stream)));
}

extern "C" int hstu_shared_bytes() { return int(Kernel::SharedStorageSize); }

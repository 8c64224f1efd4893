"""vLLM's worker, of the CPU or a GPU, with the sampler and the steady steps of recommenders (`EngineArgs.worker_cls`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.platforms import current_platform

from hstu_lab.vllm_plugin.sampling import RecommendationSampler
from hstu_lab.vllm_plugin.slates import SlateLoop
from hstu_lab.vllm_plugin.steady import SteadySteps

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class RecommendationWorker(Worker):
    """Once told to `use_recommendation_sampler`, makes the steps that `SteadySteps` takes by it and all others as vLLM does."""

    steady: SteadySteps | None = None

    def use_recommendation_sampler(self, sizes: Sequence[int]) -> None:
        """Sample by `RecommendationSampler`; its loop, and steady steps, become CUDA graphs for those numbers of requests."""
        runner = self.model_runner
        loop = SlateLoop(runner.get_model(), self.vllm_config, runner.get_model().config.slate_size)
        runner.sampler = RecommendationSampler(loop)
        graphs = self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        if self.parallel_config.world_size == 1 and (sizes or not graphs):  # no way round vLLM's graphs without own ones
            self.steady = SteadySteps(runner, self.vllm_config)
        if sizes:
            with torch.inference_mode():
                loop.capture(sizes)
                self.steady.capture(sizes)

    @torch.inference_mode()
    def execute_model(self, scheduler_output):
        """One step's forward pass; None where `sample_tokens` has the answer."""
        if self.steady is not None and self.steady.take(scheduler_output):
            return None
        return super().execute_model(scheduler_output)

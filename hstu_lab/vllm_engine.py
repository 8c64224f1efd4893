"""The real vLLM engine behind two calls: `topk` (one pass, the best next items) and `slate` (one item after another).

One engine lives in this process and steps in a thread of its own; every caller, plain or async, adds requests to it, so
that concurrent requests share batches (continuous batching).
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hstu_lab.config import TASKS, ModelConfig
from hstu_lab.model import load_config

if TYPE_CHECKING:
    from hstu_lab.vllm_plugin.cached_scores import Launched

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
"""Set, unless the caller has, before vLLM is imported: one process, quiet, no network, torch's own thread count."""


_open_engines = 0
_STEP = threading.Lock()
"""Engines take turns: vLLM keeps the context of a forward pass in a global of the process."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep two warnings that come with every start, and say nothing to act on, from stderr; everything else passes."""
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    with tempfile.TemporaryFile() as file:  # vLLM's C++ writes to the descriptor
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            os.write(2, b"".join(line for line in file if b"NUMA binding" not in line))


class EngineError(RuntimeError):
    """vLLM is missing, refused the request or died; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How to run vLLM; see vLLM's engine arguments of the same names. kv_cache_memory_bytes sizes the paged cache.

    `cuda_graphs` is NONE, FULL_DECODE_ONLY (steps in which every request adds one token are replayed) or FULL (all steps of at
    most `graph_tokens` are, whatever their mixture of prompts and single tokens). `prompt_embeds` lets prompts be tensors, which
    keeps the encoder out of the graphs. `micro_batch` is the most candidates that one request of vLLM scores. `fused_slates`: the
    device generates a whole slate in one step of the engine (one GPU; prompts of tokens); otherwise every item is a step.
    `cached_scores`: candidates whose history is cached are scored beside vLLM's scheduler (one GPU), otherwise as prompt tokens.
    """

    kv_cache_memory_bytes: int = 256 << 20
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    dtype: str = "float32"
    ops: str = "reference"
    cuda_graphs: str = "NONE"
    prompt_embeds: bool = True
    tensor_parallel_size: int = 1
    micro_batch: int = 128
    fused_slates: bool = True
    cached_scores: bool = True
    graph_tokens: int = 2048


@dataclasses.dataclass(frozen=True)
class Generated:
    """What one request got. `items` in order; `logprobs` (log-softmax over unseen items) of each; `cached_tokens` were reused."""

    items: list[int]
    logprobs: list[float]
    cached_tokens: int


def graph_sizes(most: int) -> list[int]:
    """Tokens of the steps that are captured as CUDA graphs, up to `most`; larger steps are padded by a quarter at worst."""
    steps = [1, 2, 4, 8, 12, 16, 24, 32, 48, *(quarter * 2**i for i in range(4, 20) for quarter in (4, 5, 6, 7)), most]
    return sorted({size for size in steps if size <= most})


def loop_sizes(options: EngineOptions) -> list[int]:
    """Requests for whose slates a CUDA graph is captured."""
    if options.cuda_graphs == "NONE" or not options.fused_slates or options.tensor_parallel_size > 1:
        return []
    return [size for size in graph_sizes(options.max_num_seqs) if size.bit_count() <= 2]


def micro_batch(config: ModelConfig, options: EngineOptions) -> int:
    """Most candidates of one request of vLLM."""
    if options.enable_chunked_prefill:
        return options.micro_batch
    fitting = options.max_num_batched_tokens - config.max_seq_len - 1  # a request must fit into one step
    return max(min(options.micro_batch, fitting), 0)


def room(config: ModelConfig, options: EngineOptions) -> int:
    """Most tokens of one request of vLLM: a history, and candidates behind a mark."""
    most = micro_batch(config, options)
    return config.max_seq_len + most + (most > 0)


def engine_arguments(checkpoint: str | pathlib.Path, options: EngineOptions) -> dict:
    """What vLLM's engine arguments, of its plain or asynchronous engine, must be for such a checkpoint. Registers the model."""
    from hstu_lab.vllm_plugin import candidates, register, seen_items, slates

    register()
    arguments = dataclasses.asdict(options)
    for own in ("micro_batch", "fused_slates", "cached_scores"):
        del arguments[own]
    ops, embeds = arguments.pop("ops"), arguments.pop("prompt_embeds")
    most, graphs = min(arguments.pop("graph_tokens"), options.max_num_batched_tokens), arguments.pop("cuda_graphs")
    sizes = graph_sizes(most if graphs == "FULL" else options.max_num_seqs)
    return arguments | {
        "model": str(checkpoint), "skip_tokenizer_init": True, "max_logprobs": -1, "logprobs_mode": "processed_logprobs",
        "max_model_len": room(load_config(checkpoint), options),
        "logits_processors": [seen_items.SeenItems, candidates.TaskScores, slates.SlateRows],
        "worker_cls": "hstu_lab.vllm_plugin.worker.RecommendationWorker",
        "additional_config": {"ops": ops}, "enable_prompt_embeds": embeds,
        "compilation_config": {
            "mode": 0, "cudagraph_mode": graphs, **({} if graphs == "NONE" else {"cudagraph_capture_sizes": sizes}),
        },
        "disable_log_stats": True, "use_tqdm_on_load": False, "seed": 0,
    }  # fmt: skip


class Engine:
    """vLLM serving one checkpoint folder.

    A prompt is packed tokens (list of int), or a float32 tensor (tokens, d_model + 5) made by
    `hstu_lab.vllm_plugin.modeling.attach_token`; one engine takes both. Raises EngineError where vLLM is missing.
    """

    def __init__(self, checkpoint: str | pathlib.Path, options: EngineOptions | None = None):
        options = options or EngineOptions()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm.platforms import current_platform

            memory = {} if current_platform.is_cpu() else {"gpu_memory_utilization": 0.05}  # of which the cache is not part
            # vLLM compiles two tiny sampling functions with Inductor: seconds of a first request, and a C++ compiler.
            current_platform.simple_compile_backend = "eager"
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            from hstu_lab.vllm_plugin import candidates
            from hstu_lab.vllm_plugin.seen_items import SeenItems
        except ImportError as error:
            raise EngineError(f"vllm is not installed ({error}); run `make setup`, or `pip install vllm` with a GPU") from error
        self.config = load_config(checkpoint)
        self.micro_batch = micro_batch(self.config, options)
        self._check_seen = SeenItems.validate_params
        self._last_token = self.config.token_limit + self.config.num_items + candidates.MARKS
        self.in_process = options.tensor_parallel_size == 1
        self._fused = options.fused_slates and options.tensor_parallel_size == 1
        self._room = room(self.config, options)
        self._step_tokens = self._room if options.enable_chunked_prefill else options.max_num_batched_tokens
        # vLLM wants a stdout with a file number; Jupyter's has none.
        global _open_engines
        with _STEP, contextlib.redirect_stdout(sys.__stdout__), _quiet():
            self.engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(checkpoint, options), **memory))
            _open_engines += 1
            self.engine.collective_rpc("use_recommendation_sampler", args=(loop_sizes(options),))
            self.cached_scores = None
            if options.cached_scores and options.enable_prefix_caching and self.in_process and self.micro_batch:
                from hstu_lab.vllm_plugin.cached_scores import CachedScores

                self.cached_scores = CachedScores(self.engine.engine_core.engine_core, self.micro_batch)
                if options.cuda_graphs != "NONE":
                    self.cached_scores.capture()
        self._ids = itertools.count()
        self._wake = threading.Condition()
        self._incoming: list[_Waiting] = []
        self._waiting: dict[str, _Waiting] = {}
        self._scoring: dict[str, _Waiting] = {}
        self._to_score: collections.deque[_Waiting] = collections.deque()
        self._begun: tuple[list[_Waiting], Launched] | None = None
        self._aborted: set[str] = set()
        self._turns = threading.Lock()
        self._closed = self._held = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)
        self._thread.start()

    # ---- requests

    def topk(self, prompts: list, seen: list[list[int]], k: int) -> list[Generated]:
        """The k best next items of each prompt, best first, ties by lower id; items in `seen` excluded."""
        return self._collect([self.submit_topk(p, s, k) for p, s in zip(prompts, seen, strict=True)])

    def slate(self, prompts: list, seen: list[list[int]], n: int) -> list[Generated]:
        """n items of each prompt, generated greedily one after another, none of them in `seen`."""
        return self._collect([self.submit_slate(p, s, n) for p, s in zip(prompts, seen, strict=True)])

    def submit_topk(self, prompt, seen: list[int], k: int) -> concurrent.futures.Future[Generated]:
        """A future of what `topk` gives for one prompt; fewer where the catalog has fewer. EngineError where k is below 1."""
        if k < 1:
            raise EngineError(f"k is {k}: ask for one item at least")
        k = min(k, self.config.num_items)
        return self._submit(prompt, seen, 1, k, functools.partial(_best, count=k))

    def submit_slate(self, prompt, seen: list[int], n: int) -> concurrent.futures.Future[Generated]:
        size = self.config.slate_size
        fits = len(prompt) + size <= min(self.config.max_seq_len + 1, self._room - 1, self._step_tokens)
        if not (self._fused and fits and 0 < n <= size) or isinstance(prompt, Tensor):
            return self.submit_steps(prompt, seen, n)
        from hstu_lab.vllm_plugin import slates

        number = next(self._ids)
        params = self._params(1, size - 1, slate=len(prompt), seen=self._missing(prompt, seen))
        return self._enqueue(number, slates.prompt(prompt, number, self.config), params, functools.partial(_slate, count=n))

    def submit_steps(self, prompt, seen: list[int], n: int) -> concurrent.futures.Future[Generated]:
        """`submit_slate` with one step of the engine an item, whatever the options say."""
        return self._submit(prompt, seen, n, 0, _slate_of_steps)

    def score(self, prompts: list[list[int]], candidates: list[list[int]]) -> list[Tensor]:
        """Task probabilities (C, 3) of each prompt's candidate items; only what is not cached of the prompt is computed."""
        return self._collect([self.submit_score(p, c) for p, c in zip(prompts, candidates, strict=True)])

    def cached_score_totals(self) -> dict[str, int]:
        """What was scored beside vLLM's scheduler, and so is in none of vLLM's metrics: requests, candidates, cached_tokens and
        tail_tokens; empty where everything is vLLM's."""
        return {} if self.cached_scores is None else dict(self.cached_scores.totals)

    def submit_score(self, prompt: list[int], candidates: Sequence[int]) -> concurrent.futures.Future[Tensor]:
        """Probabilities (C, 3) of engagement, retention and monetization for items (table rows) after the prompt (tokens).

        Raises EngineError for what is no item, for a prompt that is no list of tokens, and where a step has no room.
        """
        items = np.asarray(candidates)
        if len(items) and not self.micro_batch:
            raise EngineError("no candidate fits into a step: raise max_num_batched_tokens, or enable_chunked_prefill")
        known = not len(items) or (items.dtype.kind in "iu" and items.min() >= 0 and items.max() < self.config.num_items)
        if isinstance(prompt, Tensor) or items.ndim != 1 or not known:
            raise EngineError(f"candidates are table rows from 0 to {self.config.num_items - 1} after a prompt of tokens")
        size = self.micro_batch or 1
        return _joined([self._submit_part(prompt, items[i : i + size].astype(np.int32)) for i in range(0, len(items), size)])

    def _submit_part(self, prompt: list[int], items: np.ndarray) -> concurrent.futures.Future[Tensor]:
        read = functools.partial(_scores, count=len(items))
        return self._enqueue(next(self._ids), list(prompt), None, read, items)

    def _submit(self, prompt, seen, max_tokens: int, logprobs: int, read: Callable) -> concurrent.futures.Future[Generated]:
        room = self.config.max_seq_len - max_tokens + 1
        if len(prompt) > room:
            raise EngineError(f"vLLM refused the request: its prompt has {len(prompt)} tokens, at most {room} fit; shorten it")
        params = self._params(max_tokens, logprobs, seen=self._missing(prompt, seen))
        return self._enqueue(next(self._ids), prompt if isinstance(prompt, Tensor) else list(prompt), params, read)

    def _missing(self, prompt, seen: list[int]) -> list[int]:
        """Of the items seen, those that are not in the prompt: the engine masks these by itself."""
        return sorted(set(seen).difference(self._items(prompt))) if seen else []

    @staticmethod
    def _params(max_tokens: int, logprobs: int, **extra):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0, max_tokens=max_tokens, logprobs=logprobs, flat_logprobs=True, detokenize=False, ignore_eos=True,
            extra_args=extra, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True,
        )  # fmt: skip

    def _enqueue(
        self, number: int, prompt: list[int] | Tensor, params, read: Callable, candidates: np.ndarray | None = None
    ) -> concurrent.futures.Future:
        """A future of what `read` makes of vLLM's output."""
        waiting = _Waiting(number, prompt, params, read, concurrent.futures.Future(), candidates)
        with self._wake:
            if self._closed or self._failure:
                raise EngineError(f"the vLLM engine is not running ({self._failure or 'closed'}); make a new one")
            self._incoming.append(waiting)
            self._wake.notify()
        return waiting.future

    def _items(self, prompt) -> list[int]:
        if isinstance(prompt, Tensor):
            from hstu_lab.vllm_plugin.modeling import detach_token

            return detach_token(prompt)[2].tolist()
        base, items = self.config.user_token_base, self.config.num_items
        return [token % items for token in prompt if token < base]

    @staticmethod
    def _collect(futures: list[concurrent.futures.Future[Generated]]) -> list[Generated]:
        return [future.result() for future in futures]

    # ---- the loop

    def _run(self) -> None:
        while True:
            with self._wake:
                while not ((self._incoming or self._waiting or self._scoring or self._closed) and not self._held):
                    self._wake.wait()
                if self._closed:
                    break
            try:
                with self._turns:
                    self.turn()
            except Exception as error:  # the engine is gone: everybody who waits must hear of it
                with self._wake:
                    self._failure = error
                    left, self._incoming = self._incoming, []
                self._fail(left, f"the vLLM engine stopped: {error}")
                return
        self._fail(self._incoming, "the vLLM engine was closed before the request was answered")

    def _fail(self, incoming: list[_Waiting], why: str) -> None:
        for waiting in (*self._waiting.values(), *self._scoring.values(), *incoming):
            waiting.fail(why)
        self._waiting.clear(), self._scoring.clear()

    def turn(self) -> bool:
        """Begin a step for candidates, hand other new requests to vLLM for one of its steps, and answer what is finished; False
        when nobody waits."""
        with self._wake:
            incoming, self._incoming = self._incoming, []
            aborted, self._aborted = self._aborted, set()
        if gone := [request_id for request_id in aborted if self._waiting.pop(request_id, None)]:
            self.engine.engine_core.abort_requests(gone)
        for request_id in aborted:
            self._scoring.pop(request_id, None)
        for waiting in incoming:
            if waiting.request_id in aborted:
                continue
            if waiting.candidates is None or self.cached_scores is None:
                self._add(waiting)
            else:
                self._scoring[waiting.request_id] = waiting
                self._to_score.append(waiting)
        if not (self._waiting or self._scoring):
            return False
        begun = self._begin_scores()
        if self._waiting:
            self._step()
        if self._begun:
            self._answer_scores(*self._begun)
        self._begun = begun
        if begun and not (self._incoming or self._to_score):  # otherwise it runs while the next one is prepared
            self._begun = None
            self._answer_scores(*begun)
        return True

    def _begin_scores(self) -> tuple[list[_Waiting], Launched] | None:
        """Begin a step for candidates whose histories are cached; those of other histories become vLLM's."""
        scores, users, held = self.cached_scores, [], []
        while self._to_score and len(users) < scores.most_users:
            waiting = self._to_score.popleft()
            if waiting.request_id not in self._scoring:
                continue
            try:
                needs = scores.hold(waiting.prompt, waiting.candidates)
            except TypeError:  # the prompt is not made of numbers, as vLLM will say
                needs = None
            if needs is None:
                del self._scoring[waiting.request_id]
                self._add(waiting)
            else:
                users.append(waiting), held.append(needs)
        if not users:
            return None
        with _STEP:
            return users, scores.launch(held)

    def _answer_scores(self, users: list[_Waiting], launched: Launched) -> None:
        for waiting, chances in zip(users, launched.answers()):
            if self._scoring.pop(waiting.request_id, None):
                waiting.finish(chances)

    def _step(self) -> None:
        # The core itself: vLLM's front end, one request's lists of Python objects after another, costs as much as the step.
        with _STEP:
            outputs = self.engine.engine_core.get_output()
        metrics = None if self.engine.logger_manager is None else _Metrics(self.engine, outputs)
        for output in outputs.outputs:
            if (waiting := self._waiting.get(output.request_id)) is None:
                continue
            if metrics:
                metrics.note(output, waiting)
            if output.prefill_stats is not None:
                waiting.cached = output.prefill_stats.num_cached_tokens
            waiting.tokens += output.new_token_ids
            if output.new_logprobs is not None:
                waiting.best.append(output.new_logprobs[:2])
            if output.finished:
                del self._waiting[output.request_id]
                waiting.finish()
        if metrics:
            metrics.record()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the engine's own thread rests and the caller makes the turns."""
        with self._wake:
            self._held = True
        try:
            with self._turns:
                yield
        finally:
            with self._wake:
                self._held = False
                self._wake.notify()

    def _add(self, waiting: _Waiting) -> None:
        try:
            self.engine.engine_core.add_request(self._request(waiting))
        except Exception as error:  # whatever its type, it is about this request: the others go on
            waiting.fail(f"vLLM refused the request: {error}")
        else:
            self._waiting[waiting.request_id] = waiting

    def _request(self, waiting: _Waiting):
        """vLLM's form of the request, of which its own front end would check and copy much that is known here."""
        from vllm.v1.engine import EngineCoreRequest

        if waiting.candidates is not None:
            self._as_tokens(waiting)
        prompt, params = waiting.prompt, waiting.params
        if isinstance(prompt, Tensor):
            tasks = self.engine.get_supported_tasks()
            request = self.engine.input_processor.process_inputs(waiting.request_id, {"prompt_embeds": prompt}, params, tasks)
            request.external_req_id = waiting.request_id
            return request
        if not prompt:
            raise ValueError("the prompt is empty")
        self._check_seen(params)
        if min(prompt) < 0 or max(prompt) >= self._last_token:
            raise ValueError(f"tokens are from 0 to {self.config.token_limit - 1}")
        return EngineCoreRequest(
            waiting.request_id, prompt, None, params, None, waiting.arrival, None, None, None, external_req_id=waiting.request_id
        )

    def _as_tokens(self, waiting: _Waiting) -> None:
        from hstu_lab.vllm_plugin import candidates

        items = waiting.candidates.tolist()
        waiting.prompt = candidates.prompt(waiting.prompt, items, waiting.number, self.config)
        waiting.params = self._params(1, len(TASKS) * len(items) - 1, candidates=len(items))

    def abort(self, request_ids: set[str]) -> None:
        """Stop working on the requests that vLLM knows by these ids and free their blocks; their futures stay unanswered."""
        with self._wake:
            self._aborted |= request_ids

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; call it while no request is running."""
        self.engine.reset_prefix_cache()

    def close(self) -> None:
        """Stop the engine and free its memory. Requests that still wait get an EngineError."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify()
        self._thread.join()
        global _open_engines
        with _STEP:
            _open_engines -= 1
            if _open_engines:  # the process groups, which a whole shutdown frees, are every engine's
                core = self.engine.engine_core.engine_core
                core.model_executor.shutdown()
                core.scheduler.shutdown()
            else:
                self.engine.engine_core.shutdown()
            del self.engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclasses.dataclass
class _Waiting:
    """A request on its way: what vLLM said of it so far, and who waits for what `read` makes of it.

    `best` holds, for every token, the ids and log-probabilities that came with it, the token's own first. `candidates` (C,) are
    to be scored after the prompt, which has them as tokens once the request is vLLM's.
    """

    number: int
    prompt: list[int] | Tensor
    params: object
    read: Callable[[_Waiting], object]
    future: concurrent.futures.Future
    candidates: np.ndarray | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    best: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    cached: int = 0
    arrival: float = dataclasses.field(default_factory=time.time)
    stats: object = None

    @property
    def request_id(self) -> str:
        return f"request-{self.number}"

    def finish(self, answer: object = None) -> None:
        """Answer, by what vLLM said where nothing is given, unless whoever asked has cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.read(self) if answer is None else answer)
        except Exception as error:
            self.future.set_exception(EngineError(f"vLLM's answer cannot be read: {error!r}"))

    def fail(self, why: str) -> None:
        """An EngineError for whoever asked and has neither an answer nor cancelled."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(EngineError(why))


class _Metrics:
    """One step's part in vLLM's own metrics, which its front end would count."""

    def __init__(self, engine, outputs):
        from vllm.v1.metrics.stats import IterationStats

        self.engine, self.outputs, self.stats = engine, outputs, IterationStats()

    def note(self, output, waiting: _Waiting) -> None:
        from vllm.v1.metrics.stats import RequestStateStats

        lora = self.engine.output_processor.lora_states
        first = not waiting.tokens
        waiting.stats = waiting.stats or RequestStateStats(arrival_time=waiting.arrival)
        self.stats.update_from_output(output, self.outputs.timestamp, first, waiting.stats, lora, None)
        if output.finished:
            self.stats.update_from_finished_request(
                output.finish_reason, waiting.request_id, len(waiting.prompt), waiting.params.max_tokens, waiting.stats,
                waiting.cached,
            )  # fmt: skip

    def record(self) -> None:
        if self.outputs.scheduler_stats is not None:
            stats = self.stats if self.outputs.outputs else None
            self.engine.logger_manager.record(scheduler_stats=self.outputs.scheduler_stats, iteration_stats=stats)


def _best(answer: _Waiting, count: int) -> Generated:
    """The best items, best first, ties by lower id; the token that was sampled comes first and then again among them."""
    ids, scores = (rows[0][: count + 1] for rows in answer.best[0])
    ids, first = np.unique(ids, return_index=True)
    scores = scores[first]
    order = np.lexsort((ids, -scores))[:count]
    order = order[scores[order] > -np.inf]
    return Generated(ids[order].tolist(), scores[order].tolist(), answer.cached)


def _slate(answer: _Waiting, count: int) -> Generated:
    ids, scores = (rows[0][:count].tolist() for rows in answer.best[0])
    scores = list(itertools.takewhile(math.isfinite, scores))  # all seen: nothing is left
    return Generated(ids[: len(scores)], scores, answer.cached)


def _slate_of_steps(answer: _Waiting) -> Generated:
    scores = list(itertools.takewhile(math.isfinite, (float(scores[0, 0]) for _, scores in answer.best)))
    return Generated(answer.tokens[: len(scores)], scores, answer.cached)


def _scores(answer: _Waiting, count: int) -> Tensor:
    """Probabilities (count, 3) from the logits that `TaskScores` wrote."""
    scores = answer.best[0][1]
    return torch.from_numpy(scores[0][: count * len(TASKS)]).view(count, len(TASKS)).sigmoid()


def _joined(parts: list[concurrent.futures.Future[Tensor]]) -> concurrent.futures.Future[Tensor]:
    """One future of all parts' rows."""
    whole: concurrent.futures.Future[Tensor] = concurrent.futures.Future()
    left = itertools.count(1)

    def note(part: concurrent.futures.Future) -> None:
        if error := part.exception():
            if not whole.done():
                whole.set_exception(error)
        elif next(left) == len(parts) and whole.set_running_or_notify_cancel():
            whole.set_result(torch.cat([p.result() for p in parts]))

    for part in parts:
        part.add_done_callback(note)
    if not parts:
        whole.set_result(torch.empty(0, len(TASKS)))
    return whole

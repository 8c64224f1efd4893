"""The real vLLM engine behind two calls: `topk` (one pass, the best next items) and `slate` (one item after another).

One engine lives in this process and steps in a thread of its own; every caller, plain or async, adds requests to it, so
that concurrent requests share batches (continuous batching).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import math
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator

from torch import Tensor

from hstu_lab.model import load_config

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
    """How to run vLLM; see vLLM's engine arguments of the same names. kv_cache_memory_bytes sizes the paged cache."""

    kv_cache_memory_bytes: int = 256 << 20
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    dtype: str = "float32"
    ops: str = "reference"
    enforce_eager: bool = True


@dataclasses.dataclass(frozen=True)
class Generated:
    """What one request got. `items` in order; `logprobs` (log-softmax over unseen items) of each; `cached_tokens` were reused."""

    items: list[int]
    logprobs: list[float]
    cached_tokens: int


class Engine:
    """vLLM serving one checkpoint folder.

    A prompt is packed tokens (list of int), or a float32 tensor (tokens, d_model + 2) made by
    `hstu_lab.vllm_plugin.modeling.attach_levels`; one engine takes both. Raises EngineError where vLLM is missing.
    """

    def __init__(self, checkpoint: str | pathlib.Path, options: EngineOptions | None = None):
        options = options or EngineOptions()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm.platforms import current_platform

            if current_platform.is_cpu():
                # vLLM compiles two tiny sampling functions with Inductor: seconds of a first request, and a C++ compiler.
                current_platform.simple_compile_backend = "eager"
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
        except ImportError as error:
            raise EngineError(f"vllm is not installed ({error}); run `make setup`, or `pip install vllm` with a GPU") from error
        from hstu_lab.vllm_plugin import register
        from hstu_lab.vllm_plugin.seen_items import SeenItems

        register()
        self.config = load_config(checkpoint)
        arguments = dataclasses.asdict(options)
        arguments["additional_config"] = {"ops": arguments.pop("ops")}
        # vLLM wants a stdout with a file number; Jupyter's has none.
        global _open_engines
        with _STEP, contextlib.redirect_stdout(sys.__stdout__), _quiet():
            self.engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(checkpoint), skip_tokenizer_init=True, max_model_len=self.config.max_seq_len, max_logprobs=-1,
                    logprobs_mode="processed_logprobs", logits_processors=[SeenItems], enable_prompt_embeds=True,
                    disable_log_stats=True, use_tqdm_on_load=False, seed=0, **arguments,
                )
            )  # fmt: skip
            _open_engines += 1
        self._ids = itertools.count()
        self._wake = threading.Condition()
        self._incoming: list[tuple[str, dict, object, concurrent.futures.Future]] = []
        self._waiting: dict[str, concurrent.futures.Future] = {}
        self._aborted: set[str] = set()
        self._closed = False
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
        return self._submit(prompt, seen, max_tokens=1, logprobs=k, keep=k)

    def submit_slate(self, prompt, seen: list[int], n: int) -> concurrent.futures.Future[Generated]:
        return self._submit(prompt, seen, max_tokens=n, logprobs=0, keep=None)

    def _submit(self, prompt, seen, max_tokens: int, logprobs: int, keep: int | None) -> concurrent.futures.Future[Generated]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, logprobs=logprobs, flat_logprobs=True, detokenize=False, ignore_eos=True,
            extra_args={"seen": list(seen)}, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        body = {"prompt_embeds": prompt} if isinstance(prompt, Tensor) else {"prompt_token_ids": list(prompt)}
        outer: concurrent.futures.Future[Generated] = concurrent.futures.Future()
        inner: concurrent.futures.Future = concurrent.futures.Future()
        inner.add_done_callback(lambda done: _finish(done, outer, keep))
        with self._wake:
            if self._closed or self._failure:
                raise EngineError(f"the vLLM engine is not running ({self._failure or 'closed'}); make a new one")
            self._incoming.append((f"request-{next(self._ids)}", body, params, inner))
            self._wake.notify()
        return outer

    @staticmethod
    def _collect(futures: list[concurrent.futures.Future[Generated]]) -> list[Generated]:
        return [future.result() for future in futures]

    # ---- the loop

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._incoming or self._waiting or self._closed):
                    self._wake.wait()
                if self._closed:
                    break
                incoming, self._incoming = self._incoming, []
                aborted, self._aborted = self._aborted, set()
            try:
                incoming = [entry for entry in incoming if entry[0] not in aborted]
                if gone := [request_id for request_id in aborted if self._waiting.pop(request_id, None)]:
                    self.engine.abort_request(gone)
                if not (incoming or self._waiting):
                    continue
                for request_id, body, params, future in incoming:
                    self._add(request_id, body, params, future)
                with _STEP:
                    outputs = self.engine.step()
                for output in outputs:
                    if output.finished:
                        self._waiting.pop(output.request_id).set_result(output)
            except Exception as error:  # the engine is gone: everybody who waits must hear of it
                with self._wake:
                    self._failure = error
                    left, self._incoming = self._incoming, []
                for future in (*self._waiting.values(), *(entry[3] for entry in left)):
                    if not future.done():
                        future.set_exception(EngineError(f"the vLLM engine stopped: {error}"))
                self._waiting.clear()
                return
        for future in (*self._waiting.values(), *(entry[3] for entry in self._incoming)):
            future.set_exception(EngineError("the vLLM engine was closed before the request was answered"))

    def _add(self, request_id: str, body: dict, params, future: concurrent.futures.Future) -> None:
        try:
            self.engine.add_request(request_id, body, params)
        except Exception as error:  # whatever its type, it is about this request: the others go on
            future.set_exception(EngineError(f"vLLM refused the request: {error}"))
        else:
            self._waiting[request_id] = future

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


def _finish(done: concurrent.futures.Future, outer: concurrent.futures.Future, keep: int | None) -> None:
    if error := done.exception():
        outer.set_exception(error)
        return
    output = done.result()
    completion = output.outputs[0]
    flat = completion.logprobs
    if keep is None:
        starts = list(flat.start_indices)
        scores = list(itertools.takewhile(math.isfinite, (flat.logprobs[i] for i in starts)))  # all seen: nothing is left
        items = list(completion.token_ids)[: len(scores)]
    else:
        # The token that was sampled comes first and then again among the best: a dict keeps one of them.
        best = dict(zip(flat.token_ids[: keep + 1], flat.logprobs[: keep + 1]))
        ranked = sorted(((-score, item) for item, score in best.items() if score != -float("inf")))[:keep]
        items, scores = [item for _, item in ranked], [-score for score, _ in ranked]
    outer.set_result(Generated(items, scores, output.num_cached_tokens or 0))

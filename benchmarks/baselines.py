"""Every way to decode that is compared, sinkexport and its baselines: greedy, one stream.

Each decoder gets the same cache size in tokens, `capacity` C. Those that can, keep the first `sinks` of them forever.
Heavy imports are inside the classes, since each decoder runs in an environment of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Setup:
    """path: the model in the decoder's own format. threads: CPU threads."""

    path: str
    threads: int
    capacity: int
    sinks: int


class Decoder(Protocol):
    """Greedy decoding of one stream."""

    def prefill(self, ids: list[int], limit: int) -> int:
        """Start a stream with `ids`; the first new token. limit: tokens that the stream will have at most."""

    def step(self, token: int) -> int:
        """Feed `token`, the last one returned; the next one."""


class TimedDecoder(Protocol):
    """A decoder that generates by itself and records when each token came."""

    def prefill(self, ids: list[int], limit: int) -> int | None:
        """Start a stream as `Decoder` does; None: it does not report tokens."""

    def steps(self, count: int) -> list[float]:
        """Milliseconds of each of `count` steps, which start at the end of the prompt each time."""


class Sinkexport:
    """A bundle in sinkrt.Session."""

    def __init__(self, setup: Setup) -> None:
        import numpy as np
        from sinkrt import Session

        self._session = Session.load(setup.path, backend="ort", threads=setup.threads)
        self._ids = np.zeros(1, np.int64)  # [B=1]

    def prefill(self, ids: list[int], limit: int) -> int:  # noqa: ARG002 - endless anyway
        self._session.reset()
        return int(self._session.prefill(ids)[0].argmax())

    def step(self, token: int) -> int:
        self._ids[0] = token
        return int(self._session.step(self._ids)[0].argmax())


class SinkexportSteps(Sinkexport):
    """A bundle that takes its prompt token by token."""

    def prefill(self, ids: list[int], limit: int) -> int:  # noqa: ARG002
        self._session.reset()
        for token in ids:
            self._ids[0] = token
            logits = self._session.step(self._ids)
        return int(logits[0].argmax())


class Genai:
    """onnxruntime-genai's own generation loop."""

    def __init__(self, setup: Setup) -> None:
        import onnxruntime_genai as og

        config = og.Config(setup.path)
        options = {"intra_op_num_threads": setup.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._og, self._model = og, og.Model(config)
        self._generator: Any = None

    def prefill(self, ids: list[int], limit: int) -> int:
        params = self._og.GeneratorParams(self._model)
        # min_length keeps it going past an end-of-text token, as the others do.
        params.set_search_options(do_sample=False, max_length=limit, min_length=limit)
        self._generator = None  # frees the last stream's buffers first
        self._generator = self._og.Generator(self._model, params)
        self._generator.append_tokens(ids)
        return self._next()

    def step(self, _token: int) -> int:
        return self._next()  # it feeds its own last token

    def _next(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


class Transformers:
    """Hugging Face transformers, eager PyTorch with a dynamic cache."""

    def __init__(self, setup: Setup) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(setup.threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(
            setup.path, dtype=torch.float32, trust_remote_code=False
        ).eval()
        self._cache: Any = None

    def prefill(self, ids: list[int], limit: int) -> int:  # noqa: ARG002 - its cache grows as needed
        self._cache = None
        return self._run([ids])

    def step(self, token: int) -> int:
        return self._run([[token]])

    def _run(self, ids: list[list[int]], use_cache: bool = True) -> int:
        with self._torch.inference_mode():
            out = self._model(
                self._torch.tensor(ids), past_key_values=self._cache, use_cache=use_cache, logits_to_keep=1
            )
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


class Recompute(Transformers):
    """Sliding window with recomputation: a forward pass over the last C tokens for each new one.

    The baseline of StreamingLLM's paper that keeps its quality (arXiv:2309.17453).
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._capacity = setup.capacity
        self._ids: list[int] = []

    def prefill(self, ids: list[int], limit: int) -> int:  # noqa: ARG002
        self._ids = ids[-self._capacity :]
        return self._run([self._ids], use_cache=False)

    def step(self, token: int) -> int:
        self._ids = [*self._ids, token][-self._capacity :]
        return self._run([self._ids], use_cache=False)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, with context shift: how llama.cpp itself goes on past its context.

    When the cache is full, the older half of what follows the sinks is dropped. The kept keys are rotated back to their
    new positions in place. llama.cpp's server and command-line tool do the same.
    cache_type: ggml's number of the type of cached keys and values, 0 for F32.
    """

    BATCH = 512

    def __init__(self, setup: Setup, cache_type: int = 0, shift: int | None = None) -> None:
        import llama_cpp
        import numpy as np

        self._api, self._np = llama_cpp, np
        self._capacity, self._sinks, self._shift = setup.capacity, setup.sinks, shift
        self._model = llama_cpp.Llama(
            setup.path,
            n_ctx=setup.capacity,
            n_batch=self.BATCH,
            n_ubatch=self.BATCH,
            n_threads=setup.threads,
            n_threads_batch=setup.threads,
            type_k=cache_type,
            type_v=cache_type,
            flash_attn=False,  # its CPU kernel computes in half precision
            verbose=False,
        )
        self._memory = llama_cpp.llama_get_memory(self._model.ctx)
        if not llama_cpp.llama_memory_can_shift(self._memory):
            raise SystemExit("llama.cpp cannot shift the cache of this model")

    def prefill(self, ids: list[int], limit: int) -> int:  # noqa: ARG002 - endless by shifting
        self._api.llama_memory_clear(self._memory, True)
        for start in range(0, len(ids), self.BATCH):
            self._feed(ids[start : start + self.BATCH])
        return int(self.logits().argmax())

    def step(self, token: int) -> int:
        self._feed([token])
        return int(self.logits().argmax())

    def logits(self) -> Any:
        """float32 [vocab] of the last token, valid until the next call."""
        pointer = self._api.llama_get_logits_ith(self._model.ctx, -1)
        return self._np.ctypeslib.as_array(pointer, shape=(self._model.n_vocab(),))

    def _feed(self, ids: list[int]) -> None:
        api = self._api
        tokens = (api.llama_token * len(ids))(*ids)
        make_room(api, self._memory, len(ids), self._capacity, self._sinks, self._shift)
        if code := api.llama_decode(self._model.ctx, api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode returned {code}")


def make_room(api: Any, memory: Any, count: int, capacity: int, sinks: int, shift: int | None) -> None:
    """Forget tokens after the sinks until `count` more fit; positions close the gap.

    api: llama.cpp's functions on `memory`. shift: tokens to forget at a time; None: half of what follows the sinks.
    """
    while (used := api.llama_memory_seq_pos_max(memory, 0) + 1) + count > capacity:
        forget = (used - sinks) // 2 if shift is None else shift
        api.llama_memory_seq_rm(memory, 0, sinks, sinks + forget)
        api.llama_memory_seq_add(memory, 0, sinks + forget, used, -forget)


class XLlamaCpp:
    """llama.cpp as the wheel xllamacpp has it: its server loop in this process, everything at its defaults.

    Times of steps are those that the server reports, so handing tokens over is not part of them.
    """

    SPARE = 64
    """Tokens of context beyond the others', since the server stops before its context is full."""

    def __init__(self, setup: Setup) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = setup.path
        settings.n_ctx, settings.n_parallel, settings.n_keep = setup.capacity + self.SPARE, 1, setup.sinks
        settings.fit_params, settings.verbosity = False, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = setup.threads
        self._server = xllamacpp.Server(settings)
        self._ids: list[int] = []

    def prefill(self, ids: list[int], limit: int) -> None:  # noqa: ARG002 - its context is given beforehand
        self._ids = ids
        self._generate(1, cache_prompt=False)

    def steps(self, count: int) -> list[float]:
        ends_ms = [each["predicted_ms"] for each in self._generate(1 + count, cache_prompt=True)]
        return [end - start for start, end in itertools.pairwise(ends_ms)][:count]

    def _generate(self, count: int, *, cache_prompt: bool) -> list[dict[str, float]]:
        """What the server says of each of `count` tokens. cache_prompt: read the last token of the prompt alone."""
        timings: dict[int, dict[str, float]] = {}
        request = {"prompt": self._ids, "n_predict": count, "stream": True, "timings_per_token": True}
        greedy = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}

        def on_chunk(chunk: dict[str, Any]) -> bool:
            if "timings" in chunk:
                timings.setdefault(chunk["timings"]["predicted_n"], chunk["timings"])
            return False  # go on

        self._server.handle_completions({**request, **greedy, "cache_prompt": cache_prompt}, on_chunk)
        if sorted(timings) != list(range(1, count + 1)):
            raise RuntimeError(f"llama.cpp reported tokens {sorted(timings)} of {count}")
        if timings[1]["prompt_n"] != (1 if cache_prompt else len(self._ids)):
            raise RuntimeError(f"llama.cpp read {timings[1]['prompt_n']} tokens of the prompt")
        return [timings[number] for number in range(1, count + 1)]


class OpenVino:
    """OpenVINO GenAI from its wheel, everything at its defaults: it keeps prefixes, and an INT8 cache.

    It reads GGUF files. Times of steps are those that it reports, so handing tokens over is not part of them.
    """

    def __init__(self, setup: Setup) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        self._np, self._tensor, self._api = np, openvino.Tensor, openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(setup.path, "CPU", INFERENCE_NUM_THREADS=setup.threads)
        self._ids: list[int] = []

    def prefill(self, ids: list[int], limit: int) -> int:  # noqa: ARG002 - its cache grows as needed
        self._ids = ids
        return int(self._generate(1).tokens[0][0])

    def steps(self, count: int) -> list[float]:
        ends_ms = self._generate(1 + count).perf_metrics.raw_metrics.m_new_token_times
        return [end - start for start, end in itertools.pairwise(ends_ms)]

    def _generate(self, count: int) -> Any:
        config = self._api.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample = True, False
        return self._pipeline.generate(self._tensor(self._np.array([self._ids], self._np.int64)), config)


DECODERS: dict[str, type[Any]] = {
    "sinkexport": Sinkexport,
    "sinkexport-steps": SinkexportSteps,
    "genai": Genai,
    "transformers": Transformers,
    "recompute": Recompute,
    "llamacpp": LlamaCpp,
    "xllamacpp": XLlamaCpp,
    "openvino": OpenVino,
}

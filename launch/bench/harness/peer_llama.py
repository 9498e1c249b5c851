"""llama.cpp through the package `llama-cpp-python`: its own steps, called as its own tools call them."""

import ctypes
import importlib
import time
from typing import Any

import numpy as np

_BATCH, _UBATCH = 2048, 512  # tokens of a call, and of what is computed at once: llama.cpp's defaults


class LlamaCpp:
    """A GGUF file in memory, mapped as llama.cpp does by default.

    Args:
        path: of the file; vocabulary: of the model.
        threads: of decode and of prefill.
        sequences, context: most sequences at once, and tokens of each.
        cache: type of keys and values: "float32", "float16" or "bfloat16".
    """

    def __init__(self, path: str, vocabulary: int, threads: int, sequences: int, context: int, cache: str) -> None:
        llama_cpp: Any = importlib.import_module("llama_cpp.llama_cpp")
        self._api = llama_cpp
        quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._quiet = quiet  # kept as long as it may be called
        llama_cpp.llama_log_set(quiet, None)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it; use another version of it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = sequences * _whole(context), _BATCH, _UBATCH
        params.n_seq_max, params.n_threads, params.n_threads_batch = sequences, threads, threads
        params.kv_unified, params.no_perf = False, True
        params.type_k = params.type_v = {"float32": 0, "float16": 1, "bfloat16": 30}[cache]
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"{path}: llama.cpp cannot make a context of {params.n_ctx} tokens with a {cache} cache")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary, self._sequences = vocabulary, sequences
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._rng = np.random.default_rng(0)
        self._used = 0

    def prefill(self, tokens: int) -> float:
        """Seconds of one prompt. All logits are asked for: else the last layer's experts are computed for one token only."""
        self._api.llama_memory_clear(self._memory, True)
        self._used = 0
        begin = time.perf_counter()
        self._feed(tokens)
        return time.perf_counter() - begin

    def decode(self, batch: int, used: int, steps: int) -> list[float]:
        """Seconds of each step with one random token for each of `batch` sequences of `used` tokens."""
        if used != self._used:
            self.prefill(used - 1)
            for sequence in range(1, self._sequences):
                self._api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
            self._used = used
        for sequence in range(self._sequences):
            self._api.llama_memory_seq_rm(self._memory, sequence, used - 1, -1)
        seconds = []
        for step in range(steps):
            rows = [(used - 1 + step, sequence) for sequence in range(batch)]
            begin = time.perf_counter()
            self._call(rows)
            logits = self._api.llama_get_logits(self._context)
            np.ctypeslib.as_array(logits, shape=(batch, self._vocabulary)).argmax(1)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def _feed(self, tokens: int) -> None:
        for start in range(0, tokens, _BATCH):
            self._call([(position, 0) for position in range(start, min(tokens, start + _BATCH))])
        self._api.llama_synchronize(self._context)

    def _call(self, rows: list[tuple[int, int]]) -> None:
        """One call: (position, sequence) of each token."""
        batch = self._batch
        batch.n_tokens = len(rows)
        tokens = self._rng.integers(0, self._vocabulary, len(rows)).tolist()
        for i, (position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = tokens[i], position, 1, 1
            batch.seq_id[i][0] = sequence
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code} for {len(rows)} tokens")


def _whole(context: int) -> int:
    return -(-context // 256) * 256

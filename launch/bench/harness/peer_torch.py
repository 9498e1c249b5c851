"""transformers on torch as a peer: its own model classes with random weights, on the CPU."""

import copy
import importlib
import time
from typing import Any


class Transformers:
    """A model of transformers with random weights.

    Args:
        fields: the model's `config.json`.
        kind: "float32" or "bfloat16".
        threads: of torch.
    """

    def __init__(self, fields: dict[str, Any], kind: str, threads: int) -> None:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        self._torch = torch
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        given = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
        config = transformers.AutoConfig.for_model(fields["model_type"], **given)
        torch.set_default_dtype(getattr(torch, kind))
        self._model = transformers.AutoModelForCausalLM.from_config(config).eval()
        # As large as in trained models, so that sequences that share their prompt call experts of their own (peer_gguf).
        torch.nn.init.normal_(self._model.get_input_embeddings().weight)
        self._vocabulary = config.vocab_size
        self._kept: tuple[int, Any] = (0, None)

    def prefill(self, tokens: int) -> float:
        """Seconds of one prompt, logits of its last token."""
        begin = time.perf_counter()
        self._run(1, tokens, None)
        return time.perf_counter() - begin

    def decode(self, batch: int, used: int, steps: int) -> list[float]:
        """Seconds of each step with one random token for each of `batch` sequences of `used` tokens."""
        if self._kept[0] != used:
            self._kept = (used, self._run(1, used - 1, None))
        cache = copy.deepcopy(self._kept[1])
        cache.batch_repeat_interleave(batch)
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            cache = self._run(batch, 1, cache)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def _run(self, batch: int, tokens: int, cache: Any) -> Any:
        torch = self._torch
        ids = torch.randint(0, self._vocabulary, (batch, tokens))
        with torch.inference_mode():
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            out.logits[:, -1].argmax(-1).tolist()
        return out.past_key_values

"""Other engines, timed the same way: `python -m fallow.measure.baselines NAME SOURCE THREADS`.

Reads JSON lines on stdin: first {"ids", "prompt_tokens"}, then {"run"} for each run. Answers each
with one JSON line. Meant to be started by `fallow bench`.
"""

import json
import os
import sys
import time
from typing import Any

BATCH = 512  # tokens of a prompt that are read at once


class Fed:
    """An engine that is fed the very ids that ours gets."""

    def clear(self) -> None:
        """Forgets what was read."""
        raise NotImplementedError

    def read(self, ids: list[int], position: int) -> None:
        """Reads more tokens, from a position on."""
        raise NotImplementedError

    def run(self, ids: list[int], prompt: int) -> dict[str, float]:
        self.clear()
        start = time.perf_counter()
        self.read(ids[:prompt], 0)
        middle = time.perf_counter()
        for position in range(prompt, len(ids)):
            self.read(ids[position : position + 1], position)
        end = time.perf_counter()
        return {
            "prefill_tps": prompt / (middle - start),
            "decode_tps": (len(ids) - prompt) / (end - middle),
        }


class LlamaCpp(Fed):
    """llama-cpp-python."""

    def __init__(self, source: str, threads: int, n_tokens: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            source,
            n_ctx=n_tokens,
            n_batch=BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def clear(self) -> None:
        self.model.reset()

    def read(self, ids: list[int], position: int) -> None:
        self.model.eval(ids)


class LlamaCppFallow(LlamaCpp):
    """The same with our plugin; the plan is the file that FALLOW_PLAN names, if any."""

    def __init__(self, source: str, threads: int, n_tokens: int) -> None:
        import fallow.llama_cpp

        fallow.llama_cpp.load(os.environ.get("FALLOW_PLAN"))
        super().__init__(source, threads, n_tokens)


class IkLlamaCpp(Fed):
    """ik-llama-cpp-python; its own library, or the one that IK_LLAMA_CPP_LIB_PATH names."""

    repack = False  # weights laid out anew as they are loaded

    def __init__(self, source: str, threads: int, n_tokens: int) -> None:
        from ik_llama_cpp import _ctypes_api as api

        self.api = api
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.repack_tensors, params.use_mmap = self.repack, not self.repack
        self.model = api.llama_model_load_from_file(source.encode(), params)
        if not self.model:
            raise RuntimeError(f"ik_llama.cpp cannot load {source}")
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = max(n_tokens, BATCH), BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"ik_llama.cpp makes no context for {source}")

    def clear(self) -> None:
        self.api.llama_kv_cache_clear(self.context)

    def read(self, ids: list[int], position: int) -> None:
        import ctypes

        for first in range(0, len(ids), BATCH):
            some = ids[first : first + BATCH]
            tokens = (self.api.llama_token * len(some))(*some)
            batch = self.api.llama_batch(
                n_tokens=len(some),
                token=ctypes.cast(tokens, ctypes.POINTER(self.api.llama_token)),
                all_pos_0=position + first,
                all_pos_1=1,
                all_seq_id=0,
            )
            if self.api.llama_decode(self.context, batch):
                raise RuntimeError("ik_llama.cpp cannot decode")


class IkRepacked(IkLlamaCpp):
    """The same with run-time repacking, its fastest decode."""

    repack = True


class OpenVino:
    """OpenVINO GenAI, which reads llama and qwen GGUF files and generates freely."""

    def __init__(self, source: str, threads: int, n_tokens: int) -> None:
        import openvino_genai

        self.genai = openvino_genai
        # By default it would keep the prompt's cache from one run to the next.
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        self.pipeline = openvino_genai.LLMPipeline(
            source, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads
        )

    def run(self, ids: list[int], prompt: int) -> dict[str, float]:
        import numpy as np
        import openvino

        tensor = openvino.Tensor(np.array([ids[:prompt]], dtype=np.int64))
        new = len(ids) - prompt
        config = self.genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        metrics = self.pipeline.generate(tensor, config).perf_metrics
        ttft = metrics.get_ttft().mean / 1e3
        return {
            "prefill_tps": prompt / ttft,
            "decode_tps": 1e3 / metrics.get_tpot().mean,
        }


ENGINES: dict[str, Any] = {
    "llama.cpp": LlamaCpp,
    "llama.cpp+fallow": LlamaCppFallow,
    "ik_llama.cpp": IkLlamaCpp,
    "ik_llama.cpp-rtr": IkRepacked,
    "openvino": OpenVino,
}


def main() -> None:
    name, source, threads = sys.argv[1:4]
    engine = ids = prompt = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if engine is None:
                ids, prompt = message["ids"], message["prompt_tokens"]
                engine = ENGINES[name](source, int(threads), len(ids))
                engine.run(ids, prompt)  # warm-up
                answer: dict[str, Any] = {"ready": True}
            else:
                answer = engine.run(ids, prompt)
        except Exception as error:  # any failure of a foreign engine goes to the parent as a line
            lines = str(error).strip().split("\n")
            answer = {"error": lines[-1].strip()[:300] or type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""Other engines, timed the same way: `python -m fallow.measure.baselines NAME SOURCE THREADS`.

Reads JSON lines on stdin: first {"ids", "prompt_tokens"}, then {"run"} for each run. Answers each
with one JSON line. Meant to be started by `fallow bench`.
"""

import json
import sys
import time
from typing import Any


class LlamaCpp:
    """llama-cpp-python, fed the very ids that our engine gets."""

    def __init__(self, source: str, threads: int, n_tokens: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            source,
            n_ctx=n_tokens,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def run(self, ids: list[int], prompt: int) -> dict[str, float]:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(ids[:prompt])
        middle = time.perf_counter()
        for token in ids[prompt:]:
            self.model.eval([token])
        end = time.perf_counter()
        return {
            "prefill_tps": prompt / (middle - start),
            "decode_tps": (len(ids) - prompt) / (end - middle),
        }


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


ENGINES: dict[str, Any] = {"llama.cpp": LlamaCpp, "openvino": OpenVino}


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

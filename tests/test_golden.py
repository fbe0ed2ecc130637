"""Token ids and perplexity on a page of real text, against transformers; no data from elsewhere."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import fallow
from conftest import SAMPLE, make_folder
from fallow.checkpoints.text import Text
from fallow.engine.engine import Engine
from fallow.measure.quality import evaluate_engine
from fallow.packing.packer import pack

CONTEXT, WINDOWS, NEW = 64, 8, 24


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_a_page_is_read_as_transformers_does(name: str, tmp_path: Path) -> None:
    """transformers' own loading, tokenizer and generation; none of fallow's reference."""
    folder = make_folder(name, tmp_path / "model")
    pack(folder, tmp_path / "packed.gguf", quant="f32")
    engine = Engine(tmp_path / "packed.gguf", context=128)
    module = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    content = SAMPLE.read_text(encoding="utf-8")
    ids = np.array(tokenizer(content, add_special_tokens=False)["input_ids"])
    np.testing.assert_array_equal(engine.tokenizer.encode(content), ids)

    prompt = engine.tokenizer.prompt(content[:60])
    with torch.inference_mode():
        whole = module.generate(
            torch.from_numpy(prompt)[None], max_new_tokens=NEW, do_sample=False, pad_token_id=1
        )
        windows = torch.from_numpy(engine.windows(Text("page", content), CONTEXT, WINDOWS))
        logits = module(windows).logits[:, :-1].double()
    said: list[int] = []
    while len(said) < NEW and (not said or said[-1] != 1):
        last = engine.forward(prompt if not said else [said[-1]])[-1]
        said.append(int(last.argmax()))
    assert len(said) > 4
    assert said == whole[0, len(prompt) :].tolist()

    picked = logits.log_softmax(-1).gather(2, windows[:, 1:, None])
    found = evaluate_engine(engine, None, SAMPLE, context=CONTEXT, windows=WINDOWS)
    assert found.ppl == pytest.approx(math.exp(-picked.mean()), rel=1e-3)


def test_tokens_of_smollm2(smollm2: fallow.Model) -> None:
    assert (
        len(smollm2.tokenizer.encode(SAMPLE.read_text(encoding="utf-8"))) == 698
    )  # transformers' too

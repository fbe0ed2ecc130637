"""Qwen3.5 (text). SwiGLU; three of four layers have a gated delta net in attention's place."""

from typing import Any

from fallow.models._base import Architecture


def _computes(name: str, value: Any) -> bool:
    # Positions of a text are the same in all three of a picture's dimensions.
    is_of_pictures = name in ("mrope_section", "mrope_interleaved")
    return is_of_pictures or (name == "layer_types" and value == "linear_attention")


ARCHITECTURE = Architecture(
    model_type="qwen3_5_text",
    hf_class="Qwen3_5ForCausalLM",
    attention=(),  # the two kinds of layers have no projection in common
    partial_rotary=True,
    computes=_computes,
    check=lambda config: "gated delta nets and gates of attention's output",
    gguf_name="qwen35",
)

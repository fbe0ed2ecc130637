"""Bamboo and TurboSparse-Mistral. A Mistral with dReLU: most neurons are exactly zero."""

from fallow.models._base import Architecture

# Files of TurboSparse have predictors that guess what dReLU makes zero. Here that is computed.
ARCHITECTURE = Architecture(
    model_type="bamboo",
    hf_class="MistralForCausalLM",
    settings={"hidden_act": "drelu"},
    left_out="mlp.predictor.",
)

"""Models of pictures and text, of which the text model is read: where config and files have it."""

from typing import Any

from fallow.common.errors import FallowError

# transformers' config classes, by model_type.
_CONFIGS = {
    "gemma3": "Gemma3Config",
    "gemma3n": "Gemma3nConfig",
    "gemma4": "Gemma4Config",
    "mistral3": "Mistral3Config",
    "qwen3_5": "Qwen3_5Config",
}
# How names of the text model's weights begin in a folder, of an older or a newer layout, and by
# themselves.
TEXT_NAMES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


def config_class(config: dict[str, Any]) -> Any:
    """transformers' of a model with more than text; None: a text model's config.json."""
    import transformers

    model_type = config.get("model_type")
    name = _CONFIGS.get(model_type) if isinstance(model_type, str) else None
    return None if name is None else getattr(transformers, name)


def text_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """What a config.json says of the text model.

    Raises:
        FallowError: it says nothing of one.
    """
    if (found := config_class(config)) is None:
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise FallowError(f"{where} has no text_config; download it again")
    default = found.sub_configs_defaults["text_config"].model_type
    # Whether the head is the embedding is said of the whole model.
    tied = config.get("tie_word_embeddings", found().tie_word_embeddings)
    return {"model_type": default} | text | {"tie_word_embeddings": tied}


def text_name(name: str) -> str | None:
    """What the text model calls a tensor of a model with more than text; None: it has none."""
    for stored, own in TEXT_NAMES.items():
        if name.startswith(stored):
            return own + name.removeprefix(stored)
    return None

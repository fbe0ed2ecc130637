"""An OpenAI-compatible server of one packed model: `fallow serve`."""

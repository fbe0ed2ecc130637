"""How sparse a model becomes: curves of the activation ratio, laws fitted to them, and training."""

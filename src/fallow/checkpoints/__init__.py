"""What is read of a model: weights, tokenizer, chat template; and the texts it is given."""

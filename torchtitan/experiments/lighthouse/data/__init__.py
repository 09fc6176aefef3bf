"""What is trained on: text datasets and the tokenizer."""

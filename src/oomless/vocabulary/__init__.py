"""Tokens that a tokenizer is taught: found in the text of the run, put into its model, with rows made of their pieces."""

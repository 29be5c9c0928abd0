"""The artifact: one file with a compiled model, its weights, its tokenizer, and a manifest that vouches for them."""

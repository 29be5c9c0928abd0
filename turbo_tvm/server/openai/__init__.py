"""The OpenAI API: embeddings and models."""

"""Models: the catalog, pulling, converting, tokenizers and chat templates."""

"""LLMs: one interface, several engines, a cache and a meter around any of them."""

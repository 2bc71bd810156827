"""Pretrained and new models: loading them, and taking their KV. The only room that touches transformers' insides."""

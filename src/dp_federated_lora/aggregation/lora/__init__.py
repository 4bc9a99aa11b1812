"""Federated LoRA methods."""

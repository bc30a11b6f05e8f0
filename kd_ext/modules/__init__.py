"""Tensors only: nothing here knows fairseq's configurations, registries or trainer."""

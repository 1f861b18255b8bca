"""Optimizers over parameters: what happens between a gradient and a weight."""

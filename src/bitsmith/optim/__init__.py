"""Optimizers that do without gradients in float: integer ones, which move codes inside the backward pass,
and a forward-only one, which needs no backward pass. They are imported by their files."""

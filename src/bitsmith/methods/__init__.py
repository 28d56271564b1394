"""Methods look into training through five hooks. One file a method; none imports another."""

from bitsmith.methods.method import Method

__all__ = ["Method"]

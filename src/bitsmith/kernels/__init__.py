"""Integer products on a CPU: a small library in C for each instruction set, and the same integers by torch.

`choose.best()` says which of the two runs here; both have the methods of `backend.Backend`.
"""

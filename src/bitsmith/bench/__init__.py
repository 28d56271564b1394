"""What a model costs on this machine: speed and memory, measured."""
